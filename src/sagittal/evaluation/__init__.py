"""How good is a prediction? Metrics on masks, scores of label maps, tables of evaluations; numpy and scipy only."""

from sagittal.evaluation.boundary import boundary_iou
from sagittal.evaluation.cases import evaluate_case
from sagittal.evaluation.classes import ClassSet
from sagittal.evaluation.columns import metrics_of
from sagittal.evaluation.metrics import AGGREGATION_RULES, METRICS
from sagittal.evaluation.overlap import OverlapCounts, count_overlap, dice
from sagittal.evaluation.pair import MaskPair, Metric
from sagittal.evaluation.scores import CaseScore, ClassScore, Failure
from sagittal.evaluation.settings import ALL_METRICS, DEFAULT_METRICS, FAST_METRICS, EvaluationSettings
from sagittal.evaluation.skeleton import cldice
from sagittal.evaluation.surface import SurfaceDistances, diagonal_mm, hd95_mm, surface_distances_mm
from sagittal.evaluation.table import ClassSummary, Evaluation, MetricSummary, Summary, summarise

__all__ = [
    "AGGREGATION_RULES",
    "ALL_METRICS",
    "DEFAULT_METRICS",
    "FAST_METRICS",
    "METRICS",
    "CaseScore",
    "ClassScore",
    "ClassSet",
    "ClassSummary",
    "Evaluation",
    "EvaluationSettings",
    "Failure",
    "MaskPair",
    "Metric",
    "MetricSummary",
    "OverlapCounts",
    "Summary",
    "SurfaceDistances",
    "boundary_iou",
    "cldice",
    "count_overlap",
    "diagonal_mm",
    "dice",
    "evaluate_case",
    "hd95_mm",
    "metrics_of",
    "summarise",
    "surface_distances_mm",
]
