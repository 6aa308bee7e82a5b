"""The evaluation of nnU-Net v2: Dice, IoU and the counts of voxels."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

from sagittal.evaluation.metrics import METRICS, UNDEFINED
from sagittal.evaluation.pair import MaskPair, Metric
from sagittal.evaluation.protocols.averaging import classes_of_defined_cases
from sagittal.evaluation.protocols.protocol import Protocol, always

_SOURCE = "nnU-Net 2.8, nnunetv2.evaluation.evaluate_predictions."


def _true_negatives(pair: MaskPair) -> float:
    return float(pair.counted_vox - sum(pair.counts))


def _count(title: str, better: bool | None, compute: Callable[[MaskPair], float], definition: str) -> Metric:
    return Metric(
        title=title,
        unit="voxels",
        higher_is_better=better,
        digits=0,
        compute=compute,
        definition=definition,
        empty_reference="Counted as anywhere.",
        empty_prediction="Counted as anywhere.",
        both_empty="Counted as anywhere, and in the mean.",
        source=_SOURCE,
        group="overlap",
    )


_METRICS: Mapping[str, Metric] = {
    "dice": replace(METRICS["dice"], both_empty=UNDEFINED, source=_SOURCE),
    "iou": replace(METRICS["iou"], both_empty=UNDEFINED, source=_SOURCE),
    "tp": _count("TP", True, lambda pair: float(pair.counts.true_positive), "Voxels that both masks have."),
    "fp": _count("FP", False, lambda pair: float(pair.counts.false_positive), "Voxels that only the prediction has."),
    "fn": _count("FN", False, lambda pair: float(pair.counts.false_negative), "Voxels that only the reference has."),
    "tn": _count("TN", None, _true_negatives, "Voxels of the image that neither mask has; ignored ones are not among."),
    "n_pred": _count("n_pred", None, lambda pair: float(pair.counts.prediction), "Voxels of the prediction."),
    "n_ref": _count("n_ref", None, lambda pair: float(pair.counts.reference), "Voxels of the reference."),
}


NNUNET = Protocol(
    name="nnunet",
    title="nnU-Net v2",
    columns=always(_METRICS),
    headline=("dice", "iou"),
    averaging=classes_of_defined_cases,
    mean_rule="Each class over the cases in which it is defined; foreground_mean over all classes, undefined where one "
    "of them is defined in no case.",
    peculiar=(
        "A class that reference and prediction both lack is NaN and in no mean.",
        "It measures no distances.",
        "Voxels that the reference marks as ignore count for nothing, in TN neither.",
    ),
    source=_SOURCE,
)
