"""BraTS since 2023: Dice and HD95 of each lesion of three regions, with the scores of the whole region beside them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

from sagittal.evaluation.brats_lesions import WORST_MM, BratsScore, brats2023_lesionwise
from sagittal.evaluation.metrics import METRICS
from sagittal.evaluation.pair import MaskPair, Metric
from sagittal.evaluation.protocols.averaging import classes_of_all_cases
from sagittal.evaluation.protocols.brats2021 import SENSITIVITY, SPECIFICITY
from sagittal.evaluation.protocols.brats_regions import brats_regions
from sagittal.evaluation.protocols.medpy import dice_or_one
from sagittal.evaluation.protocols.protocol import Protocol
from sagittal.evaluation.settings import EvaluationSettings

_SOURCE = "R. Saluja et al., github.com/rachitsaluja/BraTS-2023-Metrics, with the parameters of BraTS-GLI."
_LESION = (
    "A lesion is what hangs together in the reference after three dilations by 18 neighbours; those of up to 50 mm3 "
    "don't count. It is compared with all components of the prediction that touch it, dilated. "
)
_COUNTED = "Counted as anywhere."


def _lesions(pair: MaskPair) -> BratsScore:
    return brats2023_lesionwise(pair.reference, pair.prediction, pair.spacing_mm)


def _hd95_mm(pair: MaskPair) -> float:
    if pair.outcome == "absent":
        return 0.0
    return pair.surfels.hd95_mm if pair.surfels else WORST_MM


def _count(title: str, better: bool, count: Callable[[BratsScore], int], definition: str) -> Metric:
    return Metric(
        title=title,
        unit="",
        higher_is_better=better,
        digits=0,
        compute=lambda pair: float(count(pair.once(_lesions))),
        definition=definition,
        empty_reference=_COUNTED,
        empty_prediction=_COUNTED,
        both_empty="0.",
        source=_SOURCE,
        group="lesions",
    )


_METRICS: Mapping[str, Metric] = {
    "lesion_dice": replace(
        METRICS["dice"],
        title="Lesion-wise Dice",
        compute=lambda pair: pair.once(_lesions).dice,
        definition=f"{_LESION}The sum of their Dice, divided by the number of lesions and of false alarms.",
        empty_reference="0: only false alarms.",
        empty_prediction="0; 1 where no lesion of the reference is large enough to count.",
        both_empty="1, and in the mean.",
        source=_SOURCE,
        group="lesions",
    ),
    "lesion_hd95_mm": replace(
        METRICS["hd95_mm"],
        title="Lesion-wise HD95",
        compute=lambda pair: pair.once(_lesions).hd95_mm,
        definition=f"{_LESION}The mean of their HD95, with 374 mm for each miss and each false alarm. The HD95 is that "
        "of DeepMind's surface-distance: the percentile is of the surface's area.",
        empty_reference="374: only false alarms.",
        empty_prediction="374; 0 where no lesion of the reference is large enough to count.",
        both_empty="0, and in the mean.",
        source=_SOURCE,
        group="lesions",
    ),
    "lesions_tp": _count(
        "Lesions found", True, lambda score: score.true_positives, f"{_LESION}Lesions that something touches."
    ),
    "lesions_fp": _count(
        "False lesions",
        False,
        lambda score: score.false_positives,
        "Components (26 neighbours) of the prediction that touch no dilated lesion.",
    ),
    "lesions_fn": _count(
        "Lesions missed", False, lambda score: score.false_negatives, f"{_LESION}Lesions that nothing touches."
    ),
    "dice": replace(
        METRICS["dice"],
        compute=dice_or_one,
        empty_reference="0.",
        empty_prediction="0.",
        both_empty="1, and in the mean.",
        source=f"{_SOURCE} Legacy_Dice.",
    ),
    "hd95_mm": replace(
        METRICS["hd95_mm"],
        compute=_hd95_mm,
        definition="The surface of each mask cut into elements with areas; the 95th percentile, by area, of their "
        "distances to the other surface; the larger of both directions, in mm.",
        empty_reference="374.",
        empty_prediction="374.",
        both_empty="0, and in the mean.",
        source=f"{_SOURCE} Legacy_HD95.",
    ),
    "sensitivity": replace(SENSITIVITY, source=_SOURCE),
    "specificity": replace(SPECIFICITY, source=_SOURCE),
}


def _columns(settings: EvaluationSettings) -> Mapping[str, Metric]:
    return _METRICS


BRATS2023 = Protocol(
    name="brats2023",
    title="BraTS 2023",
    columns=_columns,
    headline=("lesion_dice", "lesion_hd95_mm"),
    averaging=classes_of_all_cases,
    mean_rule="Each region over all cases; the overall mean over the three regions.",
    peculiar=(
        "Every component of the prediction that touches no lesion costs as much as a missed lesion: one stray voxel "
        "halves the score of a case with one lesion.",
        "A lesion of up to 50 mm3 need not be found, and what touches it is no false alarm.",
        "Parameters are those of adult glioma (BraTS-GLI); meningioma and metastases have others "
        "(brats_lesions.BRATS2023).",
        "Dice and HD95 of the whole region stand beside as in the challenge's tables, where they are called legacy.",
    ),
    source=_SOURCE,
    choose=brats_regions,
)
