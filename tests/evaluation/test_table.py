from __future__ import annotations

import csv
import io
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sagittal.errors import DataError, PlanError
from sagittal.evaluation import CaseScore, ClassScore, ClassSet, Evaluation, EvaluationSettings, Failure
from sagittal.evaluation.bootstrap import bootstrap_means

CLASSES = ClassSet.of_mapping({"a": 1, "b": 2})
SETTINGS = EvaluationSettings(metrics=("dice", "hd95_mm"))


def case(name: str, *dices: float | None, hd95_mm: float | None = 1.5) -> CaseScore:
    scores = {
        label: ClassScore(
            reference_ml=1.0, prediction_ml=0.0 if dice == 0.0 else 2.0, metrics={"dice": dice, "hd95_mm": hd95_mm}
        )
        for label, dice in zip(CLASSES.names, dices, strict=True)
    }
    return CaseScore(case=name, shape=(3, 4, 5), spacing_mm=(1.0, 2.0, 3.0), classes=scores)


def test_mean_is_over_classes_of_means_over_cases() -> None:
    # Class b is in one case only: it still weighs as much as class a.
    evaluation = Evaluation.of_cases(
        CLASSES, [case("x", 0.2, None), case("y", 0.4, None), case("z", 0.6, 1.0)], settings=SETTINGS
    )
    assert evaluation.summary.classes["a"].metrics["dice"].mean == pytest.approx(0.4)
    assert evaluation.mean_dice == pytest.approx((0.4 + 1.0) / 2)
    assert evaluation.summary.classes["b"].metrics["dice"].n == 1
    assert evaluation.summary.classes["b"].metrics["dice"].undefined == 2


def test_a_miss_stays_in_the_mean() -> None:
    evaluation = Evaluation.of_cases(CLASSES, [case("x", 0.8, 0.8), case("y", 0.0, 0.8)], settings=SETTINGS)
    assert evaluation.summary.classes["a"].metrics["dice"].mean == pytest.approx(0.4)
    assert evaluation.summary.classes["a"].missed == 1
    assert evaluation.summary.classes["b"].missed == 0


def test_class_that_is_nowhere_is_left_out_of_the_mean() -> None:
    evaluation = Evaluation.of_cases(CLASSES, [case("x", 0.8, None, hd95_mm=None)], settings=SETTINGS)
    assert evaluation.mean_dice == pytest.approx(0.8)
    assert evaluation.summary.mean["hd95_mm"] is None


def test_no_cases_give_no_mean() -> None:
    failure = Failure(case="x", code="grid_mismatch", message="no")
    evaluation = Evaluation.of_cases(CLASSES, [], settings=SETTINGS, failures=[failure])
    assert evaluation.mean_dice is None
    assert (evaluation.summary.cases, evaluation.summary.failed) == (0, 1)


def test_cases_are_ordered_by_name_and_ranked_by_dice() -> None:
    evaluation = Evaluation.of_cases(
        CLASSES, [case("c", 0.5, 0.5), case("a", None, None), case("b", 0.9, None)], settings=SETTINGS
    )
    assert [score.case for score in evaluation.cases] == ["a", "b", "c"]
    assert [score.case for score in evaluation.ranked] == ["c", "b"]


values = st.none() | st.floats(0, 1)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(st.lists(st.tuples(values, values), max_size=4))
def test_json_and_csv_keep_every_number(dices: list[tuple[float | None, float | None]]) -> None:
    evaluation = Evaluation.of_cases(
        CLASSES, [case(str(n), *pair) for n, pair in enumerate(dices)], settings=SETTINGS, warnings=["w"]
    )
    assert Evaluation.from_json(evaluation.to_json()) == evaluation
    rows = list(csv.DictReader(io.StringIO(evaluation.to_csv())))
    assert [(row["case"], row["class"]) for row in rows] == [(str(n), c) for n in range(len(dices)) for c in "ab"]
    read = [float(row["dice"]) if row["dice"] else None for row in rows]
    assert read == [dice for pair in dices for dice in pair]


def test_undefined_is_null_in_json() -> None:
    document = json.loads(Evaluation.of_cases(CLASSES, [case("x", None, 0.5)], settings=SETTINGS).to_json())
    assert document["schema_version"] == 2
    assert document["cases"][0]["classes"]["a"]["metrics"]["dice"] is None


def test_newer_schema_is_refused() -> None:
    text = (
        Evaluation.of_cases(CLASSES, [], settings=SETTINGS)
        .to_json()
        .replace('"schema_version": 2', '"schema_version": 3')
    )
    with pytest.raises(PlanError, match="schema_version"):
        Evaluation.from_json(text)


def test_results_of_the_first_schema_are_read_as_dice_and_hd95() -> None:
    evaluation = Evaluation.of_cases(CLASSES, [case("x", 0.25, None), case("y", 0.75, 1.0)], settings=SETTINGS)
    tree = json.loads(evaluation.to_json())
    tree["schema_version"] = 1
    del tree["settings"], tree["summary"]["low"], tree["summary"]["high"]
    for summary in tree["summary"]["classes"].values():
        for values in summary["metrics"].values():
            del values["std"], values["low"], values["high"]
    old = Evaluation.from_json(json.dumps(tree))
    assert tuple(old.metrics) == ("dice", "hd95_mm")
    assert old.cases == evaluation.cases
    assert old.mean_dice == evaluation.mean_dice == 0.75
    assert old.to_csv() == evaluation.to_csv()
    assert old.summary.classes["a"].metrics["dice"].std is None
    assert Evaluation.from_json(old.to_json()) == old


@pytest.mark.parametrize("text", ["[1, 2]", "{", "nonsense", '{"schema_version": 1}'])
def test_what_is_no_evaluation_is_refused(text: str) -> None:
    with pytest.raises(PlanError, match=r"metrics\.json: not valid"):
        Evaluation.from_json(text, source="metrics.json")


def test_a_case_that_was_scored_with_other_settings_is_refused() -> None:
    with pytest.raises(DataError, match=r"x: class 'a' has no value for iou, nsd_2mm"):
        Evaluation.of_cases(CLASSES, [case("x", 0.5, 0.5)], settings=EvaluationSettings(metrics=("dice", "iou", "nsd")))


def test_spread_and_interval_stand_beside_the_mean() -> None:
    dices = (0.5, 0.6, 0.8, 0.9, 0.7)
    evaluation = Evaluation.of_cases(CLASSES, [case(str(n), d, 1 - d) for n, d in enumerate(dices)], settings=SETTINGS)
    found = evaluation.summary.classes["a"].metrics["dice"]
    assert found.std == pytest.approx(np.std(dices, ddof=1))
    expected = bootstrap_means(np.array([dices]).T).columns[0]
    assert (found.low, found.high) == (expected.low, expected.high)
    assert found.low is not None and found.mean is not None and found.high is not None
    assert found.low < found.mean < found.high
    # Class b has what class a lacks: their mean is the same in every case, and its interval has no width.
    assert evaluation.summary.low["dice"] == pytest.approx(0.5)
    assert evaluation.summary.high["dice"] == pytest.approx(0.5)


def test_scans_of_one_patient_are_one_piece_of_evidence() -> None:
    cases = [case(str(n), dice, 0.5).replace(patient="anna") for n, dice in enumerate((0.5, 0.6, 0.8))]
    found = Evaluation.of_cases(CLASSES, cases, settings=SETTINGS).summary.classes["a"].metrics["dice"]
    assert (found.low, found.high, found.n) == (None, None, 3)
    more = [*cases, case("9", 0.9, 0.5).replace(patient="bert")]
    found = Evaluation.of_cases(CLASSES, more, settings=SETTINGS).summary.classes["a"].metrics["dice"]
    assert found.low is not None


def test_a_case_named_like_a_patient_is_not_that_patient() -> None:
    cases = [case("anna", 0.4, 0.5), case("x", 0.6, 0.5).replace(patient="anna")]
    found = Evaluation.of_cases(CLASSES, cases, settings=SETTINGS).summary.classes["a"].metrics["dice"]
    assert found.low is not None
