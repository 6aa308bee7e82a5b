"""Random changes of intensity: noise, blur, brightness, contrast, low resolution and gamma, as nnU-Net does them.

Values are drawn first (`draw_intensities`), then applied (`IntensityChanges`) to one channel or to those of a whole
batch at once by plain functions that leave their input unchanged. Means, ranges and deviations are taken over each
channel of each patch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeAlias, TypeVar

import numpy as np
import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor
from torch.nn import functional

from sagittal.data.draws import balanced_ratio, happens, new_seed, seeded, uniform
from sagittal.data.parcel import Parcel, Place
from sagittal.data.spatial import through_plane_axis
from sagittal.plan.augmentation import Augmentation
from sagittal.plan.base import Triple

CHANNEL_PROBABILITY = 0.5
"""Share of the channels of a chosen sample that blur and low resolution touch (nnU-Net's p_per_channel)."""

BLUR_REACH_SIGMA = 3.0
"""Where the Gaussian of the blur is cut off."""

Change: TypeAlias = Callable[[Tensor], Tensor]
"""From channels (R, D, H, W) to new ones."""

T = TypeVar("T")

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


def draw_dropout(generator: torch.Generator, config: Augmentation, channels: int) -> tuple[int, ...]:
    """Draw the channels that are left out of a sample: each by itself, but never all of them."""
    dropped = [channel for channel in range(channels) if happens(generator, config.channel_dropout)]
    if len(dropped) == channels:
        dropped.pop(min(channels - 1, int(uniform(generator, 0.0, float(channels)))))
    return tuple(dropped)


def _coarse_shape(patch_size: Triple, factor: float) -> Triple:
    thin = through_plane_axis(patch_size)
    d, h, w = (size if axis == thin else max(1, round(size * factor)) for axis, size in enumerate(patch_size))
    return d, h, w


class IntensityChanges:
    """Changes of many channels, whatever samples they are of, in as many operations as changes of one.

    Make it, send the parcel, then `apply`. Only noise is drawn channel by channel, from a generator for each.
    """

    def __init__(self, draws: Sequence[IntensityDraw], patch_size: Triple, parcel: Parcel) -> None:
        """Put into the parcel what the device needs.

        Args:
            draws: one per channel.
            patch_size: D, H, W of each.
            parcel: not yet sent.
        """
        self._parcel, self._count = parcel, len(draws)
        self._stages: list[tuple[Place | None, Change]] = []
        self._stage([None if draw.noise_std is None else (draw.noise_std, draw.noise_seed) for draw in draws], _noise)
        self._stage([draw.blur_sigma_vox for draw in draws], _blur)
        self._stage([draw.brightness for draw in draws], _brightness)
        self._stage([draw.contrast for draw in draws], _contrast)
        self._stage([draw.low_resolution_shape for draw in draws], partial(_low_resolution, patch_size))
        self._stage([draw.inverted_gamma for draw in draws], _inverted_gamma)
        self._stage([draw.gamma for draw in draws], _gamma)

    def __bool__(self) -> bool:
        """Whether anything changes at all."""
        return bool(self._stages)

    def _stage(self, drawn: Sequence[T | None], prepare: Callable[[list[T], Parcel], Change]) -> None:
        rows = [row for row, value in enumerate(drawn) if value is not None]
        if rows:
            where = self._parcel.put(rows) if len(rows) < self._count else None
            self._stages.append((where, prepare([value for value in drawn if value is not None], self._parcel)))

    def apply(self, channels: Float[Tensor, "R D H W"]) -> Float[Tensor, "R D H W"]:
        """Return the changed channels; `channels` may be overwritten, and may be what is returned."""
        for where, change in self._stages:
            if where is None:
                channels = change(channels)
            else:
                rows = self._parcel.indices(where)
                channels.index_copy_(0, rows, change(channels.index_select(0, rows)))
        return channels


def _noise(drawn: list[tuple[float, int]], parcel: Parcel) -> Change:
    stds, seeds = parcel.put([std for std, _ in drawn]), [seed for _, seed in drawn]
    return lambda channels: add_noise(channels, parcel.numbers(stds), seeds)


def _blur(sigmas: list[tuple[float, float, float]], parcel: Parcel) -> Change:
    taps = [parcel.put(gaussian_taps([sigma[axis] for sigma in sigmas])) for axis in range(3)]
    return lambda channels: blur(channels, [parcel.numbers(of_axis) for of_axis in taps])


def _brightness(factors: list[float], parcel: Parcel) -> Change:
    place = parcel.put(factors)
    return lambda channels: channels * _each(parcel.numbers(place))


def _contrast(factors: list[float], parcel: Parcel) -> Change:
    place = parcel.put(factors)
    return lambda channels: change_contrast(channels, parcel.numbers(place))


def _low_resolution(patch_size: Triple, shapes: list[Triple], parcel: Parcel) -> Change:
    if len(set(shapes)) == 1:
        return lambda channels: lower_resolution(channels, shapes[0])
    tables = [[coarse_lookup(size, shape[axis]) for shape in shapes] for axis, size in enumerate(patch_size)]
    places = [tuple(parcel.put([row[part] for row in rows]) for part in range(3)) for rows in tables]

    def change(channels: Tensor) -> Tensor:
        for axis, (first, second, share) in enumerate(places):
            lookup = parcel.indices(first), parcel.indices(second), parcel.numbers(share)
            channels = look_up_coarse(channels, axis, *lookup)
        return channels

    return change


def _inverted_gamma(gammas: list[float], parcel: Parcel) -> Change:
    place = parcel.put(gammas)
    return lambda channels: change_gamma(channels.neg(), parcel.numbers(place)).neg_()


def _gamma(gammas: list[float], parcel: Parcel) -> Change:
    place = parcel.put(gammas)
    return lambda channels: change_gamma(channels, parcel.numbers(place))


def change_intensity(channels: Float[Tensor, "R D H W"], draws: Sequence[IntensityDraw]) -> Float[Tensor, "R D H W"]:
    """Return `channels` with the drawn changes, one draw per channel; the input is left as it was."""
    _, d, h, w = channels.shape
    parcel = Parcel()
    changes = IntensityChanges(draws, (d, h, w), parcel)
    parcel.send(channels.device)
    return changes.apply(channels.clone())


def add_noise(
    channels: Float[Tensor, "R D H W"], stds: Float[Tensor, " R"], seeds: Sequence[int]
) -> Float[Tensor, "R D H W"]:
    """Add Gaussian noise of deviation `stds`, each channel's from its own seed, drawn on the channels' device."""
    device = channels.device
    noise = torch.empty_like(channels, memory_format=torch.contiguous_format)
    for row, seed in zip(noise, seeds, strict=True):
        generator = seeded(seed) if device.type == "cpu" else torch.Generator(device).manual_seed(seed)
        row.normal_(generator=generator)
    return noise.mul_(_each(stds)).add_(channels)


def gaussian_taps(sigmas_vox: Sequence[float]) -> Float64[np.ndarray, "R T"]:
    """Return the weights of a Gaussian at whole steps from -T/2 to T/2, cut off at 3 sigma; each row sums to 1."""
    reaches = [math.ceil(BLUR_REACH_SIGMA * sigma) for sigma in sigmas_vox]
    steps = np.arange(-max(reaches), max(reaches) + 1)
    taps = np.exp(-0.5 * (steps / np.asarray(sigmas_vox)[:, np.newaxis]) ** 2)
    taps[np.abs(steps) > np.asarray(reaches)[:, np.newaxis]] = 0
    return np.asarray(taps / taps.sum(axis=1, keepdims=True))


def blur(channels: Float[Tensor, "R D H W"], taps: Sequence[Float[Tensor, "R _t"]]) -> Float[Tensor, "R D H W"]:
    """Blur with the `taps` of each of the three axes (`gaussian_taps`); beyond the edge the edge goes on."""
    for axis, weights in enumerate(taps, start=1):
        count = weights.shape[1]
        pad = [0, 0, 0, 0, 0, 0]
        pad[2 * (3 - axis)] = pad[2 * (3 - axis) + 1] = count // 2
        padded = functional.pad(channels[None], pad, mode="replicate")[0]
        length = channels.shape[axis]
        # A few additions of whole slices are faster than a convolution of one channel.
        total = padded.narrow(axis, 0, length) * _each(weights[:, 0])
        for step in range(1, count):
            total.addcmul_(padded.narrow(axis, step, length), _each(weights[:, step]))
        channels = total
    return channels


def change_contrast(channels: Float[Tensor, "R D H W"], factors: Float[Tensor, " R"]) -> Float[Tensor, "R D H W"]:
    """Stretch about the mean by a factor, then clip to the range that was there before (nnU-Net's preserve_range)."""
    lowest, highest = _range(channels)
    mean = _mean(channels)
    return (channels - mean).mul_(_each(factors)).add_(mean).clamp_(lowest, highest)


def lower_resolution(channels: Float[Tensor, "R D H W"], coarse_shape: Triple) -> Float[Tensor, "R D H W"]:
    """Pick voxels on a coarser grid and interpolate back: what a scan with larger voxels would show."""
    coarse = functional.interpolate(channels[None], size=coarse_shape, mode="nearest-exact")
    return functional.interpolate(coarse, size=channels.shape[1:], mode="trilinear", align_corners=False)[0]


def coarse_lookup(
    size: int, coarse: int
) -> tuple[Float64[np.ndarray, " S"], Float64[np.ndarray, " S"], Float64[np.ndarray, " S"]]:
    """Return what `lower_resolution` does along one axis: two voxels for each, and the share of the second."""
    picked = np.minimum((np.arange(coarse) + 0.5) * size // coarse, size - 1)
    place = np.maximum((np.arange(size) + 0.5) * coarse / size - 0.5, 0)
    first = np.minimum(place.astype(int), coarse - 1)
    return picked[first], picked[np.minimum(first + 1, coarse - 1)], place - first


def look_up_coarse(
    channels: Float[Tensor, "R D H W"],
    axis: int,
    first: Int64[Tensor, "R S"],
    second: Int64[Tensor, "R S"],
    share: Float[Tensor, "R S"],
) -> Float[Tensor, "R D H W"]:
    """Return `lower_resolution` along one axis, to another coarse size for each channel (`coarse_lookup`)."""
    shape = [len(channels), *(-1 if other == axis else 1 for other in range(3))]
    near = channels.gather(axis + 1, first.view(shape).expand_as(channels))
    far = channels.gather(axis + 1, second.view(shape).expand_as(channels))
    return torch.lerp(near, far, share.view(shape))


def change_gamma(channels: Float[Tensor, "R D H W"], gammas: Float[Tensor, " R"]) -> Float[Tensor, "R D H W"]:
    """Raise each channel, scaled to 0..1, to a power, and give it back its mean and deviation."""
    lowest, highest = _range(channels)
    extent = highest - lowest
    mean = _mean(channels)
    std = _std(channels, mean)
    flat = (extent < _FLAT) | ~(std > _FLAT)
    curved = _power_((channels - lowest).div_(extent.clamp_min(_FLAT)).clamp_(0.0, 1.0), gammas)
    curved_mean = _mean(curved)
    scale = std / _std(curved, curved_mean).clamp_min(_FLAT)
    # Chosen on the device: a branch in Python would make the processor wait for the accelerator.
    return torch.where(flat, channels, curved.sub_(curved_mean).mul_(scale).add_(mean))


def _each(values: Float[Tensor, " R"]) -> Float[Tensor, "R 1 1 1"]:
    return values[:, None, None, None]


def _range(channels: Float[Tensor, "R D H W"]) -> tuple[Float[Tensor, "R 1 1 1"], Float[Tensor, "R 1 1 1"]]:
    return channels.amin((1, 2, 3), keepdim=True), channels.amax((1, 2, 3), keepdim=True)


def _mean(channels: Float[Tensor, "R D H W"]) -> Float[Tensor, "R 1 1 1"]:
    # Plane by plane: one sum over everything is split among threads, and its last bits would depend on their number.
    return channels.mean((2, 3), keepdim=True).mean(1, keepdim=True)


def _std(channels: Float[Tensor, "R D H W"], mean: Float[Tensor, "R 1 1 1"]) -> Float[Tensor, "R 1 1 1"]:
    return _mean((channels - mean).square_()).sqrt()


def _power_(values: Float[Tensor, "R D H W"], exponents: Float[Tensor, " R"]) -> Float[Tensor, "R D H W"]:
    if values.device.type != "cpu":
        return values.pow_(_each(exponents))
    # The power differs in its last bit between the vectorised middle and the scalar end of each thread's share.
    for row, exponent in zip(values.flatten(1), exponents, strict=True):
        for part in torch.split(row, _SERIAL_VOXELS):
            part.pow_(exponent)
    return values
