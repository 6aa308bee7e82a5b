"""Every protocol against the numbers of the tool itself, which benchmarks/oracles/protocols.py wrote."""

from __future__ import annotations

import importlib.util
import json
import math
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from sagittal.evaluation import CaseScore, ClassSet, EvaluationSettings, evaluate_case
from sagittal.evaluation.protocols import PROTOCOLS

ROOT = Path(__file__).parents[2]
GOLDEN = Path(__file__).parents[1] / "golden" / "metrics"
VALUES = (1, 2, 3)
DISTANCES = ("hd_mm", "hd95_mm", "hd95_vox", "asd_mm", "lesion_hd95_mm")
NNUNET_KEYS = {"dice": "Dice", "iou": "IoU", "tp": "TP", "fp": "FP", "fn": "FN", "tn": "TN"}


@pytest.fixture(scope="module")
def masks() -> ModuleType:
    path = ROOT / "benchmarks" / "oracles" / "protocol_masks.py"
    spec = importlib.util.spec_from_file_location("protocol_masks", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def golden(tool: str) -> Any:
    return json.loads((GOLDEN / f"protocols_{tool}.json").read_text())


def scored(masks: ModuleType, classes: ClassSet, settings: EvaluationSettings) -> dict[str, CaseScore]:
    scores = {}
    for name, *_ in masks.CASES:
        reference, prediction, spacing_mm = masks.label_maps(name)
        scores[name] = evaluate_case(reference, prediction, spacing_mm, classes, case=name, settings=settings)
    return scores


def assert_agree(ours: float | None, theirs: float | str, key: str, where: str, *, single: bool = False) -> None:
    """Compare with the precision that the task of the metric allows; the tool's NaN and infinity are None here."""
    expected = float(theirs)
    if not math.isfinite(expected):
        assert ours is None, f"{where}: {key} is {ours}, the tool has {expected}"
        return
    close = (
        pytest.approx(expected, rel=1e-6, abs=1e-12)
        if single or key in DISTANCES
        else pytest.approx(expected, abs=1e-9)
    )
    assert ours == close, f"{where}: {key}"


def assert_cases_agree(
    scores: Mapping[str, CaseScore], cases: Mapping[str, Any], names: Mapping[str, str], *, single: bool = False
) -> None:
    """Compare every number of the tool; `names` are its names of the classes and ours."""
    assert set(cases) == set(scores)
    for case, classes in cases.items():
        assert set(classes) == set(names)
        for theirs, metrics in classes.items():
            score = scores[case].classes[names[theirs]]
            for key, value in metrics.items():
                assert_agree(score.metrics[key], value, key, f"{case}, {theirs}", single=single)


@pytest.mark.parametrize(
    ("oracle", "labels"),
    [("nnunet", {str(v): v for v in VALUES}), ("nnunet_ignore", {"1": 1, "(1, 2)": [1, 2], "ignore": 3})],
)
def test_nnunets_numbers(masks: ModuleType, oracle: str, labels: dict[str, Any]) -> None:
    protocol, theirs = PROTOCOLS["nnunet"], golden("nnunet")[oracle]
    classes = protocol.classes(ClassSet.of_mapping(labels))
    scores = scored(masks, classes, EvaluationSettings(protocol="nnunet"))
    back = {name: key for key, name in NNUNET_KEYS.items()}
    cases = {
        case: {
            name: {back.get(key, key): value for key, value in metrics.items()} for name, metrics in by_class.items()
        }
        for case, by_class in theirs["cases"].items()
    }
    assert_cases_agree(scores, cases, {name: name for name in classes.names})
    for key in protocol.metrics:
        means = protocol.means(key, classes.names, list(scores.values()))
        assert_agree(means.overall, theirs["overall"][NNUNET_KEYS.get(key, key)], key, "foreground_mean")
        for name in classes.names:
            assert_agree(means.classes[name], theirs["classes"][name][NNUNET_KEYS.get(key, key)], key, name)


def test_monais_numbers(masks: ModuleType) -> None:
    protocol, theirs = PROTOCOLS["monai"], golden("monai")["monai"]
    settings = EvaluationSettings(protocol="monai", tolerances_mm=(1.0, 2.4))
    classes = protocol.classes(VALUES)
    scores = scored(masks, classes, settings)
    names = {name: name for name in classes.names}
    assert_cases_agree(scores, theirs["cases"], names, single=True)
    for key in protocol.columns(settings):
        means = protocol.means(key, classes.names, list(scores.values()))
        assert_agree(means.overall, theirs["overall"][key], key, "mean", single=True)
        for name in classes.names:
            assert_agree(means.classes[name], theirs["classes"][name][key], key, name, single=True)


@pytest.mark.parametrize(
    ("name", "names"),
    [
        ("brats2021", {region: region for region in ("WT", "TC", "ET")}),
        ("nnformer-synapse", {"1": "spleen", "2": "right kidney", "3": "left kidney"}),
        ("acdc", {"1": "RV", "2": "MYO", "3": "LV"}),
    ],
)
def test_numbers_of_tools_that_call_medpy(masks: ModuleType, name: str, names: dict[str, str]) -> None:
    classes = PROTOCOLS[name].classes(VALUES)
    scores = scored(masks, classes, EvaluationSettings(protocol=name))
    assert_cases_agree(scores, golden("medpy")[name]["cases"], names)


@pytest.mark.parametrize("tolerance_mm", [1.0, 2.4])
def test_numbers_of_surface_distance(masks: ModuleType, tolerance_mm: float) -> None:
    settings = EvaluationSettings(protocol="msd", tolerances_mm=(tolerance_mm,))
    scores = scored(masks, PROTOCOLS["msd"].classes(VALUES), settings)
    cases = {
        case: {
            name: {"dice": metrics["dice"], "nsd": metrics[f"nsd_{tolerance_mm:g}mm"]}
            for name, metrics in by_class.items()
        }
        for case, by_class in golden("surface_distance")["msd"]["cases"].items()
    }
    assert_cases_agree(scores, cases, {str(value): str(value) for value in VALUES})


def test_numbers_of_brats_2023_by_lesion(masks: ModuleType) -> None:
    classes = PROTOCOLS["brats2023"].classes(VALUES)
    settings = EvaluationSettings(protocol="brats2023")
    scores = {}
    for name, *_ in masks.LESION_CASES:
        scores[name] = evaluate_case(*masks.lesion_maps(name), (1.0, 1.0, 1.0), classes, case=name, settings=settings)
    assert_cases_agree(scores, golden("brats2023")["brats2023"]["cases"], {region: region for region in classes.names})
