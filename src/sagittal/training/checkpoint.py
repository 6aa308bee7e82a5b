"""Checkpoints: one safetensors file with weights, optimiser state and progress; atomic, hashed, no pickle.

A run folder holds `checkpoint_00000120.safetensors` and beside it `.sha256`, written in this order, so that a kill at
any moment leaves either a checkpoint that verifies or one that is passed over. The last few are kept.

Where the best weights may become the result, `best_00000090.safetensors` holds those of a validation. Its step is in
its name, because a run that was killed goes on from before later validations: each checkpoint that is kept finds the
weights that were the best when it was written.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import ClassVar

import torch
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from sagittal.errors import ResourceError, TrainingError
from sagittal.plan.base import Frozen, write_atomically
from sagittal.training.generators import generator_states, restore_generators
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
    validation_due: bool = False
    """Whether a stop cut the validation of this step short: it is made before the next step."""

    later_fields: ClassVar[tuple[str, ...]] = ("validation_due",)


def save_checkpoint(folder: Path, state: TrainState, progress: Progress, *, keep: int = KEPT) -> Path:
    """Write a checkpoint atomically and drop all but the last `keep`, and best weights that none of them speaks of.

    Those of later steps are dropped too: a run that goes on from before them has found them damaged.

    Raises:
        ResourceError: the disk is full or the folder is not writable; earlier checkpoints stay intact.
    """
    tensors = {f"network.{name}": value for name, value in state.network.state_dict().items()}
    if state.average is not None:
        tensors.update({f"average.{name}": value for name, value in state.average.network.state_dict().items()})
    for name, moments in _named_states(state.network, state.optimizer).items():
        tensors.update({f"optimizer.{key}.{name}": value for key, value in moments.items()})
    if state.scaler is not None:
        tensors.update({f"scaler.{name}": value for name, value in state.scaler.state().items()})
    tensors.update({f"rng.{name}": value for name, value in generator_states(_device(state)).items()})
    path = _write(folder / f"checkpoint_{progress.step:08d}.safetensors", tensors, progress=progress.model_dump_json())
    kept = [one for one in _checkpoints(folder) if one.name <= path.name][: max(keep, 1)]
    for old in set(_checkpoints(folder)) - set(kept):
        _remove(old)
    spoken_of = {_best_path(folder, step) for step in map(_best_step, kept) if step is not None}
    for best in set(folder.glob("best_*.safetensors")) - spoken_of:
        _remove(best)
    return path


def save_best(folder: Path, network: torch.nn.Module, step: int, *, plan_sha256: str) -> Path:
    """Write the weights of the best validation so far, made after `step` steps; the next checkpoint drops older ones.

    Raises:
        ResourceError: the disk is full or the folder is not writable; earlier files stay intact.
    """
    return _write(_best_path(folder, step), network.state_dict(), plan_sha256=plan_sha256)


def load_best(folder: Path, network: torch.nn.Module, step: int, *, plan_sha256: str) -> bool:
    """Put the weights that `save_best` wrote after `step` steps into a network; tell whether they are there and whole.

    Where they are not, or belong to another plan, the network stays as it is.
    """
    path = _best_path(folder, step)
    if not _is_whole(path):
        return False
    with safe_open(path, framework="pt") as file:
        if (file.metadata() or {}).get("plan_sha256") != plan_sha256:
            return False
        network.load_state_dict({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118 - no dict
    return True


def newest_checkpoint(folder: Path) -> tuple[Path, Progress] | None:
    """Return the newest checkpoint that verifies, and its progress; None where there is none."""
    for path in _checkpoints(folder):
        try:
            if _is_whole(path):
                return path, _read_progress(path)
        except (OSError, SafetensorError, ValidationError):
            continue
    return None


@contextmanager
def told_what_is_intact(folder: Path) -> Iterator[None]:
    """Add to an error of a file that can't be written which checkpoint is there to go on from.

    Raises:
        ResourceError: the disk is full, or the folder can't be written.
    """
    try:
        yield
    except ResourceError as error:
        if error.code != ResourceError.code:  # of memory or a device, not of files
            raise
        found = newest_checkpoint(folder)
        if found is None:
            left = f"{folder} holds no whole checkpoint yet, so training would begin again."
        else:
            left = f"{found[0]}, of step {found[1].step}, is intact: --resume goes on from it."
        raise ResourceError(f"{error.message} {left}") from None


def drop_parts(folder: Path) -> None:
    """Delete what kills in the midst of writing have left of checkpoints; each is as large as a whole one."""
    for name in ("checkpoint", "best"):
        for part in folder.glob(f".{name}_*.part"):
            part.unlink(missing_ok=True)


def load_checkpoint(path: Path, state: TrainState, *, plan_sha256: str) -> None:
    """Restore weights, their mean, the optimiser's state, the loss scale and the random generators, in place.

    Raises:
        TrainingError: the checkpoint belongs to another plan.
    """
    if _read_progress(path).plan_sha256 != plan_sha256:
        raise TrainingError(
            f"{path}: belongs to another plan than the one given. Go on with the run's own plan.json, or remove "
            f"{path.parent} to start afresh.",
            code="checkpoint_mismatch",
        )
    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - safe_open is no dict
    state.network.load_state_dict(_part(tensors, "network."))
    if state.average is not None:
        state.average.network.load_state_dict(_part(tensors, "average."))
    if state.scaler is not None:
        state.scaler.restore(_part(tensors, "scaler."))
    parameters = dict(state.network.named_parameters())
    for name, value in _part(tensors, "optimizer.").items():
        key, parameter = name.split(".", 1)
        target = parameters[parameter]
        # Step counters lie on the parameter's device, as fused optimisers want them, and moments in its memory format.
        state.optimizer.state[target][key] = (
            value.to(target.device) if value.ndim == 0 else torch.empty_like(target).copy_(value)
        )
    restore_generators(_part(tensors, "rng."), _device(state))


def _write(path: Path, tensors: Mapping[str, torch.Tensor], **metadata: str) -> Path:
    content = save({name: value.detach().cpu().contiguous() for name, value in tensors.items()}, metadata=metadata)
    write_atomically(path, content)
    write_atomically(_hash_file(path), hashlib.sha256(content).hexdigest().encode())
    return path


def _is_whole(path: Path) -> bool:
    """Tell whether a file is there with its hash, and as it was written."""
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest() == _hash_file(path).read_text(encoding="ascii")
    except OSError:
        return False


def _read_progress(path: Path) -> Progress:
    with safe_open(path, framework="pt") as file:
        return Progress.model_validate_json((file.metadata() or {}).get("progress", ""))


def _best_step(checkpoint: Path) -> int | None:
    try:
        return _read_progress(checkpoint).standing.best_step
    except (OSError, SafetensorError, ValidationError):
        return None


def _remove(path: Path) -> None:
    _hash_file(path).unlink(missing_ok=True)
    path.unlink(missing_ok=True)


def _device(state: TrainState) -> torch.device:
    return next(state.network.parameters()).device


def _best_path(folder: Path, step: int) -> Path:
    return folder / f"best_{step:08d}.safetensors"


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
