"""MONAI's metric classes with their defaults: DiceMetric, HausdorffDistanceMetric, SurfaceDistanceMetric, SurfaceDice.

Background is left out (`include_background=False`), the percentile of the Hausdorff distance is 95, spacings are given,
and everything else is as MONAI has it where nothing is said.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial

import numpy as np

from sagittal.evaluation.metrics import METRICS, SURFACE_VOXEL, UNDEFINED
from sagittal.evaluation.nsd import nsd_metric
from sagittal.evaluation.pair import MaskPair, Metric
from sagittal.evaluation.protocols.averaging import cases_of_defined_classes
from sagittal.evaluation.protocols.protocol import Protocol
from sagittal.evaluation.settings import EvaluationSettings

_SOURCE = "MONAI 1.6, monai.metrics."
_DROPPED = "NaN: left out of every mean, so that a miss improves it."
_INFINITE = "Infinite, and so is every mean that it is in."


def _dice(pair: MaskPair) -> float | None:
    return pair.counts.dice if pair.counts.reference else None


def _hd95_mm(pair: MaskPair) -> float | None:
    # MONAI interpolates between infinite distances where a mask is empty, and infinity less infinity is NaN.
    return pair.distances.hd95_mm if pair.distances else None


def _asd_mm(pair: MaskPair) -> float | None:
    return float(pair.distances.from_prediction_mm.mean()) if pair.distances else None


def _nsd(pair: MaskPair, *, tolerance_mm: float) -> float | None:
    if pair.outcome == "absent":
        return None
    if pair.distances is None:
        return 0.0
    # MONAI compares in single precision: 3 x 0.8 mm is within a tolerance of 2.4 mm there, in double it is not.
    pooled = np.concatenate(pair.distances).astype(np.float32)
    return float(np.count_nonzero(pooled <= np.float32(tolerance_mm)) / pooled.size)


_METRICS: Mapping[str, Metric] = {
    "dice": replace(
        METRICS["dice"],
        compute=_dice,
        empty_reference="NaN: left out of every mean, so that a false alarm costs nothing (ignore_empty=True).",
        both_empty=UNDEFINED,
        source=f"{_SOURCE}DiceMetric.",
    ),
    "hd95_mm": replace(
        METRICS["hd95_mm"],
        compute=_hd95_mm,
        empty_reference=_DROPPED,
        empty_prediction=_DROPPED,
        both_empty=UNDEFINED,
        source=f"{_SOURCE}HausdorffDistanceMetric(percentile=95).",
    ),
    "asd_mm": replace(
        METRICS["assd_mm"],
        title="ASD",
        compute=_asd_mm,
        definition="The mean of the distances from the surface voxels of the prediction to the nearest surface voxel "
        f"of the reference, between voxel centres in mm; one direction (symmetric=False). {SURFACE_VOXEL} 0 is "
        "perfect, and a prediction that covers a small part of the reference's surface exactly has 0 too.",
        empty_reference=_INFINITE,
        empty_prediction=_INFINITE,
        both_empty=UNDEFINED,
        source=f"{_SOURCE}SurfaceDistanceMetric.",
    ),
}


def _columns(settings: EvaluationSettings) -> Mapping[str, Metric]:
    columns = dict(_METRICS)
    for tolerance_mm in settings.tolerances_mm:
        columns[f"nsd_{tolerance_mm:g}mm"] = replace(
            nsd_metric(tolerance_mm),
            compute=partial(_nsd, tolerance_mm=tolerance_mm),
            source=f"{_SOURCE}SurfaceDiceMetric(class_thresholds={tolerance_mm:g}).",
        )
    return columns


MONAI = Protocol(
    name="monai",
    title="MONAI",
    columns=_columns,
    tolerances="shared",
    headline=("dice", "hd95_mm"),
    averaging=cases_of_defined_classes,
    mean_rule='Each case over its classes that are not NaN, then over cases that have one (reduction "mean"); a class '
    'over the cases in which it is not NaN (reduction "mean_batch"); 0 where nothing is defined.',
    peculiar=(
        "Dice of a class that the reference lacks is NaN, whatever the prediction.",
        "HD95 is NaN where a mask is empty: a model that misses a structure has a better mean than one that finds it.",
        "A mean over nothing is 0.",
        "SurfaceDiceMetric has no default tolerance: that of the settings is taken.",
        "MONAI computes in single precision: values agree to about 7 digits.",
    ),
    source=_SOURCE,
    infinite=frozenset({"asd_mm"}),
)
