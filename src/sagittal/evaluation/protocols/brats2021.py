"""BraTS up to 2022: Dice, HD95, sensitivity and specificity of three regions, as CaPTk computed them.

The challenge's workflows of 2021 and 2022 called CaPTk, which handed HD95 to medpy.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

from sagittal.evaluation.metrics import METRICS, SURFACE_VOXEL
from sagittal.evaluation.pair import MaskPair, Metric
from sagittal.evaluation.protocols.averaging import classes_of_all_cases
from sagittal.evaluation.protocols.brats_regions import brats_regions
from sagittal.evaluation.protocols.medpy import dice_or_one, hd95_vox
from sagittal.evaluation.protocols.protocol import Protocol, always

WORST_MM = math.sqrt(240**2 + 240**2 + 155**2)
"""Diagonal of the images of BraTS, 240 x 240 x 155 voxels of 1 mm: 373.13 mm."""

_SOURCE = "CaPTk 1.8, Utilities -lsb, with medpy's hd95: U. Baid et al., arXiv:2107.02314 (2021)."


def _hd95(pair: MaskPair) -> float:
    if pair.outcome == "absent":
        return 0.0
    value = hd95_vox(pair)
    return WORST_MM if value is None else value


def _sensitivity(pair: MaskPair) -> float:
    if pair.outcome == "absent":
        return 1.0
    return pair.counts.true_positive / pair.counts.reference if pair.counts.reference else 0.0


def _specificity(pair: MaskPair) -> float | None:
    outside = pair.counted_vox - pair.counts.reference
    return (outside - pair.counts.false_positive) / outside if outside else None


SENSITIVITY = replace(
    METRICS["recall"],
    title="Sensitivity",
    compute=_sensitivity,
    empty_reference="0.",
    empty_prediction="0.",
    both_empty="1.",
    source=_SOURCE,
)
SPECIFICITY = replace(
    METRICS["recall"],
    title="Specificity",
    compute=_specificity,
    definition="Share of the voxels outside of the reference that are outside of the prediction too. It grows with the "
    "background of the image.",
    empty_reference="As defined.",
    empty_prediction="1.",
    both_empty="1.",
    source=_SOURCE,
)

_METRICS: Mapping[str, Metric] = {
    "dice": replace(
        METRICS["dice"],
        compute=dice_or_one,
        empty_reference="0.",
        empty_prediction="0.",
        both_empty="1: rightly found nothing, and in the mean.",
        source=_SOURCE,
    ),
    "hd95_mm": replace(
        METRICS["hd95_mm"],
        compute=_hd95,
        definition="From every surface voxel of one mask the distance to the nearest surface voxel of the other; both "
        "directions pooled, and of all together the 95th percentile (linear interpolation). Distances are in voxels "
        f"whatever the spacing, which is 1 mm in BraTS. {SURFACE_VOXEL}",
        empty_reference="373.13, the diagonal of an image of BraTS.",
        empty_prediction="373.13, the diagonal of an image of BraTS.",
        both_empty="0: rightly found nothing, and in the mean.",
        source=_SOURCE,
    ),
    "sensitivity": SENSITIVITY,
    "specificity": SPECIFICITY,
}


BRATS2021 = Protocol(
    name="brats2021",
    title="BraTS 2021",
    columns=always(_METRICS),
    headline=("dice", "hd95_mm"),
    averaging=classes_of_all_cases,
    mean_rule="Each region over all cases; the overall mean over the three regions.",
    peculiar=(
        "A region that both masks lack scores a Dice of 1 and an HD95 of 0: where the enhancing tumour is absent, one "
        "false voxel costs a whole case.",
        "A miss or a false alarm scores an HD95 of 373.13 mm, the diagonal of an image of BraTS; nnU-Net's BraTS "
        "scripts have the same number. CaPTk takes the diagonal of the image at hand, in voxels: the same for BraTS.",
        "Spacing is not used: on other grids than those of BraTS, 1 mm, an HD95 is in voxels.",
        "HD95 is medpy's, one percentile over both directions pooled.",
    ),
    source=_SOURCE,
    choose=brats_regions,
)
