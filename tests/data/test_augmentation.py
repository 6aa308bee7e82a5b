from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from cached_cases import UNCHANGED, make_plan
from torch.utils._python_dispatch import TorchDispatchMode

from sagittal.data import augmentation, cutting
from sagittal.data import intensity as intensity_module
from sagittal.data.augmentation import augment, masked_channels, spatial_draw
from sagittal.data.draws import seeded
from sagittal.data.intensity import draw_intensities
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


COUNTED = (2, 8)


class Counter(TorchDispatchMode):
    """Count operations, and refuse those that make a processor wait for an accelerator."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: dict[str, int] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = func.overloadpacket.__name__
        assert name not in ("_local_scalar_dense", "nonzero", "masked_select", "equal", "unique_dim"), name
        self.calls[name] = self.calls.get(name, 0) + 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("config", [EVERYTHING, EVERYTHING.replace(elastic_probability=1.0)])
def test_a_batch_at_once_takes_as_many_operations_as_a_sample_but_for_noise_and_boxes(
    config: Augmentation, monkeypatch: pytest.MonkeyPatch
) -> None:
    # What is drawn on the processor is not counted, nor waits for anything: a generator is asked, not a device.
    spatial = {seed: spatial_draw(seed, config, PATCH) for seed in (0, 1)}
    intensity = {seed: draw_intensities(seeded(seed), config, 2, PATCH) for seed in (0, 1)}
    monkeypatch.setattr(augmentation, "seeded", lambda seed: seed)
    monkeypatch.setattr(augmentation, "draw_spatial", lambda seed, *_: spatial[seed])
    monkeypatch.setattr(augmentation, "draw_intensities", lambda seed, *_: intensity[seed])
    monkeypatch.setattr(cutting, "field", cache(cutting.field))
    # On an accelerator the power is one operation; in parts it is for the CPU.
    monkeypatch.setattr(
        intensity_module, "_power_", lambda values, exponents: values.pow_(exponents[:, None, None, None])
    )
    totals = []
    for count in COUNTED:
        seeds = [0, 1] * (count // 2)
        images, labels = boxes(config, seeds)
        augment(images, labels, config, PATCH, seeds, spacing_mm=SPACING, at_once=True)
        with Counter() as counter:
            augment(images, labels, config, PATCH, seeds, spacing_mm=SPACING, at_once=True)
        assert counter.calls["grid_sampler_3d"] == 2
        assert counter.calls["normal_"] == 2 * count
        views = {"slice", "view", "select", "unsqueeze", "expand", "detach", "unbind", "alias", "t", "permute"}
        per_sample = {"normal_", "copy_", *views}
        totals.append(sum(calls for name, calls in counter.calls.items() if name not in per_sample))
        assert counter.calls.get("copy_", 0) <= 2 * count + 3
    assert totals[0] == totals[1]


@pytest.mark.parametrize("config", [EVERYTHING, Augmentation(elastic_probability=0.5, elastic_magnitude=(0.0, 0.2))])
def test_a_batch_at_once_is_what_its_samples_are_one_by_one(config: Augmentation) -> None:
    seeds = list(range(10))
    images, labels = boxes(config, seeds)
    before = [image.clone() for image in images], [label.clone() for label in labels]
    swapping = config.replace(swapped_labels=((2, 1, 3),))
    options: dict[str, Any] = {"spacing_mm": SPACING, "masked_channels": (1,), "swaps": {2: (0, 3, 2, 1)}}
    apart = augment(images, labels, swapping, PATCH, seeds, **options, at_once=False)
    together = augment(images, labels, swapping, PATCH, seeds, **options, at_once=True)
    assert all(torch.equal(old, new) for old, new in zip(before[0], images, strict=True))
    assert all(torch.equal(old, new) for old, new in zip(before[1], labels, strict=True))
    assert torch.allclose(together[0], apart[0], atol=2e-4)
    assert (together[1] == apart[1]).float().mean() > 0.999
    assert [part.dtype for part in together] == [part.dtype for part in apart] == [torch.float32, torch.int64]


@pytest.mark.parametrize("at_once", [False, True])
def test_what_comes_out_shares_no_memory_with_the_boxes(at_once: bool) -> None:
    image, labels = torch.randn(2, 1, *PATCH), torch.ones(2, *PATCH, dtype=torch.int64)
    before = image.clone()
    patch, target = augment(image, labels, UNCHANGED, PATCH, [0, 1], spacing_mm=SPACING, at_once=at_once)
    patch.zero_()
    target.zero_()
    assert torch.equal(image, before)
    assert labels.all()


@pytest.mark.parametrize("threads", [2, 3])
def test_bits_depend_neither_on_the_number_of_threads_nor_on_the_rest_of_the_batch(threads: int) -> None:
    config = EVERYTHING.replace(elastic_probability=1.0)
    images, labels = boxes(config, [7, 8, 9])
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        together = augment(images, labels, config, PATCH, [7, 8, 9], spacing_mm=SPACING)
        torch.set_num_threads(1)
        for place, seed in enumerate([7, 8, 9]):
            alone = augment(
                images[place : place + 1], labels[place : place + 1], config, PATCH, [seed], spacing_mm=SPACING
            )
            assert torch.equal(together[0][place], alone[0][0])
            assert torch.equal(together[1][place], alone[1][0])
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("at_once", [False, True])
@pytest.mark.parametrize("turned", [0.0, 1.0])
def test_a_mirrored_left_kidney_is_a_right_kidney(at_once: bool, turned: float) -> None:
    # 1 is what lies at the low end of the last axis, 2 at the high end, 3 in the middle, 4 is ignored.
    config = UNCHANGED.replace(
        mirror_axes=(0, 2), swapped_labels=((2, 1, 2),), scaling_probability=turned, scaling_range=(1.0, 1.0)
    )
    labels = torch.full(PATCH, 3, dtype=torch.int16)
    labels[..., :5], labels[..., -5:], labels[:, :3] = 1, 2, 4
    seeds = list(range(8))
    image = labels[None].float()
    patches, targets = augment(
        [image] * 8, [labels] * 8, config, PATCH, seeds, spacing_mm=SPACING, swaps={2: (0, 2, 1, 3, 4)}, at_once=at_once
    )
    sides = set()
    for seed, patch, target in zip(seeds, patches, targets, strict=True):
        draw = spatial_draw(seed, config, PATCH)
        sides.add(draw.mirrored[2])
        assert torch.equal(target, labels.to(torch.int64))
        assert torch.allclose(patch[0], image[0].flip([2] if draw.mirrored[2] else []), atol=1e-3)
    assert sides == {False, True}


def test_a_plan_with_pairs_needs_their_indices() -> None:
    config = UNCHANGED.replace(swapped_labels=((2, 1, 2),))
    with pytest.raises(AssertionError, match="give `swaps`"):
        augment(torch.zeros(1, 1, *PATCH), torch.zeros(1, *PATCH), config, PATCH, [0], spacing_mm=SPACING)


@pytest.mark.parametrize("at_once", [False, True])
def test_boxes_of_stored_types_are_taken_as_they_are(at_once: bool) -> None:
    images, labels = boxes(EVERYTHING, [1, 2])
    images = [image.half() for image in images]
    given = augment(images, labels, EVERYTHING, PATCH, [1, 2], spacing_mm=SPACING, at_once=at_once)
    floats = augment(
        [image.float() for image in images],
        [label.to(torch.uint8) for label in labels],
        EVERYTHING,
        PATCH,
        [1, 2],
        spacing_mm=SPACING,
        at_once=at_once,
    )
    assert torch.equal(given[0], floats[0])
    assert torch.equal(given[1], floats[1])


def test_gross_statistics_survive() -> None:
    seeds = list(range(40))
    images, labels = boxes(Augmentation(), seeds)
    patches, targets = augment(images, labels, Augmentation(), PATCH, seeds, spacing_mm=SPACING)
    assert abs(float(patches.mean())) < 0.1
    assert 0.6 < float(patches.std()) < 1.3
    assert np.bincount(targets.flatten().numpy(), minlength=4).min() > 0.15 * targets.numel()
