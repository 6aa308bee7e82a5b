from __future__ import annotations

from itertools import pairwise
from math import prod

import pytest
from torch import nn

from sagittal.errors import ResourceError
from sagittal.plan import network_config
from sagittal.planning.memory import GIB, TrainingStep
from sagittal.planning.patch import PatchRule, fit_batch, fit_patch, patch_rule, patch_sizes
from sagittal.planning.topology import FittedStep

SIXTEEN = PatchRule(takes_short_axes=True)
FOUR = PatchRule(largest_batch=4)
SLICES = PatchRule(smallest_batch=12, sees_slices=True)
ISO = (1.0, 1.0, 1.0)


def by(*multiples):
    """Every patch has these multiples."""
    return lambda size: multiples


EACH = {SIXTEEN: by(16, 16, 16), FOUR: by(4, 4, 4), SLICES: by(1, 16, 16)}


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


def fit(step, sizes, median, memory_gib, batch=2):
    return fit_patch(sizes, lambda size: step.memory_bytes(size, batch), median, batch=batch, memory_gib=memory_gib)


def test_each_network_has_its_rule():
    assert patch_rule(network_config("mednext-l-k5")) == SIXTEEN
    assert patch_rule(network_config("segformer3d")) == FOUR
    assert patch_rule(network_config("nnformer-synapse")) == PatchRule()
    assert patch_rule(network_config("transbts")) == PatchRule(largest_batch=16)
    assert patch_rule(network_config("plainconvunet")) == PatchRule(minimum=4)
    assert patch_rule(network_config("unetr")) == patch_rule(network_config("3d-uxnet")) == PatchRule(minimum=32)
    assert patch_rule(network_config("swinunetr")) == PatchRule(minimum=64)
    assert patch_rule(network_config("segformer3d").for_slices()) == SLICES


@pytest.mark.parametrize(
    ("spacing", "median", "rule", "largest"),
    [
        (ISO, (36, 50, 35), SIXTEEN, (48, 64, 48)),
        (ISO, (36, 50, 35), FOUR, (36, 52, 36)),
        (ISO, (500, 600, 700), SIXTEEN, (256, 256, 256)),
        ((5.0, 0.8, 0.8), (26, 512, 512), SIXTEEN, (32, 480, 480)),
        (ISO, (5, 7, 3), FOUR, (16, 16, 16)),
        ((5.0, 0.8, 0.8), (26, 512, 400), SLICES, (1, 512, 400)),
        ((5.0, 0.5, 1.0), (26, 9000, 9000), SLICES, (1, 2896, 1456)),
        (ISO, (30, 9, 100), SLICES, (1, 16, 112)),
    ],
)
def test_the_search_starts_with_the_median_case_or_a_cube_in_mm(spacing, median, rule, largest):
    assert patch_sizes(spacing, median, rule, EACH[rule])[0] == largest


def test_a_short_axis_stays_short_where_the_network_takes_it():
    thick = FittedStep(network_config("mednext-s"), (10.0, 1.5, 1.5), 1, 2)
    sizes = patch_sizes(thick.spacing_mm, (10, 224, 224), SIXTEEN, thick.multiples)
    assert sizes[0] == (10, 224, 224)
    assert {size[0] for size in sizes} == {10}
    assert min(min(size[1:]) for size in sizes) == 16


def test_each_step_shortens_the_axis_that_covers_most_of_the_median_case():
    sizes = patch_sizes(ISO, (40, 100, 64), SIXTEEN, EACH[SIXTEEN])
    assert sizes[:5] == ((48, 112, 64), (32, 112, 64), (32, 96, 64), (32, 96, 48), (32, 80, 48))
    assert sizes[-1] == (16, 16, 16)
    for larger, smaller in pairwise(sizes):
        assert sorted(a - b for a, b in zip(larger, smaller, strict=True)) == [0, 0, 16]
    flat = patch_sizes(ISO, (40, 100, 64), SLICES, EACH[SLICES])
    assert flat[:3] == ((1, 112, 64), (1, 96, 64), (1, 96, 48))
    assert flat[-1] == (1, 16, 16)


def test_a_patch_covers_the_median_case_where_memory_allows():
    sizes = patch_sizes(ISO, (36, 50, 35), SIXTEEN, EACH[SIXTEEN])
    size, reason = fit(LinearStep(bytes_per_voxel=1000), sizes, (36, 50, 35), 8.0)
    assert size == (48, 64, 48)
    assert reason == (
        "the median case of 36x50x35 voxels, rounded up to multiples of what the network halves; a step of 2 was "
        "measured at 0.28 of 8 GiB"
    )


def test_a_patch_shrinks_until_a_step_of_two_fits():
    step = LinearStep(bytes_per_voxel=7500)
    sizes = patch_sizes(ISO, (150, 170, 140), SIXTEEN, EACH[SIXTEEN])
    size, reason = fit(step, sizes, (150, 170, 140), 8.0)
    assert step.memory_bytes(size, 2) <= 8 * GIB < step.memory_bytes(sizes[sizes.index(size) - 1], 2)
    assert reason.startswith("shrunk from 160x176x144 to fit the memory (a step of 2 was ")
    assert len(step.measured) <= 6


def test_a_patch_of_slices_is_measured_with_a_batch_of_twelve():
    step = LinearStep(bytes_per_voxel=1000)
    sizes = patch_sizes(ISO, (40, 500, 300), SLICES, EACH[SLICES])
    size, reason = fit(step, sizes, (40, 500, 300), 8.0, batch=12)
    assert size == (1, 512, 304)
    assert reason.startswith("a slice of the median case of 40x500x300 voxels, rounded up")
    assert "a step of 12 was measured" in reason
    size, reason = fit(step, sizes, (40, 500, 300), 1.0, batch=12)
    assert step.memory_bytes(size, 12) <= GIB
    assert reason.startswith("shrunk from 1x512x304")


def test_a_case_larger_than_the_start_is_said_so():
    sizes = patch_sizes(ISO, (500, 600, 700), SIXTEEN, EACH[SIXTEEN])
    _, reason = fit(LinearStep(bytes_per_voxel=1), sizes, (500, 600, 700), 8.0)
    assert reason.startswith("16777216 voxels in the shape of a cube in mm")
    sizes = patch_sizes(ISO, (5, 6000, 7000), SLICES, EACH[SLICES])
    _, reason = fit(LinearStep(bytes_per_voxel=1), sizes, (5, 6000, 7000), 8.0, batch=12)
    assert reason.startswith("4194304 voxels in the shape of a square in mm")


def test_no_patch_fits():
    sizes = patch_sizes(ISO, (36, 50, 35), SIXTEEN, EACH[SIXTEEN])
    with pytest.raises(ResourceError, match="a training step of 3 patches of 16x16x16"):
        fit(LinearStep(bytes_per_voxel=10**9), sizes, (36, 50, 35), 8.0, batch=3)


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


def test_a_batch_of_slices_has_at_least_twelve_and_no_papers_limit():
    step = LinearStep(bytes_per_voxel=100)
    rule = patch_rule(network_config("segformer3d").for_slices())
    assert fit_batch(step, (1, 64, 64), 100 * 4096.0, rule, 8.0)[0] == 12
    assert fit_batch(step, (1, 64, 64), 2000 * 4096.0, rule, 8.0)[0] == 100
