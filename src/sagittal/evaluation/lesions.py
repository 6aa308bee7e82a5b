"""Lesions: which components of the reference were found, and which components of the prediction are false alarms.

A lesion is a connected component. Dice of a whole mask says little where there are many lesions of unequal size: one
that is large outweighs all that were missed. Here each lesion counts as one.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field

from sagittal.errors import DataError
from sagittal.evaluation.components import Overlaps, Pair, overlapping_components
from sagittal.evaluation.masks import check_masks, check_spacing
from sagittal.plan.base import Frozen, Triple

_MM3_PER_ML = 1000.0
_NEIGHBOURS = {6: "faces", 18: "faces and edges", 26: "faces, edges and corners"}
_ROUNDING = 1e-9
"""Share by which a product of spacings may differ between orders of axes."""


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

    @property
    def in_words(self) -> str:
        """The rule as a reader of a report needs it."""
        parts = [f"A lesion is what is connected by {_NEIGHBOURS[self.connectivity]}"]
        if self.dilation_vox:
            parts[0] += f" once the mask is dilated {self.dilation_vox} times, with its own voxels"
        enough = f"have an IoU of at least {self.minimum_iou:g}" if self.minimum_iou else "share a voxel"
        if self.matching == "one_to_one":
            parts.append(
                f"Lesions of reference and prediction that {enough} are paired one to one, the greatest IoU first"
            )
        else:
            parts.append(
                f"A lesion counts as found, or as right, where it and one of the other mask {enough}; one may find or "
                "be found by several"
            )
        if self.minimum_ml:
            parts.append(f"Lesions below {self.minimum_ml:g} mL are neither missed nor false alarms")
        return ". ".join(parts) + "."


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

    def shifted(self, start: Triple) -> LesionScore:
        """Return the lesions of masks that were cut out of an image at `start` (D, H, W) at their places in it."""

        def moved(lesions: Iterable[Any]) -> tuple[Any, ...]:
            return tuple(
                lesion.replace(centre_vox=tuple(a + b for a, b in zip(lesion.centre_vox, start, strict=True)))
                for lesion in lesions
            )

        return self.replace(reference=moved(self.reference), predicted=moved(self.predicted))

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
        """Lesions of the prediction that find one of the reference; one to one, as many as `detected`."""
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


def match_lesions(
    reference: np.ndarray, prediction: np.ndarray, spacing_mm: Sequence[float], rule: LesionRule
) -> LesionScore:
    """Find the lesions of two boolean masks (D, H, W) and pair them by `rule`.

    Two lesions may become a pair where they share a voxel and their IoU is at least `rule.minimum_iou`. One to one: the
    pair with the greatest IoU first, of equal ones that which shares more voxels, then the first of the reference and
    of the prediction in the order of the array; both its lesions are then taken. So of the parts into which a
    prediction splits a lesion one is right and the others are false alarms, and of the lesions that it merges one is
    found and the others are missed. With `any_overlap` all such pairs count: every part is right, every merged lesion
    is found, and `LesionScore.splits` and `merges` tell how many.

    Lesions below `rule.minimum_ml` are set aside: those of the reference before pairing; a predicted one where it finds
    nothing that counts, and either is too small itself or overlaps enough with one of the reference that is.

    Nothing depends on the position of voxels but the choice among pairs of equal IoU and size.

    Args:
        reference: boolean mask (D, H, W); ignored voxels are false in both.
        prediction: boolean mask of the same shape.
        spacing_mm: voxel sizes in D, H, W order.
        rule: what a lesion is and when two are the same.

    Returns:
        Every lesion that counts. Empty masks have no lesions; see the properties of `LesionScore` for what follows.

    Raises:
        DataError: not two boolean masks of one shape, or no three positive spacings.

    Source: greatest IoU first as in Metrics Reloaded's greedy matching (Maier-Hein et al., Nature Methods 21, 2024);
        lesions that are set aside as in COCO's areas (Lin et al., ECCV 2014).
    """
    check_masks(reference, prediction)
    voxel_ml = float(np.prod(check_spacing(spacing_mm))) / _MM3_PER_ML
    found = overlapping_components(reference, prediction, rule.connectivity, rule.dilation_vox)
    pairs = [pair for pair in found.pairs if pair.iou >= rule.minimum_iou]
    excused = [_is_below(size, rule, voxel_ml) for size in found.reference.sizes]
    counted = [pair for pair in pairs if not excused[pair.reference]]
    chosen = _one_to_one(counted) if rule.matching == "one_to_one" else counted
    near_excused = {pair.prediction for pair in pairs if excused[pair.reference]}
    pairs_of_reference, pairs_of_prediction = defaultdict(list), defaultdict(list)
    for pair in chosen:
        pairs_of_reference[pair.reference].append(pair)
        pairs_of_prediction[pair.prediction].append(pair)
    references = [
        _reference_lesion(number, found, pairs_of_reference[number], voxel_ml)
        for number in range(len(found.reference.sizes))
        if not excused[number]
    ]
    predictions = [
        PredictedLesion(
            volume_ml=size * voxel_ml,
            centre_vox=found.prediction.centre_vox(number),
            finds=len(pairs_of_prediction[number]),
        )
        for number, size in enumerate(found.prediction.sizes)
        if pairs_of_prediction[number] or not (number in near_excused or _is_below(size, rule, voxel_ml))
    ]
    return LesionScore(rule=rule, reference=tuple(references), predicted=tuple(predictions))


def pool_lesions(scores: Iterable[LesionScore]) -> LesionScore:
    """Return the lesions of many cases as if they were of one, so that every lesion weighs the same.

    The mean of `LesionScore.sensitivity` over cases weighs a lesion the more, the fewer its case has, and leaves out
    cases without any; their false alarms count here.

    Raises:
        DataError: no score, or scores by different rules.
    """
    given = list(scores)
    rules = list(dict.fromkeys(score.rule for score in given))
    if len(rules) != 1:
        raise DataError(
            f"lesions of {len(given)} cases by {len(rules)} rules can't be pooled; expected at least one case and one "
            f"rule for all. Rules: {[rule.in_words for rule in rules]}.",
            code="lesions",
        )
    return LesionScore(
        rule=rules[0],
        reference=tuple(lesion for score in given for lesion in score.reference),
        predicted=tuple(lesion for score in given for lesion in score.predicted),
    )


def _is_below(voxels: int, rule: LesionRule, voxel_ml: float) -> bool:
    return voxels * voxel_ml < rule.minimum_ml * (1 - _ROUNDING)


def _one_to_one(pairs: Iterable[Pair]) -> list[Pair]:
    taken_references: set[int] = set()
    taken_predictions: set[int] = set()
    chosen = []
    for pair in sorted(pairs, key=lambda pair: (-pair.iou, -pair.shared, pair.reference, pair.prediction)):
        if pair.reference not in taken_references and pair.prediction not in taken_predictions:
            taken_references.add(pair.reference)
            taken_predictions.add(pair.prediction)
            chosen.append(pair)
    return chosen


def _reference_lesion(number: int, found: Overlaps, pairs: Sequence[Pair], voxel_ml: float) -> ReferenceLesion:
    size, shared = found.reference.sizes[number], sum(pair.shared for pair in pairs)
    both = size + sum(found.prediction.sizes[pair.prediction] for pair in pairs)
    return ReferenceLesion(
        volume_ml=size * voxel_ml,
        centre_vox=found.reference.centre_vox(number),
        found_by=len(pairs),
        dice=2 * shared / both if pairs else 0.0,
        iou=shared / (both - shared) if pairs else 0.0,
    )
