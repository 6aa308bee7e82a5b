"""Lesions: which components of the reference were found, and which components of the prediction are false alarms.

A lesion is a connected component. Dice of a whole mask says little where there are many lesions of unequal size: one
that is large outweighs all that were missed. Here each lesion counts as one.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from sagittal.plan.base import Frozen, Triple


class LesionRule(Frozen):
    """What a lesion is, and when one of the prediction and one of the reference are the same."""

    connectivity: Literal[6, 18, 26] = 26
    """Voxels of a lesion touch by a face (6), by an edge too (18), or by a corner too (26)."""
    dilation_vox: Annotated[int, Field(ge=0)] = 0
    """Parts that grow together when their mask is dilated so many times, with the neighbours that `connectivity` names,
    are one lesion. The lesion keeps its own voxels: what the dilation adds only joins."""
    matching: Literal["one_to_one", "any_overlap"] = "one_to_one"
    """`one_to_one`: pairs in the order of their IoU, the greatest first, each lesion in one pair at the most.
    `any_overlap`: all pairs that overlap enough, so that one lesion may be found by several, or find several."""
    minimum_iou: Annotated[float, Field(ge=0, le=1)] = 0.0
    """IoU that two lesions need to be a pair; 0: one shared voxel is enough."""
    minimum_ml: Annotated[float, Field(ge=0)] = 0.0
    """A smaller lesion of the reference need not be found, and whatever finds it is no false alarm; a smaller one of
    the prediction is no false alarm either, yet finds a lesion where it overlaps one enough."""


class ReferenceLesion(Frozen):
    """A lesion of the reference."""

    volume_ml: float
    centre_vox: Triple
    """Middle of its bounding box, D, H, W: where to look for it."""
    found_by: int
    """Lesions of the prediction that are its pairs; 0 where it was missed, several where the prediction splits it."""
    dice: float
    """Dice with its pairs taken together; 0 where it was missed."""
    iou: float
    """IoU with its pairs taken together; 0 where it was missed."""

    @property
    def detected(self) -> bool:
        """Whether it was found."""
        return self.found_by > 0


class PredictedLesion(Frozen):
    """A lesion of the prediction."""

    volume_ml: float
    centre_vox: Triple
    """Middle of its bounding box, D, H, W."""
    finds: int
    """Lesions of the reference that are its pairs; 0 for a false alarm, several where the prediction merges them."""


class LesionScore(Frozen):
    """The lesions of one class in one case, or in many cases together.

    Lesions that `LesionRule.minimum_ml` excuses are in neither tuple.
    """

    rule: LesionRule
    reference: tuple[ReferenceLesion, ...]
    """In the order of their first voxels."""
    predicted: tuple[PredictedLesion, ...]
    """In the order of their first voxels."""

    @property
    def detected(self) -> int:
        """Lesions of the reference that were found."""
        return sum(lesion.detected for lesion in self.reference)

    @property
    def false_negatives(self) -> int:
        """Lesions of the reference that were missed."""
        return len(self.reference) - self.detected

    @property
    def true_positives(self) -> int:
        """Lesions of the prediction that find one of the reference; equal to `detected` where matching is one to one."""
        return sum(lesion.finds > 0 for lesion in self.predicted)

    @property
    def false_positives(self) -> int:
        """Lesions of the prediction that find none."""
        return len(self.predicted) - self.true_positives

    @property
    def false_negatives_ml(self) -> tuple[float, ...]:
        """Volumes of the lesions that were missed."""
        return tuple(lesion.volume_ml for lesion in self.reference if not lesion.detected)

    @property
    def false_positives_ml(self) -> tuple[float, ...]:
        """Volumes of the false alarms."""
        return tuple(lesion.volume_ml for lesion in self.predicted if not lesion.finds)

    @property
    def splits(self) -> int:
        """Lesions of the reference that several of the prediction find."""
        return sum(lesion.found_by > 1 for lesion in self.reference)

    @property
    def merges(self) -> int:
        """Lesions of the prediction that find several of the reference."""
        return sum(lesion.finds > 1 for lesion in self.predicted)

    @property
    def sensitivity(self) -> float | None:
        """Share of the reference's lesions that were found; None where it has none: nothing could be missed."""
        return self.detected / len(self.reference) if self.reference else None

    @property
    def precision(self) -> float | None:
        """Share of the predicted lesions that find one; 0 where none was predicted though there are lesions, so that a
        miss stays in a mean; None where there are none in either."""
        if self.predicted:
            return self.true_positives / len(self.predicted)
        return 0.0 if self.reference else None

    @property
    def f1(self) -> float | None:
        """Harmonic mean of sensitivity and precision; 0 where either mask alone has lesions, None where neither has."""
        if not self.reference and not self.predicted:
            return None
        found, right = self.sensitivity or 0.0, self.precision or 0.0
        return 2 * found * right / (found + right) if found + right else 0.0

    @property
    def mean_dice(self) -> float | None:
        """Sum of the lesions' Dice over found, missed and falsely predicted ones: misses and false alarms count as 0.

        None where neither mask has a lesion.
        """
        count = len(self.reference) + self.false_positives
        return sum(lesion.dice for lesion in self.reference) / count if count else None
