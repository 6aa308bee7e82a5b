"""Two label maps of one case -> the score of every class."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import reduce
from typing import Any

import numpy as np
from jaxtyping import Bool, Integer
from scipy.ndimage import find_objects

from sagittal.errors import DataError, did_you_mean
from sagittal.evaluation.classes import ClassSet
from sagittal.evaluation.columns import metrics_of
from sagittal.evaluation.lesions import LesionRule, LesionScore, match_lesions
from sagittal.evaluation.masks import check_spacing
from sagittal.evaluation.pair import MaskPair
from sagittal.evaluation.scores import CaseScore, ClassScore
from sagittal.evaluation.settings import EvaluationSettings
from sagittal.plan.base import Triple
from sagittal.volumes.crop import Box

MAX_LABEL = 65535

Boxes = dict[int, Box]
"""Bounding box of every label value that is present."""


def evaluate_case(
    reference: np.ndarray,
    prediction: np.ndarray,
    spacing_mm: Sequence[float],
    classes: ClassSet | Mapping[str, Any],
    *,
    case: str = "",
    patient: str | None = None,
    settings: EvaluationSettings | None = None,
) -> CaseScore:
    """Score every class of one case.

    A class is a set of label values. A voxel that the reference marks with the ignore value belongs to no mask, neither
    of the reference nor of the prediction; a class is cut off where an ignored area begins. Values that no class names
    count as background.

    Args:
        reference: label map (D, H, W), integers from 0.
        prediction: label map of the same shape.
        spacing_mm: voxel sizes in D, H, W order.
        classes: what to score; a mapping is read like the `labels` of a dataset.json.
        case: name of the case, for the result and for error messages.
        patient: whose scan it is, for the result.
        settings: which metrics; by itself those of `EvaluationSettings()`.

    Raises:
        DataError: no integers, values below 0, two shapes, no three positive spacings, an unknown
            protocol, or a tolerance of a class that is not scored.
        ResourceError: a metric needs a package that is not installed.
    """
    settings = settings or EvaluationSettings()
    metrics = metrics_of(settings)
    wanted = classes if isinstance(classes, ClassSet) else ClassSet.of_mapping(classes)
    where = f"{case}: " if case else ""
    check_tolerances(settings, wanted)
    _check_labels(reference, prediction, where)
    spacing = check_spacing(spacing_mm)
    shape: Triple = (reference.shape[0], reference.shape[1], reference.shape[2])
    kept = None if wanted.ignore_value is None else reference != wanted.ignore_value
    ignored_vox = 0 if kept is None else kept.size - int(np.count_nonzero(kept))
    reference_boxes, prediction_boxes = _boxes(reference), _boxes(prediction)
    scores = {}
    for label in wanted.labels:
        box = _joint_box(label.values, reference_boxes, prediction_boxes)
        pair = MaskPair(
            reference=_mask(reference, label.values, box, kept),
            prediction=_mask(prediction, label.values, box, kept),
            spacing_mm=spacing,
            image_shape=shape,
            name=label.name,
            ignored_vox=ignored_vox,
        )
        scores[label.name] = ClassScore(
            reference_ml=pair.counts.reference * pair.voxel_ml,
            prediction_ml=pair.counts.prediction * pair.voxel_ml,
            metrics={key: metric.compute(pair) for key, metric in metrics.items()},
            lesions=None if settings.lesions is None else _lesions(pair, settings.lesions, box.start),
        )
    return CaseScore(case=case, shape=shape, spacing_mm=spacing, classes=scores, patient=patient)


def _lesions(pair: MaskPair, rule: LesionRule, start: Triple) -> LesionScore:
    return match_lesions(pair.reference, pair.prediction, pair.spacing_mm, rule).shifted(start)


def check_tolerances(settings: EvaluationSettings, classes: ClassSet) -> None:
    """Refuse a tolerance of a class that is not scored: it would count for nothing.

    Raises:
        DataError: names it, and the class that it may mean.
    """
    for name, _ in settings.class_tolerances_mm:
        if name not in classes.names:
            raise DataError(
                f"class_tolerances_mm has a tolerance of '{name}', which is not scored."
                f"{did_you_mean(name, classes.names)}",
                code="unknown_class",
            )


def _check_labels(reference: np.ndarray, prediction: np.ndarray, where: str) -> None:
    for name, labels in (("reference", reference), ("prediction", prediction)):
        if labels.dtype.kind not in "iu":
            raise DataError(
                f"{where}{name} has dtype {labels.dtype}; expected a label map of integers. "
                "Convert it with `labels.astype(np.uint8)` once its values are known to be whole.",
                code="label_dtype",
            )
        if labels.ndim != 3:
            raise DataError(f"{where}{name} has shape {labels.shape}; expected (D, H, W).", code="label_shape")
        lowest, highest = (int(labels.min()), int(labels.max())) if labels.size else (0, 0)
        if lowest < 0 or highest > MAX_LABEL:
            raise DataError(
                f"{where}{name} has values from {lowest} to {highest}; label values lie between 0 and {MAX_LABEL}.",
                code="label_value",
            )
    if reference.shape != prediction.shape:
        raise DataError(
            f"{where}reference and prediction grids differ (shape {reference.shape} against {prediction.shape}). "
            "Bring the prediction onto the reference's grid first.",
            code="grid_mismatch",
        )


def _boxes(labels: Integer[np.ndarray, "D H W"]) -> Boxes:
    # One pass over the map for all classes; asking each class for its own box would read it once per class.
    found = find_objects(labels)
    return {
        value: Box(start=(d.start, h.start, w.start), stop=(d.stop, h.stop, w.stop))
        for value, (d, h, w) in ((value, box) for value, box in enumerate(found, start=1) if box is not None)
    }


def _joint_box(values: Iterable[int], *boxes: Boxes) -> Box:
    present = [found[value] for value in values for found in boxes if value in found]
    return reduce(Box.union, present) if present else Box.whole((0, 0, 0))


def _mask(
    labels: Integer[np.ndarray, "D H W"], values: Sequence[int], box: Box, kept: Bool[np.ndarray, "D H W"] | None
) -> Bool[np.ndarray, "d h w"]:
    part = labels[box.slices]
    mask: Bool[np.ndarray, "d h w"] = np.isin(part, values) if len(values) > 1 else part == values[0]
    return mask if kept is None else mask & kept[box.slices]
