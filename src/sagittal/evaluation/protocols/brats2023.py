"""BraTS since 2023: Dice and HD95 of each lesion of three regions, with the scores of the whole region beside them.

Five challenges with one script and three sets of parameters: each is a protocol of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

from sagittal.evaluation import brats_lesions
from sagittal.evaluation.brats_lesions import WORST_MM, BratsRule, BratsScore, brats2023_lesionwise
from sagittal.evaluation.metrics import METRICS
from sagittal.evaluation.pair import MaskPair, Metric
from sagittal.evaluation.protocols.averaging import classes_of_all_cases
from sagittal.evaluation.protocols.brats2021 import SENSITIVITY, SPECIFICITY
from sagittal.evaluation.protocols.brats_regions import brats_regions
from sagittal.evaluation.protocols.medpy import dice_or_one
from sagittal.evaluation.protocols.protocol import Protocol, always

_SOURCE = "R. Saluja et al., github.com/rachitsaluja/BraTS-2023-Metrics, eval.py with the parameters of BraTS-{}."
_COUNTED = "Counted as anywhere."
_CHALLENGES = {
    "GLI": ("brats2023", "adult glioma"),
    "SSA": ("brats2023-ssa", "adult glioma in sub-Saharan Africa"),
    "MEN": ("brats2023-men", "meningioma"),
    "PED": ("brats2023-ped", "paediatric tumours"),
    "MET": ("brats2023-met", "metastases"),
}
"""Challenge -> name of its protocol, and what it is about; parameters are in `brats_lesions.BRATS2023`."""


def _hd95_mm(pair: MaskPair) -> float:
    if pair.outcome == "absent":
        return 0.0
    return pair.surfels.hd95_mm if pair.surfels else WORST_MM


def _lesion_metrics(rule: BratsRule, source: str) -> Mapping[str, Metric]:
    """Return what is scored lesion by lesion; the lesions of a pair are found once for all of it."""

    def lesions(pair: MaskPair) -> BratsScore:
        return brats2023_lesionwise(pair.reference, pair.prediction, pair.spacing_mm, rule)

    def count(title: str, better: bool, of: Callable[[BratsScore], int], definition: str) -> Metric:
        return Metric(
            title=title,
            unit="",
            higher_is_better=better,
            digits=0,
            compute=lambda pair: float(of(pair.once(lesions))),
            definition=definition,
            empty_reference=_COUNTED,
            empty_prediction=_COUNTED,
            both_empty="0.",
            source=source,
            group="lesions",
        )

    dilations = "one dilation" if rule.dilation_vox == 1 else f"{rule.dilation_vox} dilations"
    lesion = (
        f"A lesion is what hangs together in the reference after {dilations} by 18 neighbours; those of up to "
        f"{rule.minimum_mm3:g} mm3 don't count. It is compared with all components of the prediction that touch it, "
        "dilated. "
    )
    return {
        "lesion_dice": replace(
            METRICS["dice"],
            title="Lesion-wise Dice",
            compute=lambda pair: pair.once(lesions).dice,
            definition=f"{lesion}The sum of their Dice, divided by the number of lesions and of false alarms.",
            empty_reference="0: only false alarms.",
            empty_prediction="0; 1 where no lesion of the reference is large enough to count.",
            both_empty="1, and in the mean.",
            source=source,
            group="lesions",
        ),
        "lesion_hd95_mm": replace(
            METRICS["hd95_mm"],
            title="Lesion-wise HD95",
            compute=lambda pair: pair.once(lesions).hd95_mm,
            definition=f"{lesion}The mean of their HD95, with 374 mm for each miss and each false alarm. The HD95 is "
            "that of DeepMind's surface-distance: the percentile is of the surface's area.",
            empty_reference="374: only false alarms.",
            empty_prediction="374; 0 where no lesion of the reference is large enough to count.",
            both_empty="0, and in the mean.",
            source=source,
            group="lesions",
        ),
        "lesions_tp": count(
            "Lesions found", True, lambda score: score.true_positives, f"{lesion}Lesions that something touches."
        ),
        "lesions_fp": count(
            "False lesions",
            False,
            lambda score: score.false_positives,
            "Components (26 neighbours) of the prediction that touch no dilated lesion.",
        ),
        "lesions_fn": count(
            "Lesions missed", False, lambda score: score.false_negatives, f"{lesion}Lesions that nothing touches."
        ),
    }


def _region_metrics(source: str) -> Mapping[str, Metric]:
    """Return what is scored of a whole region."""
    return {
        "dice": replace(
            METRICS["dice"],
            compute=dice_or_one,
            empty_reference="0.",
            empty_prediction="0.",
            both_empty="1, and in the mean.",
            source=f"{source} Legacy_Dice.",
        ),
        "hd95_mm": replace(
            METRICS["hd95_mm"],
            compute=_hd95_mm,
            definition="The surface of each mask cut into elements with areas; the 95th percentile, by area, of their "
            "distances to the other surface; the larger of both directions, in mm.",
            empty_reference="374.",
            empty_prediction="374.",
            both_empty="0, and in the mean.",
            source=f"{source} Legacy_HD95.",
        ),
        "sensitivity": replace(SENSITIVITY, source=source),
        "specificity": replace(SPECIFICITY, source=source),
    }


def _protocol(challenge: str) -> Protocol:
    name, subject = _CHALLENGES[challenge]
    rule, source = brats_lesions.BRATS2023[challenge], _SOURCE.format(challenge)
    others = ", ".join(f"{other} ({about})" for other, about in _CHALLENGES.values() if other != name)
    return Protocol(
        name=name,
        title=f"BraTS 2023, {subject}",
        columns=always({**_lesion_metrics(rule, source), **_region_metrics(source)}),
        headline=("lesion_dice", "lesion_hd95_mm"),
        averaging=classes_of_all_cases,
        mean_rule="Each region over all cases; the overall mean over the three regions.",
        peculiar=(
            "Every component of the prediction that touches no lesion costs as much as a missed lesion: one stray "
            "voxel halves the score of a case with one lesion.",
            f"A lesion of up to {rule.minimum_mm3:g} mm3 need not be found, and what touches it is no false alarm.",
            f"Parameters are those of {subject}; the other challenges of 2023 are {others}.",
            "Dice and HD95 of the whole region stand beside as in the challenge's tables, where they are called "
            "legacy.",
        ),
        source=source,
        choose=brats_regions,
    )


PROTOCOLS_2023: Mapping[str, Protocol] = {
    protocol.name: protocol for protocol in (_protocol(challenge) for challenge in _CHALLENGES)
}
"""The five challenges of 2023 by the names of their protocols; adult glioma, the first, is `brats2023`."""
