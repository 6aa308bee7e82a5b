"""Two models in one bundle: trained one after the other, joined, resumed, and used by --fast."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import sagittal
from sagittal.errors import PlanError
from sagittal.inference.fast import FAST_STEP, fast_settings
from sagittal.testing.bundle import write_random_bundle
from sagittal.testing.datasets import TINY_SETTINGS
from sagittal.testing.plans import untrained_plan, untrained_spec
from sagittal.training import second_model
from sagittal.training.fast_cost import cost_of_fast, fast_of_folds
from sagittal.training.run import train
from sagittal.training.second_model import attach_low, train_both
from sagittal.training.stages import RunOptions

pytestmark = pytest.mark.filterwarnings("ignore:.*is not writable:UserWarning")
SETTINGS = {**TINY_SETTINGS, "schedule.steps": 1, "schedule.validations": 0}
PLAN = untrained_plan("mednext-s", untrained_spec(3), settings=TINY_SETTINGS)
LOW = PLAN.replace(configuration="3d-low", preprocessing=PLAN.preprocessing.replace(spacing_mm=(2.0, 2.0, 2.0)))


def test_training_measures_what_fewer_windows_cost(tiny_dataset: Path, tmp_path: Path) -> None:
    result = train(tiny_dataset, tmp_path / "b", settings=SETTINGS, options=RunOptions(device="cpu"))
    fast = result.metrics["fast"]
    entry = result.metrics["folds"]["0"]
    assert set(entry["fast_cases"]) == set(entry["cases"]) and fast["cases"] == len(entry["cases"])
    for name in ("bright", "dark"):
        pairs = [(entry["cases"][case][name], entry["fast_cases"][case][name]) for case in entry["cases"]]
        costs = [was - now for was, now in pairs if was is not None and now is not None]
        assert fast["cost"][name] == (pytest.approx(np.mean(costs)) if costs else None)
    settings = fast_settings(sagittal.read_bundle(tmp_path / "b"))
    assert (settings.mirror, settings.step) == (False, FAST_STEP)
    assert "step 0.75" in settings.sentence and "held-out cases" in settings.sentence
    assert "## Fast prediction" in (tmp_path / "b" / "MODEL_CARD.md").read_text()


def test_two_models_become_one_bundle_and_go_on(
    tiny_dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, seen = train, []

    def coarser(dataset: Path, out: Path, *, configuration: str, settings: dict[str, Any], **more: Any) -> Any:
        # Scans of this size have no coarser configuration of their own: the spacing alone stands for it.
        seen.append((out.name, configuration, more["budget_s"]))
        own = {"preprocessing.spacing_mm": [2.5, 1.8, 1.5]} if configuration == "3d-low" else {}
        return real(dataset, out, settings={**settings, **own}, **more)

    monkeypatch.setattr(second_model, "train", coarser)
    monkeypatch.setattr(second_model, "_require_coarser", lambda *given: None)
    out = tmp_path / "b"
    result = train_both(tiny_dataset, out, settings=SETTINGS, options=RunOptions(device="cpu"))
    assert result.complete and seen == [("b", "3d", None), ("b.low", "3d-low", None)]
    bundle = sagittal.read_bundle(out)
    assert bundle.low is not None and bundle.low.plan.preprocessing.spacing_mm == (2.5, 1.8, 1.5)
    fast = bundle.metrics["fast"]
    assert fast["how"] == "low" and fast["cases"] == len(bundle.metrics["folds"]["0"]["cases"])
    chosen = fast_settings(bundle)
    assert chosen.bundle.plan == bundle.low.plan and chosen.step is None and "2.5 x 1.8 x 1.5 mm" in chosen.sentence
    scan = tiny_dataset / "imagesTs" / "case_test_0000.nii.gz"
    labels = sagittal.load(chosen.bundle, device="cpu").predict(scan, mirror=False)
    assert labels.array.shape == (1, 18, 22, 20)
    assert "the second model of this bundle" in (out / "MODEL_CARD.md").read_text()

    changed = (out / "manifest.json").read_bytes()
    again = RunOptions(device="cpu", resume=True)
    assert train_both(tiny_dataset, out, settings=SETTINGS, options=again).metrics == result.metrics
    assert (out / "manifest.json").read_bytes() == changed
    other = train(tiny_dataset, out, fold="1", options=RunOptions(device="cpu"))
    assert set(other.metrics["folds"]) == {"0", "1"}
    assert sagittal.read_bundle(out).low is not None


def test_what_has_no_coarser_configuration_is_refused_before_training(tiny_dataset: Path, tmp_path: Path) -> None:
    with pytest.raises(PlanError):
        train_both(tiny_dataset, tmp_path / "b", settings=TINY_SETTINGS, options=RunOptions(device="cpu"))
    assert not list(tmp_path.glob("b*"))


def test_a_second_model_without_scores_is_joined_and_says_so(tmp_path: Path) -> None:
    write_random_bundle(tmp_path / "b", PLAN)
    write_random_bundle(tmp_path / "low", LOW)
    metrics = attach_low(tmp_path / "b", tmp_path / "low")
    assert "fast" not in metrics
    settings = fast_settings(sagittal.read_bundle(tmp_path / "b"))
    assert "second model" in settings.sentence and "was not measured" in settings.sentence
    assert "step 0.75" in fast_settings(sagittal.read_bundle(tmp_path / "low")).sentence


def test_the_cost_is_of_cases_that_were_predicted_both_ways() -> None:
    plain = {"a": {"class_1": 0.9, "class_2": None}, "b": {"class_1": 0.7, "class_2": 0.5}}
    fast = {"a": {"class_1": 0.8, "class_2": 0.0}, "c": {"class_1": 0.1, "class_2": 0.1}}
    found = cost_of_fast(PLAN, plain, fast, "step")
    assert found is not None and found["cases"] == 1
    assert found["cost"] == {"class_1": pytest.approx(0.1), "class_2": None}
    assert found["mean_cost"] == pytest.approx(0.1) and found["mean_dice"] == pytest.approx(0.8)
    assert cost_of_fast(PLAN, plain, {}, "step") is None
    folds = {"0": {"cases": plain}, "1": {"cases": plain, "fast_cases": {"a": fast["a"]}}}
    of_folds = fast_of_folds(PLAN, folds)
    assert of_folds is not None and of_folds["cases"] == 1
