"""Rules chosen at the end of a run reach the bundle's plan, its metrics and its card, once and only where they may."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import sagittal
from sagittal.bundle import hash_case
from sagittal.data.dataset import Dataset
from sagittal.plan import Plan
from sagittal.plan.postprocessing import FillHoles
from sagittal.testing.bundle import write_random_bundle
from sagittal.testing.datasets import TINY_SETTINGS, write_tiny_dataset
from sagittal.testing.plans import untrained_plan
from sagittal.training.joining import finished_before, join_bundle, join_folds, note_failures, rewrite
from sagittal.training.postprocessing_bundle import choose_for_bundle
from sagittal.training.signals import StopFlag
from sagittal.volumes import Volume, read_labels

CASES = 12
SETTINGS = {**TINY_SETTINGS, "training.folds": 2}


def _entry(cases: list[str]) -> dict[str, Any]:
    return {
        "ended": "finished",
        "steps": 1,
        "training_cases": 6,
        "validation": "held-out cases",
        "cases": {hash_case(case): {"bright": 0.5, "dark": 0.5} for case in cases},
        "cases_hd95_mm": {},
    }


class _Run:
    """Two folds of twelve cases whose predictions are the references with an island of label 1 each."""

    def __init__(self, folder: Path, **changes: Any) -> None:
        self.data: Dataset = sagittal.read_dataset(write_tiny_dataset(folder / "tiny", cases=CASES))
        self.plan: Plan = untrained_plan("mednext-s", self.data.spec, settings=SETTINGS).replace(**changes)
        self.out, self.folder = folder / "b", folder / "b.run"
        cases = [case.id for case in self.data.cases]
        self.folds = {"0": _entry(cases[:6]), "1": _entry(cases[6:])}
        write_random_bundle(self.out, self.plan, folds=("fold_0", "fold_1"))
        self.join()
        for number, case in enumerate(cases):
            labels, grid = read_labels(self.data.folder / "labelsTr" / f"{case}.nii.gz")
            labels[17, 2, 3:8] = np.where(labels[17, 2, 3:8] == 0, 1, labels[17, 2, 3:8])
            Volume.on(grid, labels).write(self.folder / f"fold_{number // 6}" / "validation" / f"{case}.nii.gz")

    def join(self) -> None:
        metrics = join_folds(self.plan, self.folds, patients={}, failed={})
        rewrite(sagittal.read_bundle(self.out), self.plan, metrics)

    def choose(self, stop: StopFlag | None = None, ends: float | None = None) -> tuple[Any, list[str]]:
        lines: list[str] = []
        stop = stop or StopFlag()
        found = choose_for_bundle(self.out, self.folder, self.plan, self.data, stop, ends=ends, say=lines.append)
        assert sagittal.read_bundle(self.out).metrics == found
        return found, lines


@pytest.fixture
def run(tmp_path: Path) -> _Run:
    return _Run(tmp_path)


def test_what_helps_is_written_into_the_bundle_and_stays_when_folds_go_on(run: _Run) -> None:
    metrics, lines = run.choose()
    bundle = sagittal.read_bundle(run.out)
    assert bundle.plan.postprocessing and "12 held-out cases" in bundle.plan.reasons["postprocessing"]
    assert metrics["postprocessing"]["folds"] == ["0", "1"] and metrics["postprocessing"]["cases"] == CASES
    chosen = metrics["postprocessing"]["chosen"][-1]
    assert chosen["gain"]["bright"] > 0.001 and "flatters" in metrics["postprocessing"]["note"]
    assert metrics["dice"] == {"bright": 0.5, "dark": 0.5}
    assert any(chosen["words"] in line for line in lines)
    card = (run.out / "MODEL_CARD.md").read_text()
    assert chosen["words"] in card and f"{chosen['gain']['bright']:+.4f}" in card
    assert "cases that chose" in card

    assert run.choose() == (metrics, [])
    assert finished_before(run.out, run.plan, "0") is not None
    noted = note_failures(run.out, run.plan, {"3": "why"}, patients={})
    assert set(noted["folds"]) == {"0", "1"} and "postprocessing" not in noted
    assert sagittal.read_bundle(run.out).plan == run.plan
    again, _ = run.choose()
    assert again["postprocessing"] == metrics["postprocessing"]
    joined = join_bundle(run.out, run.plan, "1", run.folds["1"], bundle.weights("fold_1"), patients={}, failed={})
    assert set(joined["folds"]) == {"0", "1"}


def test_the_plan_can_forbid_it_or_have_rules_of_its_own(tmp_path: Path, run: _Run) -> None:
    forbidding = run.plan.training.replace(postprocessing="none")
    for name, changes in {"a": {"training": forbidding}, "b": {"postprocessing": (FillHoles(label="dark"),)}}.items():
        other = _Run(tmp_path / name, **changes)
        metrics, lines = other.choose()
        assert "postprocessing" not in metrics and not lines
        assert sagittal.read_bundle(other.out).plan == other.plan


def test_a_stop_leaves_the_bundle_and_a_lack_of_time_is_told(run: _Run) -> None:
    stop = StopFlag()
    stop.reason = "interrupted"
    metrics, lines = run.choose(stop)
    assert "postprocessing" not in metrics and not lines
    metrics, lines = run.choose(ends=time.monotonic() - 1)
    assert metrics["postprocessing"]["chosen"] == [] and "no time" in metrics["postprocessing"]["why"]
    assert "no time" in (run.out / "MODEL_CARD.md").read_text()
    assert len(lines) == 1 and sagittal.read_bundle(run.out).plan == run.plan


def test_predictions_that_are_gone_are_told_of(run: _Run) -> None:
    next((run.folder / "fold_1" / "validation").iterdir()).unlink()
    metrics, _ = run.choose()
    assert "no longer in b.run" in metrics["postprocessing"]["why"]


def test_another_bundle_is_left_alone(run: _Run) -> None:
    other = run.plan.replace(inference=run.plan.inference.replace(overlap=0.25))
    assert choose_for_bundle(run.out, run.folder, other, run.data, StopFlag(), ends=None, say=print) == {}
