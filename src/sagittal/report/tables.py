"""Tables for papers: one table as Markdown, as LaTeX (booktabs) and its numbers as CSV.

The same cells go into every form, so that a paper's table and the page can't disagree.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sagittal.evaluation import Evaluation, Metric, MetricSummary
from sagittal.plan.base import write_atomically
from sagittal.report.text_table import TextTable

TABLES_MARKDOWN = "tables.md"
TABLES_LATEX = "tables.tex"
SUMMARY_CSV = "summary.csv"
MEAN_ROW = "Mean over classes"
_PREAMBLE = (
    "% Needs \\usepackage[T1]{fontenc} and \\usepackage{booktabs}; for wide tables \\resizebox or a smaller font.\n"
    "% Names in other alphabets than Latin need XeLaTeX or LuaLaTeX with a font that has them.\n"
)
_GROUPS = {
    "overlap": "Overlap",
    "volume": "Volume",
    "surface": "Surface distances",
    "shape": "Shape",
    "lesions": "Lesions",
}
_SPECIAL = {
    "\\": r"\textbackslash{}",
    "&": r"\&",
    "%": r"\%",
    "$": r"\$",
    "#": r"\#",
    "_": r"\_",
    "{": r"\{",
    "}": r"\}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    "±": r"$\pm$",
    "≤": r"$\leq$",
    "≥": r"$\geq$",
    "≈": r"$\approx$",
    "≠": r"$\neq$",
    "−": "$-$",
    "→": r"$\rightarrow$",
    "←": r"$\leftarrow$",
    "∞": r"$\infty$",
    "µ": r"$\mu$",
    "°": r"$^{\circ}$",
    "×": r"$\times$",
    "²": "$^2$",
    "³": "$^3$",
    "†": r"$^{\dagger}$",
    "–": "--",
    "·": r"$\cdot$",
    "\n": " ",
    "\r": " ",
}
_GREEK = {
    "α": "alpha",
    "β": "beta",
    "γ": "gamma",
    "δ": "delta",
    "ε": "epsilon",
    "θ": "theta",
    "κ": "kappa",
    "λ": "lambda",
    "μ": "mu",
    "π": "pi",
    "ρ": "rho",
    "σ": "sigma",
    "τ": "tau",
    "φ": "phi",
    "χ": "chi",
    "ψ": "psi",
    "ω": "omega",
    "Γ": "Gamma",
    "Δ": "Delta",
    "Θ": "Theta",
    "Λ": "Lambda",
    "Σ": "Sigma",
    "Φ": "Phi",
    "Ω": "Omega",
}
_SPECIAL |= {letter: rf"$\{name}$" for letter, name in _GREEK.items()}


@dataclass(frozen=True)
class Cell:
    """A text of a table, and whether it is the best of its kind."""

    text: str
    bold: bool = False


@dataclass(frozen=True)
class PaperTable:
    """A table with its caption; the first column names the rows, the others hold numbers."""

    caption: str
    label: str
    """Letters, digits and hyphens: what LaTeX refers to it by."""
    header: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    notes: tuple[str, ...] = ()
    apart: int = 0
    """Rows at the end that a line sets apart: means."""

    def markdown(self) -> str:
        """Return the caption, the table and the notes, as GitHub reads them."""
        cells = tuple(tuple(_markdown(cell) for cell in row) for row in self.rows)
        header = tuple(escape_markdown(name) for name in self.header)
        table = TextTable(f"**{escape_markdown(self.caption)}**", header, cells, frozenset(header[1:]))
        notes = "".join(f"\n\n{escape_markdown(note)}" for note in self.notes)
        return f"{table.markdown()}{notes}\n"

    def latex(self) -> str:
        """Return a `table` environment with rules of the package booktabs."""
        lines = [" & ".join(_latex(cell) for cell in row) + r" \\" for row in self.rows]
        if 0 < self.apart < len(lines):
            lines.insert(len(lines) - self.apart, r"\midrule")
        return "\n".join(
            [
                r"\begin{table}[htbp]",
                r"\centering",
                rf"\caption{{{escape_latex(' '.join((self.caption, *self.notes)))}}}",
                rf"\label{{tab:{self.label}}}",
                rf"\begin{{tabular}}{{l{'r' * (len(self.header) - 1)}}}",
                r"\toprule",
                " & ".join(escape_latex(name) for name in self.header) + r" \\",
                r"\midrule",
                *lines,
                r"\bottomrule",
                r"\end{tabular}",
                r"\end{table}",
                "",
            ]
        )


def write_tables(out: Path, evaluation: Evaluation) -> tuple[Path, ...]:
    """Write tables.md, tables.tex and summary.csv of an evaluation into `out`; return their paths.

    Raises:
        ResourceError: a file can't be written.
    """
    tables = evaluation_tables(evaluation)
    return (*write_papers(out, tables), write_atomically(out / SUMMARY_CSV, summary_csv(evaluation).encode()))


def write_papers(out: Path, tables: Sequence[PaperTable]) -> tuple[Path, ...]:
    """Write `tables` as tables.md and tables.tex into `out`; return their paths."""
    markdown = "\n".join(table.markdown() for table in tables)
    latex = _PREAMBLE + "\n".join(table.latex() for table in tables)
    return (
        write_atomically(out / TABLES_MARKDOWN, markdown.encode()),
        write_atomically(out / TABLES_LATEX, latex.encode()),
    )


def evaluation_tables(evaluation: Evaluation) -> tuple[PaperTable, ...]:
    """Return one table for each group of metrics: classes as rows, mean ± standard deviation [95 % interval]."""
    groups: dict[str, dict[str, Metric]] = {}
    for key, metric in evaluation.metrics.items():
        groups.setdefault(metric.group, {})[key] = metric
    return tuple(_group_table(evaluation, group, metrics) for group, metrics in groups.items())


def summary_csv(evaluation: Evaluation) -> str:
    """Return one row per class and metric, then the means over classes; undefined values are empty cells."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["class", "metric", "mean", "std", "low", "high", "median", "minimum", "maximum", "n", "undefined"])
    for name, scores in evaluation.summary.classes.items():
        for key, found in scores.metrics.items():
            numbers = [found.mean, found.std, found.low, found.high, found.median, found.minimum, found.maximum]
            cells = ["" if value is None else repr(value) for value in numbers]
            writer.writerow([name, key, *cells, found.n, found.undefined])
    summary = evaluation.summary
    for key in evaluation.metrics:
        values = [summary.mean[key], None, summary.low.get(key), summary.high.get(key), None, None, None]
        writer.writerow(
            [f"({MEAN_ROW.lower()})", key, *("" if value is None else repr(value) for value in values), "", ""]
        )
    return text.getvalue()


def spread_text(mean: float | None, std: float | None, low: float | None, high: float | None, digits: int) -> str:
    """Return `0.853 ± 0.042 [0.840, 0.866]`, without what is None; a dash where there is no mean."""
    if mean is None:
        return "–"
    told = _fixed(mean, digits)
    if std is not None:
        told += f" ± {_fixed(std, digits)}"
    return told if low is None or high is None else f"{told} [{_fixed(low, digits)}, {_fixed(high, digits)}]"


def titled(metric: Metric) -> str:
    """Return a metric's title with its unit: `HD95 (mm)`."""
    return f"{metric.title} ({metric.unit})" if metric.unit else metric.title


def escape_latex(text: str) -> str:
    """Return `text` with every character that LaTeX would read as a command written out; -1 gets a minus sign."""
    escaped = "".join(_SPECIAL.get(character, character) for character in text)
    escaped = re.sub(r"(?<![\w.)\]-])-(?=\d)", "$-$", escaped)
    # A bracket after the end of a row would be read as the row's distance.
    return re.sub(r"^([\[*])", r"{\1}", escaped)


def escape_markdown(text: str) -> str:
    """Return `text` with what Markdown would read as formatting written out."""
    return re.sub(r"([\\`*_\[\]<>])", r"\\\1", text.replace("\n", " ").replace("\r", " "))


def _fixed(value: float, digits: int) -> str:
    # Adding 0.0 takes the sign off a rounded -0.0.
    return f"{round(value, digits) + 0.0:.{digits}f}"


def _markdown(cell: Cell) -> str:
    text = escape_markdown(cell.text)
    return f"**{text}**" if cell.bold else text


def _latex(cell: Cell) -> str:
    text = escape_latex(cell.text)
    return rf"\textbf{{{text}}}" if cell.bold else text


def _group_table(evaluation: Evaluation, group: str, metrics: dict[str, Metric]) -> PaperTable:
    summary = evaluation.summary
    rows = [
        (
            Cell(name),
            *(_cell(scores.metrics[key], metric) for key, metric in metrics.items()),
            _counted(scores.metrics, metrics),
        )
        for name, scores in summary.classes.items()
    ]
    if len(rows) > 1:
        means = (
            spread_text(summary.mean[key], None, summary.low.get(key), summary.high.get(key), metric.digits)
            for key, metric in metrics.items()
        )
        rows.append((Cell(MEAN_ROW), *(Cell(text) for text in means), Cell(str(summary.cases))))
    failed = f" {summary.failed} could not be scored and are in no mean." if summary.failed else ""
    return PaperTable(
        caption=f"{_GROUPS.get(group, group)}: mean ± standard deviation over cases "
        "[95 % interval of the mean by patient].",
        label=f"evaluation-{group}",
        header=("Class", *(titled(metric) for metric in metrics.values()), "n"),
        rows=tuple(rows),
        notes=(f"{summary.cases} cases.{failed}",),
        apart=1 if len(summary.classes) > 1 else 0,
    )


def _cell(found: MetricSummary, metric: Metric) -> Cell:
    return Cell(spread_text(found.mean, found.std, found.low, found.high, metric.digits))


def _counted(scores: dict[str, MetricSummary], metrics: dict[str, Metric]) -> Cell:
    counts = sorted({scores[key].n for key in metrics})
    return Cell(str(counts[0]) if len(counts) == 1 else f"{counts[0]}–{counts[-1]}")
