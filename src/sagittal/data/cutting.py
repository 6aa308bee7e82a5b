"""Cut patches out of their boxes: rotated, scaled, bent and mirrored in one go, so that voxels are interpolated at most
once; a patch that is only mirrored comes out exact.

`cut_patch` cuts one patch and is what the CPU does: a sample does not depend on its neighbours, bit for bit, and an
unturned one costs a copy. `CutTogether` cuts those of a whole batch in the same number of operations as one, for
accelerators, where starting an operation takes longer than doing it; its results differ by rounding only.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float32, Float64, Num
from torch import Tensor
from torch.nn import functional

from sagittal.data.elastic import displacements, field
from sagittal.data.parcel import Parcel, Place
from sagittal.data.spatial import SpatialDraw, source_matrix
from sagittal.plan.base import Triple, TripleMm


def cut_patch(
    image: Num[Tensor, "C d h w"],
    labels: Num[Tensor, "d h w"],
    draw: SpatialDraw,
    patch_size: Triple,
    spacing_mm: TripleMm,
) -> tuple[Num[Tensor, "C D H W"], Num[Tensor, "D H W"]]:
    """Cut the drawn patch out of a box around its centre: image trilinear, labels nearest; inputs are kept.

    The box may be larger than `spatial.box_size`; what lies beyond it counts as 0 in the image and background in the
    labels. An unturned, unmirrored patch is a view of its box.
    """
    if draw.is_exact:
        return _cropped(image, draw, patch_size), _cropped(labels, draw, patch_size)
    parcel = Parcel()
    turned = _Turned([draw], [_shape(labels)], patch_size, spacing_mm, parcel)
    parcel.send(image.device)
    sampled, nearest = turned.cut(image[None], labels[None])
    return sampled[0], nearest[0].to(labels.dtype)


class CutTogether:
    """Cut all patches of a batch, the exact ones by one look-up, the turned ones by one sampling grid.

    Make it, send the parcel, then `cut`. Only boxes of different sizes are copied one by one, into an array that holds
    them all.
    """

    def __init__(
        self,
        draws: Sequence[SpatialDraw],
        boxes: Sequence[Triple],
        patch_size: Triple,
        spacing_mm: TripleMm,
        parcel: Parcel,
    ) -> None:
        """Put into the parcel what the device needs.

        Args:
            draws: one per sample.
            boxes: sizes d, h, w of their boxes.
            patch_size: D, H, W of what comes out.
            spacing_mm: D, H, W.
            parcel: not yet sent.
        """
        self._parcel = parcel
        self._exact = [place for place, draw in enumerate(draws) if draw.is_exact]
        self._others = [place for place, draw in enumerate(draws) if not draw.is_exact]
        self._places = (parcel.put(self._exact), parcel.put(self._others))
        self._moved = _Moved([draws[n] for n in self._exact], [boxes[n] for n in self._exact], patch_size, parcel)
        self._turned = _Turned(
            [draws[n] for n in self._others], [boxes[n] for n in self._others], patch_size, spacing_mm, parcel
        )

    def cut(
        self, images: Sequence[Num[Tensor, "C _d _h _w"]], labels: Sequence[Num[Tensor, "_d _h _w"]]
    ) -> tuple[Float32[Tensor, "N C D H W"], Num[Tensor, "N D H W"]]:
        """Return the patches of the batch, in its order."""
        patches: Tensor | None = None
        targets: Tensor | None = None
        cutters: tuple[_Moved | _Turned, ...] = (self._moved, self._turned)
        for which, where, cutter in zip((self._exact, self._others), self._places, cutters, strict=True):
            if not which:
                continue
            part = cutter.cut(_together([images[n] for n in which]), _together([labels[n] for n in which]))
            if len(which) == len(images):
                return part
            if patches is None or targets is None:
                patches, targets = (side.new_empty((len(images), *side.shape[1:])) for side in part)
            for whole, side in zip((patches, targets), part, strict=True):
                whole.index_copy_(0, self._parcel.indices(where), side.to(whole.dtype))
        assert patches is not None and targets is not None, "an empty batch"
        return patches, targets


class _Moved:
    """Crops and mirror images of many boxes: for each sample and axis, which of its voxels comes where."""

    def __init__(
        self, draws: Sequence[SpatialDraw], boxes: Sequence[Triple], patch_size: Triple, parcel: Parcel
    ) -> None:
        self._parcel = parcel
        self._sources: list[Place] = []
        for axis, size in enumerate(patch_size):
            rows = []
            for draw, box in zip(draws, boxes, strict=True):
                assert box[axis] >= size, f"a box of {box} for {patch_size}"
                line = np.arange(size) + (box[axis] - size) // 2
                rows.append(line[::-1] if draw.mirrored[axis] else line)
            self._sources.append(parcel.put(np.array(rows).reshape(len(draws), size)))
        self._samples = parcel.put(np.arange(len(draws)))

    def cut(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        d, h, w = (self._parcel.indices(place) for place in self._sources)
        n = self._parcel.indices(self._samples)
        lookup = (n[:, None, None, None], d[:, :, None, None], h[:, None, :, None], w[:, None, None, :])
        # Look-ups beside each other: the channels come last and stay a view.
        patches = images.movedim(1, -1)[lookup].movedim(-1, 1)
        return patches.to(torch.float32).contiguous(), labels[lookup]


class _Turned:
    """Patches that are rotated, scaled or bent, and their one sampling grid."""

    def __init__(
        self,
        draws: Sequence[SpatialDraw],
        boxes: Sequence[Triple],
        patch_size: Triple,
        spacing_mm: TripleMm,
        parcel: Parcel,
    ) -> None:
        self._parcel, self._patch_size = parcel, patch_size
        widest = np.array(boxes).reshape(-1, 3).max(axis=0, initial=0)
        maps = [_grid_map(draw, box, widest, patch_size, spacing_mm) for draw, box in zip(draws, boxes, strict=True)]
        self._maps = parcel.put(np.array(maps).reshape(len(draws), 3, 4))
        self._field = None
        if any(draw.elastic is not None for draw in draws):
            self._field = self._put_fields(draws)

    def _put_fields(self, draws: Sequence[SpatialDraw]) -> tuple[Place, tuple[Place, Place, Place], Place]:
        """Put the fields of all samples, padded to the finest lattice; a sample that is not bent moves by nothing."""
        fields = [None if draw.elastic is None else field(draw.elastic, self._patch_size) for draw in draws]
        most = max(one.knots.shape[1] for one in fields if one is not None)
        knots = np.zeros((len(draws), 3, most, most, most))
        weights = [np.zeros((len(draws), size, most)) for size in self._patch_size]
        reach = np.zeros((len(draws), 3))
        for n, (draw, one) in enumerate(zip(draws, fields, strict=True)):
            if one is None or draw.elastic is None:
                continue
            count = one.knots.shape[1]
            knots[n, :, :count, :count, :count] = one.knots
            reach[n] = draw.elastic.reach_vox
            for axis in range(3):
                weights[axis][n, :, :count] = one.weights[axis]
        d, h, w = (self._parcel.put(of_axis) for of_axis in weights)
        return self._parcel.put(knots), (d, h, w), self._parcel.put(reach)

    def cut(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        theta = self._parcel.numbers(self._maps)
        grid = functional.affine_grid(theta, [len(theta), 1, *self._patch_size], align_corners=False)
        if self._field is not None:
            knots, weights, reach = self._field
            d, h, w = (self._parcel.numbers(place) for place in weights)
            moved = displacements(self._parcel.numbers(knots), (d, h, w), self._parcel.numbers(reach))
            for axis, size in enumerate(self._patch_size):
                # The grid counts axes from fast to slow and a patch as 2 long; the map turns displacements, too.
                column = theta[:, None, None, None, :, 2 - axis] * (2 / size)
                grid = torch.addcmul(grid, moved[:, axis, ..., None], column)
        sampled = functional.grid_sample(
            images.to(torch.float32), grid, mode="bilinear", padding_mode="zeros", align_corners=False
        )
        nearest = functional.grid_sample(
            labels[:, None].to(torch.float32), grid, mode="nearest", padding_mode="zeros", align_corners=False
        )
        return sampled, nearest[:, 0].to(labels.dtype)


def _grid_map(
    draw: SpatialDraw, box: Triple, held: np.ndarray, patch_size: Triple, spacing_mm: TripleMm
) -> Float64[np.ndarray, "3 4"]:
    """Return the affine map of `affine_grid` for a box at the beginning of an array of the size `held`."""
    sizes = np.asarray(patch_size)[np.newaxis, :] / np.asarray(held)[:, np.newaxis]
    matrix = source_matrix(draw, spacing_mm) * sizes
    centre = np.asarray(box) / held - 1
    # grid_sample counts axes from fast to slow, and both its cubes run from -1 to 1.
    return np.concatenate([matrix[::-1, ::-1], centre[::-1, np.newaxis]], axis=1)


def _together(boxes: Sequence[Tensor]) -> Tensor:
    """Return one array of all boxes, each at its beginning, zero beyond them."""
    widest = [max(sizes) for sizes in zip(*(box.shape for box in boxes), strict=True)]
    if all(list(box.shape) == widest for box in boxes):
        return torch.stack(list(boxes))
    held = boxes[0].new_zeros((len(boxes), *widest))
    for n, box in enumerate(boxes):
        held[n, ..., : box.shape[-3], : box.shape[-2], : box.shape[-1]].copy_(box)
    return held


def _shape(array: Tensor) -> Triple:
    d, h, w = array.shape[-3:]
    return d, h, w


def _cropped(array: Tensor, draw: SpatialDraw, patch_size: Triple) -> Tensor:
    box = array.shape[-3:]
    assert all(have >= want for have, want in zip(box, patch_size, strict=True)), f"a box of {box} for {patch_size}"
    for axis, (have, want) in enumerate(zip(box, patch_size, strict=True)):
        array = array.narrow(axis - 3, (have - want) // 2, want)
    axes = [axis - 3 for axis in draw.mirrored_axes]
    return array.flip(axes) if axes else array
