"""Folds in a SLURM queue: the weights of one machine, preempted or not, and jobs that outlive their command."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from slurm_site import SlurmSite

import sagittal
from sagittal.cluster import slurm_folds
from sagittal.cluster.places import parse_place
from sagittal.cluster.slurm_folds import SlurmFolds
from sagittal.errors import PlanError, TrainingError
from sagittal.testing.datasets import TINY_SETTINGS
from sagittal.training.checkpoint import newest_checkpoint
from sagittal.training.run import train
from sagittal.training.run_folder import HANDED_OUT
from sagittal.training.stages import RunOptions

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:.*is not writable:UserWarning"),
]

TWO = {**TINY_SETTINGS, "schedule.steps": 2, "training.folds": 2, "training.deterministic": True}
LONG = {**TWO, "schedule.steps": 80}


@pytest.fixture
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def _carrier(text: str = "slurm:cpus=1,time=10") -> SlurmFolds:
    return SlurmFolds(parse_place(text), device="cpu", poll_s=0.3)


def _require_equal(one: Path, other: Path) -> None:
    first, second = sagittal.read_bundle(one), sagittal.read_bundle(other)
    assert first.weight_names == second.weight_names == ("fold_0", "fold_1")
    for name in first.weight_names:
        wanted, found = first.weights(name), second.weights(name)
        assert all(np.array_equal(wanted[key], found[key]) for key in wanted)
        file = f"weights/{name}.safetensors"
        assert (one / file).read_bytes() == (other / file).read_bytes()
    assert first.metrics["out_of_fold"] == second.metrics["out_of_fold"]


def test_a_preempted_fold_goes_on_and_the_bundle_is_that_of_one_machine(
    slurm: SlurmSite, tiny_dataset: Path, tmp_path: Path, one_thread: None
) -> None:
    """One fold is told to end by a signal; the other one is preempted by a job that goes before it."""
    here, there = tmp_path / "here", tmp_path / "there"
    cache, lines = tmp_path / "cache", list[str]()
    train(tiny_dataset, here, settings=LONG, fold="all", options=RunOptions(device="cpu", cache=cache))

    def disturb() -> None:
        _until(lambda: _steps(there, 0), "the first fold did not begin")
        first, second = sorted(slurm.jobs())
        slurm.ask("scancel", "--signal=TERM", first)
        _until(lambda: _steps(there, 1), "the second fold did not begin")
        slurm.ask("sbatch", "-p", "urgent", "-n2", "-o", "/dev/null", "--wrap", "true")
        for job in (first, second):
            slurm.go_on(job)

    disturber = _Disturber(disturb)
    options = RunOptions(
        device="cpu", cache=cache, carrier=_carrier(), checkpoint_every_s=3600, say=lines.append, resume=False
    )
    result = train(tiny_dataset, there, settings=LONG, fold="all", options=options)
    disturber.require_done()
    assert result.complete
    for fold in (0, 1):
        told = "\n".join(line for line in lines if line.startswith(f"fold {fold} | "))
        assert "start 2" in told and "goes on after step" in told, told
    _require_equal(here, there)
    assert not list((tmp_path / "there.run").glob("fold_*/bundle"))


def test_jobs_outlive_their_command_and_the_next_one_joins_them(
    slurm: SlurmSite, tiny_dataset: Path, tmp_path: Path, one_thread: None
) -> None:
    out, lines = tmp_path / "b", list[str]()

    def stop_when(word: str, number: signal.Signals) -> Callable[[str], None]:
        def say(line: str) -> None:
            lines.append(line)
            if word in line:
                os.kill(os.getpid(), number)

        return say

    say = stop_when("_1: pending", signal.SIGTERM)
    options = RunOptions(device="cpu", carrier=_carrier(), resume=True, say=say)
    slurm.hold(True)  # or its jobs begin before the first look at the queue
    result = train(tiny_dataset, out, settings=TWO, fold="all", options=options)
    slurm.hold(False)
    assert result.ended == "terminated"
    jobs = json.loads((tmp_path / "b.run" / HANDED_OUT).read_text())["jobs"]
    assert any(line.endswith("go on without this command, which joins them when it is given again") for line in lines)
    assert set(jobs) == {"0", "1"}
    result = train(tiny_dataset, out, fold="all", options=dataclasses.replace(options, say=lines.append))
    assert result.complete
    assert any("are in the queue already or done" in line for line in lines)
    assert sum(line.startswith("train: folds 0, 1 on slurm") for line in lines) == 1
    assert not (tmp_path / "b.run" / HANDED_OUT).exists()

    # Ctrl-C, on the contrary, takes the jobs out of the queue.
    options = dataclasses.replace(options, say=stop_when("train: fold 1", signal.SIGINT))
    result = train(tiny_dataset, tmp_path / "c", settings=LONG, fold="1", options=options)
    assert result.ended == "interrupted" and slurm.jobs() == {}
    assert newest_checkpoint(tmp_path / "c.run" / "fold_1") is not None


def test_a_fold_whose_job_is_lost_is_told_as_failed_and_trained_again(
    slurm: SlurmSite, tiny_dataset: Path, tmp_path: Path, one_thread: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(slurm_folds, "LATE_S", 1.0)
    out, lines = tmp_path / "b", list[str]()

    def kill(line: str) -> None:
        lines.append(line)
        if "fold 0 | train: fold 0" in line:
            slurm.ask("scancel", "--signal=KILL", *slurm.jobs())

    options = RunOptions(device="cpu", carrier=_carrier(), resume=True, say=kill)
    with pytest.raises(TrainingError, match=r"1 of 1 folds failed: fold 0 \(job_lost\)") as caught:
        train(tiny_dataset, out, settings=LONG, fold="0", options=options)
    assert "ended, by SLURM's account: " in caught.value.__notes__[0]
    result = train(tiny_dataset, out, fold="0", options=dataclasses.replace(options, say=lines.append))
    assert result.complete


def test_shards_and_unknown_settings_are_refused_before_anything_is_begun(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="an element per fold"):
        _carrier("slurm:shards=2")
    with pytest.raises(PlanError, match="Did you mean 'partition'"):
        _carrier("slurm:partitions=a")


def _steps(out: Path, fold: int) -> bool:
    log = out.with_name(out.name + ".run") / f"fold_{fold}" / "log.jsonl"
    return log.is_file() and '"step"' in log.read_text()


def _until(true: object, what: str, seconds: float = 300.0) -> None:
    assert callable(true)
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, what
        time.sleep(0.05)


class _Disturber:
    """A thread, and what went wrong in it."""

    def __init__(self, act: object) -> None:
        assert callable(act)
        self._error: BaseException | None = None

        def run() -> None:
            try:
                act()
            except BaseException as error:
                self._error = error

        self._thread = threading.Thread(target=run, daemon=True)
        self._thread.start()

    def require_done(self) -> None:
        self._thread.join(300)
        assert not self._thread.is_alive()
        if self._error is not None:
            raise self._error
