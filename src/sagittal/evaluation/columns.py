"""Settings -> the metrics of an evaluation, in the order of its columns."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from types import MappingProxyType

from sagittal.errors import DataError, did_you_mean
from sagittal.evaluation.metrics import AGGREGATION_RULES, METRICS
from sagittal.evaluation.nsd import nsd_metric, nsd_own_metric
from sagittal.evaluation.pair import Metric
from sagittal.evaluation.protocols import PROTOCOLS, Protocol
from sagittal.evaluation.settings import FAMILIES, NSD_SURFEL, SAGITTAL, EvaluationSettings

OWN_MEANS = ("Mean of a class", "Mean foreground")
"""Rules of `AGGREGATION_RULES` that a protocol replaces by its own."""


@lru_cache(maxsize=32)
def metrics_of(settings: EvaluationSettings) -> Mapping[str, Metric]:
    """Return the metrics that `settings` ask for by key, in the order of the columns.

    Keys are those of `METRICS`; "nsd" and "nsd_surfel" become one column for each tolerance (`nsd_2mm`,
    `nsd_surfel_0.5mm`) and one more where classes have tolerances of their own (`nsd_own`). Another protocol than
    "sagittal" brings its own metrics.

    Raises:
        DataError: the protocol is unknown.
    """
    if settings.protocol != SAGITTAL:
        return MappingProxyType(dict(_protocol_metrics(settings)))
    columns: dict[str, Metric] = {}
    for name in settings.metrics:
        if name not in FAMILIES:
            columns[name] = METRICS[name]
            continue
        surfel = name == NSD_SURFEL
        for tolerance_mm in settings.tolerances_mm:
            columns[f"{name}_{tolerance_mm:g}mm"] = nsd_metric(tolerance_mm, surfel=surfel)
        if settings.class_tolerances_mm:
            own = dict(settings.class_tolerances_mm)
            columns[f"{name}_own"] = nsd_own_metric(own, settings.tolerances_mm[0], surfel=surfel)
    return MappingProxyType(columns)


def rules_of(settings: EvaluationSettings) -> tuple[tuple[str, str], ...]:
    """Return what a reader has to know beside the metrics: (name, rule), of this project's means or of a protocol's.

    Raises:
        DataError: the protocol is unknown.
    """
    if settings.protocol == SAGITTAL:
        return AGGREGATION_RULES
    shared = tuple(rule for rule in AGGREGATION_RULES if rule[0] not in OWN_MEANS)
    return (*_protocol(settings).rules, *shared)


def _protocol_metrics(settings: EvaluationSettings) -> Mapping[str, Metric]:
    return _protocol(settings).columns(settings)


def _protocol(settings: EvaluationSettings) -> Protocol:
    name = settings.protocol
    if name not in PROTOCOLS:
        known = (SAGITTAL, *PROTOCOLS)
        raise DataError(f"protocol '{name}' is unknown.{did_you_mean(name, known)}", code="unknown_protocol")
    return PROTOCOLS[name]
