"""Two or more methods on the same cases, compared: every mean, every pair, every rank, as one value.

`pairing` brings the evaluations into one table, `paired` and `power` tell of differences, `ranking` of ranks; here they
are asked for each metric and class, and for the mean over classes.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping
from typing import Literal

from sagittal.evaluation.classes import ClassSet
from sagittal.evaluation.contests import ComparisonSettings, Contest, MetricComparison, PairScore, compare_metric
from sagittal.evaluation.pairing import pair_evaluations
from sagittal.evaluation.power import ALPHA
from sagittal.evaluation.scores import Failure
from sagittal.evaluation.settings import EvaluationSettings
from sagittal.evaluation.table import Evaluation
from sagittal.plan.base import Frozen

__all__ = ["Comparison", "ComparisonSettings", "compare_evaluations"]


class Comparison(Frozen):
    """Everything that was found when methods were compared on the same cases."""

    schema_version: Literal[1] = 1
    classes: ClassSet
    settings: EvaluationSettings
    """How every method was scored."""
    statistics: ComparisonSettings
    methods: tuple[str, ...]
    cases: tuple[str, ...]
    patients: tuple[str, ...]
    """Whose case each is, in the order of the cases."""
    metrics: dict[str, MetricComparison]
    """By the metric's key, in the order of the settings."""
    missing: dict[str, tuple[str, ...]]
    """Per method the cases that count as worst because it has no score for them."""
    perfect: int
    """Values set to perfect because the reference lacks the class and only other methods found it."""
    failures: dict[str, tuple[Failure, ...]]
    """Per method the cases that could not be scored."""
    warnings: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    """How the scores of the methods were come by, for whoever reads the result."""

    @property
    def primary(self) -> str:
        """The metric that is shown first: Dice where it was measured."""
        return "dice" if "dice" in self.metrics else next(iter(self.metrics))

    def to_csv(self) -> str:
        """Return one row per metric, class and pair of methods; undefined values are empty cells."""
        text = io.StringIO()
        writer = csv.DictWriter(text, _PAIR_COLUMNS, lineterminator="\n")
        writer.writeheader()
        for key, metric in self.metrics.items():
            for name, contest in (("(mean over classes)", metric.mean), *metric.classes.items()):
                for pair in contest.pairs:
                    cells = {"metric": key, "class": name, **_pair_cells(contest, pair)}
                    writer.writerow({column: "" if cell is None else cell for column, cell in cells.items()})
        return text.getvalue()

    def values_csv(self) -> str:
        """Return one row per case, class and method with every metric; undefined values are empty cells."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(["case", "patient", "class", "method", *self.metrics])
        for place, (case, patient) in enumerate(zip(self.cases, self.patients, strict=True)):
            for name in self.classes.names:
                for method in self.methods:
                    values = [metric.values[name][method][place] for metric in self.metrics.values()]
                    cells = ["" if value is None else repr(value) for value in values]
                    writer.writerow([case, patient, name, method, *cells])
        return text.getvalue()


def compare_evaluations(
    evaluations: Mapping[str, Evaluation],
    *,
    statistics: ComparisonSettings | None = None,
    patients: Mapping[str, str] | None = None,
) -> Comparison:
    """Compare methods on the same cases.

    Args:
        evaluations: by the names of the methods, in the order in which they are shown.
        statistics: how they are compared.
        patients: the patient of each case; a case that is not named has the one of its scores, else is a patient of
            its own.

    Raises:
        DataError: fewer than two methods, classes, settings or references that differ, no common cases, or cases that
            a method lacks (see `ComparisonSettings.missing`).
    """
    wanted = statistics or ComparisonSettings()
    paired = pair_evaluations(evaluations, wanted.missing)
    owners = _patients(evaluations, paired.cases, patients or {})
    first = next(iter(evaluations.values()))
    methods = tuple(evaluations)
    return Comparison(
        classes=first.classes,
        settings=first.settings,
        statistics=wanted,
        methods=methods,
        cases=paired.cases,
        patients=owners,
        metrics={
            key: compare_metric(paired.values[key], metric, methods, first.classes.names, owners, wanted)
            for key, metric in first.metrics.items()
        },
        missing=paired.missing,
        perfect=paired.perfect,
        failures={name: item.failures for name, item in evaluations.items() if item.failures},
        warnings=tuple(_warnings(evaluations, owners)),
        notes=_notes(paired.perfect),
    )


def _notes(perfect: int) -> tuple[str, ...]:
    if not perfect:
        return ()
    return (
        f"{perfect} value{'s were' if perfect > 1 else ' was'} set to perfect, of classes that the reference lacks and "
        "only other methods find: left out, a false alarm would cost nothing. An evaluation of one method has no value "
        "there, so its means are others.",
    )


def _patients(
    evaluations: Mapping[str, Evaluation], cases: tuple[str, ...], given: Mapping[str, str]
) -> tuple[str, ...]:
    own = {case.case: case.patient for item in evaluations.values() for case in item.cases if case.patient is not None}
    return tuple(given.get(case, own.get(case, case)) for case in cases)


def _warnings(evaluations: Mapping[str, Evaluation], owners: tuple[str, ...]) -> list[str]:
    found = [f"{name}: {warning}" for name, item in evaluations.items() for warning in item.warnings]
    patients = len(set(owners))
    pairs = len(evaluations) * (len(evaluations) - 1) // 2
    if pairs * 2.0 ** (1 - patients) > ALPHA:
        found.append(
            f"With {patients} patient{'' if patients == 1 else 's'} and {pairs} pair{'' if pairs == 1 else 's'} of "
            "methods no rank or permutation test can be significant at 5 %, however large the differences are."
        )
    return found


_PAIR_COLUMNS = (
    *("metric", "class", "first", "second", "first_mean", "second_mean", "mean_difference", "low", "high", "patients"),
    *("wilcoxon_p", "wilcoxon_p_holm", "wilcoxon_exact", "zeros", "ties", "permutation_p", "permutation_p_holm"),
    *("permutation_exact", "rank_biserial", "cohen_dz", "better", "margin", "equivalence_p", "equivalent"),
    *("standard_deviation", "patients_80", "patients_90", "equality_patients_80", "equality_patients_90"),
)


def _pair_cells(contest: Contest, pair: PairScore) -> dict[str, str | float | bool | None]:
    equal, power = pair.equivalence, pair.power
    needed = (*power.to_show, *power.to_equal) if power else ()
    counts = {column: item.patients for column, item in zip(_PAIR_COLUMNS[-4:], needed, strict=False)}
    return {
        "first": pair.first,
        "second": pair.second,
        "first_mean": contest.methods[pair.first].mean,
        "second_mean": contest.methods[pair.second].mean,
        "mean_difference": pair.mean,
        "low": pair.low,
        "high": pair.high,
        "patients": pair.patients,
        "wilcoxon_p": pair.wilcoxon.p,
        "wilcoxon_p_holm": pair.wilcoxon_holm,
        "wilcoxon_exact": pair.wilcoxon.exact,
        "zeros": pair.wilcoxon.zeros,
        "ties": pair.wilcoxon.ties,
        "permutation_p": pair.permutation.p,
        "permutation_p_holm": pair.permutation_holm,
        "permutation_exact": pair.permutation.exact,
        "rank_biserial": pair.rank_biserial,
        "cohen_dz": pair.cohen_dz,
        "better": pair.better,
        "margin": equal.margin if equal else None,
        "equivalence_p": equal.p if equal else None,
        "equivalent": equal.equivalent if equal else None,
        "standard_deviation": power.standard_deviation if power else None,
        **counts,
    }
