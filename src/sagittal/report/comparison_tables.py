"""A comparison as tables for papers: methods by class, and every pair with its tests."""

from __future__ import annotations

from sagittal.evaluation import Metric, metrics_of
from sagittal.evaluation.comparison import Comparison
from sagittal.evaluation.contests import Contest, MethodScore, PairScore
from sagittal.evaluation.power import Needed
from sagittal.report.tables import MEAN_ROW, Cell, PaperTable, spread_text, titled

MARK = "†"
"""Stands at methods that are significantly worse than the best one."""
MAX_CLASSES_ACROSS = 5
"""Up to this many classes methods are the rows, as most papers print them; beyond, the classes are."""


def comparison_tables(comparison: Comparison) -> tuple[PaperTable, ...]:
    """Return for each metric a table of the methods and one of the pairs on the mean over classes, then the pairs in
    every class by the first metric."""
    metrics = metrics_of(comparison.settings)
    found = []
    for key, metric in metrics.items():
        found += [methods_table(comparison, key, metric), pairs_table(comparison, key, metric, None)]
    if len(comparison.classes.names) > 1:
        first = comparison.primary
        found += [pairs_table(comparison, first, metrics[first], name) for name in comparison.classes.names]
    return tuple(found)


def compared_title(metric: Metric) -> str:
    """Return the metric's title with its unit, in bars where the size of a signed error is compared."""
    return titled(metric) if metric.higher_is_better is not None else f"|{metric.title}| ({metric.unit})"


def methods_table(comparison: Comparison, key: str, metric: Metric) -> PaperTable:
    """Return the means of all methods in every class, best in bold."""
    contests = columns_of(comparison, key)
    cells = {
        name: [_cell(contest, method, metric) for method in comparison.methods] for name, contest in contests.items()
    }
    if len(contests) <= MAX_CLASSES_ACROSS + 1:
        header = ("Method", *contests)
        rows = tuple(
            (Cell(method), *(column[place] for column in cells.values()))
            for place, method in enumerate(comparison.methods)
        )
        apart = 0
    else:
        header = ("Class", *comparison.methods)
        rows = tuple((Cell(name), *column) for name, column in cells.items())
        apart = 1
    better = {True: "higher is better", False: "lower is better", None: "nearer to 0 is better"}
    return PaperTable(
        caption=f"{compared_title(metric)} ({better[metric.higher_is_better]}): mean ± standard deviation over cases "
        "[95 % interval of the mean by patient].",
        label=f"methods-{key.replace('_', '-')}",
        header=header,
        rows=rows,
        notes=(f"{counted(comparison)} Best in bold; {MARK} significantly worse than the best (Wilcoxon, Holm, 5 %).",),
        apart=apart,
    )


def pairs_table(comparison: Comparison, key: str, metric: Metric, name: str | None) -> PaperTable:
    """Return every pair with its tests in class `name`; None: on the mean over classes."""
    found = comparison.metrics[key]
    contest = found.mean if name is None else found.classes[name]
    margin = comparison.statistics.margin
    bounded = any(pair.equivalence for pair in contest.pairs)
    header = ["Pair", "Difference", "p Wilcoxon", "p permutation", "r rank-biserial", "d_z"]
    if bounded:
        header += [f"p equal within {margin:g}", "n for 80 % power", "n for 90 % power"]
    rows = []
    for pair in contest.pairs:
        cells = [Cell(text) for text in (f"{pair.first} – {pair.second}", *pair_texts(pair, metric))]
        cells[1] = Cell(cells[1].text, bold=pair.better is not None)
        rows.append(tuple(cells[: len(header)]))
    note = f"{counted(comparison)} First minus second; bold: one is better (Wilcoxon, Holm, 5 %). p after Holm."
    if bounded:
        note += f" n: patients that a paired t test needs to show a true difference of {margin:g}."
    where = "mean over classes" if name is None else name
    return PaperTable(
        caption=f"{compared_title(metric)}, {where}: paired differences [95 % interval by patient].",
        label=f"pairs-{key.replace('_', '-')}"
        + ("" if name is None else f"-{comparison.classes.names.index(name) + 1}"),
        header=tuple(header),
        rows=tuple(rows),
        notes=(note,),
    )


def pair_texts(pair: PairScore, metric: Metric) -> tuple[str, ...]:
    """Return difference, both p, both effect sizes, p of equality and patients for 80 % and 90 % power, as texts."""
    digits = metric.digits + 1
    equal, power = pair.equivalence, pair.power
    needed = [needed_text(item) for item in power.to_show] if power else ["–", "–"]
    return (
        spread_text(pair.mean, None, pair.low, pair.high, digits),
        p_text(pair.wilcoxon_holm),
        p_text(pair.permutation_holm),
        f"{pair.rank_biserial:.2f}",
        "–" if pair.cohen_dz is None else f"{pair.cohen_dz:.2f}",
        "–" if equal is None else p_text(equal.p),
        *needed,
    )


def needed_text(needed: Needed) -> str:
    """Return a number of patients, or that it is beyond all bounds."""
    return "more than a million" if needed.patients is None else f"{needed.patients}"


def p_text(p: float) -> str:
    """Return p with three decimals, or that it is below the last of them."""
    return "<0.001" if p < 0.001 else f"{p:.3f}"


def p_equation(p: float) -> str:
    """Return `p = 0.012` or `p < 0.001`."""
    told = p_text(p)
    return f"p < {told[1:]}" if told.startswith("<") else f"p = {told}"


def counted(comparison: Comparison) -> str:
    """Return the numbers of cases and patients in words."""
    cases, patients = len(comparison.cases), len(set(comparison.patients))
    told = f"{cases} {'case' if cases == 1 else 'cases'}"
    return f"{told}." if cases == patients else f"{told} of {patients} {'patient' if patients == 1 else 'patients'}."


def columns_of(comparison: Comparison, key: str) -> dict[str, Contest]:
    """Return the contests of a metric by class; the mean over classes last, where there are several."""
    found = comparison.metrics[key]
    return {**found.classes, MEAN_ROW: found.mean} if len(found.classes) > 1 else dict(found.classes)


def is_worse(contest: Contest, method: str) -> bool:
    """Tell whether the tests say that `method` is worse than the best one."""
    best = contest.best
    return best is not None and any(
        pair.better == best and {pair.first, pair.second} == {best, method} for pair in contest.pairs
    )


def is_best(contest: Contest, method: str) -> bool:
    """Tell whether `method` has rank 1 by its mean, alone or with others."""
    return any(ranking.ranks[method] == 1 for ranking in contest.rankings[:1])


def method_text(score: MethodScore, metric: Metric) -> str:
    """Return `mean ± std [low, high]`."""
    return spread_text(score.mean, score.std, score.low, score.high, metric.digits)


def _cell(contest: Contest, method: str, metric: Metric) -> Cell:
    mark = f" {MARK}" if is_worse(contest, method) else ""
    return Cell(method_text(contest.methods[method], metric) + mark, bold=is_best(contest, method))
