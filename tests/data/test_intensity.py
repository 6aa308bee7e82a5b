from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import ndimage

from sagittal.data.draws import seeded
from sagittal.data.intensity import (
    IntensityDraw,
    add_noise,
    blur,
    change_contrast,
    change_gamma,
    change_intensity,
    draw_intensities,
    gaussian_taps,
    lower_resolution,
)
from sagittal.plan.augmentation import Augmentation

PATCH = (14, 19, 16)
EVERYTHING = IntensityDraw(
    noise_std=0.2,
    noise_seed=5,
    blur_sigma_vox=(0.6, 0.8, 1.0),
    brightness=1.2,
    contrast=0.8,
    low_resolution_shape=(8, 10, 9),
    inverted_gamma=1.3,
    gamma=0.8,
)


def channel(seed: int = 0) -> torch.Tensor:
    return torch.randn((1, *PATCH), generator=torch.Generator().manual_seed(seed))


def blurred(image: torch.Tensor, *sigmas: tuple[float, float, float]) -> torch.Tensor:
    taps = [torch.from_numpy(gaussian_taps([sigma[axis] for sigma in sigmas])).float() for axis in range(3)]
    return blur(image, taps)


def test_a_draw_replays_and_leaves_its_input_unchanged() -> None:
    image = channel()
    before = image.clone()
    first, second = change_intensity(image, [EVERYTHING]), change_intensity(image, [EVERYTHING])
    assert torch.equal(first, second)
    assert torch.equal(image, before)
    assert not torch.allclose(first, image)


def test_an_empty_draw_changes_nothing() -> None:
    assert torch.equal(change_intensity(channel(), [IntensityDraw()]), channel())


@pytest.mark.parametrize("threads", [2, 3])
def test_the_bits_do_not_depend_on_the_number_of_threads(threads: int) -> None:
    image = torch.randn((1, 37, 61, 53), generator=torch.Generator().manual_seed(1))
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = change_intensity(image, [EVERYTHING])
        torch.set_num_threads(threads)
        shared = change_intensity(image, [EVERYTHING])
    finally:
        torch.set_num_threads(before)
    assert torch.equal(alone, shared)


def test_noise_has_its_deviation_and_is_not_correlated_with_the_image() -> None:
    image = torch.randn((1, 30, 40, 35), generator=torch.Generator().manual_seed(2))
    noise = add_noise(image, torch.tensor([0.3]), [7]) - image
    assert float(noise.std()) == pytest.approx(0.3, rel=0.02)
    assert float(noise.mean()) == pytest.approx(0.0, abs=0.01)
    assert abs(float((noise * image).mean())) < 0.01


def test_blur_is_scipys_gaussian_along_each_axis() -> None:
    image, sigma = channel(3), (0.5, 0.9, 1.0)
    reached = [math.ceil(3 * value) for value in sigma]
    expected = ndimage.gaussian_filter(image[0].numpy(), sigma, mode="nearest", radius=reached)
    assert np.allclose(blurred(image, sigma)[0].numpy(), expected, atol=1e-5)


def test_blur_keeps_a_constant_patch_and_works_on_a_single_slice() -> None:
    flat = torch.full((1, 1, 5, 4), 2.5)
    assert torch.allclose(blurred(flat, (1.0, 1.0, 1.0)), flat)


def test_contrast_keeps_range_and_moves_away_from_the_mean() -> None:
    image = channel(4)
    stronger, weaker = (change_contrast(image, torch.tensor([factor])) for factor in (1.25, 0.75))
    assert stronger.min() == image.min()
    assert stronger.max() == image.max()
    assert stronger.std() > image.std() > weaker.std()
    assert float(weaker.std() / image.std()) == pytest.approx(0.75, rel=1e-3)
    assert float(weaker.mean()) == pytest.approx(float(image.mean()), abs=1e-5)


def test_low_resolution_keeps_the_size_and_loses_detail() -> None:
    image = channel(5)
    coarse = lower_resolution(image, (7, 10, 8))
    assert coarse.shape == image.shape
    assert coarse.std() < 0.9 * image.std()
    assert torch.equal(lower_resolution(image, PATCH), image)


@pytest.mark.parametrize("gamma", [0.7, 1.5])
def test_gamma_keeps_order_mean_and_deviation(gamma: float) -> None:
    image = channel(6)
    curved = change_gamma(image, torch.tensor([gamma]))
    assert float(curved.mean()) == pytest.approx(float(image.mean()), abs=1e-4)
    assert float(curved.std()) == pytest.approx(float(image.std()), rel=1e-3)
    order = image.flatten().argsort()
    assert (curved.flatten()[order].diff() > -1e-5).all()
    # A power above 1 pulls the middle of the range down.
    middle = order[len(order) // 2]
    assert (curved.flatten()[middle] < image.flatten()[middle] - 0.01) == (gamma > 1)


def test_gamma_leaves_a_constant_patch_alone() -> None:
    flat = torch.full((1, 3, 4, 5), -1.25)
    assert torch.equal(change_gamma(flat, torch.tensor([1.4])), flat)


def test_gamma_of_one_is_the_identity() -> None:
    assert torch.allclose(change_gamma(channel(8), torch.tensor([1.0])), channel(8), atol=1e-5)


def test_draws_have_the_probabilities_and_ranges_of_the_plan() -> None:
    config = Augmentation()
    draws = [draw_intensities(seeded(seed), config, 2, (20, 30, 40)) for seed in range(3000)]
    first = [channels[0] for channels in draws]
    shares = {
        name: np.mean([getattr(draw, name) is not None for draw in first])
        for name in ("noise_std", "blur_sigma_vox", "brightness", "contrast", "low_resolution_shape", "gamma")
    }
    expected = {
        "noise_std": 0.1,
        "blur_sigma_vox": 0.2 * 0.5,
        "brightness": 0.15,
        "contrast": 0.15,
        "low_resolution_shape": 0.25 * 0.5,
        "gamma": 0.3,
    }
    assert shares == pytest.approx(expected, abs=0.025)
    assert np.mean([draw.inverted_gamma is not None for draw in first]) == pytest.approx(0.1, abs=0.02)
    noise = np.array([draw.noise_std for draw in first if draw.noise_std is not None])
    assert (noise**2).max() <= 0.1
    assert (noise**2).mean() == pytest.approx(0.05, abs=0.01)
    brightness = np.array([draw.brightness for draw in first if draw.brightness is not None])
    assert (brightness.min() >= 0.75, brightness.max() <= 1.25) == (True, True)
    shapes = [draw.low_resolution_shape for draw in first if draw.low_resolution_shape is not None]
    assert (min(shapes) >= (10, 15, 20), max(shapes) <= (20, 30, 40)) == (True, True)


def test_channels_are_drawn_apart_but_share_the_strength_of_the_noise() -> None:
    config = Augmentation(noise_probability=1.0, gamma_probability=1.0, brightness_probability=1.0)
    first, second = draw_intensities(seeded(9), config, 2, PATCH)
    assert first.noise_std == second.noise_std
    assert first.noise_seed != second.noise_seed
    assert first.gamma != second.gamma
    assert first.brightness != second.brightness


def test_low_resolution_spares_the_through_plane_axis_of_a_flat_patch() -> None:
    config = Augmentation(low_resolution_probability=1.0, low_resolution_range=(0.5, 0.5))
    shapes = {draw_intensities(seeded(seed), config, 1, (8, 40, 40))[0].low_resolution_shape for seed in range(20)}
    assert shapes == {None, (8, 20, 20)}


MIXED = (
    EVERYTHING,
    IntensityDraw(),
    IntensityDraw(blur_sigma_vox=(1.0, 0.5, 0.5), low_resolution_shape=(14, 15, 9), gamma=1.4),
    IntensityDraw(noise_std=0.1, noise_seed=8, brightness=0.8, inverted_gamma=0.7),
    IntensityDraw(contrast=1.2, low_resolution_shape=(7, 19, 12)),
)


@pytest.mark.parametrize("which", [(0, 1, 2, 3, 4), (2, 4), (1, 3), (0, 0)])
def test_channels_changed_together_are_what_they_are_alone(which: tuple[int, ...]) -> None:
    draws = [MIXED[place] for place in which]
    images = torch.cat([channel(seed) for seed in range(len(which))])
    before = images.clone()
    together = change_intensity(images, draws)
    assert torch.equal(images, before)
    for place, draw in enumerate(draws):
        alone = change_intensity(images[place : place + 1], [draw])[0]
        assert torch.allclose(together[place], alone, atol=1e-5)
        assert torch.equal(together[place], images[place]) == (draw == IntensityDraw())


@pytest.mark.parametrize("shapes", [((7, 10, 8), (14, 12, 9)), ((1, 19, 3), (13, 1, 16)), ((7, 10, 8), (7, 10, 8))])
def test_other_coarse_grids_for_each_channel_are_the_same_as_one_after_another(
    shapes: tuple[tuple[int, int, int], ...],
) -> None:
    images = torch.cat([channel(1), channel(2)])
    draws = [IntensityDraw(low_resolution_shape=shape) for shape in shapes]
    together = change_intensity(images, draws)
    for place, shape in enumerate(shapes):
        assert torch.allclose(together[place], lower_resolution(images[place : place + 1], shape)[0], atol=1e-5)
