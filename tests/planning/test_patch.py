from __future__ import annotations

from itertools import pairwise
from math import prod

import pytest
from torch import nn

from sagittal.errors import ResourceError
from sagittal.plan import network_config
from sagittal.planning.memory import GIB, TrainingStep
from sagittal.planning.patch import PatchRule, fit_batch, fit_patch, patch_multiples, patch_rule, patch_sizes

SIXTEEN = PatchRule(multiple=16)
FOUR = PatchRule(multiple=4, largest_batch=4)


class LinearStep(TrainingStep):
    """A step whose memory is known: so many bytes for each voxel, and some whatever the size."""

    fixed_bytes = 1 << 20

    def __init__(self, bytes_per_voxel: int) -> None:
        super().__init__(nn.Identity(), 1, 2)
        object.__setattr__(self, "bytes_per_voxel", bytes_per_voxel)
        object.__setattr__(self, "measured", [])

    def memory_bytes(self, patch_size, batch_size):
        self.measured.append((patch_size, batch_size))
        return self.fixed_bytes + self.bytes_per_voxel * batch_size * prod(patch_size)


def test_each_network_has_its_multiple():
    assert patch_rule(network_config("mednext-l-k5")) == SIXTEEN
    assert patch_rule(network_config("segformer3d")) == FOUR
    assert patch_rule(network_config("nnformer-synapse")) == SIXTEEN
    assert patch_rule(network_config("nnformer-acdc")) == PatchRule(multiple=20)
    assert patch_rule(network_config("transbts")) == PatchRule(multiple=8, largest_batch=16)
    assert patch_rule(network_config("plainconvunet")) == PatchRule(multiple=None, minimum=4)
    assert patch_rule(network_config("unetr")) == patch_rule(network_config("3d-uxnet")) == PatchRule(16, minimum=32)
    assert patch_rule(network_config("swinunetr")) == PatchRule(32, minimum=64)


def test_a_network_as_it_is_has_its_multiples():
    uneven = network_config("plainconvunet").replace(strides=((1, 1, 1), *[(1, 2, 2)] * 2, *[(2, 2, 2)] * 3))
    assert patch_multiples(uneven) == (8, 32, 32)
    assert patch_multiples(network_config("mednext-s")) == (16, 16, 16)


def test_a_patch_of_a_u_net_says_what_it_is_a_multiple_of():
    rule = patch_rule(network_config("plainconvunet"))
    size, reason = fit_patch(LinearStep(bytes_per_voxel=1), (1.0, 1.0, 1.0), (10, 50, 35), rule, 8.0)
    assert size == (10, 56, 40)
    assert reason.startswith("the median case of 10x50x35 voxels, rounded up to multiples of what its U-Net halves; ")
    size, reason = fit_patch(LinearStep(bytes_per_voxel=500), (1.0, 1.0, 1.0), (10, 50, 35), rule, 0.02)
    assert prod(size) < prod((10, 56, 40))
    assert reason.startswith("shrunk from 10x56x40, by multiples of what its U-Net halves, to fit the memory")


@pytest.mark.parametrize(
    ("spacing", "median", "rule", "largest"),
    [
        ((1.0, 1.0, 1.0), (36, 50, 35), SIXTEEN, (48, 64, 48)),
        ((1.0, 1.0, 1.0), (36, 50, 35), FOUR, (36, 52, 36)),
        ((1.0, 1.0, 1.0), (500, 600, 700), SIXTEEN, (256, 256, 256)),
        ((5.0, 0.8, 0.8), (26, 512, 512), SIXTEEN, (32, 480, 480)),
        ((1.0, 1.0, 1.0), (5, 7, 3), FOUR, (16, 16, 16)),
    ],
)
def test_the_search_starts_with_the_median_case_or_a_cube_in_mm(spacing, median, rule, largest):
    assert patch_sizes(spacing, median, rule)[0] == largest


def test_each_step_shortens_the_axis_that_covers_most_of_the_median_case():
    sizes = patch_sizes((1.0, 1.0, 1.0), (40, 100, 64), SIXTEEN)
    assert sizes[:5] == ((48, 112, 64), (32, 112, 64), (32, 96, 64), (32, 96, 48), (32, 80, 48))
    assert sizes[-1] == (16, 16, 16)
    for larger, smaller in pairwise(sizes):
        assert sorted(a - b for a, b in zip(larger, smaller, strict=True)) == [0, 0, 16]


def test_a_patch_covers_the_median_case_where_memory_allows():
    step = LinearStep(bytes_per_voxel=1000)
    size, reason = fit_patch(step, (1.0, 1.0, 1.0), (36, 50, 35), SIXTEEN, 8.0)
    assert size == (48, 64, 48)
    assert reason == (
        "the median case of 36x50x35 voxels, rounded up to multiples of 16; a step of 2 was measured at 0.28 of 8 GiB"
    )


def test_a_patch_shrinks_until_a_step_of_two_fits():
    step = LinearStep(bytes_per_voxel=7500)
    size, reason = fit_patch(step, (1.0, 1.0, 1.0), (150, 170, 140), SIXTEEN, 8.0)
    sizes = patch_sizes((1.0, 1.0, 1.0), (150, 170, 140), SIXTEEN)
    assert step.memory_bytes(size, 2) <= 8 * GIB < step.memory_bytes(sizes[sizes.index(size) - 1], 2)
    assert reason.startswith("shrunk from 160x176x144, 16 voxels at a time, to fit the memory (a step of 2 was ")
    assert len(step.measured) <= 6


def test_a_case_larger_than_the_start_is_said_so():
    _, reason = fit_patch(LinearStep(bytes_per_voxel=1), (1.0, 1.0, 1.0), (500, 600, 700), SIXTEEN, 8.0)
    assert reason.startswith("16777216 voxels in the shape of a cube in mm")


def test_no_patch_fits():
    with pytest.raises(ResourceError, match="16x16x16"):
        fit_patch(LinearStep(bytes_per_voxel=10**9), (1.0, 1.0, 1.0), (36, 50, 35), SIXTEEN, 8.0)


@pytest.mark.parametrize(
    ("bytes_per_voxel", "cases", "rule", "batch", "why"),
    [
        (1000, 200, SIXTEEN, 20, "the most below 5 % of the data set's voxels"),
        (8000, 200, SIXTEEN, 16, "the most that fits the memory"),
        (1000, 200, FOUR, 4, "the paper's"),
        (1000, 30, FOUR, 3, "the most below 5 %"),
        (1000, 3, SIXTEEN, 2, "the smallest allowed; it shows 33.3 % of the data set's voxels, the limit is 5 %"),
    ],
)
def test_the_batch_fills_memory_up_to_a_share_of_the_data_set(bytes_per_voxel, cases, rule, batch, why):
    step = LinearStep(bytes_per_voxel)
    found, reason = fit_batch(step, (32, 64, 32), cases * 131072.0, rule, 8.0)
    assert found == batch
    assert step.memory_bytes((32, 64, 32), found) <= 8 * GIB
    assert reason.startswith(why)


def test_a_batch_that_does_not_grow_in_proportion_is_measured_again():
    class Convex(LinearStep):
        def memory_bytes(self, patch_size, batch_size):
            return super().memory_bytes(patch_size, batch_size) + (batch_size - 2) * 150 * 2**20

    step = Convex(bytes_per_voxel=4000)
    batch, _ = fit_batch(step, (32, 64, 32), 200 * 131072.0, SIXTEEN, 4.0)
    assert step.memory_bytes((32, 64, 32), batch) <= 4 * GIB < step.memory_bytes((32, 64, 32), batch + 1)
