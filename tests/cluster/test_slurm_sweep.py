"""A sweep in a SLURM queue: a network's folds are an array, and it goes on after its command was ended."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from slurm_site import SlurmSite

import sagittal
from sagittal.cluster.places import parse_place
from sagittal.cluster.slurm_folds import SlurmFolds
from sagittal.testing.datasets import TINY_SETTINGS
from sagittal.training import stages
from sagittal.training.stages import RunOptions
from sagittal.training.sweep import Sweep, begin, conclude, keep, sweep_here, sweep_in_arrays

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:.*is not writable:UserWarning"),
]


def test_a_sweep_in_a_queue_has_the_scores_and_the_winner_of_one_machine(
    slurm: SlurmSite, tiny_dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # What a budget makes of a plan depends on how long a step takes, which differs from one measurement to the next.
    monkeypatch.setattr(stages, "_made_quick", lambda plan, *others, **more: (plan, 0.01))
    before, lines = torch.get_num_threads(), list[str]()
    torch.set_num_threads(1)
    settings = {**TINY_SETTINGS, "schedule.steps": 2, "schedule.validations": 0, "training.deterministic": True}
    here = Sweep(
        tiny_dataset,
        tmp_path / "here",
        networks=("mednext-s", "mednext-b"),
        budget_s=1200.0,
        folds=2,
        settings=settings,
        options=RunOptions(device="cpu", workers=1, cache=tmp_path / "cache"),
    )
    carrier = SlurmFolds(parse_place("slurm:cpus=1,time=10"), device="cpu", poll_s=0.3)
    options = dataclasses.replace(here.options, carrier=carrier, at_once=carrier.at_once, say=lines.append)
    there = dataclasses.replace(here, out=tmp_path / "there", options=options)
    try:
        one = sweep_here(here, begin(here, resume=False), lambda now: keep(here, now))
        other = sweep_in_arrays(there, begin(there, resume=False), lambda now: keep(there, now))
    finally:
        torch.set_num_threads(before)
    assert other.scores == one.scores and other.failed == {} == one.failed
    assert sum("folds 0, 1 on slurm" in line for line in lines) == 2  # an array for each network
    found, wanted = (sagittal.read_bundle(conclude(sweep, one)) for sweep in (there, here))
    assert found.plan.network_name == wanted.plan.network_name and found.weight_names == ("fold_0", "fold_1")
    for name in found.weight_names:
        first, second = wanted.weights(name), found.weights(name)
        assert all(np.array_equal(first[key], second[key]) for key in first)
    assert (tmp_path / "there" / "compared" / "comparison.html").is_file()
