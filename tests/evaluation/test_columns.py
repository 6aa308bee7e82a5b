from __future__ import annotations

import numpy as np
import pytest
from pydantic import ValidationError

from sagittal.errors import DataError
from sagittal.evaluation import ALL_METRICS, FAST_METRICS, METRICS, EvaluationSettings, evaluate_case, metrics_of
from sagittal.evaluation.protocols import PROTOCOLS


def test_by_itself_an_evaluation_has_these_columns() -> None:
    assert list(metrics_of(EvaluationSettings())) == [
        "dice",
        "iou",
        "precision",
        "recall",
        "volume_error_ml",
        "volume_error_percent",
        "hd95_mm",
        "assd_mm",
        "nsd_2mm",
    ]


def test_columns_keep_the_order_in_which_they_were_asked_for() -> None:
    settings = EvaluationSettings(
        metrics=("nsd_surfel", "hd_mm", "nsd", "dice"),
        tolerances_mm=(0.5, 3.0),
        class_tolerances_mm=(("liver", 7.0),),
    )
    assert list(metrics_of(settings)) == [
        "nsd_surfel_0.5mm",
        "nsd_surfel_3mm",
        "nsd_surfel_own",
        "hd_mm",
        "nsd_0.5mm",
        "nsd_3mm",
        "nsd_own",
        "dice",
    ]
    assert list(metrics_of(EvaluationSettings(metrics=FAST_METRICS))) == ["dice", "hd95_mm"]


def test_every_column_has_a_title_of_its_own() -> None:
    settings = EvaluationSettings(metrics=ALL_METRICS, tolerances_mm=(1.0, 2.0), class_tolerances_mm=(("a", 7.0),))
    shown = [(metric.title, metric.unit) for metric in metrics_of(settings).values()]
    assert len(set(shown)) == len(shown) == len(METRICS) + 6


@pytest.mark.parametrize("family", ["nsd", "nsd_surfel"])
def test_each_class_has_its_own_tolerance_and_the_others_the_first(family: str) -> None:
    reference, prediction = np.zeros((6, 12, 14), np.uint8), np.zeros((6, 12, 14), np.uint8)
    for value, start in ((1, 1), (2, 7)):
        reference[1:5, start : start + 4, 2:8] = value
        prediction[1:5, start : start + 4, 4:10] = value
    settings = EvaluationSettings(metrics=(family,), tolerances_mm=(1.0, 9.0), class_tolerances_mm=(("far", 2.0),))
    scores = evaluate_case(reference, prediction, (1.0, 1.0, 1.0), {"near": 1, "far": 2}, settings=settings).classes
    assert scores["near"].metrics[f"{family}_own"] == scores["near"].metrics[f"{family}_1mm"]
    assert scores["far"].metrics[f"{family}_own"] == pytest.approx(1.0)
    near = scores["near"].metrics[f"{family}_1mm"]
    assert near is not None
    assert 0 < near < 1


def test_a_tolerance_of_a_class_that_is_not_scored_is_refused() -> None:
    labels = np.ones((2, 3, 4), np.uint8)
    settings = EvaluationSettings(class_tolerances_mm=(("livre", 7.0),))
    with pytest.raises(DataError, match=r"tolerance of 'livre', which is not scored\. Did you mean 'liver'"):
        evaluate_case(labels, labels, (1.0, 1.0, 1.0), {"liver": 1}, settings=settings)


@pytest.mark.parametrize("name", PROTOCOLS)
def test_a_protocol_brings_its_own_columns(name: str) -> None:
    columns = metrics_of(EvaluationSettings(protocol=name))
    assert columns
    assert [(key, metric.title) for key, metric in columns.items()] == [
        (key, metric.title) for key, metric in PROTOCOLS[name].metrics.items()
    ]


def test_unknown_protocol_is_refused() -> None:
    with pytest.raises(DataError, match=r"protocol 'nnunets' is unknown\. Did you mean 'nnunet'"):
        metrics_of(EvaluationSettings(protocol="nnunets"))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"metrics": ("dise",)}, "metric 'dise' is unknown. Did you mean 'dice'"),
        ({"metrics": ()}, "at least one name"),
        ({"metrics": ("dice", "iou", "dice")}, "metrics: dice appears more than once"),
        ({"tolerances_mm": (0.0,)}, "tolerances must be positive"),
        ({"tolerances_mm": (-1.0,)}, "tolerances must be positive"),
        ({"tolerances_mm": (1.0, 1.0)}, "tolerances_mm: 1 appears more than once"),
        ({"tolerances_mm": (2.0, 2.0000001)}, "tolerances_mm: 2 appears more than once"),
        ({"tolerances_mm": ()}, "an NSD needs at least one"),
        ({"class_tolerances_mm": (("a", 0.0),)}, "tolerances must be positive"),
        ({"class_tolerances_mm": (("a", 1.0), ("a", 2.0))}, "class_tolerances_mm: a appears more than once"),
    ],
)
def test_settings_that_make_no_sense_are_refused(given: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        EvaluationSettings.model_validate(given)


def test_settings_survive_json() -> None:
    settings = EvaluationSettings(metrics=ALL_METRICS, tolerances_mm=(0.5, 2.0), class_tolerances_mm=(("a", 7.0),))
    assert EvaluationSettings.from_json(settings.to_json()) == settings
    assert EvaluationSettings(metrics=("dice",), tolerances_mm=()).metrics == ("dice",)
