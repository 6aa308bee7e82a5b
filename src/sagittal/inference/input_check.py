"""Is a scan like those that the model was trained on? What is far off is flagged, never refused.

A bundle keeps no fingerprint, so that it tells nothing of single scans: what can be compared is what the plan is made
of, its spacing, its window and its normalisation. The limits are wide on purpose: a flag that comes with every third
scan is read by nobody.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float64, Shaped

from sagittal.data.preprocessing import network_order
from sagittal.inference.run_report import Flag
from sagittal.plan.plan import CTNormalization, Plan
from sagittal.volumes import Volume
from sagittal.volumes.geometry import Geometry, direction_of, is_sheared, spacing_of

SPACING_RATIO = 3.0
"""Voxels this much larger or smaller than the plan's along an axis: the resampled scan looks unlike any seen."""
WINDOW_SHARE = 0.25
"""A scan that fills less of the window than this along an axis shows little of what the window showed in training."""
TILT_DEG = 20.0
_LONGEST_MM = 3000.0
_SAMPLES = 1_000_000
_CT_FLOOR = -500.0
"""Air and lung lie below; no MR does."""
_CT_MIN_RANGE = 100.0
_CT_INSIDE = 0.01
_CT_ABOVE = 0.5
_CT_MEDIAN_STDS = 4.0
_CT_NAMES = ("ct", "cbct", "cta", "hu")
_MR_NAMES = ("mr", "mri", "t1", "t1c", "t1ce", "t1gd", "t1w", "t2", "t2w", "flair", "dwi", "adc", "pd")


def check_grid(geometry: Geometry, plan: Plan) -> tuple[Flag, ...]:
    """Return what is unusual in a scan's grid: spacing, extent, orientation."""
    order = network_order(geometry.affine, plan.preprocessing)
    own = spacing_of(order.affine(geometry.affine, geometry.shape))
    target = plan.preprocessing.target_mm(own)
    flags = []
    for axis, (given, wanted) in enumerate(zip(own, target, strict=True)):
        if not 1 / SPACING_RATIO <= given / wanted <= SPACING_RATIO:
            word = "coarser" if given > wanted else "finer"
            factor = max(given / wanted, wanted / given)
            message = (
                f"spacing {given:.3g} mm along {'DHW'[axis]} of the network, {factor:.1f} times {word} than the "
                f"{wanted:.3g} mm that the model works at"
            )
            flags.append(Flag(code="spacing", message=message))
    extents = [count * step for count, step in zip(order.shape(geometry.shape), own, strict=True)]
    for axis, (extent, size) in enumerate(zip(extents, plan.patch.size, strict=True)):
        window = size * target[axis]
        if size > 1 and extent < WINDOW_SHARE * window:
            message = (
                f"{extent:.3g} mm along {'DHW'[axis]} of the network; the model's window sees {window:.3g} mm, and "
                "most of it stays empty"
            )
            flags.append(Flag(code="size", message=message))
        elif extent > _LONGEST_MM:
            message = f"{extent:.4g} mm along {'DHW'[axis]} of the network: is the spacing in mm?"
            flags.append(Flag(code="size", message=message))
    return (*flags, *_orientation(geometry, plan))


def check_intensities(volumes: Sequence[Volume], plan: Plan) -> tuple[Flag, ...]:
    """Return what is unusual in the voxels of each channel; some of them, spread over the scan, are looked at.

    Args:
        volumes: the channels in the plan's order: one volume of C channels, or several.
        plan: the model's.
    """
    channels = [channel for volume in volumes for channel in volume.array]
    flags: list[Flag] = []
    names, schemes = plan.dataset.channel_names, plan.preprocessing.normalization
    for channel, name, scheme in zip(channels, names, schemes, strict=False):
        values = _sampled(channel)
        if not np.isfinite(values).all():
            continue  # it is refused
        if values.min() == values.max():
            flags.append(Flag(code="intensity", message=f"{name}: every voxel looked at is {values[0]:.4g}"))
        elif isinstance(scheme, CTNormalization):
            flags.extend(_ct(values, scheme, name))
        elif values.min() < _CT_FLOOR and _is_named(name, _MR_NAMES):
            message = f"{name}: values go down to {values.min():.5g}, as in CT; the model was trained on {name}"
            flags.append(Flag(code="intensity", message=message))
    return tuple(flags)


def check_modality(images: Sequence[Path], modalities: Sequence[str | None], plan: Plan) -> tuple[Flag, ...]:
    """Return where a DICOM header names another modality than the channel's name does.

    Args:
        images: the channels' files or folders, for the message.
        modalities: what their headers say, None where there is none.
        plan: the model's.
    """
    flags = []
    for path, modality, name in zip(images, modalities, plan.dataset.channel_names, strict=False):
        is_ct, is_mr = _is_named(name, _CT_NAMES), _is_named(name, _MR_NAMES)
        if modality is not None and ((is_ct and modality != "CT") or (is_mr and modality != "MR")):
            message = f"{path.name}: the DICOM header says {modality}; the model was trained on {name}"
            flags.append(Flag(code="modality", message=message))
    return tuple(flags)


def _ct(values: Float64[np.ndarray, " n"], scheme: CTNormalization, name: str) -> list[Flag]:
    low, high = float(values.min()), float(values.max())
    clip = f"the model's range is {scheme.lower:.4g} to {scheme.upper:.4g} HU"
    inside = values[(values > scheme.lower) & (values < scheme.upper)]
    share, above = len(inside) / len(values), float((values >= scheme.upper).mean())
    if high - low < _CT_MIN_RANGE:
        told = f"values from {low:.4g} to {high:.4g}, too close together for HU; {clip}. Was the scan normalised?"
    elif share < _CT_INSIDE:
        told = f"only {100 * share:.2g} % of the voxels, which go from {low:.4g} to {high:.4g}, are in reach; {clip}"
    elif above > _CT_ABOVE:
        told = (
            f"{100 * above:.0f} % of the voxels are above {scheme.upper:.4g}; {clip}. Is the offset of -1024 missing?"
        )
    elif low >= 0 and scheme.lower < 0 and np.median(values) > scheme.mean + _CT_MEDIAN_STDS * scheme.std:
        told = f"no value below 0 and a median of {np.median(values):.4g}; {clip}. Is the offset of -1024 missing?"
    elif abs(np.median(inside) - scheme.mean) > _CT_MEDIAN_STDS * scheme.std:
        told = f"the median within the model's range is {np.median(inside):.4g} HU, far from its mean {scheme.mean:.4g}"
    else:
        return []
    return [Flag(code="intensity", message=f"{name}: {told}")]


def _orientation(geometry: Geometry, plan: Plan) -> list[Flag]:
    flags = []
    if plan.preprocessing.orientation == "RAS":
        if not geometry.has_world:
            message = "the file says nothing of the patient's sides; left and right are a guess from the axes' order"
            flags.append(Flag(code="orientation", message=message))
        largest = np.abs(direction_of(geometry.affine)).max(axis=0)
        tilt = math.degrees(math.acos(min(1.0, float(largest.min()))))
        if tilt > TILT_DEG:
            message = f"the grid is tilted by {tilt:.0f} degrees against the patient; the network sees it tilted"
            flags.append(Flag(code="orientation", message=message))
    if is_sheared(geometry.affine):
        flags.append(Flag(code="orientation", message="the grid's axes are not at right angles"))
    return flags


def _sampled(channel: Shaped[np.ndarray, "D H W"]) -> Float64[np.ndarray, " n"]:
    """Return about a million voxels, every k-th along each axis."""
    step = max(1, math.ceil((channel.size / _SAMPLES) ** (1 / 3)))
    with np.errstate(invalid="ignore"):  # some of a damaged file's NaNs can't be converted without a word
        return np.asarray(channel[::step, ::step, ::step], np.float64).reshape(-1)


def _is_named(name: str, words: Sequence[str]) -> bool:
    return any(part in words for part in name.lower().replace("-", "_").replace(" ", "_").split("_"))
