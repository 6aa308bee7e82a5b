from __future__ import annotations

import pytest
from fingerprints import fingerprint_of

from sagittal.plan import DatasetSpec, Label
from sagittal.planning.sampling import class_balanced, rare_class_power


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


@pytest.mark.parametrize(
    ("volumes_ml", "power", "told"),
    [
        ((500.0, 0.03), 0.5, "the smallest class has 30 voxels (median), 0.00092 of a patch, less than 0.002"),
        ((500.0, 0.3), 0.0, "0.0092 of a patch, at least 0.002"),
        ((500.0, None), 0.0, "at least"),
        ((), 0.0, "not measured"),
    ],
)
def test_voxels_of_a_tiny_class_weigh_more(volumes_ml, power, told):
    fingerprint = fingerprint_of((64, 64, 64)).replace(class_volumes_ml=volumes_ml)
    found, reason = rare_class_power(fingerprint, (1.0, 1.0, 1.0), (32, 32, 32))
    assert found == power and told in reason
    assert rare_class_power(fingerprint, (1.0, 1.0, 1.0), (32, 32, 32), "nnunet")[0] == 0.0


def test_a_tiny_class_is_measured_on_the_networks_grid():
    fingerprint = fingerprint_of((64, 64, 64)).replace(class_volumes_ml=(0.1,))
    assert rare_class_power(fingerprint, (1.0, 1.0, 1.0), (32, 32, 32))[0] == 0.0
    assert rare_class_power(fingerprint, (2.0, 2.0, 2.0), (32, 32, 32))[0] == 0.5


@pytest.mark.parametrize(
    ("depth_mm", "width", "power", "told"),
    [
        (1.0, 256, 0.5, "1e+03 voxels (median), about 100 in a slice, 0.0015 of a patch, less than"),
        (5.0, 128, 0.0, "200 voxels (median), about 100 in a slice, 0.0031 of a patch, at least"),
        (20.0, 128, 0.5, "50 voxels (median), about 50 in a slice, 0.0015 of a patch, less than"),
    ],
)
def test_a_slice_holds_a_part_of_a_class(depth_mm, width, power, told):
    fingerprint = fingerprint_of((64, 256, 256)).replace(class_volumes_ml=(1.0,))
    found, reason = rare_class_power(fingerprint, (depth_mm, 1.0, 1.0), (1, 256, width))
    assert found == power and told in reason
