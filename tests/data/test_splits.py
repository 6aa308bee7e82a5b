from __future__ import annotations

import pytest

from sagittal.data.splits import (
    Fold,
    check_splits,
    folds_sha256,
    make_folds,
    patients_of,
    split_warnings,
    splits_tree,
)
from sagittal.errors import DataError
from sagittal.plan.augmentation import Augmentation
from sagittal.plan.loss import Loss
from sagittal.plan.optimizers import AdamW
from sagittal.plan.training import Training

# From scikit-learn 1.9: KFold(folds, shuffle=True, random_state=seed).split(range(cases)), the test indices.
SCIKIT_LEARN = {
    (7, 5, 12345): [[3, 6], [0, 4], [1], [5], [2]],
    (13, 5, 12345): [[0, 7, 9], [3, 6, 10], [8, 11, 12], [1, 4], [2, 5]],
    (5, 5, 12345): [[0], [4], [3], [1], [2]],
    (6, 3, 7): [[3, 5], [0, 2], [1, 4]],
}
# The same of StratifiedKFold(folds, shuffle=True, random_state=seed).split(range(13), CLASSES).
CLASSES = [0, 0, 1, 2, 1, 0, 1, 1, 0, 0, 2, 1, 0]
STRATIFIED = {
    (3, 12345): [[3, 4, 7, 8, 9], [1, 6, 11, 12], [0, 2, 5, 10]],
    (5, 7): [[5, 9, 11], [7, 8, 10], [0, 3, 6], [2, 12], [1, 4]],
}
LABELS_OF_CLASS = {0: frozenset({1}), 1: frozenset({1, 2}), 2: frozenset({4})}
IDS = tuple(f"case_{i:02d}" for i in range(13))


def training(**changes: object) -> Training:
    plain = Training(
        batch_size=2,
        optimizer=AdamW(learning_rate=1e-3, weight_decay=0.0),
        loss=Loss(),
        augmentation=Augmentation(),
    )
    return plain.replace(**changes)


@pytest.mark.parametrize(("cases", "folds", "seed"), SCIKIT_LEARN)
def test_folds_equal_scikit_learns(cases, folds, seed):
    ids = [f"case_{i:02d}" for i in range(cases)]
    found = make_folds(reversed(ids), training(folds=folds, split_seed=seed))
    assert [[ids.index(case) for case in fold.validation] for fold in found] == SCIKIT_LEARN[cases, folds, seed]


@pytest.mark.parametrize(("folds", "seed"), STRATIFIED)
def test_stratified_folds_equal_scikit_learns(folds, seed):
    strata = {case: LABELS_OF_CLASS[kind] for case, kind in zip(IDS, CLASSES, strict=True)}
    wanted = training(folds=folds, split_seed=seed, split="stratified")
    found = make_folds(reversed(IDS), wanted, strata=strata)
    assert [[IDS.index(case) for case in fold.validation] for fold in found] == STRATIFIED[folds, seed]


@pytest.mark.parametrize("split", ["random", "stratified"])
@pytest.mark.parametrize("pattern", [None, r"case_(\d).*"])
def test_every_case_validates_once_and_never_where_it_trains(split, pattern):
    strata = {case: {index % 3} for index, case in enumerate(IDS)}
    folds = make_folds(IDS, training(folds=2, split=split, patient_pattern=pattern), strata=strata)
    assert tuple(sorted(case for fold in folds for case in fold.validation)) == IDS
    for fold in folds:
        assert tuple(sorted((*fold.train, *fold.validation))) == IDS
        assert list(fold.train) == sorted(fold.train)


@pytest.mark.parametrize("split", ["random", "stratified"])
def test_all_cases_of_a_patient_are_on_one_side(split):
    ids = [f"p{patient}_{frame}" for patient in range(7) for frame in range(1 + patient % 3)]
    strata = {case: {int(case[-1])} for case in ids}
    by_pattern = make_folds(ids, training(patient_pattern=r"(.*)_\d+", split=split), strata=strata)
    for fold in by_pattern:
        assert not {case[:2] for case in fold.train} & {case[:2] for case in fold.validation}
    table = {case: f"name of {case[:2]}" for case in ids}
    assert make_folds(ids, training(split=split), patients=table, strata=strata) == by_pattern
    held_out = [sorted({int(case[1]) for case in fold.validation}) for fold in by_pattern]
    if split == "random":
        assert held_out == SCIKIT_LEARN[7, 5, 12345]


def test_a_rare_label_is_spread_over_the_folds():
    strata = {case: {1, 2} if index < 3 else {1} for index, case in enumerate(IDS)}
    folds = make_folds(IDS, training(folds=3, split="stratified"), strata=strata)
    assert [sum(2 in strata[case] for case in fold.validation) for fold in folds] == [1, 1, 1]


@pytest.mark.parametrize("split", ["random", "stratified"])
def test_fewer_cases_than_folds_are_refused(split):
    strata = {case: {1} for case in "abcd"}
    with pytest.raises(DataError, match="4 cases can't be split into 5 folds") as caught:
        make_folds("abcd", training(split=split), strata=strata)
    assert caught.value.code == "too_few_cases"
    with pytest.raises(DataError, match="6 cases of 3 patients can't be split into 5"):
        make_folds(["a1", "a2", "b1", "b2", "c1", "c2"], training(patient_pattern=r"(.)\d"))


def test_what_no_number_of_folds_can_split_is_not_told_to_try_fewer():
    with pytest.raises(DataError, match=r"Train on all of them \(--fold none\)\.$"):
        make_folds(["a1", "a2"], training(patient_pattern=r"(.)\d"))


def test_a_case_without_a_patient_is_refused():
    with pytest.raises(DataError, match=r"case_01: no patient in patients.csv.*each of the 2 cases") as caught:
        make_folds(["case_00", "case_01"], training(), patients={"case_00": "a", "case_07": "b"})
    assert caught.value.code == "unknown_patient"
    with pytest.raises(DataError, match=r"b, c, d and 1 more: the id does not fit .*'\(\.\)_\.'"):
        patients_of(["a_1", "b", "c", "d", "e"], training(patient_pattern="(.)_."))
    with pytest.raises(DataError, match="x1: the id does not fit"):
        patients_of(["a1", "x1"], training(patient_pattern=r"(a)?.*"))


def test_own_splits_are_taken_as_they_are():
    splits = [Fold(("b", "a"), ("c",)), Fold(("a",), ("c", "b"))]
    found = make_folds("cab", training(split="own"), splits=splits)
    assert found == (Fold(("a", "b"), ("c",)), Fold(("a",), ("b", "c")))


@pytest.mark.parametrize(
    ("splits", "message"),
    [
        ([], "0 folds. Expected 1 to 5"),
        ([Fold(("a",), ("b",))] * 6, "6 folds. Expected 1 to 5"),
        ([Fold(("a",), ())], "fold 0 has an empty 'val'"),
        ([Fold(("a",), ("b",)), Fold((), ("b",))], "fold 1 has an empty 'train'"),
        ([Fold(("a", "z"), ("b",))], "fold 0, 'train': z not in the data set. Expected ids of its 3 cases, such as a"),
        ([Fold(("a",), ("b", "c", "b"))], "fold 0, 'val': b listed twice"),
        ([Fold(("a", "c"), ("b", "c"))], "fold 0: c in 'train' and in 'val'"),
    ],
)
def test_own_splits_that_make_no_sense_are_refused(splits, message):
    with pytest.raises(DataError, match=message) as caught:
        check_splits(splits, ("a", "b", "c"))
    assert caught.value.code == "bad_splits"


def test_what_is_strange_in_own_splits_is_told():
    folds = (Fold(("a", "b"), ("c", "d")), Fold(("a",), ("b", "c", "d", "e")))
    assert split_warnings(folds, "abcde", {}) == ("fold 0 leaves out 1 of 5 cases: e",)
    told = split_warnings(folds, "abcde", {"a": "P", "b": "Q", "c": "P"})
    assert told[1] == ("fold 0 trains and validates on scans of the same patients (P), so its score says too much")
    assert len(told) == 3


def test_the_hash_of_folds_sees_cases_and_order_of_folds_not_the_order_of_cases():
    one, other = Fold(("a", "b"), ("c",)), Fold(("c",), ("a",))
    assert folds_sha256([one, other]) == folds_sha256([Fold(("b", "a"), ("c",)), other])
    assert len({folds_sha256(folds) for folds in ([one, other], [other, one], [one])}) == 3
    assert splits_tree([one]) == [{"train": ["a", "b"], "val": ["c"]}]
