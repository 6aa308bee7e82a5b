from __future__ import annotations

import pytest

from sagittal.data.mirroring import composed, label_swaps, output_swaps
from sagittal.errors import PlanError
from sagittal.plan import DatasetSpec, Label
from sagittal.plan.augmentation import Augmentation


def spec_of(*values: tuple[int, ...], regions: bool = False, ignore: int | None = None) -> DatasetSpec:
    return DatasetSpec(
        name="sides",
        channel_names=("CT",),
        labels=tuple(Label(name=f"label {index}", values=value) for index, value in enumerate(values)),
        regions_class_order=tuple(range(1, len(values) + 1)) if regions else None,
        ignore_value=ignore,
        file_ending=".nii.gz",
    )


def test_values_become_indices_and_the_ignored_voxels_stay() -> None:
    spec = spec_of((3,), (10,), (205,), ignore=255)
    config = Augmentation(swapped_labels=((2, 205, 3), (0, 3, 10)))
    assert label_swaps(spec, config) == {2: (0, 3, 2, 1, 4), 0: (0, 2, 1, 3, 4)}
    assert output_swaps(spec, config) == {2: (0, 3, 2, 1), 0: (0, 2, 1, 3)}
    assert label_swaps(spec, Augmentation()) == output_swaps(spec, Augmentation()) == {}


def test_outputs_of_regions_change_places_where_their_values_do() -> None:
    spec = spec_of((1, 2, 5), (1,), (2,), (5,), regions=True)
    config = Augmentation(swapped_labels=((1, 1, 2),))
    assert label_swaps(spec, config) == {1: (0, 2, 1, 3)}
    assert output_swaps(spec, config) == {1: (0, 2, 1, 3)}
    assert spec.cut_by_swaps([(1, 2)]) is None


def test_swaps_of_several_axes_follow_each_other() -> None:
    swaps = {0: (0, 2, 1, 3), 2: (0, 1, 3, 2)}
    assert composed(swaps, (0,)) == (0, 2, 1, 3)
    assert composed(swaps, (0, 2)) == (0, 3, 1, 2)
    assert composed(swaps, (1,)) is None
    assert composed({0: (1, 0), 1: (1, 0)}, (0, 1)) is None
    assert composed({}, (0, 1, 2)) is None


def test_a_value_that_is_not_declared_is_refused() -> None:
    with pytest.raises(PlanError, match=r"label values \[7\]; expected two of \[1, 2\]") as caught:
        label_swaps(spec_of((1,), (2,)), Augmentation(swapped_labels=((2, 1, 7),)))
    assert caught.value.code == "swapped_labels"


def test_a_swap_that_cuts_a_region_is_refused() -> None:
    spec = spec_of((1, 3), (2,), (3,), regions=True)
    assert spec.cut_by_swaps([(1, 2)]) == spec.labels[0]
    with pytest.raises(PlanError, match=r"of the region 'label 0' \[1, 3\] the values \[2, 3\]") as caught:
        output_swaps(spec, Augmentation(swapped_labels=((2, 1, 2),)))
    assert caught.value.code == "swapped_labels"


@pytest.mark.parametrize("pairs", [((2, 1, 1),), ((2, 1, 2), (2, 2, 3)), ((2, 1, 2), (2, 2, 1))])
def test_a_value_is_in_one_pair_of_an_axis(pairs: tuple[tuple[int, int, int], ...]) -> None:
    with pytest.raises(ValueError, match="must be in one pair of axis 2, of two values"):
        Augmentation(swapped_labels=pairs)


@pytest.mark.parametrize("name", ["elastic_sigma", "elastic_magnitude"])
def test_a_range_of_elastic_deformation_ascends(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} must ascend"):
        Augmentation(**{name: (0.2, 0.1)})
