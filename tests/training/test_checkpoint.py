"""Checkpoints: exact, atomic, verified."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
import torch

from sagittal.errors import ResourceError, TrainingError
from sagittal.plan.optimizers import SGD, AdamW, Muon, Optimizer
from sagittal.training.average import WeightAverage
from sagittal.training.checkpoint import (
    Progress,
    drop_parts,
    load_best,
    load_checkpoint,
    newest_checkpoint,
    save_best,
    save_checkpoint,
)
from sagittal.training.optimizers import new_optimizer
from sagittal.training.precision import LossScale
from sagittal.training.standing import Standing
from sagittal.training.state import TrainState

CPU = torch.device("cpu")
OPTIMIZERS: tuple[Optimizer, ...] = (
    AdamW(learning_rate=0.1, weight_decay=0.01),
    SGD(learning_rate=0.01, weight_decay=0.01),
    Muon(learning_rate=0.1, weight_decay=0.01),
)


def _state(config: Optimizer = OPTIMIZERS[0], *, scaler: LossScale | None = None) -> TrainState:
    torch.manual_seed(0)
    network = torch.nn.Sequential(
        torch.nn.Conv3d(1, 4, 3), torch.nn.BatchNorm3d(4), torch.nn.Dropout(0.3), torch.nn.Conv3d(4, 3, 1)
    ).to(memory_format=torch.channels_last_3d)
    return TrainState(network, new_optimizer(network, config), WeightAverage(network, 0.9), scaler)


def _step(state: TrainState, seed: int) -> float:
    generator = torch.Generator().manual_seed(seed)
    loss = state.network(torch.randn(2, 1, 5, 6, 7, generator=generator)).square().mean()
    state.optimizer.zero_grad()
    (loss if state.scaler is None else state.scaler.scaled(loss)).backward()
    if state.scaler is not None:
        state.scaler.unscale(state.optimizer)
        state.scaler.update(skipped=seed == 1)
    state.optimizer.step()
    assert state.average is not None
    state.average.update(state.network, seed)
    return float(loss.detach())


def _progress(step: int, plan: str = "p") -> Progress:
    return Progress(step=step, plan_sha256=plan, elapsed_s=1.5)


@pytest.mark.parametrize("config", OPTIMIZERS, ids=lambda config: config.kind)
def test_a_restored_run_goes_on_with_the_same_bits(tmp_path: Path, config: Optimizer) -> None:
    state = _state(config, scaler=LossScale(CPU))
    for seed in range(3):
        _step(state, seed)
    assert state.scaler is not None
    state.scaler.skipped_in_a_row = 4
    save_checkpoint(tmp_path, state, _progress(3))
    undisturbed = [_step(state, seed) for seed in range(3, 6)]

    again = _state(config, scaler=LossScale(CPU))
    found = newest_checkpoint(tmp_path)
    assert found is not None
    assert found[1] == _progress(3)
    load_checkpoint(found[0], again, plan_sha256="p")
    assert again.scaler is not None
    assert again.scaler.skipped_in_a_row == 4
    # Dropout draws from the generator that is restored, too.
    assert [_step(again, seed) for seed in range(3, 6)] == undisturbed
    assert again.average is not None
    assert state.average is not None
    for one, other in ((state.network, again.network), (state.average.network, again.average.network)):
        other_state = other.state_dict()
        assert all(torch.equal(value, other_state[name]) for name, value in one.state_dict().items())
    assert again.scaler.state() == state.scaler.state()


def test_moments_keep_the_memory_of_their_weights(tmp_path: Path) -> None:
    state = _state()
    _step(state, 0)
    path = save_checkpoint(tmp_path, state, _progress(1))
    again = _state()
    load_checkpoint(path, again, plan_sha256="p")
    weight = again.network[0].weight
    assert again.optimizer.state[weight]["exp_avg"].stride() == weight.stride()
    assert again.optimizer.state[weight]["step"].shape == ()


def test_the_last_two_are_kept(tmp_path: Path) -> None:
    state = _state()
    for step in (1, 2, 3):
        save_checkpoint(tmp_path, state, _progress(step))
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        f"checkpoint_{step:08d}.{ending}" for step in (2, 3) for ending in ("safetensors", "sha256")
    ]


@pytest.mark.parametrize("keep", [1, 3])
def test_as_many_are_kept_as_asked_for(tmp_path: Path, keep: int) -> None:
    state = _state()
    for step in (5, 50, 100, 200):
        save_checkpoint(tmp_path, state, _progress(step), keep=keep)
    kept = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert kept == [f"checkpoint_{step:08d}.safetensors" for step in (5, 50, 100, 200)[-keep:]]


def _with_best(step: int, best: int) -> Progress:
    return _progress(step).replace(standing=Standing(best_dice=0.5, best_step=best))


def test_best_weights_are_there_for_every_checkpoint_that_is_kept(tmp_path: Path) -> None:
    state = _state()
    for best, step in ((1, 2), (3, 4), (3, 6), (7, 8)):
        with torch.no_grad():
            state.network[0].weight.fill_(best)
        save_best(tmp_path, state.network, best, plan_sha256="p")
        save_checkpoint(tmp_path, state, _with_best(step, best))
    assert sorted(path.name for path in tmp_path.glob("best_*.safetensors")) == [
        "best_00000003.safetensors",
        "best_00000007.safetensors",
    ]
    for best in (3, 7):
        network = _state().network
        assert load_best(tmp_path, network, best, plan_sha256="p")
        assert bool((network[0].weight == best).all())


def test_best_weights_that_are_missing_damaged_or_of_another_plan_are_not_taken(tmp_path: Path) -> None:
    state = _state()
    before = state.network[0].weight.detach().clone()
    with torch.no_grad():
        other = _state().network
        other[0].weight.fill_(9.0)
    path = save_best(tmp_path, other, 4, plan_sha256="p")
    assert not load_best(tmp_path, state.network, 5, plan_sha256="p")
    assert not load_best(tmp_path, state.network, 4, plan_sha256="q")
    path.write_bytes(path.read_bytes()[:-1])
    assert not load_best(tmp_path, state.network, 4, plan_sha256="p")
    assert torch.equal(state.network[0].weight, before)


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


@pytest.mark.parametrize("keep", [1, 2])
def test_a_damaged_checkpoint_does_not_take_the_place_of_one_that_is_whole(tmp_path: Path, keep: int) -> None:
    state = _state()
    for step in (90, 100):
        path = save_checkpoint(tmp_path, state, _progress(step))
        if keep == 1 or step == 100:  # killed before the hash was written
            path.with_suffix(".sha256").unlink()
    save_checkpoint(tmp_path, state, _progress(95), keep=keep)
    found = newest_checkpoint(tmp_path)
    assert found is not None
    assert found[1].step == 95
    assert len(list(tmp_path.glob("checkpoint_*.safetensors"))) == keep


def test_what_a_kill_left_half_written_is_deleted(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, _state(), _progress(1))
    whole = sorted(tmp_path.iterdir())
    for name in ("checkpoint_00000002", "best_00000001"):
        (tmp_path / f".{name}.safetensors.x1y2.part").write_bytes(b"half")
    drop_parts(tmp_path)
    assert sorted(tmp_path.iterdir()) == whole


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
