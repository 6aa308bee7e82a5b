from __future__ import annotations

import pytest
from fingerprints import spec_of

from sagittal.plan import DatasetSpec, Label
from sagittal.planning.sides import mirroring, opposite_pairs


def regions_of(**values: tuple[int, ...]) -> DatasetSpec:
    return DatasetSpec(
        name="regions",
        channel_names=("CT",),
        labels=tuple(Label(name=name, values=value) for name, value in values.items()),
        regions_class_order=tuple(range(1, len(values) + 1)),
        file_ending=".nii.gz",
    )


@pytest.mark.parametrize(
    ("names", "pairs"),
    [
        (("left_kidney", "right_kidney"), (("left_kidney", "right_kidney"),)),
        (("liver", "kidney right", "Kidney Left"), (("Kidney Left", "kidney right"),)),
        (("LeftLung", "RightLung"), (("LeftLung", "RightLung"),)),
        (("hippocampus_L", "hippocampus_R"), (("hippocampus_L", "hippocampus_R"),)),
        (("eye_l", "ear_r", "ear_l", "eye_r"), (("eye_l", "eye_r"), ("ear_l", "ear_r"))),
        (("lung_upper_lobe_left", "lung_lower_lobe_right"), ()),
        (("left_atrium", "aorta"), ()),
        (("left_1", "right_2"), ()),
        (("Anterior", "Posterior"), ()),
    ],
)
def test_labels_that_differ_by_side_only_are_found(names, pairs):
    assert opposite_pairs(names, 2) == pairs


@pytest.mark.parametrize(
    ("names", "axes", "swapped"),
    [
        (("kidney",), (0, 1, 2), ()),
        (("left_kidney", "right_kidney", "liver"), (0, 1, 2), ((2, 1, 2),)),
        (("right_eye", "liver", "left_eye", "left_ear", "right_ear"), (0, 1, 2), ((2, 3, 1), (2, 4, 5))),
        (("Anterior", "Posterior"), (0, 2), ()),
        (("lung upper", "lung lower"), (1, 2), ()),
        (("lung_upper_left", "lung_lower_left", "lung_upper_right"), (1, 2), ((2, 1, 3),)),
        (("anterior horn", "posterior"), (0, 1, 2), ()),
        (("heart_ventricle_left", "heart_ventricle_right"), (0, 1), ()),
        (("left lateral ventricle", "right lateral ventricle"), (0, 1, 2), ((2, 1, 2),)),
    ],
)
def test_sides_change_places_and_other_directions_are_not_mirrored(names, axes, swapped):
    found = mirroring(spec_of(*names))
    assert (found.axes, found.swapped_labels) == (axes, swapped)
    assert ("mirrored, one would look like the other" in found.why) == (axes != (0, 1, 2))
    assert ("change places (training.augmentation.swapped_labels)" in found.why) == bool(swapped)
    assert ("are mirror images" in found.why_swapped) == bool(swapped)


def test_an_axis_is_known_by_its_place_in_the_networks_arrays():
    spec = spec_of("left_kidney", "right_kidney", "upper", "lower")
    found = mirroring(spec, transpose=(2, 0, 1))
    assert (found.axes, found.swapped_labels) == ((0, 2), ((0, 1, 2),))


@pytest.mark.parametrize("names", [("left_kidney", "right_kidney"), ("upper", "lower")])
def test_in_stored_order_nothing_is_mirrored_where_a_direction_tells_labels_apart(names):
    found = mirroring(spec_of(*names), "stored")
    assert (found.axes, found.swapped_labels) == ((), ())
    assert "no known one" in found.why
    assert mirroring(spec_of("kidney"), "stored").axes == (0, 1, 2)


@pytest.mark.parametrize(
    ("regions", "obstacle"),
    [
        ({"left": (1,), "right": (2,), "both": (1, 2)}, None),
        ({"left": (1,), "right": (2,), "left_and_liver": (1, 3)}, "cut another region in two"),
        ({"left": (1,), "right": (2, 3)}, "join several label values"),
        ({"left_lung": (1,), "right_lung": (2,), "left_lobe": (1,), "right_lobe": (3,)}, "is in several pairs"),
    ],
)
def test_regions_are_mirrored_only_where_a_swap_keeps_them_whole(regions, obstacle):
    found = mirroring(regions_of(**regions))
    if obstacle is None:
        assert (found.axes, found.swapped_labels) == ((0, 1, 2), ((2, 1, 2),))
    else:
        assert (found.axes, found.swapped_labels) == ((0, 1), ())
        assert obstacle in found.why
