"""Distances and overlaps against the numbers of other tools, which the scripts in benchmarks/oracles wrote."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from sagittal.evaluation import METRICS, EvaluationSettings, MaskPair, metrics_of
from sagittal.evaluation.surfels import corner_codes, surfel_distances_mm

ORACLES = Path(__file__).parents[2] / "benchmarks" / "oracles"
GOLDEN = Path(__file__).parents[1] / "golden" / "metrics"
DEEPMIND: dict[str, Any] = json.loads((GOLDEN / "surface_elements.json").read_text())["pairs"]
MONAI: dict[str, Any] = json.loads((GOLDEN / "monai_metrics.json").read_text())["pairs"]
EMPTY = ("missed", "false_alarm")


@pytest.fixture(scope="module")
def masks() -> ModuleType:
    spec = importlib.util.spec_from_file_location("metric_masks", ORACLES / "metric_masks.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def mask_pair(masks: ModuleType, name: str) -> MaskPair:
    reference, prediction, spacing = masks.pair(name)
    return MaskPair(reference=reference, prediction=prediction, spacing_mm=spacing, image_shape=reference.shape)


def test_all_pairs_are_compared(masks: ModuleType) -> None:
    assert set(masks.PAIRS) == set(DEEPMIND) == set(MONAI)


@pytest.mark.parametrize("name", DEEPMIND)
def test_surface_elements_equal_deepminds(masks: ModuleType, name: str) -> None:
    found, expected = mask_pair(masks, name).surfels, DEEPMIND[name]
    if name in EMPTY:
        # Theirs are 0 too where one mask is empty, for no distance exists that could be within the tolerance.
        assert found is None
        assert set(expected["nsd"].values()) == {0.0}
        return
    assert found is not None
    assert [found.reference_mm2.sum(), found.prediction_mm2.sum()] == pytest.approx(expected["area_mm2"], rel=1e-12)
    assert found.hd95_mm == pytest.approx(expected["hd95_mm"], abs=1e-9)
    for tolerance, value in expected["nsd"].items():
        assert found.nsd(float(tolerance)) == pytest.approx(value, abs=1e-12)


@pytest.mark.parametrize("name", [name for name, expected in DEEPMIND.items() if "reference" in expected])
def test_every_surface_element_has_deepminds_area_and_distance(masks: ModuleType, name: str) -> None:
    found = surfel_distances_mm(*masks.pair(name))
    assert found is not None
    sides = {
        "reference": (found.from_reference_mm, found.reference_mm2),
        "prediction": (found.from_prediction_mm, found.prediction_mm2),
    }
    for side, (distances, areas) in sides.items():
        expected = np.array(DEEPMIND[name][side])
        order = np.lexsort((areas.round(9), distances.round(9)))
        theirs = np.lexsort((expected[:, 1].round(9), expected[:, 0].round(9)))
        np.testing.assert_allclose(distances[order], expected[theirs, 0], rtol=0, atol=1e-9)
        np.testing.assert_allclose(areas[order], expected[theirs, 1], rtol=0, atol=1e-9)


def test_noise_has_elements_of_every_shape(masks: ModuleType) -> None:
    # Otherwise the comparison above would leave out some of the 254.
    reference, prediction, _ = masks.pair("noise")
    codes = np.concatenate([corner_codes(mask).ravel() for mask in (reference, prediction)])
    assert len(np.unique(codes)) == 256


@pytest.mark.parametrize("name", MONAI)
def test_distances_and_overlaps_equal_monais_within_its_float32(masks: ModuleType, name: str) -> None:
    pair, expected = mask_pair(masks, name), MONAI[name]
    for key in ("dice", "iou"):
        assert METRICS[key].compute(pair) == pytest.approx(expected[key] if expected[key] != "nan" else 0.0, rel=1e-6)
    if name in EMPTY:
        return
    for key in ("hd_mm", "hd95_mm", "assd_mm"):
        assert METRICS[key].compute(pair) == pytest.approx(expected[key], rel=1e-6, abs=1e-9)
    tolerances = tuple(float(tolerance) for tolerance in expected["nsd"])
    metrics = metrics_of(EvaluationSettings(metrics=("nsd",), tolerances_mm=tolerances))
    for (key, metric), value in zip(metrics.items(), expected["nsd"].values(), strict=True):
        assert metric.compute(pair) == pytest.approx(value, rel=1e-6), key


@pytest.mark.parametrize("name", EMPTY)
def test_where_a_mask_is_empty_monai_loses_the_case_and_we_do_not(masks: ModuleType, name: str) -> None:
    pair = mask_pair(masks, name)
    assert MONAI[name]["hd95_mm"] in ("nan", "inf")
    for key in ("hd_mm", "hd95_mm", "assd_mm"):
        assert METRICS[key].compute(pair) == pair.diagonal_mm
