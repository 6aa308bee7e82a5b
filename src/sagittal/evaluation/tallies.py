"""Counting probabilities by how large they are and whether they came true: the sums that calibration is made of."""

from __future__ import annotations

import numpy as np
from jaxtyping import Bool, Float, Float64, Int64, UInt16

from sagittal.errors import DataError

_SLAB_VOXELS = 1 << 18
"""Voxels looked at at once: what is computed of them fits the processor's cache."""
_ABOVE_ONE = 1e-3
"""What rounding to float16 may add to a probability."""
_HALVES = 1 << 14
"""More than there are halves from 0 to 1."""


def slabs(shape: tuple[int, ...]) -> list[slice]:
    """Return parts of the first axis of about equally many voxels."""
    rows = max(1, _SLAB_VOXELS // max(1, shape[1] * shape[2]))
    return [slice(first, first + rows) for first in range(0, shape[0], rows)]


class Tally:
    """Counts one output's probabilities: apart from and near the foreground, false and true, by bin.

    Attributes:
        bins: equal ones from 0 to 1.
        voxels: how many there are.
        sums: of their probabilities.
        squares: of the differences of probability and truth; apart from the foreground, near it.
    """

    def __init__(self, bins: int) -> None:
        self.bins = bins
        self.voxels: Int64[np.ndarray, "2 2 B"] = np.zeros((2, 2, bins), np.int64)
        self.sums: Float64[np.ndarray, "2 2 B"] = np.zeros((2, 2, bins))
        self.squares: Float64[np.ndarray, " 2"] = np.zeros(2)
        self._halves: Int64[np.ndarray, "2 2 V"] | None = None

    def add(
        self,
        probability: Float[np.ndarray, "d H W"],
        true: Bool[np.ndarray, "d H W"],
        near: Bool[np.ndarray, "d H W"],
        kept: Bool[np.ndarray, "d H W"] | None,
    ) -> None:
        """Count voxels: their probability, whether it came true, whether the foreground is near, whether they count."""
        group = true.astype(np.uint16)
        group += near.view(np.uint8) * np.uint8(2)
        given = [array.ravel() if kept is None else array[kept] for array in (probability, group)]
        if probability.dtype == np.float16:
            # From 0 on, the bits of a half grow with its value: 15361 of them up to 1, which leaves room for the group.
            codes = (given[0] + np.float16(0)).view(np.uint16) + given[1] * np.uint16(_HALVES)
            counts = np.bincount(codes, minlength=4 * _HALVES).reshape(2, 2, _HALVES)
            self._halves = counts if self._halves is None else self._halves + counts
        else:
            self._add(given[0].astype(np.float64), given[1], None)

    def finished(self) -> Tally:
        """Sort what was counted value by value into the bins, let go of it, and return the tally."""
        if self._halves is not None:
            values = np.tile(np.arange(_HALVES, dtype=np.uint16).view(np.float16).astype(np.float64), 4)
            there = np.flatnonzero(self._halves)
            self._add(values[there], (there // _HALVES).astype(np.uint16), self._halves.ravel()[there])
            self._halves = None
        return self

    def _add(
        self,
        probability: Float64[np.ndarray, " n"],
        group: UInt16[np.ndarray, " n"],
        counts: Int64[np.ndarray, " n"] | None,
    ) -> None:
        times: Float64[np.ndarray, " n"] | float = 1.0 if counts is None else counts.astype(np.float64)
        place = np.minimum((probability * self.bins).astype(np.int64), self.bins - 1)
        place += group.astype(np.int64) * self.bins
        length, shape = self.voxels.size, self.voxels.shape
        # Counts stay below 2^53, so that adding them up as floats is exact.
        voxels = np.bincount(place, None if counts is None else counts.astype(np.float64), length)
        self.voxels += voxels.astype(np.int64).reshape(shape)
        self.sums += np.bincount(place, probability * times, length).reshape(shape)
        self.squares += np.bincount(group >= 2, np.square(probability - group % 2) * times, 2)


class Top:
    """The greatest probability of every voxel, and whose it is; of equal ones the first."""

    def __init__(self, first: Float[np.ndarray, "D H W"]) -> None:
        self.greatest = first.copy()
        self.output = np.zeros(first.shape, np.uint16)

    def take(self, output: int, probability: Float[np.ndarray, "D H W"]) -> None:
        """Compare with the next output."""
        for slab in slabs(probability.shape):
            greater = probability[slab] > self.greatest[slab]
            np.copyto(self.greatest[slab], probability[slab], where=greater)
            self.output[slab][greater] = output


def check_range(probability: Float[np.ndarray, "D H W"], what: str) -> None:
    """Refuse numbers that are no probabilities.

    Raises:
        DataError: below 0, above 1 by more than rounding, or NaN.
    """
    lowest, highest = (float(probability.min()), float(probability.max())) if probability.size else (0.0, 0.0)
    # Written so that NaN fails too.
    if not (lowest >= 0 and highest <= 1 + _ABOVE_ONE):
        raise DataError(
            f"{what} lie between {lowest:g} and {highest:g}; expected 0 to 1. Give the softmax or the sigmoids, not "
            "logits.",
            code="probability",
        )
