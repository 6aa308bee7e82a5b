"""The words and rows of a report's first screen."""

from __future__ import annotations

import numpy as np
import pytest

from sagittal.evaluation import (
    CaseScore,
    ClassScore,
    ClassSet,
    Evaluation,
    EvaluationSettings,
    Failure,
    Metric,
    evaluate_case,
    metrics_of,
)
from sagittal.report.main_columns import (
    badness,
    distance_metric,
    headline_metric,
    in_words,
    main_metrics,
    plotted_metrics,
)
from sagittal.report.summary import (
    MAX_LOOK,
    cases_to_look_at,
    glance,
    millilitres,
    plain_words,
    ranked_cases,
    summary_facts,
)

CLASSES = ClassSet.of_mapping({"head": 1, "tail": 2})
SPACING = (3.0, 1.0, 1.0)


def labels() -> np.ndarray:
    found = np.zeros((6, 9, 12), np.uint8)
    found[1:4, 2:5, 3:9], found[1:4, 5:8, 3:9] = 1, 2
    return found


def of(predictions: dict[str, np.ndarray], settings: EvaluationSettings | None = None, **more: object) -> Evaluation:
    settings = settings or EvaluationSettings()
    scores = [
        evaluate_case(labels(), prediction, SPACING, CLASSES, case=case, settings=settings)
        for case, prediction in predictions.items()
    ]
    return Evaluation.of_cases(CLASSES, scores, settings=settings, **more)  # type: ignore[arg-type]


def without(value: int) -> np.ndarray:
    return np.where(labels() == value, 0, labels()).astype(np.uint8)


def told(evaluation: Evaluation, **options: object) -> dict[str, str]:
    return {one.about: one.text for one in plain_words(evaluation, **options)}  # type: ignore[arg-type]


def test_perfect_predictions_are_told_plainly() -> None:
    words = told(of({"a": labels(), "b": labels()}), floor=0.6, floor_note="the mean label map")
    assert words == {
        "Scored": "2 cases in 2 classes.",
        "Found": "4 of 4 structures in the references; none was missed entirely, and no false alarm.",
        "Overlap": "The mean Dice is 1.000; over other cases of the same kind it would lie between 1.000 and 1.000 "
        "(95 % interval). That is 0.400 above the floor of 0.600 (the mean label map).",
        "Outline": "In the typical structure 95 % of the outline lies within 0.00 mm of its counterpart (HD95, median "
        "of the 4 found). The largest is 0.00 mm, in b (tail).",
        "Volume": "The typical error is between 0.00 mL (head, 0.0 %) and 0.00 mL (head, 0.0 %). Over all cases "
        "together volumes are neither too large nor too small.",
    } | {"Volume": words["Volume"]}
    assert words["Volume"].endswith("neither too large nor too small.")


def test_misses_false_alarms_and_failures_are_counted_and_named() -> None:
    alarm = evaluate_case(without(2), labels(), SPACING, CLASSES, case="alarm")
    miss = evaluate_case(labels(), without(2), SPACING, CLASSES, case="miss")
    evaluation = Evaluation.of_cases(CLASSES, [alarm, miss], failures=[Failure(case="x", code="y", message="z")])
    words = told(evaluation, floor=0.6)
    assert words["Scored"] == "2 cases in 2 classes. 1 case could not be scored."
    assert words["Found"] == "2 of 3 structures in the references; 1 missed entirely, and 1 false alarm."
    assert "0.100 below the floor of 0.600" in words["Overlap"]
    assert "Strongest class: head (1.000); weakest: tail (0.000)." in words["Overlap"]
    looks = cases_to_look_at(evaluation)
    assert [look.case for look in looks] == ["miss", "alarm"]
    assert looks[0].why == "tail missed entirely; mean Dice 0.500"
    assert looks[1].why.startswith("tail found where there is none;")


def test_without_any_structure_there_is_nothing_to_tell() -> None:
    nothing = np.zeros((6, 9, 12), np.uint8)
    score = evaluate_case(nothing, nothing, SPACING, CLASSES, case="a")
    words = told(Evaluation.of_cases(CLASSES, [score]))
    assert list(words) == ["Scored", "Found"]
    assert "nothing to compare" in words["Found"]
    assert list(told(Evaluation.of_cases(CLASSES, []))) == ["Scored"]
    assert cases_to_look_at(Evaluation.of_cases(CLASSES, [score])) == ()


def test_patients_are_told_where_cases_repeat_them() -> None:
    scores = [
        evaluate_case(labels(), labels(), SPACING, CLASSES, case=case).replace(patient=patient)
        for case, patient in (("a", "p"), ("b", "p"), ("c", "q"))
    ]
    assert told(Evaluation.of_cases(CLASSES, scores))["Scored"] == "3 cases of 2 patients in 2 classes."


def test_rows_of_classes_tell_typical_errors() -> None:
    half = labels()
    half[1] = 0  # a third of either class
    head, tail = glance(of({"a": labels(), "b": half, "c": without(2)}))
    assert (head.present, head.found, head.false_alarms) == (3, 3, 0)
    assert (tail.present, tail.found) == (3, 2)
    volume = 3 * 3 * 6 * 3.0 / 1000
    assert head.volume_error_ml == pytest.approx(0.0)
    assert tail.volume_error_ml == pytest.approx(volume / 3)
    assert tail.volume_error_percent == pytest.approx(100 / 3)
    assert tail.headline.mean == pytest.approx((1 + 0.8 + 0) / 3)


def test_at_most_five_cases_to_look_at_and_two_of_them_without_a_miss() -> None:
    cases = {f"miss {number}": without(2) for number in range(6)}
    cases |= {"good": labels(), "moved": np.roll(labels(), 2, axis=2), "shifted": np.roll(labels(), 1, axis=2)}
    looks = cases_to_look_at(of(cases))
    assert len(looks) == MAX_LOOK
    assert [look.case for look in looks][3:] == ["moved", "shifted"]


def test_ranking_follows_the_headline_metric_whatever_it_is() -> None:
    cases = {"good": labels(), "moved": np.roll(labels(), 2, axis=2), "bad": np.roll(labels(), 4, axis=2)}
    for metrics in (("dice", "hd95_mm"), ("assd_mm",)):
        evaluation = of(cases, EvaluationSettings(metrics=metrics))
        assert [case.case for case in ranked_cases(evaluation)] == ["bad", "moved", "good"]
    larger = labels()
    larger[4] = larger[3]
    evaluation = of(
        {"good": labels(), "less": without(2), "more": larger}, EvaluationSettings(metrics=("volume_error_ml",))
    )
    assert [case.case for case in ranked_cases(evaluation)][-1] == "good"


def columns(*names: str, **options: object) -> tuple[str, ...]:
    return main_metrics(metrics_of(EvaluationSettings(metrics=names, **options)))  # type: ignore[arg-type]


def test_main_columns_are_four_of_different_kinds() -> None:
    default = metrics_of(EvaluationSettings())
    assert main_metrics(default) == ("dice", "hd95_mm", "nsd_2mm", "volume_error_ml")
    assert plotted_metrics(default) == ("dice", "hd95_mm", "nsd_2mm", "volume_error_percent")
    assert columns("dice", "hd95_mm") == ("dice", "hd95_mm")
    assert columns("iou", "assd_mm", "kappa") == ("iou", "assd_mm", "kappa")
    assert columns("volume_error_ml") == ("volume_error_ml",)
    assert columns("nsd", "hd_mm", tolerances_mm=(1.0, 3.0)) == ("nsd_1mm", "hd_mm", "nsd_3mm")
    assert headline_metric(default) == "dice"
    assert distance_metric(metrics_of(EvaluationSettings(metrics=("dice",)))) is None


def test_badness_grows_with_what_is_worse() -> None:
    metrics = metrics_of(EvaluationSettings())
    assert badness(0.2, metrics["dice"]) > badness(0.9, metrics["dice"])
    assert badness(9.0, metrics["hd95_mm"]) > badness(1.0, metrics["hd95_mm"])
    assert badness(-3.0, metrics["volume_error_ml"]) > badness(1.0, metrics["volume_error_ml"])


def test_numbers_in_words() -> None:
    metric: Metric = metrics_of(EvaluationSettings())["hd95_mm"]
    assert in_words(1.234, metric) == "1.23 mm"
    assert in_words(None, metric) == "–"
    assert [millilitres(value) for value in (0.0, 0.0123, 1.234, 123.4)] == ["0.00", "0.0123", "1.23", "123"]


def test_settings_tell_protocol_tolerances_and_lesions() -> None:
    settings = EvaluationSettings(tolerances_mm=(1.0, 2.5), class_tolerances_mm=(("tail", 3.0),))
    facts = summary_facts(of({"a": labels()}, settings))
    assert facts["Protocol"] == "sagittal"
    assert facts["Tolerances (mm)"] == "1, 2.5"
    assert facts["Tolerances of classes (mm)"] == "tail 3"
    assert "nsd_2.5mm" in str(facts["Metrics"])


def test_a_class_score_with_other_volumes_is_told_with_its_sign() -> None:
    settings = EvaluationSettings(metrics=("dice",))
    score = ClassScore(reference_ml=10.0, prediction_ml=12.0, metrics={"dice": 0.9})
    both = {"head": score, "tail": score}
    case = CaseScore(case="a", shape=(1, 2, 3), spacing_mm=SPACING, classes=both)
    words = told(Evaluation.of_cases(CLASSES, [case], settings=settings))
    assert words["Volume"].endswith("Over all cases together volumes are 20 % too large.")
    assert "Outline" not in words
