"""Agreement beyond chance: Cohen's kappa of two masks."""

from __future__ import annotations

from sagittal.evaluation.overlap import OverlapCounts


def kappa(counts: OverlapCounts, voxels: int) -> float | None:
    """Return Cohen's kappa of two masks in an image of `voxels` voxels that count.

    One mask empty: 0, as the formula gives. Both empty: None. Both fill the image: 1, the limit of masks that agree.

    Source: J. Cohen, A coefficient of agreement for nominal scales, Educ. and Psychol. Measurement 20 (1960).
    """
    reference, prediction = counts.reference, counts.prediction
    assert voxels >= counts.true_positive + counts.false_positive + counts.false_negative
    if not reference and not prediction:
        return None
    # In whole numbers up to the division: shares of voxels near 1 would lose digits to their difference.
    wrong = counts.false_positive + counts.false_negative
    disagree_by_chance = reference * (voxels - prediction) + prediction * (voxels - reference)
    return 1.0 - voxels * wrong / disagree_by_chance if disagree_by_chance else 1.0
