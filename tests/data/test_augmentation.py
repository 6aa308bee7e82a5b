from __future__ import annotations

import numpy as np
import torch
from cached_cases import UNCHANGED, make_plan

from sagittal.data.augmentation import augment, masked_channels, spatial_draw
from sagittal.data.spatial import box_size
from sagittal.plan.augmentation import Augmentation

PATCH = (12, 17, 14)
SPACING = (2.0, 1.0, 1.5)
EVERYTHING = Augmentation(
    rotation_probability=1.0,
    scaling_probability=1.0,
    noise_probability=1.0,
    blur_probability=1.0,
    brightness_probability=1.0,
    contrast_probability=1.0,
    low_resolution_probability=1.0,
    gamma_probability=1.0,
    gamma_inverted_probability=1.0,
)


def boxes(config: Augmentation, seeds: list[int]) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    images, labels = [], []
    for seed in seeds:
        size = box_size(spatial_draw(seed, config, PATCH), PATCH, SPACING)
        generator = torch.Generator().manual_seed(seed)
        images.append(torch.randn(2, *size, generator=generator))
        labels.append(torch.randint(0, 4, size, generator=generator, dtype=torch.int16))
    return images, labels


def test_a_batch_replays_from_its_seeds_and_leaves_its_boxes_unchanged() -> None:
    seeds = [3, 4, 2**62]
    images, labels = boxes(EVERYTHING, seeds)
    before = [image.clone() for image in images], [label.clone() for label in labels]
    first = augment(images, labels, EVERYTHING, PATCH, seeds, spacing_mm=SPACING)
    second = augment(images, labels, EVERYTHING, PATCH, seeds, spacing_mm=SPACING)
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])
    assert all(torch.equal(old, new) for old, new in zip(before[0], images, strict=True))
    assert all(torch.equal(old, new) for old, new in zip(before[1], labels, strict=True))
    assert first[0].shape == (3, 2, *PATCH)
    assert first[1].shape == (3, *PATCH)
    assert first[1].dtype == torch.int64
    assert torch.isfinite(first[0]).all()


def test_a_sample_does_not_depend_on_its_neighbours() -> None:
    images, labels = boxes(EVERYTHING, [5, 6])
    together, _ = augment(images, labels, EVERYTHING, PATCH, [5, 6], spacing_mm=SPACING)
    alone, _ = augment(images[1:], labels[1:], EVERYTHING, PATCH, [6], spacing_mm=SPACING)
    assert torch.equal(together[1], alone[0])


def test_other_seeds_give_other_patches() -> None:
    image, labels = torch.randn(1, 2, 30, 40, 40), torch.zeros(1, 30, 40, 40, dtype=torch.int16)
    first, _ = augment(image, labels, EVERYTHING, PATCH, [1], spacing_mm=SPACING)
    second, _ = augment(image, labels, EVERYTHING, PATCH, [2], spacing_mm=SPACING)
    assert not torch.allclose(first, second)


def test_nothing_switched_on_is_the_centre_of_the_box() -> None:
    image = torch.randn(1, 1, 14, 19, 18)
    labels = torch.randint(0, 3, (1, 14, 19, 18))
    patch, target = augment(image, labels, UNCHANGED, PATCH, [0], spacing_mm=SPACING)
    assert torch.equal(patch, image[:, :, 1:13, 1:18, 2:16])
    assert torch.equal(target, labels[:, 1:13, 1:18, 2:16])


def test_intensity_changes_touch_no_label_and_mirroring_moves_both() -> None:
    config = EVERYTHING.replace(rotation_probability=0.0, scaling_probability=0.0)
    labels = torch.randint(0, 3, (1, *PATCH))
    image = labels[:, None].float()
    for seed in range(6):
        patch, target = augment(image, labels, config, PATCH, [seed], spacing_mm=SPACING)
        draw = spatial_draw(seed, config, PATCH)
        assert torch.equal(target, labels.flip([axis + 1 for axis in range(3) if draw.mirrored[axis]]))
        means = [float(patch[0, 0][target[0] == value].mean()) for value in range(3)]
        assert means == sorted(means)


def test_outside_of_a_masked_channel_stays_zero() -> None:
    config = EVERYTHING.replace(rotation_probability=0.0, scaling_probability=0.0, mirror_axes=())
    image = torch.randn(1, 2, *PATCH)
    image[:, :, :, :6] = 0
    labels = torch.zeros(1, *PATCH)
    patch, _ = augment(image, labels, config, PATCH, [1], spacing_mm=SPACING, masked_channels=(1,))
    assert not patch[0, 1, :, :6].any()
    assert patch[0, 1, :, 6:].all()
    assert patch[0, 0, :, :6].any()


def test_channels_normalised_inside_their_mask_are_masked() -> None:
    assert masked_channels(make_plan(PATCH, nonzero_only=True).preprocessing) == (0,)
    assert masked_channels(make_plan(PATCH).preprocessing) == ()


def test_gross_statistics_survive() -> None:
    seeds = list(range(40))
    images, labels = boxes(Augmentation(), seeds)
    patches, targets = augment(images, labels, Augmentation(), PATCH, seeds, spacing_mm=SPACING)
    assert abs(float(patches.mean())) < 0.1
    assert 0.6 < float(patches.std()) < 1.3
    assert np.bincount(targets.flatten().numpy(), minlength=4).min() > 0.15 * targets.numel()
