"""Random changes of intensity: noise, blur, brightness, contrast, low resolution and gamma, as nnU-Net does them.

Values are drawn first (`draw_intensities`), then applied (`change_intensity`) to one channel at a time by plain
functions that leave their input unchanged. Means, ranges and deviations are taken over the patch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from sagittal.data.draws import balanced_ratio, happens, new_seed, seeded, uniform
from sagittal.data.spatial import through_plane_axis
from sagittal.plan.augmentation import Augmentation
from sagittal.plan.base import Triple

CHANNEL_PROBABILITY = 0.5
"""Share of the channels of a chosen sample that blur and low resolution touch (nnU-Net's p_per_channel)."""

BLUR_REACH_SIGMA = 3.0
"""Where the Gaussian of the blur is cut off."""

_FLAT = 1e-7
"""A patch whose range or deviation is below this is constant: gamma has nothing to stretch."""

_SERIAL_VOXELS = 16384
"""torch never splits an elementwise operation of this size among threads."""


@dataclass(frozen=True, slots=True)
class IntensityDraw:
    """What happens to one channel of one sample, in this order; None is left out."""

    noise_std: float | None = None
    noise_seed: int = 0
    blur_sigma_vox: tuple[float, float, float] | None = None
    brightness: float | None = None
    contrast: float | None = None
    low_resolution_shape: Triple | None = None
    inverted_gamma: float | None = None
    gamma: float | None = None


def draw_intensities(
    generator: torch.Generator, config: Augmentation, channels: int, patch_size: Triple
) -> tuple[IntensityDraw, ...]:
    """Draw what happens to each channel: whether, once for the sample; how much, for each channel apart.

    The strength of the noise is common to all channels, as in nnU-Net; its voxels are not.
    """
    noise = happens(generator, config.noise_probability)
    noise_std = math.sqrt(uniform(generator, *config.noise_variance))
    blur = happens(generator, config.blur_probability)
    brightness = happens(generator, config.brightness_probability)
    contrast = happens(generator, config.contrast_probability)
    low_resolution = happens(generator, config.low_resolution_probability)
    inverted_gamma = happens(generator, config.gamma_inverted_probability)
    gamma = happens(generator, config.gamma_probability)
    draws = []
    for _ in range(channels):
        sigmas = (
            uniform(generator, *config.blur_sigma_vox),
            uniform(generator, *config.blur_sigma_vox),
            uniform(generator, *config.blur_sigma_vox),
        )
        blurred = happens(generator, CHANNEL_PROBABILITY) and blur
        coarse = _coarse_shape(patch_size, uniform(generator, *config.low_resolution_range))
        coarsened = happens(generator, CHANNEL_PROBABILITY) and low_resolution
        draws.append(
            IntensityDraw(
                noise_std=noise_std if noise else None,
                noise_seed=new_seed(generator),
                blur_sigma_vox=sigmas if blurred else None,
                brightness=balanced_ratio(generator, *config.brightness_range) if brightness else None,
                contrast=balanced_ratio(generator, *config.contrast_range) if contrast else None,
                low_resolution_shape=coarse if coarsened else None,
                inverted_gamma=balanced_ratio(generator, *config.gamma_range) if inverted_gamma else None,
                gamma=balanced_ratio(generator, *config.gamma_range) if gamma else None,
            )
        )
    return tuple(draws)


def _coarse_shape(patch_size: Triple, factor: float) -> Triple:
    thin = through_plane_axis(patch_size)
    d, h, w = (size if axis == thin else max(1, round(size * factor)) for axis, size in enumerate(patch_size))
    return d, h, w


def change_intensity(channel: Float[Tensor, "D H W"], draw: IntensityDraw) -> Float[Tensor, "D H W"]:
    """Return `channel` with the drawn changes; the input is left as it was (and returned where nothing happens)."""
    if draw.noise_std is not None:
        channel = add_noise(channel, draw.noise_std, draw.noise_seed)
    if draw.blur_sigma_vox is not None:
        channel = blur(channel, draw.blur_sigma_vox)
    if draw.brightness is not None:
        channel = channel * draw.brightness
    if draw.contrast is not None:
        channel = change_contrast(channel, draw.contrast)
    if draw.low_resolution_shape is not None:
        channel = lower_resolution(channel, draw.low_resolution_shape)
    if draw.inverted_gamma is not None:
        channel = -change_gamma(-channel, draw.inverted_gamma)
    if draw.gamma is not None:
        channel = change_gamma(channel, draw.gamma)
    return channel


def add_noise(channel: Float[Tensor, "D H W"], std: float, seed: int) -> Float[Tensor, "D H W"]:
    """Add Gaussian noise of deviation `std`, drawn on the channel's device."""
    generator = seeded(seed) if channel.device.type == "cpu" else torch.Generator(channel.device).manual_seed(seed)
    noise = torch.empty_like(channel).normal_(0.0, std, generator=generator)
    return noise.add_(channel)


def blur(channel: Float[Tensor, "D H W"], sigma_vox: tuple[float, float, float]) -> Float[Tensor, "D H W"]:
    """Blur with a Gaussian along each axis; beyond the edge the edge goes on."""
    for axis, sigma in enumerate(sigma_vox):
        reach = math.ceil(BLUR_REACH_SIGMA * sigma)
        taps = [math.exp(-0.5 * (step / sigma) ** 2) for step in range(-reach, reach + 1)]
        pad = [0, 0, 0, 0, 0, 0]
        pad[2 * (2 - axis)] = pad[2 * (2 - axis) + 1] = reach
        padded = functional.pad(channel[None, None], pad, mode="replicate")[0, 0]
        length = channel.shape[axis]
        # A few additions of whole slices are faster than a convolution of one channel.
        total = padded.narrow(axis, 0, length) * (taps[0] / sum(taps))
        for step, tap in enumerate(taps[1:], start=1):
            total.add_(padded.narrow(axis, step, length), alpha=tap / sum(taps))
        channel = total
    return channel


def change_contrast(channel: Float[Tensor, "D H W"], factor: float) -> Float[Tensor, "D H W"]:
    """Stretch about the mean by `factor`, then clip to the range that was there before (nnU-Net's preserve_range)."""
    lowest, highest = channel.aminmax()
    mean, _ = _mean_and_std(channel)
    return ((channel - mean) * factor + mean).clamp_(lowest, highest)


def lower_resolution(channel: Float[Tensor, "D H W"], coarse_shape: Triple) -> Float[Tensor, "D H W"]:
    """Pick voxels on a coarser grid and interpolate back: what a scan with larger voxels would show."""
    coarse = functional.interpolate(channel[None, None], size=coarse_shape, mode="nearest-exact")
    return functional.interpolate(coarse, size=channel.shape, mode="trilinear", align_corners=False)[0, 0]


def change_gamma(channel: Float[Tensor, "D H W"], gamma: float) -> Float[Tensor, "D H W"]:
    """Raise the patch, scaled to 0..1, to the power `gamma`, and give it back its mean and deviation."""
    lowest, highest = channel.aminmax()
    extent = highest - lowest
    mean, std = _mean_and_std(channel)
    flat = (extent < _FLAT) | ~(std > _FLAT)
    curved = _power_((channel - lowest).contiguous().div_(extent.clamp_min(_FLAT)).clamp_(0.0, 1.0), gamma)
    curved_mean, curved_std = _mean_and_std(curved)
    curved = (curved - curved_mean) * (std / curved_std.clamp_min(_FLAT)) + mean
    # Chosen on the device: a branch in Python would make the processor wait for the accelerator.
    return torch.where(flat, channel, curved)


def _mean_and_std(channel: Float[Tensor, "D H W"]) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    # Plane by plane: one sum over everything is split among threads, and its last bits would depend on their number.
    mean = channel.flatten(1).mean(1).mean()
    return mean, (channel - mean).square_().flatten(1).mean(1).mean().sqrt()


def _power_(values: Float[Tensor, "D H W"], exponent: float) -> Float[Tensor, "D H W"]:
    if values.device.type != "cpu":
        return values.pow_(exponent)
    # The power differs in its last bit between the vectorised middle and the scalar end of each thread's share.
    for part in torch.split(values.view(-1), _SERIAL_VOXELS):
        part.pow_(exponent)
    return values
