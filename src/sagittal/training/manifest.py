"""run.json: what a run was made of and where, one entry per attempt; and the part of it that a bundle may tell.

A run that is resumed appends an attempt, so that a change of machine or version between two of them stays visible.
"""

from __future__ import annotations

import json
import os
import platform
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch

import sagittal
from sagittal.errors import DataError, ResourceError
from sagittal.kernels import cpu_available
from sagittal.kernels.choice import kernels_mode, kernels_on
from sagittal.plan.base import write_atomically
from sagittal.plan.plan import Plan
from sagittal.plan.urls import words_without_secrets
from sagittal.training.run_folder import RUN_JSON


def remember_data(run_folder: Path, data_folder: Path, content: str, *, started: bool) -> None:
    """Write down which data the run is made of; refuse to go on where it changed.

    Args:
        run_folder: where run.json is.
        data_folder: the data set, for the message.
        content: hash over its files.
        started: whether the run has begun before; another one's attempts are dropped.

    Raises:
        DataError: the data set is not the one that the run began with.
    """
    path = run_folder / RUN_JSON
    stored = _read(path) if started else {}
    if stored.get("content_sha256", content) != content:
        raise DataError(
            f"{data_folder}: changed since the run in {run_folder} began, so it can't be continued exactly. "
            "Restore the data, or train into another --out.",
            code="data_changed",
        )
    _write(path, {"content_sha256": content, "attempts": stored.get("attempts", [])})


@contextmanager
def attempt(
    run_folder: Path, facts: Mapping[str, Any], folds: Sequence[str], *, started: str, write: bool
) -> Iterator[list[str]]:
    """Add an attempt to run.json, and to it how it ended; one that was killed has no end.

    Args:
        run_folder: where run.json is.
        facts: what `facts_of` returned.
        folds: which folds are to be trained.
        started: date and time, ISO 8601.
        write: False where another process of the run does it.

    Yields:
        A list to append the outcome to; an exception is noted by its type.
    """
    if not write:
        yield []
        return
    path = run_folder / RUN_JSON
    stored = _read(path)
    this: dict[str, Any] = {"started": started, "ended": None, "outcome": None}
    this |= {"command": words_without_secrets(sys.argv), "folds": list(folds), **facts}
    _write(path, {**stored, "attempts": [*stored.get("attempts", []), this]})
    begun = json.loads(json.dumps(this))
    outcome: list[str] = []
    try:
        yield outcome
    except BaseException as error:
        this.update(ended=now(), outcome=type(error).__name__)
        # On a disk that is full this fails as well, which may not hide what happened.
        with suppress(ResourceError):
            _end(path, begun, this)
        raise
    this.update(ended=now(), outcome=outcome[-1] if outcome else None)
    _end(path, begun, this)


def _end(path: Path, begun: Mapping[str, Any], ended: Mapping[str, Any]) -> None:
    """Write how an attempt ended, beside those of other folds that began meanwhile."""
    stored = _read(path)
    others = [attempt for attempt in stored.get("attempts", []) if attempt != begun]
    _write(path, {**stored, "attempts": [*others, ended]})


def now() -> str:
    """Return date and time, UTC, ISO 8601."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def facts_of(
    plan: Plan, plan_sha256: str, content_sha256: str, devices: Sequence[torch.device], *, processes: int
) -> dict[str, Any]:
    """Return everything that weights may depend on; it names no case, no path, no user and no machine.

    Args:
        plan, plan_sha256: what is trained by, and its hash.
        content_sha256: hash over the data set's files.
        devices: where.
        processes: how many train a network together.
    """
    return {
        "sagittal": _version("sagittal"),
        "git_commit": git_commit(Path(sagittal.__file__).resolve().parents[2]),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "numpy": np.__version__,
        "kernels": ", ".join(dict.fromkeys(kernels_on(device, on_cpu=cpu_available()) for device in devices)),
        "kernels_switch": kernels_mode(),
        "platform": f"{platform.system()} {platform.machine()}",
        "devices": [str(device) for device in devices],
        "device_names": [device_name(device) for device in devices],
        "threads": torch.get_num_threads(),
        "processes": processes,
        "precision": plan.training.precision,
        "deterministic": plan.training.deterministic,
        "seeds": {"training": plan.training.seed, "split": plan.training.split_seed},
        "plan_sha256": plan_sha256,
        "content_sha256": content_sha256,
    }


def device_name(device: torch.device) -> str:
    """Return what the maker calls a device."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type == "cpu" and sys.platform == "linux":
        # platform.processor() is empty on most Linux systems.
        for line in _text(Path("/proc/cpuinfo")).splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def git_commit(root: Path) -> str | None:
    """Return the commit that a checkout stands at, None where `root` is none; git itself is not needed."""
    folder = root / ".git"
    if folder.is_file():  # a worktree: the file says where its folder is
        folder = root / _text(folder).removeprefix("gitdir:").strip()
    head = _text(folder / "HEAD").strip()
    if not head.startswith("ref:"):
        return head or None
    name = head.removeprefix("ref:").strip()
    common = folder / (_text(folder / "commondir").strip() or ".")
    found = _text(folder / name).strip() or _text(common / name).strip()
    if found:
        return found
    packed = (line.split() for line in _text(common / "packed-refs").splitlines() if line[:1] not in "#^")
    return next((words[0] for words in packed if words[1:] == [name]), None)


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:  # run from a source tree that was never installed
        return "0+source"


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _read(path: Path) -> dict[str, Any]:
    text = _text(path)
    content: dict[str, Any] = json.loads(text) if text else {}
    return content


def _write(path: Path | os.PathLike[str], content: Mapping[str, Any]) -> None:
    write_atomically(Path(path), (json.dumps(content, indent=2) + "\n").encode())
