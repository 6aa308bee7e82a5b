"""Checkpoints: exact, atomic, verified."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
import torch

from sagittal.errors import ResourceError, TrainingError
from sagittal.training.average import WeightAverage
from sagittal.training.checkpoint import Progress, load_checkpoint, newest_checkpoint, save_checkpoint
from sagittal.training.state import TrainState


def _state() -> TrainState:
    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.Conv3d(1, 4, 3), torch.nn.BatchNorm3d(4)).to(
        memory_format=torch.channels_last_3d
    )
    return TrainState(network, torch.optim.AdamW(network.parameters(), lr=0.1), WeightAverage(network, 0.9), None)


def _step(state: TrainState, seed: int) -> float:
    generator = torch.Generator().manual_seed(seed)
    loss = state.network(torch.randn(2, 1, 5, 6, 7, generator=generator)).square().mean()
    state.optimizer.zero_grad()
    loss.backward()
    state.optimizer.step()
    assert state.average is not None
    state.average.update(state.network, seed)
    return float(loss.detach())


def _progress(step: int, plan: str = "p") -> Progress:
    return Progress(step=step, plan_sha256=plan, elapsed_s=1.5)


def test_a_restored_run_goes_on_with_the_same_losses(tmp_path: Path) -> None:
    state = _state()
    for seed in range(3):
        _step(state, seed)
    save_checkpoint(tmp_path, state, _progress(3))
    undisturbed = [_step(state, seed) for seed in range(3, 6)]

    state = _state()
    found = newest_checkpoint(tmp_path)
    assert found is not None
    assert found[1] == _progress(3)
    load_checkpoint(found[0], state, plan_sha256="p")
    assert [_step(state, seed) for seed in range(3, 6)] == undisturbed


def test_the_last_two_are_kept(tmp_path: Path) -> None:
    state = _state()
    for step in (1, 2, 3):
        save_checkpoint(tmp_path, state, _progress(step))
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        f"checkpoint_{step:08d}.{ending}" for step in (2, 3) for ending in ("safetensors", "sha256")
    ]


@pytest.mark.parametrize("damage", ["cut", "byte", "no hash", "empty"])
def test_a_damaged_checkpoint_is_passed_over(tmp_path: Path, damage: str) -> None:
    state = _state()
    save_checkpoint(tmp_path, state, _progress(1))
    newest = save_checkpoint(tmp_path, state, _progress(2))
    content = newest.read_bytes()
    match damage:
        case "cut":
            newest.write_bytes(content[:-10])
        case "byte":
            newest.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        case "no hash":
            newest.with_suffix(".sha256").unlink()
        case "empty":
            newest.write_bytes(b"")
    found = newest_checkpoint(tmp_path)
    assert found is not None
    assert found[1].step == 1


def test_another_plan_is_refused(tmp_path: Path) -> None:
    state = _state()
    path = save_checkpoint(tmp_path, state, _progress(1))
    with pytest.raises(TrainingError, match="another plan"):
        load_checkpoint(path, state, plan_sha256="q")


def test_a_full_disk_leaves_the_last_checkpoint_and_no_litter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = _state()
    save_checkpoint(tmp_path, state, _progress(1))
    before = sorted(tmp_path.iterdir())

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ResourceError, match="No space left"):
        save_checkpoint(tmp_path, state, _progress(2))
    assert sorted(tmp_path.iterdir()) == before
    found = newest_checkpoint(tmp_path)
    assert found is not None
    assert found[1].step == 1
