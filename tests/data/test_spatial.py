from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sagittal.data.draws import seeded
from sagittal.data.spatial import SpatialDraw, box_size, cut_patch, draw_spatial, source_matrix, through_plane_axis
from sagittal.plan.augmentation import Augmentation

PATCH = (12, 17, 14)
SPACING = (2.0, 1.0, 1.5)


def box_of(size: tuple[int, int, int], seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    image = torch.randn(2, *size, generator=generator)
    return image, torch.randint(0, 4, size, generator=generator, dtype=torch.int16)


def smooth_box(size: tuple[int, int, int]) -> torch.Tensor:
    d, h, w = torch.meshgrid(*(torch.arange(n, dtype=torch.float32) - (n - 1) / 2 for n in size), indexing="ij")
    return torch.stack([d, h, w])


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    patch=st.tuples(*[st.integers(1, 9)] * 3),
    room=st.tuples(*[st.integers(0, 3)] * 3),
    mirrored=st.tuples(*[st.booleans()] * 3),
)
def test_without_rotation_and_scale_voxels_are_only_moved(
    patch: tuple[int, int, int], room: tuple[int, int, int], mirrored: tuple[bool, bool, bool]
) -> None:
    image, labels = box_of(tuple(size + 2 * more for size, more in zip(patch, room, strict=True)))
    cut, target = cut_patch(image, labels, SpatialDraw(mirrored=mirrored), patch, SPACING)
    window = tuple(slice(more, more + size) for size, more in zip(patch, room, strict=True))
    axes = [axis for axis in range(3) if mirrored[axis]]
    assert torch.equal(cut, image[(slice(None), *window)].flip([axis + 1 for axis in axes]))
    assert torch.equal(target, labels[window].flip(axes))
    assert target.dtype == labels.dtype


def test_an_exact_patch_reads_its_own_size_and_shares_no_memory() -> None:
    draw = SpatialDraw()
    assert box_size(draw, PATCH, SPACING) == PATCH
    image, labels = box_of(PATCH)
    cut, target = cut_patch(image, labels, draw, PATCH, SPACING)
    cut.zero_()
    target.zero_()
    assert image.abs().sum() > 0
    assert labels.sum() > 0


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_a_quarter_turn_is_rot90_in_the_plane_of_the_other_axes(axis: int) -> None:
    size = (9, 9, 9)
    image, labels = box_of(size)
    rotation = tuple(math.pi / 2 if other == axis else 0.0 for other in range(3))
    cut, target = cut_patch(image, labels, SpatialDraw(rotation_rad=rotation), size, (1.0, 1.0, 1.0))
    first, second = (other for other in range(3) if other != axis)
    expected = image.rot90(-1, (first + 1, second + 1))
    assert torch.allclose(cut[:, 1:-1, 1:-1, 1:-1], expected[:, 1:-1, 1:-1, 1:-1], atol=1e-4)
    assert torch.equal(target[1:-1, 1:-1, 1:-1], labels.rot90(-1, (first, second))[1:-1, 1:-1, 1:-1])


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 2**31),
    patch=st.tuples(*[st.integers(2, 15)] * 3),
    spacing=st.tuples(*[st.sampled_from([0.7, 1.0, 2.5])] * 3),
)
def test_the_box_holds_every_voxel_that_the_patch_needs(
    seed: int, patch: tuple[int, int, int], spacing: tuple[float, float, float]
) -> None:
    config = Augmentation(rotation_probability=1.0, scaling_probability=1.0)
    draw = draw_spatial(seeded(seed), config, patch)
    box = box_size(draw, patch, spacing)
    assert all((have - want) % 2 == 0 for have, want in zip(box, patch, strict=True))
    # Coordinates are linear, and trilinear interpolation is exact on them wherever no neighbour is missing.
    coordinates = smooth_box(box)
    labels = torch.ones(box, dtype=torch.int16)
    cut, target = cut_patch(coordinates, labels, draw, patch, spacing)
    matrix = torch.from_numpy(source_matrix(draw, spacing)).to(torch.float32)
    expected = torch.einsum("ij,jdhw->idhw", matrix, smooth_box(patch))
    assert torch.allclose(cut, expected, atol=2e-3)
    assert target.min() == 1


def test_a_larger_box_than_needed_gives_the_same_patch() -> None:
    draw = SpatialDraw(rotation_rad=(0.3, -0.2, 0.1), extent_factor=(1.2, 1.2, 1.2), mirrored=(True, False, True))
    box = box_size(draw, PATCH, SPACING)
    image, labels = box_of(tuple(size + 4 for size in box))
    inner = (slice(2, -2),) * 3
    large = cut_patch(image, labels, draw, PATCH, SPACING)
    small = cut_patch(image[(slice(None), *inner)], labels[inner], draw, PATCH, SPACING)
    assert torch.allclose(large[0], small[0], atol=1e-4)
    assert (large[1] == small[1]).float().mean() > 0.99


def test_a_bright_cube_stays_with_its_label() -> None:
    config = Augmentation(rotation_probability=1.0, scaling_probability=1.0)
    patch = (20, 24, 22)
    for seed in range(8):
        draw = draw_spatial(seeded(seed), config, patch)
        box = box_size(draw, patch, SPACING)
        labels = torch.zeros(box, dtype=torch.int16)
        start = [size // 2 - 2 for size in box]
        labels[start[0] : start[0] + 6, start[1] : start[1] + 7, start[2] : start[2] + 5] = 3
        cut, target = cut_patch((labels == 3)[None].float(), labels, draw, patch, SPACING)
        bright, inside = cut[0] > 0.5, target == 3
        overlap = 2 * (bright & inside).sum() / (bright.sum() + inside.sum())
        assert overlap > 0.9, f"seed {seed}"


def test_rotation_is_rigid_in_millimetres_and_scale_stretches() -> None:
    draw = SpatialDraw(rotation_rad=(0.4, -0.3, 0.2), extent_factor=(1.3, 1.3, 1.3))
    matrix = source_matrix(draw, SPACING)
    world = np.diag(SPACING) @ matrix @ np.diag(1 / np.asarray(SPACING))
    assert np.allclose(world @ world.T, 1.3**2 * np.eye(3))


def test_what_lies_beyond_the_box_is_zero_and_background() -> None:
    image, labels = torch.ones(1, 8, 8, 8), torch.ones(8, 8, 8, dtype=torch.int16)
    draw = SpatialDraw(extent_factor=(2.0, 2.0, 2.0))
    cut, target = cut_patch(image, labels, draw, (8, 8, 8), (1.0, 1.0, 1.0))
    assert cut[0, 0, 0, 0] == 0
    assert target[0, 0, 0] == 0
    assert cut[0, 4, 4, 4] == pytest.approx(1.0)
    assert target[4, 4, 4] == 1


def test_draws_have_the_probabilities_and_ranges_of_the_plan() -> None:
    config = Augmentation()
    draws = [draw_spatial(seeded(seed), config, (48, 64, 48)) for seed in range(3000)]
    rotated = [draw for draw in draws if any(draw.rotation_rad)]
    scaled = [draw.extent_factor[0] for draw in draws if draw.extent_factor != (1.0, 1.0, 1.0)]
    assert len(rotated) / len(draws) == pytest.approx(0.2, abs=0.03)
    assert len(scaled) / len(draws) == pytest.approx(0.2, abs=0.03)
    assert np.mean([draw.is_exact for draw in draws]) == pytest.approx(0.64, abs=0.03)
    assert np.mean([draw.mirrored for draw in draws], axis=0) == pytest.approx([0.5] * 3, abs=0.03)
    assert max(abs(angle) for draw in rotated for angle in draw.rotation_rad) <= math.radians(30)
    assert (min(scaled) >= 0.7, max(scaled) <= 1.4) == (True, True)
    assert len({draw.extent_factor for draw in draws if len(set(draw.extent_factor)) > 1}) == 0


def test_only_the_plans_axes_are_mirrored() -> None:
    config = Augmentation(mirror_axes=(2,))
    mirrored = np.array([draw_spatial(seeded(seed), config, PATCH).mirrored for seed in range(200)])
    assert not mirrored[:, :2].any()
    assert 60 < mirrored[:, 2].sum() < 140


@pytest.mark.parametrize(
    ("patch", "axis"), [((48, 64, 48), None), ((16, 48, 48), None), ((15, 48, 48), 0), ((64, 20, 40), 1)]
)
def test_a_flat_patch_is_turned_in_its_plane_only(patch: tuple[int, int, int], axis: int | None) -> None:
    assert through_plane_axis(patch) == axis
    config = Augmentation(rotation_probability=1.0, scaling_probability=1.0)
    draw = draw_spatial(seeded(0), config, patch)
    turned = [other for other in range(3) if draw.rotation_rad[other]]
    assert turned == ([0, 1, 2] if axis is None else [axis])
    if axis is not None:
        assert draw.extent_factor[axis] == 1.0
        assert box_size(draw, patch, (1.0, 1.0, 1.0))[axis] == patch[axis]
