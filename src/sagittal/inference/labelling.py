"""From finished features or logits to labels, a few voxels at a time: the logits of a volume never exist."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float32, Int64, Integer

from sagittal.data.label_index import LabelIndex
from sagittal.inference.blending import Place
from sagittal.inference.consumers import SlabConsumer
from sagittal.inference.engines.engine import LinearHead

VOXELS_AT_ONCE = 2048
"""Their logits stay in a core's cache: 1 MiB for 128 classes."""
_FLOAT_BYTES = 4


def plane_bytes(outputs: int, height: int, width: int) -> int:
    """Return what it takes to hand on one plane: its values side by side, its logits, and float16 shares of them."""
    return 5 * outputs * height * width * _FLOAT_BYTES // 2


class LabelWriter:
    """Decide voxels and write their labels.

    A voxel gets the class with the largest logit, the first among equals; or for regions the value of the last one in
    regions_class_order whose logit is above zero, that is, whose probability exceeds one half.

    Args:
        index: what the outputs mean.
        head: from features to logits; None where logits are given.
        labels: where labels go, (D, H, W); any view of a label map.
    """

    def __init__(self, index: LabelIndex, head: LinearHead | None, labels: Integer[np.ndarray, "D H W"]) -> None:
        self._values = index.values_of_classes()
        self._has_regions = index.spec.has_regions
        self._head = head
        self._labels = labels

    @property
    def bound(self) -> float | None:
        """Where an output that stays at or below it leaves no label: 0 for regions, None for classes."""
        return 0.0 if self._has_regions else None

    def __call__(
        self,
        place: Place,
        values: Float32[np.ndarray, "F d h w"],
        outputs: Int64[np.ndarray, " k"] | None = None,
    ) -> None:
        """Write the labels of a block; `outputs` tells which ones are given, where others can't win."""
        codes = self._values if outputs is None else self._values[outputs]
        if outputs is not None and len(outputs) <= 1 and not self._has_regions:
            self._labels[place] = codes[0]
            return
        columns = values.reshape(len(values), math.prod(values.shape[1:]))
        found = np.empty(columns.shape[1], codes.dtype)
        for start in range(0, columns.shape[1], VOXELS_AT_ONCE):
            piece = slice(start, start + VOXELS_AT_ONCE)
            found[piece] = self._decide(columns[:, piece], codes)
        self._labels[place] = found.reshape(values.shape[1:])

    def _decide(
        self, columns: Float32[np.ndarray, "F n"], codes: Integer[np.ndarray, " k"]
    ) -> Integer[np.ndarray, " n"]:
        if not self._has_regions:
            # Voxels first: the search for the largest then runs through neighbouring numbers.
            if self._head is None:
                logits = np.ascontiguousarray(columns.T)
            else:
                logits = np.matmul(columns.T, self._head.weight.T)
                logits += self._head.bias
            return np.asarray(codes[logits.argmax(axis=1)])
        regions = columns if self._head is None else apply_head(self._head, columns)
        found = np.zeros(columns.shape[1], codes.dtype)
        for value, region in zip(codes, regions, strict=True):
            found[region > 0] = value
        return found


def apply_head(head: LinearHead, columns: Float32[np.ndarray, "F n"]) -> Float32[np.ndarray, "K n"]:
    """Return the logits of voxels side by side."""
    logits = head.weight @ columns
    logits += head.bias[:, None]
    return np.asarray(logits)


class ConsumerFeed:
    """Gather blocks into whole slabs along D and hand their logits to consumers.

    Args:
        consumers: take the logits.
        head: from features to logits; None where logits are given.
        shape: channels of the blocks, the most rows that a layer completes, H, W.
        slab_bytes: memory for what is handed on at once (`plane_bytes`); at least one plane is.
    """

    def __init__(
        self,
        consumers: Sequence[SlabConsumer],
        head: LinearHead | None,
        shape: tuple[int, int, int, int],
        slab_bytes: int,
    ) -> None:
        self._consumers, self._head = tuple(consumers), head
        self._gathered = np.empty(shape, np.float32)
        outputs = shape[0] if head is None else len(head.bias)
        self._rows = max(1, slab_bytes // plane_bytes(outputs, shape[2], shape[3]))
        self._first, self._stop = 0, 0

    def __call__(self, place: Place, values: Float32[np.ndarray, "F d h w"]) -> None:
        """Take a block; its first row is not before the first of the layer."""
        rows, height, width = place
        self._gathered[:, rows.start - self._first : rows.stop - self._first, height, width] = values
        self._stop = max(self._stop, rows.stop)

    def end_layer(self) -> None:
        """Hand on what was gathered; every voxel of these rows is there."""
        for start in range(self._first, self._stop, self._rows):
            stop = min(start + self._rows, self._stop)
            slab = self._gathered[:, start - self._first : stop - self._first]
            if self._head is not None:
                logits = apply_head(self._head, slab.reshape(len(slab), -1)).reshape(-1, *slab.shape[1:])
            else:
                logits = np.ascontiguousarray(slab)
            for consumer in self._consumers:
                consumer(slice(start, stop), logits)
        self._first = self._stop
