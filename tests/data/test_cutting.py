from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sagittal.data.cutting import CutTogether, cut_patch
from sagittal.data.draws import seeded
from sagittal.data.elastic import Elastic, displacements, field
from sagittal.data.parcel import Parcel
from sagittal.data.spatial import SpatialDraw, box_size, draw_spatial, source_matrix
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


def test_an_exact_patch_reads_its_own_size() -> None:
    assert box_size(SpatialDraw(), PATCH, SPACING) == PATCH


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


def test_what_lies_beyond_the_box_is_zero_and_background() -> None:
    image, labels = torch.ones(1, 8, 8, 8), torch.ones(8, 8, 8, dtype=torch.int16)
    draw = SpatialDraw(extent_factor=(2.0, 2.0, 2.0))
    cut, target = cut_patch(image, labels, draw, (8, 8, 8), (1.0, 1.0, 1.0))
    assert cut[0, 0, 0, 0] == 0
    assert target[0, 0, 0] == 0
    assert cut[0, 4, 4, 4] == pytest.approx(1.0)
    assert target[4, 4, 4] == 1


BENT = SpatialDraw(
    rotation_rad=(0.3, -0.2, 0.1),
    extent_factor=(1.2, 1.2, 1.2),
    mirrored=(True, False, True),
    elastic=Elastic(sigma=0.15, reach_vox=(1.0, 2.5, 0.7), seed=4),
)


def moved_by(elastic: Elastic, patch: tuple[int, int, int]) -> torch.Tensor:
    """The field of displacements (3, D, H, W)."""
    made = field(elastic, patch)
    d, h, w = (torch.from_numpy(weights).float()[None] for weights in made.weights)
    return displacements(torch.from_numpy(made.knots).float()[None], (d, h, w), torch.tensor([elastic.reach_vox]))[0]


def test_elastic_rotation_scale_and_mirroring_are_one_map_and_the_box_holds_it() -> None:
    assert BENT.elastic is not None
    box = box_size(BENT, PATCH, SPACING)
    cut, target = cut_patch(smooth_box(box), torch.ones(box, dtype=torch.int16), BENT, PATCH, SPACING)
    matrix = torch.from_numpy(source_matrix(BENT, SPACING)).to(torch.float32)
    expected = torch.einsum("ij,jdhw->idhw", matrix, smooth_box(PATCH) + moved_by(BENT.elastic, PATCH))
    assert torch.allclose(cut, expected, atol=2e-3)
    assert target.min() == 1
    unbent = SpatialDraw(BENT.rotation_rad, BENT.extent_factor, BENT.mirrored)
    straight, _ = cut_patch(smooth_box(box), torch.ones(box), unbent, PATCH, SPACING)
    assert not torch.allclose(cut, straight, atol=0.3)


@settings(max_examples=15, deadline=None, derandomize=True)
@given(seed=st.integers(0, 2**31), patch=st.tuples(*[st.integers(2, 15)] * 3))
def test_the_box_of_a_bent_patch_holds_every_voxel_that_it_needs(seed: int, patch: tuple[int, int, int]) -> None:
    config = Augmentation(
        rotation_probability=1.0, scaling_probability=1.0, elastic_probability=1.0, elastic_magnitude=(0.1, 0.2)
    )
    draw = draw_spatial(seeded(seed), config, patch)
    box = box_size(draw, patch, SPACING)
    _, target = cut_patch(torch.zeros(1, *box), torch.ones(box, dtype=torch.int16), draw, patch, SPACING)
    assert target.min() == 1


DRAWS = (
    SpatialDraw(),
    BENT,
    SpatialDraw(mirrored=(False, True, True)),
    SpatialDraw(rotation_rad=(0.1, 0.0, 0.0)),
    SpatialDraw(mirrored=(True, False, False)),
    SpatialDraw(extent_factor=(0.8, 0.8, 0.8), elastic=Elastic(sigma=0.3, reach_vox=(0.5, 0.5, 0.5), seed=1)),
)


@pytest.mark.parametrize("which", [(0, 1, 2, 3, 4, 5), (1, 3), (0, 2, 4), (5,)])
@pytest.mark.parametrize("more", [0, 2])
def test_a_batch_cut_together_is_what_its_samples_are_alone(which: tuple[int, ...], more: int) -> None:
    draws = [DRAWS[place] for place in which]
    sizes = [
        tuple(size + more * (place % 2) for size in box_size(draw, PATCH, SPACING)) for place, draw in enumerate(draws)
    ]
    images, labels = zip(*(box_of(size, seed) for seed, size in enumerate(sizes)), strict=True)
    parcel = Parcel()
    cutter = CutTogether(draws, sizes, PATCH, SPACING, parcel)
    parcel.send(torch.device("cpu"))
    patches, targets = cutter.cut(images, labels)
    assert (patches.shape, targets.shape) == ((len(which), 2, *PATCH), (len(which), *PATCH))
    for place, draw in enumerate(draws):
        cut, target = cut_patch(images[place], labels[place], draw, PATCH, SPACING)
        if draw.is_exact:
            assert torch.equal(patches[place], cut)
            assert torch.equal(targets[place], target)
        else:
            assert torch.allclose(patches[place], cut, atol=1e-4)
            assert (targets[place] == target).float().mean() > 0.999
