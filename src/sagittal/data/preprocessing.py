"""From a scan to the array that the network sees, the same way for training and prediction, and back.

Order: RAS axis order, crop to the box of non-zero voxels, normalise, resample to the plan's spacing. nnU-Net's order
and rules (default_preprocessor.py), with anatomical axis order in place of its transposition.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import assert_never

import numpy as np
from jaxtyping import Bool, Float32, Integer, Shaped, UInt
from scipy import ndimage

from sagittal.data.resampling import resample_image, resample_labels, separate_axis
from sagittal.errors import DataError
from sagittal.plan.base import Triple, TripleMm
from sagittal.plan.plan import (
    CTNormalization,
    NoNormalization,
    Normalization,
    Preprocessing,
    RescaleToUnit,
    ZScore,
)
from sagittal.volumes import Volume
from sagittal.volumes.crop import Box, nonzero_box, uncrop
from sagittal.volumes.geometry import Reorientation, reorientation_to_ras, spacing_of
from sagittal.volumes.resampling import new_shape

_STD_FLOOR = 1e-8
_STORED_ORDER = Reorientation((0, 1, 2), (False, False, False))


@dataclass(frozen=True)
class Frame:
    """Where a prepared array comes from: all that the way back to the scan's own grid needs. Shapes are D, H, W."""

    stored_shape: Triple
    """Shape of the scan as its file holds it."""
    reorientation: Reorientation
    """From the stored axis order to the prepared one."""
    box: Box
    """The crop, in voxels of the reoriented scan."""
    spacing_mm: TripleMm
    """Spacing of the reoriented scan, before resampling."""
    prepared_shape: Triple
    """Shape after resampling: the network's grid."""

    @property
    def cropped_shape(self) -> Triple:
        """Shape after reorientation and crop, before resampling."""
        return self.box.shape

    def uncrop_and_unorient(self, labels: Shaped[np.ndarray, "D H W"]) -> Shaped[np.ndarray, "d h w"]:
        """Return labels (D, H, W) of the cropped grid as a C-ordered array of the stored shape, 0 outside the crop."""
        whole = uncrop(labels, self.box, self.reorientation.shape(self.stored_shape))
        return np.ascontiguousarray(self.reorientation.inverse().apply(whole))


@dataclass(frozen=True, eq=False)
class Prepared:
    """What the network sees of one case."""

    image: Float32[np.ndarray, "C D H W"]
    labels: UInt[np.ndarray, "D H W"] | None
    """Label indices on the image's grid, where labels were given."""
    frame: Frame


def prepare(
    images: Volume | Sequence[Volume],
    preprocessing: Preprocessing,
    labels: UInt[np.ndarray, "D H W"] | None = None,
) -> Prepared:
    """Reorient, crop, normalise and resample one case.

    Args:
        images: the case's channels in the plan's order: one volume of C channels, or several on the same grid.
        preprocessing: the plan's.
        labels: label indices (`LabelIndex.encode`) in the stored order of the images; they do not decide the crop.

    Raises:
        DataError: another number of channels than the plan has, or labels of another shape than the image.
    """
    volumes = [images] if isinstance(images, Volume) else list(images)
    channels = [channel for volume in volumes for channel in volume.array]
    stored_shape = volumes[0].geometry.shape
    _require_fitting(volumes, len(preprocessing.normalization), labels)
    orient = preprocessing.orientation == "RAS"
    change = reorientation_to_ras(volumes[0].affine) if orient else _STORED_ORDER
    spacing = spacing_of(change.affine(volumes[0].affine, stored_shape))
    turned = [change.apply(channel) for channel in channels]
    box = _box_of(turned) if preprocessing.crop_to_nonzero else Box.whole(change.shape(stored_shape))
    cropped = np.stack([np.asarray(channel[box.slices], np.float32) for channel in turned])
    normalized = normalize(cropped, preprocessing.normalization)
    target = preprocessing.spacing_mm
    shape = new_shape(box.shape, spacing, target)
    apart = separate_axis(spacing, target, preprocessing.anisotropy_threshold)
    frame = Frame(
        stored_shape=stored_shape,
        reorientation=change,
        box=box,
        spacing_mm=spacing,
        prepared_shape=shape,
    )
    prepared_labels = None
    if labels is not None:
        cropped_labels = np.ascontiguousarray(change.apply(labels)[box.slices])
        prepared_labels = resample_labels(cropped_labels, shape, apart=apart)
    return Prepared(resample_image(normalized, shape, apart=apart), prepared_labels, frame)


def normalize(
    image: Float32[np.ndarray, "C D H W"], schemes: Sequence[Normalization]
) -> Float32[np.ndarray, "C D H W"]:
    """Return the image with each channel normalised by its scheme, as a new array."""
    mask = None
    if any(isinstance(scheme, ZScore) and scheme.nonzero_only for scheme in schemes):
        mask = filled_nonzero_mask(image)
    out = np.empty_like(image)
    for channel, scheme, target in zip(image, schemes, out, strict=True):
        target[...] = _normalize_channel(channel, scheme, mask)
    return out


def filled_nonzero_mask(image: Shaped[np.ndarray, "C D H W"]) -> Bool[np.ndarray, "D H W"]:
    """Return where any channel is not zero, with enclosed holes filled (nnU-Net's create_nonzero_mask).

    A hole is a region of zeros that no path through the faces of voxels joins to the border.
    """
    zero = (image == 0).all(axis=0)
    # Scipy's binary_fill_holes dilates step by step; one labelling of the zeros finds the same holes at once.
    regions, count = ndimage.label(zero)
    outside = np.zeros(count + 1, bool)
    for axis in range(3):
        for side in (0, -1):
            outside[np.unique(regions.take(side, axis=axis))] = True
    outside[0] = False
    return np.asarray(~outside[regions])


def _normalize_channel(
    channel: Float32[np.ndarray, "D H W"], scheme: Normalization, mask: Bool[np.ndarray, "D H W"] | None
) -> Float32[np.ndarray, "D H W"]:
    match scheme:
        case ZScore(nonzero_only=True):
            assert mask is not None
            out = np.zeros_like(channel)
            if mask.any():
                out[mask] = _z_score(channel[mask])
            return out
        case ZScore():
            return _z_score(channel)
        case CTNormalization():
            clipped = np.clip(channel, np.float32(scheme.lower), np.float32(scheme.upper))
            return np.asarray((clipped - np.float32(scheme.mean)) / np.float32(max(scheme.std, _STD_FLOOR)))
        case RescaleToUnit():
            low, high = float(channel.min()), float(channel.max())
            return np.asarray((channel - np.float32(low)) / np.float32(max(high - low, _STD_FLOOR)))
        case NoNormalization():
            return channel
        case _:
            assert_never(scheme)


def _z_score(values: Float32[np.ndarray, "*shape"]) -> Float32[np.ndarray, "*shape"]:
    # Intensities beyond 1e6 exist: sums of float32 lose them, so both moments are summed in float64.
    mean = float(values.mean(dtype=np.float64))
    std = float(values.std(dtype=np.float64))
    return np.asarray((values - np.float32(mean)) / np.float32(max(std, _STD_FLOOR)))


def _box_of(channels: Sequence[Shaped[np.ndarray, "D H W"]]) -> Box:
    # Channel by channel, so that no copy of all channels is made before the crop.
    found: Box | None = None
    for channel in channels:
        if channel.any():
            box = nonzero_box(channel[None])
            found = box if found is None else found.union(box)
    d, h, w = channels[0].shape
    return found if found is not None else Box.whole((d, h, w))


def _require_fitting(
    volumes: Sequence[Volume], expected_channels: int, labels: Integer[np.ndarray, "D H W"] | None
) -> None:
    shapes = [volume.geometry.shape for volume in volumes]
    given = sum(volume.array.shape[0] for volume in volumes)
    if given != expected_channels:
        raise DataError(
            f"the case has {given} channels; the plan has {expected_channels}. Give one file per channel, in the "
            "order of the data set's channel_names.",
            code="channel_count",
        )
    if len(set(shapes)) > 1:
        raise DataError(
            f"the channels have different shapes (D, H, W): {shapes}. Resample them onto one grid.", code="other_grid"
        )
    if labels is not None and labels.shape != shapes[0]:
        raise DataError(
            f"the label map has shape {labels.shape} (D, H, W), its image {shapes[0]}. Resample one onto the other.",
            code="other_grid",
        )
