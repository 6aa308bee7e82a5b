"""Several processes train what one does, end together, and go on in any number: by the same files as for a user.

Starting processes takes longer than what they do here, so each start serves many checks.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open

import sagittal
from sagittal.errors import PlanError, ResourceError, TrainingError
from sagittal.networks.build import build_network
from sagittal.plan.schedule import Schedule
from sagittal.testing.datasets import TINY_SETTINGS, write_tiny_dataset
from sagittal.training import fold as fold_module
from sagittal.training.distributed import World
from sagittal.training.log import read_log
from sagittal.training.peers import enough_samples
from sagittal.training.run import TrainResult, train
from sagittal.training.schedules import Shortening
from sagittal.training.stages import RunOptions

MEDNEXT: Mapping[str, Any] = {
    **TINY_SETTINGS,
    "training.batch_size": 3,
    "training.loss.batch_dice": True,
    "training.ema_decay": 0.9,
    "schedule.steps": 10,
    "schedule.validations": 2,
    "schedule.keep": "best",
}
SEGFORMER: Mapping[str, Any] = {
    **{name: value for name, value in MEDNEXT.items() if "network" not in name},
    "network.embed_dims": [4, 8, 8, 8],
    "network.num_heads": [1, 2, 2, 2],
    "network.depths": [1, 1, 1, 1],
    "network.decoder_dim": 8,
    "network.norm": "batch",
}
RUNS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "mednext": ("mednext-s", MEDNEXT),
    "segformer": ("segformer3d", SEGFORMER),
    "segformer64": ("segformer3d", {**SEGFORMER, "training.precision": "fp64"}),
    "parts64": (
        "segformer3d",
        {**SEGFORMER, "training.precision": "fp64", "training.batch_size": 8, "training.micro_batches": 2},
    ),
}
"""Batches of three on two processes have uneven shares; batch Dice and BatchNorm see the samples of all of them."""
IN_ONE_START = ("mednext", "segformer", "parts64")


def _train(folder: Path, out: str, run: str, world: World | None = None, **more: Any) -> TrainResult:
    network, settings = RUNS[run]
    said: list[str] = []
    options = RunOptions(device="cpu", cache=folder / "cache", resume=_is_begun(folder, out), say=said.append)
    if world is not None:
        options = RunOptions(**{**vars(options), "world": world})
    if options.resume:
        network, settings = None, {}
    result = train(folder / "tiny", folder / out, network=network, settings=settings, options=options, **more)
    assert bool(said) == options.world.main
    return result


def _is_begun(folder: Path, out: str) -> bool:
    return any((folder / f"{out}.run" / "fold_0").glob("checkpoint_*"))


def _decide_as(folder: Path, expected: str, *outs: str) -> None:
    """Let runs to come make the validations that another made: on a busy machine one is left out now and then."""
    for out in outs:
        fold = folder / f"{out}.run" / "fold_0"
        fold.mkdir(parents=True)
        shutil.copy(folder / f"{expected}.run" / "fold_0" / "validations.json", fold)


def _losses(folder: Path, out: str) -> list[float]:
    records = read_log(folder / f"{out}.run" / "fold_0" / "log.jsonl")
    return [record["loss"] for record in records if record["kind"] == "step"]


def _scores(folder: Path, out: str) -> list[Mapping[str, Any]]:
    records = read_log(folder / f"{out}.run" / "fold_0" / "log.jsonl")
    return [record["dice"] for record in records if record["kind"] == "validation"]


def _last_weights(folder: Path, out: str) -> dict[str, torch.Tensor]:
    path = max((folder / f"{out}.run" / "fold_0").glob("checkpoint_*.safetensors"))
    with safe_open(path, framework="pt") as file:
        names = [name for name in file.keys() if name.startswith("network.")]  # noqa: SIM118 - safe_open is no dict
        return {name.removeprefix("network."): file.get_tensor(name) for name in names}


def _outputs(folder: Path, out: str) -> torch.Tensor:
    plan = sagittal.read_bundle(folder / out).plan
    network = build_network(plan.network, 1, plan.dataset.num_outputs).double().eval()
    network.load_state_dict(_last_weights(folder, out))
    image = torch.randn(1, 1, 16, 20, 24, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    with torch.no_grad():
        output = network(image)
    return output[0] if isinstance(output, list) else output


def _require_same(folder: Path, out: str, expected: str, tolerance: float) -> None:
    here, there = _losses(folder, out), _losses(folder, expected)
    assert len(here) == len(there) == 10
    np.testing.assert_allclose(here, there, rtol=tolerance)
    for dice, wanted in zip(_scores(folder, out), _scores(folder, expected), strict=True):
        # A voxel on the edge between two labels falls to the other one by the last bit of fp32.
        assert dice == pytest.approx(wanted, abs=0 if tolerance < 1e-9 else 0.01)
    ours, theirs = (sagittal.read_bundle(folder / name) for name in (out, expected))
    assert ours.plan == theirs.plan
    assert ours.metrics["folds"]["0"]["cases"].keys() == theirs.metrics["folds"]["0"]["cases"].keys()


@contextmanager
def _held_ports(count: int) -> Iterator[list[int]]:
    """Find ports, and keep them from other programs: processes may meet there, as both sides allow it."""
    with ExitStack() as held:
        sockets = [held.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            one.bind(("127.0.0.1", 0))
        yield [one.getsockname()[1] for one in sockets]


def _spawn(work: Callable[..., None], processes: int, folder: Path, worlds: int) -> None:
    with _held_ports(worlds) as ports:
        torch.multiprocessing.spawn(work, (processes, folder, ports), processes)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_tiny_dataset(tmp_path / "tiny")
    return tmp_path


def _two(rank: int, size: int, folder: Path, ports: list[int]) -> None:
    torch.set_num_threads(1)
    worlds = iter([World(rank, size, rank, f"tcp://127.0.0.1:{port}") for port in ports])
    for run in IN_ONE_START:
        assert _train(folder, f"{run}-2", run, next(worlds)).complete
    _check_stop(rank, folder, next(worlds))
    assert _train(folder, "begun-by-one", "mednext", next(worlds)).complete
    _check_clock(rank, folder, next(worlds))
    _check_failure(rank, folder, next(worlds))
    _check_failure_before_training(rank, folder, next(worlds))


def _at_step(step: int, do: Callable[[], None]) -> Callable[[], None]:
    """Do something when a step begins, in this process; return what undoes that."""
    real = fold_module.train_on_batch

    def doing(state: Any, batch: Any, *arguments: Any, **keywords: Any) -> Any:
        if batch.step == step:
            do()
        return real(state, batch, *arguments, **keywords)

    fold_module.train_on_batch = doing
    return lambda: setattr(fold_module, "train_on_batch", real)


def _check_stop(rank: int, folder: Path, world: World) -> None:
    undo = _at_step(4, lambda: os.kill(os.getpid(), signal.SIGTERM) if rank == 1 else None)
    assert _train(folder, "begun-by-two", "mednext", world).ended == "terminated"
    undo()


def _check_clock(rank: int, folder: Path, world: World) -> None:
    def shorten(schedule: Schedule, step: int, current: Shortening | None, **times: float) -> Shortening | None:
        assert rank == 0, "only one process looks at its clock"
        return Shortening(start=3, end=6, start_position=3.0, reason="late") if step == 3 else current

    real, fold_module.shorten = fold_module.shorten, shorten
    network, settings = RUNS["mednext"]
    options = RunOptions(device="cpu", cache=folder / "cache", world=world)
    result = train(
        folder / "tiny", folder / "clock", network=network, settings=settings, budget_s=600.0, options=options
    )
    fold_module.shorten = real
    assert result.ended == "shortened" and result.metrics["folds"]["0"]["steps"] == 6


def _check_failure(rank: int, folder: Path, world: World) -> None:
    def fail() -> None:
        if rank == 1:
            raise ResourceError("case_3: can't be read.", code="unreadable_cache")

    undo = _at_step(2, fail)
    told = "^case_3: can't be read.$" if rank == 1 else "^process 0 of 2 ends, because process 1 did: case_3: can't"
    kind = ResourceError if rank == 1 else TrainingError
    with pytest.raises(kind, match=told) as caught:
        _train(folder, "failed", "mednext", world)
    assert caught.value.code == "unreadable_cache"
    undo()


def _check_failure_before_training(rank: int, folder: Path, world: World) -> None:
    options = RunOptions(device="cpu", world=world)
    settings = {**MEDNEXT, "training.batch_size": 1}
    with pytest.raises(PlanError if rank == 0 else TrainingError, match="batch_size is 1, for 2 processes"):
        train(folder / "tiny", folder / "few", settings=settings, options=options)
    assert not (folder / "few.run" / "cache").exists()


@pytest.mark.slow
def test_two_processes_train_what_one_does_and_end_together(folder: Path) -> None:
    for run in IN_ONE_START:
        _train(folder, run, run)
        _decide_as(folder, run, f"{run}-2")
    _decide_as(folder, "mednext", "begun-by-one", "begun-by-two")
    undo = _at_step(4, lambda: os.kill(os.getpid(), signal.SIGTERM))
    assert _train(folder, "begun-by-one", "mednext").ended == "terminated"
    undo()
    _spawn(_two, 2, folder, len(IN_ONE_START) + 5)

    _require_same(folder, "mednext-2", "mednext", 1e-5)
    _require_same(folder, "segformer-2", "segformer", 1e-5)
    _require_same(folder, "parts64-2", "parts64", 1e-12)
    torch.testing.assert_close(_outputs(folder, "parts64-2"), _outputs(folder, "parts64"), rtol=0, atol=1e-9)

    assert _train(folder, "begun-by-two", "mednext").complete
    for out in ("begun-by-one", "begun-by-two"):
        _require_same(folder, out, "mednext", 1e-5)


def _four(rank: int, size: int, folder: Path, ports: list[int]) -> None:
    torch.set_num_threads(1)
    _train(folder, "parts64-4", "parts64", World(rank, size, rank, f"tcp://127.0.0.1:{ports[0]}"))


@pytest.mark.slow
def test_four_processes_train_what_one_does(folder: Path) -> None:
    _train(folder, "parts64", "parts64")
    _decide_as(folder, "parts64", "parts64-4")
    _spawn(_four, 4, folder, 1)
    _require_same(folder, "parts64-4", "parts64", 1e-12)
    torch.testing.assert_close(_outputs(folder, "parts64-4"), _outputs(folder, "parts64"), rtol=0, atol=1e-9)


@pytest.mark.slow
def test_torchrun_starts_the_command_line_in_several_processes(folder: Path) -> None:
    _train(folder, "one", "segformer64")
    _decide_as(folder, "one", "torchrun")
    network, settings = RUNS["segformer64"]
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "sagittal"]
    asked = [word for name, value in settings.items() for word in ("--set", f"{name}={_as_text(value)}")]
    words = [str(folder / "tiny"), "--out", str(folder / "torchrun"), "--cache", str(folder / "cache")]
    done = subprocess.run(
        [sys.executable, *launch, "train", *words, "--network", network, "--device", "cpu", *asked],
        capture_output=True,
        text=True,
        timeout=550,
        env={**os.environ, "XDG_CACHE_HOME": str(folder / "known")},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("check: 6 cases") == done.stdout.count("bundle: ") == 1
    _require_same(folder, "torchrun", "one", 1e-12)
    torch.testing.assert_close(_outputs(folder, "torchrun"), _outputs(folder, "one"), rtol=0, atol=1e-9)
    ours, theirs = (sagittal.read_bundle(folder / name) for name in ("torchrun", "one"))
    for name, value in theirs.weights("fold_0").items():
        np.testing.assert_allclose(ours.weights("fold_0")[name], value, rtol=1e-6, atol=1e-7)
    assert ours.metrics["dice"] == theirs.metrics["dice"]


def _as_text(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, list) else json.dumps(value).strip('"')


def test_processes_need_a_sample_in_each_part_of_a_batch(folder: Path) -> None:
    plan = _train(folder, "mednext", "mednext").plan
    assert enough_samples(plan, World(0, 3)) and not enough_samples(plan, World(0, 4))
    parts = plan.replace(training=plan.training.replace(batch_size=8, micro_batches=4))
    assert enough_samples(parts, World(0, 2)) and not enough_samples(parts, World(0, 3))
