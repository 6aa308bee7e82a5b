"""What a run folder, OUT.run, tells of a run: how it ended or how far it is, and how it goes on. Read without torch."""

from __future__ import annotations

import json
import shlex
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sagittal.errors import DataError
from sagittal.plan.lock import alone
from sagittal.plan.plan import Plan
from sagittal.training.log import read_log

RUN_JSON = "run.json"
HANDED_OUT = "handed_out.json"
"""Written by what trains folds elsewhere without this process to wait for them: they may begin at any time."""
LOCK = ".bundle.lock"
SILENT_S = 600.0
"""A run that wrote nothing for so long, and no end either, was most likely killed."""
_OVER = ("finished", "shortened", "stale")
_STATES = {
    "finished": "finished",
    "shortened": "finished, shortened by the clock",
    "stale": "stopped early: no better validation",
    "interrupted": "interrupted",
    "terminated": "terminated",
}


def alone_with_bundle(folder: Path) -> AbstractContextManager[None]:
    """Return a block in which no other process changes the bundle beside a run folder.

    Folds may be trained by commands of their own that end at the same time, and each adds its own to what is there.
    """
    return alone(folder / LOCK)


@dataclass(frozen=True)
class FoldStanding:
    """How far a fold is, by its log.

    Attributes:
        name: `0` to `4`, or `none`.
        step, end: finished steps, and the last one as things stand.
        dice, dice_step: of the last validation on the way; None where there was none.
    """

    name: str
    step: int
    end: int
    dice: float | None
    dice_step: int | None


@dataclass(frozen=True)
class RunStanding:
    """How a run stands.

    Attributes:
        plan: what it trains by; None where it was stopped before it had one.
        state: in words.
        resumable: whether there is something to go on with.
        folds: those that have begun, by name.
        command: that goes on with it; empty where it was not begun from the command line.
    """

    plan: Plan | None
    state: str
    resumable: bool
    folds: tuple[FoldStanding, ...]
    command: str


def is_run_folder(path: Path) -> bool:
    """Whether a folder is that of a run."""
    return (path / RUN_JSON).is_file()


def read_run(folder: Path) -> RunStanding:
    """Read how a run stands.

    Raises:
        DataError: its run.json is damaged.
        PlanError: its plan.json is.
    """
    attempts = _attempts(folder / RUN_JSON)
    plan = Plan.read(folder / "plan.json") if (folder / "plan.json").is_file() else None
    begun = [path for path in sorted(folder.glob("fold_*")) if (path / "log.jsonl").is_file()]
    folds = () if plan is None else tuple(fold_standing(path, plan.schedule.steps) for path in begun)
    last = attempts[-1] if attempts else {}
    outcome = last.get("outcome")
    if not last:
        state = "prepared; training was not begun"
    elif last.get("ended") is None:
        state = _unended(folder)
    else:
        state = _STATES.get(str(outcome), f"failed ({outcome})")
    return RunStanding(plan, state, bool(last) and outcome not in _OVER, folds, _command(last))


def _attempts(path: Path) -> list[Mapping[str, Any]]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        attempts: list[Mapping[str, Any]] = content["attempts"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{path}: can't be read ({type(error).__name__}). Expected what 'sagittal train' writes. Look at the "
            "fold's progress.html instead.",
            code="run_json",
        ) from None
    return attempts


def _unended(folder: Path) -> str:
    """Return what may be said of a run that wrote no end: it goes on, or was killed."""
    logs = [path.stat().st_mtime for path in folder.glob("fold_*/log.jsonl")]
    silent_s = time.time() - max([*logs, (folder / RUN_JSON).stat().st_mtime])
    if silent_s < SILENT_S:
        return f"running, or killed a moment ago: last heard of {silent_s:.0f} s ago"
    return f"killed, or stuck: not heard of for {silent_s / 60:.0f} min"


def fold_standing(folder: Path, steps: int) -> FoldStanding:
    """Return how far a fold is, by the log in its folder; `steps` is what its plan says."""
    records = read_log(folder / "log.jsonl")
    validation = next((record for record in reversed(records) if record["kind"] == "validation"), None)
    shortened = next((record for record in reversed(records) if record["kind"] == "shortening"), None)
    return FoldStanding(
        name=folder.name.removeprefix("fold_"),
        step=max((int(record["step"]) for record in records), default=0),
        end=steps if shortened is None else int(shortened["end"]),
        dice=None if validation is None else float(validation["mean_dice"]),
        dice_step=None if validation is None else int(validation["step"]),
    )


def _command(attempt: Mapping[str, Any]) -> str:
    """Return the command of an attempt with --resume, as one types it."""
    words: Sequence[str] = attempt.get("command", [])
    if len(words) < 2 or words[1] != "train":
        return ""
    processes = int(attempt.get("processes", 1))
    program = "sagittal" if processes == 1 else f"torchrun (as before, {processes} processes) -m sagittal"
    return f"{program} {shlex.join([*(word for word in words[1:] if word != '--resume'), '--resume'])}"
