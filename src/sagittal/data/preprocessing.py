"""From a scan to the array that the network sees, the same way for training and prediction, and back.

Order: the plan's axis order (anatomical or stored, then transposed), crop to the box of non-zero voxels, normalise,
resample to the plan's spacing: nnU-Net's order and rules (default_preprocessor.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Float64, Shaped, UInt

from sagittal.data.normalizing import nonzero_mask, scaling
from sagittal.data.resampling import Products, resample_channel, resample_labels, separate_axis
from sagittal.errors import DataError
from sagittal.plan.base import Triple, TripleMm
from sagittal.plan.plan import NoNormalization, Preprocessing, ZScore
from sagittal.volumes import Volume
from sagittal.volumes.crop import Box, nonzero_box, uncrop
from sagittal.volumes.geometry import Reorientation, reorientation_to_ras, spacing_of
from sagittal.volumes.resampling import new_shape

_FLOAT16_LIMIT = 6e4


@dataclass(frozen=True)
class Frame:
    """Where a prepared array comes from: all that the way back to the scan's own grid needs. Shapes are D, H, W."""

    stored_shape: Triple
    """Shape of the scan as its file holds it."""
    reorientation: Reorientation
    """From the stored axis order to the network's."""
    box: Box
    """The crop, in voxels of the scan in the network's axis order."""
    spacing_mm: TripleMm
    """Spacing in the network's axis order, before resampling."""
    prepared_shape: Triple
    """Shape after resampling: the network's grid."""
    apart: int | None = None
    """Axis that is resampled apart from the plane, see `separate_axis`."""

    @property
    def cropped_shape(self) -> Triple:
        """Shape in the network's axis order after the crop, before resampling."""
        return self.box.shape

    def crop(self, array: Shaped[np.ndarray, "D H W"]) -> Shaped[np.ndarray, "d h w"]:
        """Return a view of an array in stored order: turned into the network's order and cropped."""
        return self.reorientation.apply(array)[self.box.slices]

    def uncrop_and_unorient(self, labels: Shaped[np.ndarray, "D H W"]) -> Shaped[np.ndarray, "d h w"]:
        """Return labels (D, H, W) of the cropped grid as a C-ordered array of the stored shape, 0 outside the crop."""
        whole = uncrop(labels, self.box, self.reorientation.shape(self.stored_shape))
        return np.ascontiguousarray(self.reorientation.inverse().apply(whole))


@dataclass(frozen=True, eq=False)
class Prepared:
    """What the network sees of one case."""

    image: Float[np.ndarray, "C D H W"]
    """float32, or float16 where that was asked for and holds the values."""
    labels: UInt[np.ndarray, "D H W"] | None
    """Label indices on the image's grid, where labels were given."""
    frame: Frame


def prepare(
    images: Volume | Sequence[Volume],
    preprocessing: Preprocessing,
    labels: UInt[np.ndarray, "D H W"] | None = None,
    *,
    compact: bool = False,
    products: Products | None = None,
) -> Prepared:
    """Reorient, crop, normalise and resample one case.

    Args:
        images: the case's channels in the plan's order: one volume of C channels, or several on the same grid.
        preprocessing: the plan's.
        labels: label indices (`LabelIndex.encode`) in the stored order of the images; they do not decide the crop.
        compact: make a float16 image where its values fit: half the memory, for the cache.
        products: what computes the resampling; numpy where it is None.

    Raises:
        DataError: another number of channels than the plan has, or labels of another shape than the image.
    """
    frame = frame_of(images, preprocessing)
    prepared_labels = None if labels is None else prepare_labels(labels, frame)
    image = prepare_image(images, preprocessing, frame, compact=compact, products=products)
    return Prepared(image, prepared_labels, frame)


def frame_of(images: Volume | Sequence[Volume], preprocessing: Preprocessing) -> Frame:
    """Return where the prepared arrays of a case lie in its scan; only the crop needs the voxels.

    Raises:
        DataError: another number of channels than the plan has, or channels of different shapes.
    """
    volumes = [images] if isinstance(images, Volume) else list(images)
    _require_fitting(volumes, len(preprocessing.normalization))
    stored_shape = volumes[0].geometry.shape
    change = network_order(volumes[0].affine, preprocessing)
    spacing = spacing_of(change.affine(volumes[0].affine, stored_shape))
    turned = [change.apply(channel) for channel in _channels(images)]
    box = nonzero_box(turned) if preprocessing.crop_to_nonzero else Box.whole(change.shape(stored_shape))
    target = preprocessing.target_mm(spacing)
    return Frame(
        stored_shape=stored_shape,
        reorientation=change,
        box=box,
        spacing_mm=spacing,
        prepared_shape=new_shape(box.shape, spacing, target),
        apart=separate_axis(spacing, target, preprocessing.anisotropy_threshold),
    )


def prepare_labels(labels: UInt[np.ndarray, "D H W"], frame: Frame) -> UInt[np.ndarray, "d h w"]:
    """Return label indices, given in the scan's stored order, on the network's grid.

    Raises:
        DataError: labels of another shape than the image.
    """
    if labels.shape != frame.stored_shape:
        raise DataError(
            f"the label map has shape {labels.shape} (D, H, W), its image {frame.stored_shape}. Resample one onto the "
            "other.",
            code="other_grid",
        )
    return resample_labels(np.ascontiguousarray(frame.crop(labels)), frame.prepared_shape, apart=frame.apart)


def _channels(images: Volume | Sequence[Volume]) -> list[Shaped[np.ndarray, "D H W"]]:
    volumes = [images] if isinstance(images, Volume) else images
    return [channel for volume in volumes for channel in volume.array]


def network_order(affine: Float64[np.ndarray, "4 4"], preprocessing: Preprocessing) -> Reorientation:
    """Return the way from a scan's stored axis order to the network's: the plan's orientation, then its transposition.

    Args:
        affine: from stored (d, h, w, 1) to RAS mm.
        preprocessing: the plan's.
    """
    axes, flips = (0, 1, 2), (False, False, False)
    if preprocessing.orientation == "RAS":
        oriented = reorientation_to_ras(affine)
        axes, flips = oriented.permutation, oriented.flips
    first, second, third = preprocessing.transpose
    return Reorientation((axes[first], axes[second], axes[third]), (flips[first], flips[second], flips[third]))


def prepare_image(
    images: Volume | Sequence[Volume],
    preprocessing: Preprocessing,
    frame: Frame,
    *,
    compact: bool = False,
    products: Products | None = None,
) -> Float[np.ndarray, "C d h w"]:
    """Return the channels of a case on the network's grid, normalised; `compact` and `products` as for `prepare`.

    Neither step changes its input or copies it whole.
    """
    channels, schemes = [frame.crop(channel) for channel in _channels(images)], preprocessing.normalization
    masked = any(isinstance(scheme, ZScore) and scheme.nonzero_only for scheme in schemes)
    mask = nonzero_mask(list(channels)) if masked else None
    scalings = [scaling(channel, scheme, mask) for channel, scheme in zip(channels, schemes, strict=True)]
    raw = any(isinstance(scheme, NoNormalization) for scheme in schemes)
    fits = (
        compact
        and not raw
        and all(
            max(map(abs, each.bounds(channel))) <= _FLOAT16_LIMIT
            for each, channel in zip(scalings, channels, strict=True)
        )
    )
    out = np.empty((len(channels), *frame.prepared_shape), np.float16 if fits else np.float32)
    for channel, each, resampled in zip(channels, scalings, out, strict=True):
        resample_channel(channel, resampled, each.apply, apart=frame.apart, products=products)
    return out


def _require_fitting(volumes: Sequence[Volume], expected_channels: int) -> None:
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
