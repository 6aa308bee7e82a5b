"""Comparisons put together: what is paired, what is refused, and that every number is the one of its own function."""

from __future__ import annotations

import csv
import io

import numpy as np
import pytest
from scipy import stats

from sagittal.errors import DataError
from sagittal.evaluation import CaseScore, ClassScore, ClassSet, Evaluation, EvaluationSettings, Failure, diagonal_mm
from sagittal.evaluation.comparison import Comparison, ComparisonSettings, compare_evaluations
from sagittal.evaluation.joining import join_evaluations

CLASSES = ClassSet.of_mapping({"a": 1, "b": 2})
SETTINGS = EvaluationSettings(metrics=("dice", "volume_error_ml", "hd95_mm"))
FEW = ComparisonSettings(resamples=300, flips=500, draws=100, simulations=200)
Dices = tuple[float | None, float | None]


def score(name: str, dices: Dices, *, reference_ml: float = 2.0, patient: str | None = None) -> CaseScore:
    """A case; a Dice of None is a class that neither mask has, 0 with `reference_ml` 0 a false alarm."""
    classes = {}
    for label, dice in zip(CLASSES.names, dices, strict=True):
        absent = dice is None
        reference = 0.0 if absent else reference_ml
        predicted = 0.0 if absent or (dice == 0.0 and reference_ml) else 3.0
        metrics = {
            "dice": dice,
            "volume_error_ml": None if absent else predicted - reference,
            "hd95_mm": None if dice is None else 10.0 * (1 - dice),
        }
        classes[label] = ClassScore(reference_ml=reference, prediction_ml=predicted, metrics=metrics)
    return CaseScore(case=name, shape=(3, 4, 5), spacing_mm=(1.0, 2.0, 3.0), classes=classes, patient=patient)


def method(dices: dict[str, Dices], **options: object) -> Evaluation:
    scores = [score(name, pair) for name, pair in dices.items()]
    return Evaluation.of_cases(CLASSES, scores, settings=SETTINGS, **options)  # type: ignore[arg-type]


def random_methods(count: int = 12, methods: str = "xyz") -> dict[str, Evaluation]:
    rng = np.random.default_rng(0)
    hard = rng.uniform(0.4, 0.8, (count, 2))
    return {
        name: method(
            {
                f"case_{row:03}": tuple(np.clip(hard[row] + rng.normal(0.08 * place, 0.03, 2), 0.01, 1).tolist())
                for row in range(count)
            }
        )
        for place, name in enumerate(methods)
    }


@pytest.fixture(scope="module")
def compared() -> Comparison:
    return compare_evaluations(random_methods(), statistics=FEW)


def test_every_number_is_that_of_its_own_test(compared: Comparison) -> None:
    methods = random_methods()
    dices = {
        name: np.array([[case.classes[label].metrics["dice"] for label in "ab"] for case in item.cases], dtype=float)
        for name, item in methods.items()
    }
    for column, contest in enumerate((*compared.metrics["dice"].classes.values(), compared.metrics["dice"].mean)):
        assert [(pair.first, pair.second) for pair in contest.pairs] == [("x", "y"), ("x", "z"), ("y", "z")]
        for pair in contest.pairs:
            difference = dices[pair.first] - dices[pair.second]
            difference = difference.mean(1) if column == 2 else difference[:, column]
            assert pair.mean == pytest.approx(difference.mean())
            assert pair.low is not None and pair.high is not None and pair.low < difference.mean() < pair.high
            assert pair.wilcoxon.p == pytest.approx(stats.wilcoxon(difference).pvalue)
            flipped = stats.permutation_test((difference,), np.mean, permutation_type="samples", n_resamples=np.inf)
            assert pair.permutation.p == pytest.approx(flipped.pvalue, abs=0.05)
            assert pair.cohen_dz == pytest.approx(difference.mean() / difference.std(ddof=1))
            assert pair.wilcoxon_holm >= pair.wilcoxon.p and pair.permutation_holm >= pair.permutation.p
            assert pair.better == pair.second
            assert pair.equivalence is not None and not pair.equivalence.equivalent
            assert pair.power is not None and pair.power.standard_deviation == pytest.approx(difference.std(ddof=1))
            assert (pair.power.to_show[0].simulated is not None) == (column == 2)


def test_means_are_those_of_each_evaluation_where_nothing_was_set(compared: Comparison) -> None:
    for name, evaluation in random_methods().items():
        found = compared.metrics["dice"]
        assert found.mean.methods[name].mean == pytest.approx(evaluation.mean_dice)
        summary = evaluation.summary.classes["b"].metrics["dice"]
        own = found.classes["b"].methods[name]
        assert (own.mean, own.median, own.std, own.n) == pytest.approx((summary.mean, summary.median, summary.std, 12))
    assert compared.metrics["dice"].mean.best == "z" == compared.metrics["hd95_mm"].mean.best
    assert compared.metrics["dice"].mean.rankings[0].ranks == {"x": 3, "y": 2, "z": 1}


def test_margin_and_power_are_for_metrics_between_0_and_1(compared: Comparison) -> None:
    pair = compared.metrics["hd95_mm"].mean.pairs[0]
    assert pair.equivalence is None and pair.power is None
    assert pair.mean == pytest.approx(0.8, abs=0.3)
    assert pair.better == "y"


def test_signed_errors_are_compared_by_their_size() -> None:
    below = method({"p": (0.5, 0.5), "q": (0.5, 0.5)})
    above = Evaluation.of_cases(CLASSES, [score(name, (0.0, 0.0)) for name in "pq"], settings=SETTINGS)
    found = compare_evaluations({"one": below, "other": above}, statistics=FEW).metrics["volume_error_ml"]
    assert found.mean.methods["one"].mean == 1.0
    assert found.mean.methods["other"].mean == 2.0
    assert found.mean.best == "one"


def test_json_and_csv_hold_everything(compared: Comparison) -> None:
    assert Comparison.from_json(compared.to_json()) == compared
    rows = list(csv.DictReader(io.StringIO(compared.to_csv())))
    assert len(rows) == 3 * 3 * 3
    first = compared.metrics["dice"].mean.pairs[0]
    assert rows[0]["class"] == "(mean over classes)"
    assert float(rows[0]["wilcoxon_p_holm"]) == first.wilcoxon_holm
    assert first.power is not None
    assert [rows[0]["patients_80"], rows[0]["patients_90"]] == [str(item.patients) for item in first.power.to_show]
    values = list(csv.DictReader(io.StringIO(compared.values_csv())))
    assert len(values) == 12 * 2 * 3
    assert float(values[1]["dice"]) == compared.metrics["dice"].values["a"]["y"][0]


def test_same_seed_same_comparison(compared: Comparison) -> None:
    assert compare_evaluations(random_methods(), statistics=FEW) == compared


def test_order_of_methods_turns_signs_and_nothing_else(compared: Comparison) -> None:
    turned = compare_evaluations(dict(reversed(random_methods().items())), statistics=FEW)
    one, other = compared.metrics["dice"].mean.pairs[0], turned.metrics["dice"].mean.pairs[2]
    assert (one.first, one.second) == (other.second, other.first)
    assert one.mean == pytest.approx(-other.mean)  # type: ignore[operator]
    assert (one.wilcoxon.p, one.better, one.rank_biserial) == (other.wilcoxon.p, other.better, -other.rank_biserial)


def test_a_case_that_one_method_lacks_is_refused_by_name_and_reason() -> None:
    failure = Failure(case="q", code="grid_mismatch", message="grids differ")
    whole = method({"p": (0.8, 0.8), "q": (0.7, 0.7), "r": (0.7, 0.7)})
    part = method({"p": (0.9, 0.9)}, failures=[failure])
    with pytest.raises(
        DataError, match=r"part lacks 2 of 3 cases: q, r \(q: grids differ\).*--missing worst"
    ) as caught:
        compare_evaluations({"whole": whole, "part": part})
    assert caught.value.code == "missing_cases"


def test_a_missing_case_may_count_as_worst() -> None:
    whole, part = method({"p": (0.8, None), "q": (0.7, 0.7)}), method({"q": (0.9, 0.9)})
    found = compare_evaluations({"whole": whole, "part": part}, statistics=FEW.replace(missing="worst"))
    assert found.missing == {"part": ("p",)}
    assert found.metrics["dice"].values["a"] == {"whole": (0.8, 0.7), "part": (0.0, 0.9)}
    # No method says anything about b in p: it stays undefined for both.
    assert found.metrics["dice"].values["b"] == {"whole": (None, 0.7), "part": (None, 0.9)}
    # The image's diagonal, and the error of an empty prediction.
    assert found.metrics["hd95_mm"].values["a"]["part"][0] == diagonal_mm((3, 4, 5), (1.0, 2.0, 3.0))
    assert found.metrics["volume_error_ml"].values["a"]["part"][0] == 2.0


def test_a_false_alarm_counts_against_the_method_that_kept_quiet() -> None:
    quiet = method({"p": (0.8, None), "q": (0.7, 0.7)})
    alarms = Evaluation.of_cases(
        CLASSES,
        [
            CaseScore(
                case="p",
                shape=(3, 4, 5),
                spacing_mm=(1.0, 2.0, 3.0),
                classes={
                    "a": score("p", (0.9, None)).classes["a"],
                    "b": ClassScore(
                        reference_ml=0.0,
                        prediction_ml=1.0,
                        metrics={"dice": 0.0, "volume_error_ml": 1.0, "hd95_mm": 17.0},
                    ),
                },
            ),
            score("q", (0.9, 0.9)),
        ],
        settings=SETTINGS,
    )
    found = compare_evaluations({"quiet": quiet, "alarms": alarms}, statistics=FEW)
    assert found.metrics["dice"].values["b"] == {"quiet": (1.0, 0.7), "alarms": (0.0, 0.9)}
    assert found.metrics["hd95_mm"].values["b"]["quiet"][0] == 0.0
    assert found.perfect == 3
    assert "3 values were set to perfect" in found.notes[0] and "its means are others" in found.notes[0]
    assert compare_evaluations({"quiet": quiet, "again": quiet}, statistics=FEW).notes == ()


def test_scans_of_a_patient_are_one_piece_of_evidence() -> None:
    methods = random_methods(12, "xy")
    whose = {f"case_{row:03}": f"patient_{row // 3}" for row in range(12)}
    found = compare_evaluations(methods, statistics=FEW, patients=whose)
    assert found.patients[:4] == ("patient_0", "patient_0", "patient_0", "patient_1")
    pair = found.metrics["dice"].mean.pairs[0]
    assert (pair.patients, pair.wilcoxon.n, pair.permutation.flips) == (4, 4, 16)
    assert pair.wilcoxon.p == 0.125
    assert "With 4 patients and 1 pair of methods no rank or permutation test" in found.warnings[-1]


def test_patients_of_the_scores_are_used_where_none_are_given() -> None:
    scores = [score(name, (0.5, 0.5), patient="p") for name in ("r", "s")]
    one = Evaluation.of_cases(CLASSES, scores, settings=SETTINGS)
    assert compare_evaluations({"one": one, "two": one}, statistics=FEW).patients == ("p", "p")
    given = compare_evaluations({"one": one, "two": one}, statistics=FEW, patients={"r": "q"})
    assert given.patients == ("q", "p")


def test_equal_methods_are_equal_and_none_is_better() -> None:
    one = method(dict.fromkeys("pqrstuv", (0.8, 0.6)))
    pair = compare_evaluations({"one": one, "two": one}, statistics=FEW).metrics["dice"].mean.pairs[0]
    assert (pair.mean, pair.wilcoxon.p, pair.permutation.p, pair.better) == (0.0, 1.0, 1.0, None)
    assert pair.equivalence is not None and pair.equivalence.equivalent
    assert pair.power is None


def test_one_method_is_no_comparison() -> None:
    with pytest.raises(DataError, match="Expected two or more") as caught:
        compare_evaluations({"one": method({"p": (0.5, 0.5)})})
    assert caught.value.code == "usage"


def test_no_common_cases_are_told_with_what_there_is() -> None:
    methods = {"one": method({"p": (0.5, 0.5)}), "two": method({"q": (0.5, 0.5)}), "three": method({})}
    with pytest.raises(DataError, match=r"no case in common.*one: p; two: q; three: none") as caught:
        compare_evaluations(methods, statistics=FEW.replace(missing="worst"))
    assert caught.value.code == "no_common_cases"


def test_other_classes_and_other_settings_are_refused() -> None:
    one = method({"p": (0.5, 0.5)})
    other = Evaluation.of_cases(ClassSet.of_mapping({"a": 1, "b": 3}), one.cases, settings=SETTINGS)
    with pytest.raises(DataError, match=r"classes differ: one has a \[1\], b \[2\]; two has a \[1\], b \[3\]"):
        compare_evaluations({"one": one, "two": other})
    fewer = Evaluation.of_cases(CLASSES, one.cases, settings=EvaluationSettings(metrics=("dice",)))
    with pytest.raises(DataError, match="other settings"):
        compare_evaluations({"one": one, "two": fewer})


def test_other_references_are_refused() -> None:
    one = method({"p": (0.5, 0.5)})
    changed = Evaluation.of_cases(CLASSES, [score("p", (0.5, 0.5), reference_ml=2.1)], settings=SETTINGS)
    with pytest.raises(
        DataError, match=r"p: one and two were scored against different references.*2 ml against 2.1 ml"
    ):
        compare_evaluations({"one": one, "two": changed})
    moved = Evaluation.of_cases(CLASSES, [one.cases[0].replace(shape=(3, 4, 6))], settings=SETTINGS)
    with pytest.raises(DataError, match=r"shape \(3, 4, 5\)"):
        compare_evaluations({"one": one, "two": moved})


def test_folds_are_joined_by_case_and_not_by_fold() -> None:
    one = method({"p": (0.2, 0.2)}, warnings=["w"])
    two = method(
        {"q": (0.8, 0.8), "r": (0.8, 0.8)}, warnings=["w"], failures=[Failure(case="s", code="x", message="m")]
    )
    joined = join_evaluations({"fold 0": one, "fold 1": two})
    assert [case.case for case in joined.cases] == ["p", "q", "r"]
    assert joined.mean_dice == pytest.approx((0.2 + 0.8 + 0.8) / 3)
    assert (joined.warnings, len(joined.failures), joined.settings) == (("w",), 1, SETTINGS)
    again = method({"s": (0.8, 0.8)})
    with pytest.raises(DataError, match="s is in fold 1 and in fold 2") as caught:
        join_evaluations({"fold 0": one, "fold 1": two, "fold 2": again})
    assert caught.value.code == "repeated_case"
    with pytest.raises(DataError, match="no evaluations"):
        join_evaluations({})
    fewer = Evaluation.of_cases(CLASSES, [score("z", (0.5, 0.5))], settings=EvaluationSettings(metrics=("dice",)))
    with pytest.raises(DataError, match="classes or settings differ"):
        join_evaluations({"a": one, "b": fewer})
