"""The page of a comparison: one HTML file that needs no network, no script and no other file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup, escape

from sagittal.evaluation import Metric, metrics_of
from sagittal.evaluation.comparison import Comparison
from sagittal.evaluation.comparison_rules import STATISTICS_RULES
from sagittal.evaluation.contests import Contest, PairScore
from sagittal.report.colours import class_colour
from sagittal.report.comparison_plots import Forest, PairedPlot, forests, paired_plots, rank_plots
from sagittal.report.comparison_tables import (
    MARK,
    columns_of,
    compared_title,
    counted,
    is_best,
    is_worse,
    method_text,
    needed_text,
    p_equation,
    p_text,
    pair_texts,
)
from sagittal.report.page import environment, versions
from sagittal.report.tables import spread_text

MOST_CASES = 12
"""Rows of the table of cases in which the methods differ most."""


@dataclass(frozen=True)
class MetricPart:
    """What the page shows of one metric."""

    key: str
    metric: Metric
    title: str
    columns: dict[str, Contest]
    mean: Contest
    forests: tuple[Forest, ...]


def render_comparison(comparison: Comparison, *, references: str = "") -> str:
    """Return the page's HTML; `references` is the name of their folder."""
    metrics = metrics_of(comparison.settings)
    parts = [_part(comparison, key, metric) for key, metric in metrics.items()]
    first = next(part for part in parts if part.key == comparison.primary)
    plots, hidden = paired_plots(comparison, first.key, first.metric)
    distance = next((part for part in parts if part.metric.group == "surface" and part is not first), None)
    further: tuple[PairedPlot, ...] = ()
    if distance is not None:
        further, _ = paired_plots(comparison, distance.key, distance.metric)
    return (
        environment()
        .get_template("comparison.html.j2")
        .render(
            comparison=comparison,
            statistics=comparison.statistics,
            first=first,
            others=[part for part in parts if part is not first],
            parts=parts,
            sentences=verdict(comparison, first.metric, first.mean),
            counted=counted(comparison),
            colours={name: class_colour(number) for number, name in enumerate(comparison.methods)},
            plots=plots,
            hidden_plots=hidden,
            distance=distance,
            distance_plots=further,
            ranks=rank_plots(comparison, first.mean, first.metric),
            apart=most_apart(comparison),
            rules=STATISTICS_RULES,
            facts=_facts(comparison, references),
            mark=MARK,
            method_text=method_text,
            is_best=is_best,
            is_worse=is_worse,
            pair_texts=pair_texts,
            needed_text=needed_text,
            p_text=p_text,
            whole_brackets=whole_brackets,
        )
    )


def whole_brackets(text: str) -> Markup:
    """Return a value with its interval, which a narrow page puts below it and doesn't break."""
    value, bracket, rest = text.partition(" [")
    return escape(value) + Markup(' <span class="num">[{}</span>').format(rest) if bracket else escape(text)


def verdict(comparison: Comparison, metric: Metric, contest: Contest) -> list[str]:
    """Tell the result in sentences: what a reader takes home who reads nothing else."""
    if contest.best is None:
        return [f"{metric.title} is undefined in every case: there is nothing to compare."]
    order = sorted(comparison.methods, key=lambda name: (contest.rankings[0].ranks[name], name))
    best, second = order[0], order[1]
    pair = next(pair for pair in contest.pairs if {pair.first, pair.second} == {best, second})
    told = [_first_sentence(pair, best, second, contest, metric), *_margin_sentences(pair)]
    tied = [name for name in order[2:] if not is_worse(contest, name)]
    worse = [name for name in order[2:] if is_worse(contest, name)]
    if worse:
        told.append(f"{_listed(worse)} {'is' if len(worse) == 1 else 'are'} significantly worse than {best}.")
    if tied:
        told.append(f"No significant difference was found between {best} and {_listed(tied)} either.")
    return told


def _first_sentence(pair: PairScore, best: str, second: str, contest: Contest, metric: Metric) -> str:
    digits = metric.digits + 1
    mean, low, high = pair.mean, pair.low, pair.high
    if pair.first != best and mean is not None:
        mean, low, high = -mean, None if high is None else -high, None if low is None else -low
    difference = spread_text(mean, None, low, high, digits)
    test = f"Wilcoxon, Holm: {p_equation(pair.wilcoxon_holm)}"
    means = " against ".join(f"{contest.methods[name].mean:.{metric.digits}f}" for name in (best, second))
    if pair.better == best:
        return f"{best} is better than {second}: {metric.title} {means}, a difference of {difference} ({test})."
    return (
        f"{best} has a better mean than {second} ({metric.title} {means}, a difference of {difference}), "
        f"but the difference is not significant ({test})."
    )


def _margin_sentences(pair: PairScore) -> list[str]:
    if pair.equivalence is None:
        return []
    margin = pair.equivalence.margin
    equal = "equal" if pair.equivalence.equivalent else "not shown to be equal"
    told = [f"These two are {equal} within {margin:g} ({p_equation(pair.equivalence.p)})."]
    if pair.power is not None:
        eighty, ninety = (needed_text(item) for item in pair.power.to_show)
        told.append(
            f"To show a true difference of {margin:g} between them takes {eighty} patients for 80 % power and {ninety} "
            f"for 90 %; here are {pair.patients}."
        )
    return told


def most_apart(comparison: Comparison) -> list[dict[str, Any]]:
    """Return the cases in which the methods differ most by the mean of the first metric over classes."""
    found = comparison.metrics[comparison.primary]
    rows = []
    for place, case in enumerate(comparison.cases):
        means = {}
        for method in comparison.methods:
            known = [value for name in found.classes if (value := found.values[name][method][place]) is not None]
            if known:
                means[method] = sum(known) / len(known)
        if means:
            rows.append({"case": case, "means": means, "spread": max(means.values()) - min(means.values())})
    rows.sort(key=lambda row: (-float(str(row["spread"])), str(row["case"])))
    return rows[:MOST_CASES]


def _part(comparison: Comparison, key: str, metric: Metric) -> MetricPart:
    return MetricPart(
        key=key,
        metric=metric,
        title=compared_title(metric),
        columns=columns_of(comparison, key),
        mean=comparison.metrics[key].mean,
        forests=forests(comparison, key, metric),
    )


def _facts(comparison: Comparison, references: str) -> dict[str, dict[str, object]]:
    wanted = comparison.statistics
    settings = comparison.settings
    compared = {"References": references} if references else {}
    missing = {"refuse": "refused", "worst": "counted as the worst result"}[wanted.missing]
    return {
        "Compared": {
            **compared,
            "Methods": ", ".join(comparison.methods),
            "Cases": len(comparison.cases),
            "Patients": len(set(comparison.patients)),
            "Missing cases": missing,
            "Values set to perfect": comparison.perfect,
        },
        "Scored with": {
            "Protocol": settings.protocol,
            "Metrics": ", ".join(metrics_of(settings)),
            "Classes": ", ".join(comparison.classes.names),
        },
        "Statistics": {
            "Level": wanted.alpha,
            "Margin": wanted.margin,
            "Bootstrap samples": f"{wanted.resamples} for intervals, {wanted.draws} for ranks",
            "Sign patterns": f"up to {wanted.flips}",
            "Seed": wanted.seed,
        },
        "Versions": dict(versions()),
    }


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
