"""Overlap of two masks: the counts of voxels, and the shares made of them."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from sagittal.evaluation.masks import check_masks


class OverlapCounts(NamedTuple):
    """Voxels of a structure that both masks have, that only the prediction has, and that only the reference has."""

    true_positive: int
    false_positive: int
    false_negative: int

    @property
    def reference(self) -> int:
        """Voxels of the reference."""
        return self.true_positive + self.false_negative

    @property
    def prediction(self) -> int:
        """Voxels of the prediction."""
        return self.true_positive + self.false_positive

    @property
    def dice(self) -> float | None:
        """2 TP / (2 TP + FP + FN); None where both masks are empty."""
        total = self.reference + self.prediction
        return 2.0 * self.true_positive / total if total else None

    @property
    def iou(self) -> float | None:
        """TP / (TP + FP + FN); None where both masks are empty."""
        return self.true_positive / sum(self) if any(self) else None

    @property
    def precision(self) -> float | None:
        """TP / (TP + FP); 0 where the prediction alone is empty, None where both masks are."""
        if not any(self):
            return None
        return self.true_positive / self.prediction if self.prediction else 0.0

    @property
    def recall(self) -> float | None:
        """TP / (TP + FN); 0 where the reference alone is empty, None where both masks are."""
        if not any(self):
            return None
        return self.true_positive / self.reference if self.reference else 0.0


def count_overlap(reference: np.ndarray, prediction: np.ndarray) -> OverlapCounts:
    """Count the voxels of two boolean masks (D, H, W).

    Raises:
        DataError: not two boolean masks of one shape.
    """
    check_masks(reference, prediction)
    both = int(np.count_nonzero(reference & prediction))
    return OverlapCounts(
        true_positive=both,
        false_positive=int(np.count_nonzero(prediction)) - both,
        false_negative=int(np.count_nonzero(reference)) - both,
    )


def dice(reference: np.ndarray, prediction: np.ndarray) -> float | None:
    """Return the Dice coefficient of two boolean masks (D, H, W): 2 |R and P| / (|R| + |P|), from 0 to 1.

    Empty masks: reference empty, prediction not (a false alarm): 0. Prediction empty, reference not (a miss): 0.
    Both empty: None, for there is nothing to overlap; a mean counts it apart and leaves it out.

    Source: L. R. Dice, Measures of the amount of ecologic association between species, Ecology 26 (1945).

    Raises:
        DataError: not two boolean masks of one shape.
    """
    return count_overlap(reference, prediction).dice
