"""The free-response curve: how many lesions are found for how many false alarms per case, as the threshold moves.

A label map shows one threshold. Probabilities allow all of them, so that two models can be compared at the same number
of false alarms, or the threshold chosen that a clinic can bear.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from typing import Annotated

import numpy as np
from pydantic import Field, model_validator

from sagittal.errors import DataError
from sagittal.evaluation.components import islands
from sagittal.evaluation.lesions import LesionRule, match_lesions
from sagittal.evaluation.masks import check_masks, check_spacing
from sagittal.evaluation.tallies import check_range
from sagittal.plan.base import Frozen

THRESHOLDS = tuple(step / 20 for step in range(1, 20))
"""0.05 to 0.95."""
LUNA16_RATES = (0.125, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0)
"""False alarms per case at which LUNA16 takes the mean sensitivity."""


class FreeResponsePoint(Frozen):
    """What one threshold gives."""

    threshold: float
    """Probabilities from here on are predicted."""
    detected: int
    """Lesions of the reference that are found."""
    false_positives: int
    """Lesions of the prediction that find none."""


class FreeResponse(Frozen):
    """Lesions found and false alarms at every threshold, over one case or many; it adds up with `+`."""

    rule: LesionRule
    cases: Annotated[int, Field(ge=1)]
    lesions: int
    """Lesions of the reference that count."""
    points: tuple[FreeResponsePoint, ...]
    """By ascending threshold."""

    @model_validator(mode="after")
    def _check(self) -> FreeResponse:
        thresholds = [point.threshold for point in self.points]
        if not thresholds or not all(a < b for a, b in itertools.pairwise(thresholds)):
            raise ValueError(f"thresholds must ascend, got {thresholds}")
        return self

    def __add__(self, other: FreeResponse) -> FreeResponse:
        """Return the curve of both together.

        Raises:
            DataError: other thresholds or another rule.
        """
        own, others = ([point.threshold for point in curve.points] for curve in (self, other))
        if own != others or self.rule != other.rule:
            raise DataError(
                f"free-response curves with thresholds {own} and {others}, and rules {self.rule} and {other.rule}, "
                "can't be added up: both must be equal. Compute them with the same settings.",
                code="free_response",
            )
        return FreeResponse(
            rule=self.rule,
            cases=self.cases + other.cases,
            lesions=self.lesions + other.lesions,
            points=tuple(
                FreeResponsePoint(
                    threshold=a.threshold,
                    detected=a.detected + b.detected,
                    false_positives=a.false_positives + b.false_positives,
                )
                for a, b in zip(self.points, other.points, strict=True)
            ),
        )

    @property
    def curve(self) -> tuple[tuple[float, float], ...]:
        """(false alarms per case, sensitivity) of every threshold, the highest first; empty without any lesion."""
        if not self.lesions:
            return ()
        return tuple(
            (point.false_positives / self.cases, point.detected / self.lesions) for point in reversed(self.points)
        )

    def sensitivity_at(self, false_positives_per_case: float) -> float | None:
        """Return the sensitivity that is reached with at most so many false alarms per case; None without any lesion.

        The curve begins where nothing is predicted, at (0, 0). A threshold that has fewer lesions for as many or more
        false alarms than another one (parts of a low threshold grow together) is left out; between the others it is a
        straight line, as in LUNA16, and beyond the last of them it stays level.
        """
        if not self.lesions:
            return None
        best = {0.0: 0.0}
        for rate, sensitivity in sorted(self.curve):
            best[rate] = max(sensitivity, *best.values())
        return float(np.interp(false_positives_per_case, list(best), list(best.values())))

    @property
    def mean_sensitivity(self) -> float | None:
        """Mean of `sensitivity_at` 1/8, 1/4, 1/2, 1, 2, 4 and 8 false alarms per case (LUNA16's score, CPM)."""
        found = [self.sensitivity_at(rate) for rate in LUNA16_RATES]
        defined = [value for value in found if value is not None]
        return sum(defined) / len(defined) if defined else None


def free_response(
    reference: np.ndarray,
    probability: np.ndarray,
    spacing_mm: Sequence[float],
    rule: LesionRule,
    *,
    thresholds: Sequence[float] = THRESHOLDS,
) -> FreeResponse:
    """Count at every threshold the lesions that are found and the false alarms of one case.

    At each threshold the voxels at or above it are a mask of their own, and its components are matched with those of
    the reference as `match_lesions` does. So a lesion may be found at 0.5 and lost at 0.1, where it has grown together
    with its surroundings and `rule` asks for more than a shared voxel.

    Args:
        reference: boolean mask (D, H, W).
        probability: of one class or region, floats (D, H, W).
        spacing_mm: voxel sizes in D, H, W order.
        rule: what a lesion is and when it is found.
        thresholds: in (0, 1], in any order; compared in the map's own type.

    Returns:
        The counts of this case; those of other cases are added with `+`. A case without lesions counts too: its false
        alarms are as real.

    Raises:
        DataError: no boolean mask, no floats of its shape, no probabilities, no three positive spacings, thresholds out
            of (0, 1].

    Source: LUNA16 (Setio et al., Medical Image Analysis 42, 2017) for the rates; there candidates are points with one
        probability each, here they are components of a map, so curves of both are not the same.
    """
    wanted = sorted(set(thresholds))
    if not wanted or not all(0 < threshold <= 1 for threshold in wanted):
        raise DataError(f"thresholds {tuple(wanted)}: expected numbers in (0, 1].", code="threshold")
    check_masks(reference, reference)
    check_spacing(spacing_mm)
    _check_probability(reference, probability)
    lesions, points = 0, np.zeros((len(wanted), 2), np.int64)
    # A higher threshold only takes voxels away: no lesion of any threshold reaches beyond an island of the lowest.
    for island in islands(reference | (probability >= wanted[0]), rule.dilation_vox):
        own, part = island.cut(reference), np.where(island.own, probability[island.box.slices], 0)
        scores = [match_lesions(own, part >= threshold, spacing_mm, rule) for threshold in wanted]
        lesions += len(scores[0].reference)
        points += [(score.detected, score.false_positives) for score in scores]
    return FreeResponse(
        rule=rule,
        cases=1,
        lesions=lesions,
        points=tuple(
            FreeResponsePoint(threshold=float(threshold), detected=int(detected), false_positives=int(false_positives))
            for threshold, (detected, false_positives) in zip(wanted, points, strict=True)
        ),
    )


def add_free_responses(cases: Iterable[FreeResponse]) -> FreeResponse:
    """Return the curve of many cases; only one of them has to be in memory at a time.

    Raises:
        DataError: no case, or cases with different thresholds or rules.
    """
    total: FreeResponse | None = None
    for case in cases:
        total = case if total is None else total + case
    if total is None:
        raise DataError("a free-response curve needs at least one case, and there is none.", code="free_response")
    return total


def _check_probability(reference: np.ndarray, probability: np.ndarray) -> None:
    if probability.dtype.kind != "f" or probability.shape != reference.shape:
        raise DataError(
            f"probability: dtype {probability.dtype} and shape {probability.shape}; expected floats of the reference's "
            f"shape {reference.shape}. Give one class or region, `probabilities[k]`.",
            code="probability",
        )
    check_range(probability, "probabilities")
