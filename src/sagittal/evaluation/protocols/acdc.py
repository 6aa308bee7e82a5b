"""The Automated Cardiac Diagnosis Challenge: Dice, Hausdorff distance and volumes of three structures of the heart."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from sagittal.errors import DataError
from sagittal.evaluation.classes import ClassSet
from sagittal.evaluation.metrics import METRICS
from sagittal.evaluation.pair import MaskPair, Metric
from sagittal.evaluation.protocols.averaging import classes_of_all_cases
from sagittal.evaluation.protocols.medpy import dice_or_one
from sagittal.evaluation.protocols.protocol import Protocol, always
from sagittal.evaluation.protocols.recognition import by_name, described, has_only_values
from sagittal.plan.dataset import Label

STRUCTURES: Mapping[str, int] = {"RV": 1, "MYO": 2, "LV": 3}
"""Right ventricle, myocardium and left ventricle, with their values in the label maps of the challenge."""

_ALIASES = {
    "RV": ("rightventricle", "rightventricularcavity", "rvc", "rightventriclecavity"),
    "MYO": ("myocardium", "mlv", "lvmyo", "lvm", "leftventricularmyocardium", "leftventriclemyocardium"),
    "LV": ("leftventricle", "leftventricularcavity", "lvc", "leftventriclecavity"),
}
_SOURCE = "The challenge's metrics_acdc.py (C. Zotti, 2017), with medpy: O. Bernard et al., IEEE TMI 37 (2018)."


def _hd_mm(pair: MaskPair) -> float:
    if pair.outcome == "absent":
        return 0.0
    return pair.distances.hd_mm if pair.distances else pair.diagonal_mm


def _prediction_ml(pair: MaskPair) -> float:
    return pair.counts.prediction * pair.voxel_ml


def _error_ml(pair: MaskPair) -> float:
    return (pair.counts.prediction - pair.counts.reference) * pair.voxel_ml


_METRICS: Mapping[str, Metric] = {
    "dice": replace(
        METRICS["dice"],
        compute=dice_or_one,
        empty_reference="0.",
        empty_prediction="0.",
        both_empty="1, as medpy's dc with numpy 1 (with numpy 2.4 it is NaN), and in the mean.",
        source=_SOURCE,
    ),
    "hd_mm": replace(
        METRICS["hd_mm"],
        compute=_hd_mm,
        empty_reference="The diagonal of the image in mm. medpy stops with an error instead.",
        empty_prediction="The diagonal of the image in mm. medpy stops with an error instead.",
        both_empty="0. medpy stops with an error instead.",
        source=_SOURCE,
    ),
    "volume_ml": replace(
        METRICS["volume_error_ml"],
        title="Volume",
        compute=_prediction_ml,
        definition="Volume of the prediction in mL.",
        empty_reference="The volume of the prediction.",
        empty_prediction="0.",
        both_empty="0.",
        source=_SOURCE,
    ),
    "volume_error_ml": replace(METRICS["volume_error_ml"], compute=_error_ml, both_empty="0.", source=_SOURCE),
}


def _structures(classes: ClassSet) -> ClassSet:
    found = by_name(classes, _ALIASES)
    if len(found) == len(STRUCTURES):
        labels = tuple(found.values())
    elif has_only_values(classes) and classes.foreground_values <= set(STRUCTURES.values()):
        labels = tuple(Label(name=name, values=(value,)) for name, value in STRUCTURES.items())
    else:
        raise DataError(
            f"ACDC scores right ventricle, myocardium and left ventricle, and the classes are {described(classes)}. "
            "Expected the names RV, MYO and LV, or the label values 1, 2 and 3 without names. Name the classes in "
            "dataset.json, or choose another protocol.",
            code="protocol_classes",
        )
    return classes.replace(labels=labels)


ACDC = Protocol(
    name="acdc",
    title="ACDC",
    columns=always(_METRICS),
    headline=("dice", "hd_mm"),
    averaging=classes_of_all_cases,
    mean_rule="Each structure over all cases; the overall mean over the three structures. The challenge's tables keep "
    "end diastole and end systole apart.",
    peculiar=(
        "The Hausdorff distance is the maximum, not a percentile, and uses the spacing.",
        "The challenge has no rule for empty masks, and every reference has all three structures: medpy raises an "
        "error where one is missed. Here a miss has the diagonal of the image. baumgach/acdc_segmenter, which adds "
        "the distance to the challenge's script, gives it 1 mm, which is better than most hits.",
        "nnFormer's inference_acdc.py reports medpy's hd95 in voxels instead.",
    ),
    source=_SOURCE,
    choose=_structures,
)
