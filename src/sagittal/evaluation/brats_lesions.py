"""Lesion-wise Dice and HD95 as the BraTS challenges score since 2023.

Written from what the organisers' script computes (github.com/rachitsaluja/BraTS-2023-Metrics, eval.py), and tested
against the numbers that the script itself gives. It differs from `match_lesions` in more than parameters, so it stands
by itself. The scripts of 2024 (BraTS-2024-Metrics) are others: for metastases and Africa they also join enhancing
lesions of the reference that touch one non-enhancing core.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import MappingProxyType

import numpy as np
from jaxtyping import Bool, Int32
from scipy import ndimage

from sagittal.evaluation.components import dilate, joint_box, number_components, shared_counts
from sagittal.evaluation.masks import check_masks, check_spacing
from sagittal.evaluation.surfels import surfel_distances_mm
from sagittal.plan.base import Frozen, TripleMm

WORST_MM = 374.0
"""Distance of a miss and of a false alarm: the diagonal of BraTS's 240 x 240 x 155 voxels of 1 mm is 373.1 mm."""


class BratsRule(Frozen):
    """What a challenge of 2023 counts as a lesion."""

    dilation_vox: int
    """Times that the reference is dilated by the 18 neighbours before its components are taken, and by which a
    prediction may miss a lesion and still find it."""
    minimum_mm3: float
    """Lesions of the reference up to this volume don't count."""


BRATS2023 = MappingProxyType(
    {
        "GLI": BratsRule(dilation_vox=3, minimum_mm3=50.0),
        "SSA": BratsRule(dilation_vox=3, minimum_mm3=50.0),
        "MEN": BratsRule(dilation_vox=1, minimum_mm3=50.0),
        "PED": BratsRule(dilation_vox=3, minimum_mm3=50.0),
        "MET": BratsRule(dilation_vox=1, minimum_mm3=2.0),
    }
)
"""Adult glioma, sub-Saharan Africa, meningioma, paediatric, metastases, as eval.py has them."""


class BratsLesion(Frozen):
    """A lesion of the reference."""

    volume_mm3: float
    found_by: int
    """Components of the prediction that touch it once it is dilated."""
    dice: float
    """Dice of the lesion and all of these components together; 0 where there are none."""
    hd95_mm: float
    """HD95 of the lesion and these components, by surface elements weighted with their area; 374 without any."""


class BratsScore(Frozen):
    """The lesions of one region in one case."""

    lesions: tuple[BratsLesion, ...]
    """Those above `BratsRule.minimum_mm3`."""
    false_positives: int
    """Components of the prediction, of whatever size, that touch no dilated lesion, not even one that is too small to
    count."""

    @property
    def true_positives(self) -> int:
        """Lesions that a component of the prediction touches."""
        return sum(lesion.found_by > 0 for lesion in self.lesions)

    @property
    def false_negatives(self) -> int:
        """Lesions that none touches."""
        return len(self.lesions) - self.true_positives

    @property
    def dice(self) -> float:
        """Sum of the lesions' Dice over found, missed and false ones; 1 where there are none of any."""
        count = len(self.lesions) + self.false_positives
        return sum(lesion.dice for lesion in self.lesions) / count if count else 1.0

    @property
    def hd95_mm(self) -> float:
        """Mean of the lesions' HD95 and of 374 mm for each false one; 0 where there are none of any."""
        count = len(self.lesions) + self.false_positives
        total = sum(lesion.hd95_mm for lesion in self.lesions) + WORST_MM * self.false_positives
        return total / count if count else 0.0


def brats2023_lesionwise(
    reference: np.ndarray,
    prediction: np.ndarray,
    spacing_mm: Sequence[float],
    rule: BratsRule = BRATS2023["GLI"],
) -> BratsScore:
    """Score one region (whole tumour, tumour core, enhancing tumour) lesion by lesion, as BraTS 2023 does.

    The reference is dilated `rule.dilation_vox` times by its 18 neighbours; what then hangs together by 26 is one
    lesion, with its own undilated voxels. Every component (26) of the prediction that meets the dilated lesion belongs
    to it, whole, and to other lesions that it meets as well. Components that meet no lesion are false alarms, each
    counted once.

    Args:
        reference: boolean mask (D, H, W).
        prediction: boolean mask of the same shape.
        spacing_mm: voxel sizes in D, H, W order.
        rule: dilation and threshold of the challenge.

    Returns:
        The lesions that count and the means of the challenge.

    Raises:
        DataError: not two boolean masks of one shape, or no three positive spacings.

    Source: R. Saluja et al., BraTS-2023-Metrics; A. W. Moawad et al., arXiv 2306.00838 (2023), for metastases.
    """
    check_masks(reference, prediction)
    spacing = check_spacing(spacing_mm)
    box = joint_box(reference, prediction)
    if box is None:
        return BratsScore(lesions=(), false_positives=0)
    reference, prediction = reference[box.slices], prediction[box.slices]
    # A lesion dilated by itself is the component that it is cut out of: what touches it can be read there.
    grown, count = number_components(dilate(reference, 18, rule.dilation_vox), 26)
    predicted, predicted_count = number_components(prediction, 26)
    touching = prediction & (grown > 0)
    found_by: list[list[int]] = [[] for _ in range(count)]
    for lesion, component, _ in shared_counts(grown[touching].astype(np.int64) - 1, predicted[touching] - np.int64(1)):
        found_by[lesion].append(component + 1)
    grown[~reference] = 0
    places = ndimage.find_objects(grown, count)
    predicted_places = ndimage.find_objects(predicted, predicted_count)
    sizes = np.bincount(grown[reference], minlength=count + 1)
    lesions = []
    for number, components in enumerate(found_by, start=1):
        volume_mm3 = int(sizes[number]) * float(np.prod(spacing))
        if volume_mm3 > rule.minimum_mm3:
            place = _around([places[number - 1], *(predicted_places[component - 1] for component in components)])
            own, pooled = grown[place] == number, _any_of(predicted[place], components)
            lesions.append(_lesion(own, pooled, spacing, volume_mm3, len(components)))
    used = {component for components in found_by for component in components}
    return BratsScore(lesions=tuple(lesions), false_positives=predicted_count - len(used))


def _lesion(
    own: Bool[np.ndarray, "d h w"],
    pooled: Bool[np.ndarray, "d h w"],
    spacing_mm: TripleMm,
    volume_mm3: float,
    found_by: int,
) -> BratsLesion:
    distances = surfel_distances_mm(own, pooled, spacing_mm)
    voxels = int(np.count_nonzero(own)) + int(np.count_nonzero(pooled))
    return BratsLesion(
        volume_mm3=volume_mm3,
        found_by=found_by,
        dice=2 * int(np.count_nonzero(own & pooled)) / voxels,
        hd95_mm=WORST_MM if distances is None else distances.hd95_mm,
    )


def _any_of(numbers: Int32[np.ndarray, "d h w"], wanted: Sequence[int]) -> Bool[np.ndarray, "d h w"]:
    table = np.zeros(int(numbers.max()) + 1, bool)
    table[list(wanted)] = True
    mask: Bool[np.ndarray, "d h w"] = table[numbers]
    return mask


def _around(places: Sequence[tuple[slice, slice, slice]]) -> tuple[slice, slice, slice]:
    """Return the smallest box around several."""
    d, h, w = (
        slice(min(place[axis].start for place in places), max(place[axis].stop for place in places))
        for axis in range(3)
    )
    return d, h, w
