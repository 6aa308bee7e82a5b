"""Rules are chosen where they help and no class loses; what is counted equals what applying them gives."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from scipy import ndimage

from sagittal.evaluation.overlap import dice
from sagittal.inference.postprocessing import apply
from sagittal.plan import DatasetSpec, Label
from sagittal.plan.postprocessing import FillHoles, LargestComponent, MinimumVolume
from sagittal.testing.plans import untrained_plan, untrained_spec
from sagittal.training.component_counts import count_case, parts_of
from sagittal.training.postprocessing_choice import (
    MIN_CASES,
    Choice,
    Chosen,
    GivenUpError,
    HeldOut,
    choose,
    unchosen,
    with_choice,
)

MM = (2.0, 1.0, 1.0)
SPEC = untrained_spec(3)
REGIONS = DatasetSpec(
    name="tumours",
    channel_names=("T1",),
    labels=(Label(name="whole", values=(1, 2)), Label(name="core", values=(2,))),
    regions_class_order=(1, 2),
    file_ending=".nii.gz",
)
Change = Callable[[np.ndarray, np.random.Generator], None]


def _case(seed: int, change: Change) -> Callable[[], HeldOut]:
    """Two boxes of class 1, one of class 2; `change` spoils the prediction."""
    rng = np.random.default_rng(seed)
    reference = np.zeros((12, 20, 24), np.uint8)
    shift = int(rng.integers(0, 3))
    reference[2:6, 2 + shift : 8, 2:9] = 1
    reference[2:6, 2:8, 14:20] = 1
    reference[7:11, 10:16, 4 + shift : 12] = 2
    prediction = reference.copy()
    change(prediction, rng)
    return lambda: HeldOut(reference, prediction, MM)


def _cases(change: Change, count: int = 12) -> list[Callable[[], HeldOut]]:
    return [_case(seed, change) for seed in range(count)]


def _islands(value: int, voxels: int) -> Change:
    def add(labels: np.ndarray, rng: np.random.Generator) -> None:
        labels[0, 18, 2 : 2 + voxels] = value
        if rng.random() < 0.5:
            labels[0, 12, 15] = value

    return add


def _mean(cases: list[Callable[[], HeldOut]], rules: tuple, label: int) -> float:  # type: ignore[type-arg]
    values = []
    for read in cases:
        case = read()
        found = apply(case.prediction, rules, case.spacing_mm, SPEC)
        values.append(dice(case.reference == label, found == label))
    return float(np.mean([value for value in values if value is not None]))


def test_islands_of_a_class_with_two_organs_go_by_their_volume() -> None:
    cases = _cases(_islands(1, 9))
    choice = choose(SPEC, cases)
    assert [rule.kind for rule in choice.rules] == ["minimum_volume"]
    (rule,) = choice.rules
    # Nine voxels of 2 mm^3 go, the smallest organ, 96 voxels, stays.
    assert isinstance(rule, MinimumVolume) and rule.label == "class_1" and 0.018 < rule.volume_ml < 0.19
    assert choice.before is not None and choice.after is not None
    assert choice.before["class_1"] == pytest.approx(_mean(cases, (), 1))
    assert choice.after["class_1"] == pytest.approx(_mean(cases, choice.rules, 1)) == 1.0
    gain = choice.chosen[0].gain
    assert set(gain) == {"class_1"}
    assert gain["class_1"] == pytest.approx(choice.after["class_1"] - choice.before["class_1"])
    assert (choice.chosen[0].cases_better, choice.chosen[0].cases_worse) == (12, 0)


def test_large_islands_of_a_single_organ_go_by_the_largest_component() -> None:
    def add(labels: np.ndarray, rng: np.random.Generator) -> None:
        labels[0:2, 17:20, 2 : 2 + int(rng.integers(4, 20))] = 2

    choice = choose(SPEC, _cases(add))
    assert LargestComponent(labels=("class_2",)) in choice.rules
    assert not any(isinstance(rule, LargestComponent) and "class_1" in rule.labels for rule in choice.rules)


def test_holes_are_filled_where_that_helps() -> None:
    def spoil(labels: np.ndarray, rng: np.random.Generator) -> None:
        labels[3:5, 4:7, 16:18] = 0

    cases = _cases(spoil)
    choice = choose(SPEC, cases)
    assert choice.rules == (FillHoles(label="class_1"),)
    assert choice.after is not None and choice.after["class_1"] == pytest.approx(1.0)


def test_a_hole_that_belongs_there_stays() -> None:
    def spoil(labels: np.ndarray, rng: np.random.Generator) -> None:
        pass

    choice = choose(SPEC, _cases(spoil))
    assert choice.rules == () and "no rule raised" in str(choice.why)


def test_everything_but_the_body_goes_first() -> None:
    def joined(labels: np.ndarray, rng: np.random.Generator) -> None:
        labels[0, 17:20, 2:9] = 1
        labels[11, 1:3, 20:23] = 2

    readers = []
    for read in _cases(joined):
        case = read()
        for labels in (case.reference, case.prediction):
            labels[6:7, 4:16, 4:18] = 1
        readers.append(lambda case=case: case)
    choice = choose(SPEC, readers)
    assert choice.rules[0] == LargestComponent()
    assert set(choice.chosen[0].gain) == {"class_1", "class_2"}


def test_too_few_cases_choose_nothing() -> None:
    choice = choose(SPEC, _cases(_islands(1, 9), MIN_CASES - 1))
    assert choice.rules == () and "too few" in str(choice.why)
    assert choice.as_tree() == {"cases": MIN_CASES - 1, "chosen": [], "why": choice.why}


def test_what_helps_few_cases_much_and_harms_many_a_little_is_not_taken() -> None:
    def spoil(labels: np.ndarray, rng: np.random.Generator) -> None:
        labels[labels == 2] = 0
        if rng.random() < 0.7:
            # An organ in two parts: the largest component loses the smaller one.
            labels[7:11, 10:16, 6:10], labels[7:11, 10:16, 11] = 2, 2
        else:
            labels[7:11, 10:16, 6:12], labels[0:2, 17:20, 2:22] = 2, 2

    cases = _cases(spoil, 16)
    largest = (LargestComponent(labels=("class_2",)),)
    assert _mean(cases, largest, 2) > _mean(cases, (), 2) + 0.01
    assert choose(SPEC, cases).rules == ()


def test_a_search_can_be_given_up() -> None:
    with pytest.raises(GivenUpError):
        choose(SPEC, _cases(_islands(1, 9)), go_on=lambda: False)


def _noise(seed: int, values: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    smooth = ndimage.gaussian_filter(rng.normal(0, 1, (8, 13, 11)), 0.8)
    return np.digitize(smooth, np.quantile(smooth, np.linspace(0.5, 1, values)[:-1])).astype(np.uint8)


@pytest.mark.parametrize("spec", [SPEC, REGIONS, SPEC.replace(ignore_value=9)])
def test_counted_changes_are_what_applying_gives(spec: DatasetSpec) -> None:
    for seed in range(4):
        reference, prediction = _noise(seed, 3), _noise(seed + 50, 3)
        if spec.ignore_value is not None:
            reference[:2] = 9
        names = [label.name for label in spec.labels]
        before = count_case(spec, reference, prediction)
        known = reference != 9
        for row, label in zip(before, spec.labels, strict=True):
            true, given = np.isin(reference, label.values) & known, np.isin(prediction, label.values) & known
            assert row.tolist() == [(true & given).sum(), given.sum(), true.sum()]
        for fill in (False, True):
            for name in names:
                part = parts_of(spec, reference, prediction, MM, {name: (name,)}, fill=fill)[name]
                rule = FillHoles(label=name) if fill else LargestComponent(labels=(name,))
                goes = np.ones(len(part.sizes), bool) if fill else part.sizes < part.sizes.max()
                after = count_case(spec, reference, apply(prediction, (rule,), MM, spec))
                assert (after[:, :2] - before[:, :2] == part.changes[goes].sum(axis=0)).all()


def test_regions_are_searched_from_the_outside_in() -> None:
    readers = []
    for seed in range(MIN_CASES):
        reference = np.zeros((10, 14, 16), np.uint8)
        reference[2:8, 2:10, 2 : 9 + seed % 3] = 1
        reference[3:6, 3:7, 3:7] = 2
        prediction = reference.copy()
        prediction[6, 8, 4:7] = 2
        prediction[9, 12, 2:12] = 1
        readers.append(lambda reference=reference, prediction=prediction: HeldOut(reference, prediction, MM))
    choice = choose(REGIONS, readers)
    assert choice.after == {"whole": pytest.approx(1.0), "core": pytest.approx(1.0)}
    case = readers[0]()
    found = apply(case.prediction, choice.rules, MM, REGIONS)
    np.testing.assert_array_equal(found, case.reference)


def test_the_choice_is_written_into_a_plan_and_taken_out_again() -> None:
    plan = untrained_plan("mednext-s", SPEC)
    rules = (LargestComponent(labels=("class_1",)), MinimumVolume(label="class_1", volume_ml=0.5))
    choice = Choice(30, (Chosen(rules[0], {}, 0, 0), Chosen(rules[1], {"class_1": 0.02}, 9, 1)), {}, {})
    chosen = with_choice(plan, choice)
    assert chosen.postprocessing == rules
    reason = chosen.reasons["postprocessing"]
    assert "30 held-out cases" in reason and "class_1 +0.0200" in reason and "measured" in reason
    assert unchosen(chosen) == plan
    assert with_choice(plan, Choice(3, why="too few")) == plan
    own = plan.replace(postprocessing=rules, reasons={**plan.reasons, "postprocessing": "--set"})
    assert unchosen(own) == own
