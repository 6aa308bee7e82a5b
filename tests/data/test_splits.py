from __future__ import annotations

import pytest

from sagittal.data.splits import five_folds
from sagittal.errors import DataError
from sagittal.plan.plan import AdamW, Augmentation, Loss, Training

# From scikit-learn 1.9: KFold(folds, shuffle=True, random_state=seed).split(range(cases)), the test indices.
SCIKIT_LEARN = {
    (7, 5, 12345): [[3, 6], [0, 4], [1], [5], [2]],
    (13, 5, 12345): [[0, 7, 9], [3, 6, 10], [8, 11, 12], [1, 4], [2, 5]],
    (5, 5, 12345): [[0], [4], [3], [1], [2]],
    (6, 3, 7): [[3, 5], [0, 2], [1, 4]],
}


def training(**changes: int) -> Training:
    return Training(
        batch_size=2,
        optimizer=AdamW(learning_rate=1e-3, weight_decay=0.0),
        loss=Loss(),
        augmentation=Augmentation(),
        **changes,
    )


@pytest.mark.parametrize(("cases", "folds", "seed"), SCIKIT_LEARN)
def test_folds_equal_scikit_learns(cases, folds, seed):
    ids = [f"case_{i:02d}" for i in range(cases)]
    found = five_folds(reversed(ids), training(folds=folds, split_seed=seed))
    assert [[ids.index(case) for case in fold.validation] for fold in found] == SCIKIT_LEARN[cases, folds, seed]


def test_every_case_validates_once_and_never_where_it_trains():
    ids = [f"case_{i:02d}" for i in range(13)]
    folds = five_folds(ids, training())
    assert sorted(case for fold in folds for case in fold.validation) == ids
    for fold in folds:
        assert sorted((*fold.train, *fold.validation)) == ids
        assert list(fold.train) == sorted(fold.train)


def test_fewer_cases_than_folds_are_refused():
    with pytest.raises(DataError, match="4 cases can't be split into 5 folds") as caught:
        five_folds("abcd", training())
    assert caught.value.code == "too_few_cases"
