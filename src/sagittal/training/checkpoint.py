"""Checkpoints: one safetensors file with weights, optimiser state and progress; atomic, hashed, no pickle.

A run folder holds `checkpoint_00000120.safetensors` and beside it `.sha256`, written in this order, so that a kill at
any moment leaves either a checkpoint that verifies or one that is passed over. The last two are kept.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from sagittal.errors import TrainingError
from sagittal.plan.base import Frozen, write_atomically
from sagittal.training.schedules import Shortening
from sagittal.training.standing import Standing
from sagittal.training.state import TrainState

KEPT = 2


class Progress(Frozen):
    """How far a run has come; everything else that an exact resume needs is in the tensors or follows from the plan."""

    step: int
    """Finished optimiser steps."""
    plan_sha256: str
    elapsed_s: float
    """Training time so far, over all attempts."""
    shortening: Shortening | None = None
    standing: Standing = Standing()


def save_checkpoint(folder: Path, state: TrainState, progress: Progress) -> Path:
    """Write a checkpoint atomically and drop all but the last two.

    Raises:
        ResourceError: the disk is full or the folder is not writable; earlier checkpoints stay intact.
    """
    tensors = {f"network.{name}": value for name, value in state.network.state_dict().items()}
    if state.average is not None:
        tensors.update({f"average.{name}": value for name, value in state.average.network.state_dict().items()})
    for name, moments in _named_states(state.network, state.optimizer).items():
        tensors.update({f"optimizer.{key}.{name}": value for key, value in moments.items()})
    tensors["rng.torch"] = torch.get_rng_state()
    content = save(
        {name: value.detach().cpu().contiguous() for name, value in tensors.items()},
        metadata={"progress": progress.model_dump_json()},
    )
    path = write_atomically(folder / f"checkpoint_{progress.step:08d}.safetensors", content)
    write_atomically(_hash_file(path), hashlib.sha256(content).hexdigest().encode())
    for old in _checkpoints(folder)[KEPT:]:
        _hash_file(old).unlink(missing_ok=True)
        old.unlink(missing_ok=True)
    return path


def newest_checkpoint(folder: Path) -> tuple[Path, Progress] | None:
    """Return the newest checkpoint that verifies, and its progress; None where there is none."""
    for path in _checkpoints(folder):
        try:
            wanted = _hash_file(path).read_text()
            if hashlib.sha256(path.read_bytes()).hexdigest() != wanted:
                continue
            with safe_open(path, framework="pt") as file:
                return path, Progress.model_validate_json((file.metadata() or {}).get("progress", ""))
        except (OSError, SafetensorError, ValidationError):
            continue
    return None


def load_checkpoint(path: Path, state: TrainState, *, plan_sha256: str) -> None:
    """Restore weights, their mean, optimiser state and the random generator, in place.

    Raises:
        TrainingError: the checkpoint belongs to another plan.
    """
    with safe_open(path, framework="pt") as file:
        progress = Progress.model_validate_json((file.metadata() or {})["progress"])
        if progress.plan_sha256 != plan_sha256:
            raise TrainingError(
                f"{path}: belongs to another plan than the one given. Go on with the run's own plan.json, or remove "
                f"{path.parent} to start afresh.",
                code="checkpoint_mismatch",
            )
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - safe_open is no dict
    state.network.load_state_dict(_part(tensors, "network."))
    if state.average is not None:
        state.average.network.load_state_dict(_part(tensors, "average."))
    parameters = dict(state.network.named_parameters())
    for name, value in tensors.items():
        if not name.startswith("optimizer."):
            continue
        key, parameter = name.removeprefix("optimizer.").split(".", 1)
        target = parameters[parameter]
        moments = state.optimizer.state[target]
        # Adam keeps its step counter as a CPU scalar; moments take the memory format of their parameter.
        moments[key] = value if value.ndim == 0 else torch.empty_like(target).copy_(value)
    torch.set_rng_state(tensors["rng.torch"])


def _part(tensors: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def _named_states(network: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, dict[str, torch.Tensor]]:
    names: dict[torch.Tensor, str] = {parameter: name for name, parameter in network.named_parameters()}
    return {
        names[parameter]: {key: value for key, value in state.items() if isinstance(value, torch.Tensor)}
        for parameter, state in optimizer.state.items()
    }


def _checkpoints(folder: Path) -> list[Path]:
    return sorted(folder.glob("checkpoint_*.safetensors"), reverse=True)


def _hash_file(path: Path) -> Path:
    return path.with_suffix(".sha256")
