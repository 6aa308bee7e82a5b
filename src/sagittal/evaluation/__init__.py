"""How good is a prediction? Metrics on masks, scores of label maps, tables of evaluations; numpy and scipy only."""

from sagittal.evaluation.cases import evaluate_case
from sagittal.evaluation.classes import ClassSet
from sagittal.evaluation.metrics import AGGREGATION_RULES, METRICS, MaskPair, Metric
from sagittal.evaluation.overlap import OverlapCounts, count_overlap, dice
from sagittal.evaluation.surface import SurfaceDistances, diagonal_mm, hd95_mm, surface_distances_mm
from sagittal.evaluation.table import (
    CaseScore,
    ClassScore,
    ClassSummary,
    Evaluation,
    Failure,
    MetricSummary,
    Summary,
    summarise,
)

__all__ = [
    "AGGREGATION_RULES",
    "METRICS",
    "CaseScore",
    "ClassScore",
    "ClassSet",
    "ClassSummary",
    "Evaluation",
    "Failure",
    "MaskPair",
    "Metric",
    "MetricSummary",
    "OverlapCounts",
    "Summary",
    "SurfaceDistances",
    "count_overlap",
    "diagonal_mm",
    "dice",
    "evaluate_case",
    "hd95_mm",
    "summarise",
    "surface_distances_mm",
]
