from __future__ import annotations

import pytest

from sagittal.plan import DatasetSpec, Label
from sagittal.planning.sampling import class_balanced


def spec(*labels: tuple[int, ...], ignore: int | None = None) -> DatasetSpec:
    return DatasetSpec(
        name="made up",
        channel_names=("MR",),
        labels=tuple(Label(name=f"label {number}", values=values) for number, values in enumerate(labels)),
        ignore_value=ignore,
        file_ending=".nii.gz",
    )


def test_one_class_needs_no_balance() -> None:
    assert class_balanced(spec((1,))) == (False, "there is one class only")
    assert class_balanced(spec((1,), ignore=2))[0] is False


def test_several_classes_are_drawn_before_their_case() -> None:
    balanced, why = class_balanced(spec((1,), (2,), (5,)))
    assert balanced
    assert why.startswith("3 classes")


@pytest.mark.parametrize("preset", ["mednext-paper", "segformer3d-paper"])
def test_a_protocol_draws_as_it_does(preset: str) -> None:
    balanced, why = class_balanced(spec((1,), (2,)), preset)
    assert not balanced
    assert preset in why
