"""Tables for papers: the numbers in every form, and nothing that LaTeX or Markdown would read as a command."""

from __future__ import annotations

import csv
import io
import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sagittal.errors import ResourceError
from sagittal.evaluation import CaseScore, ClassScore, ClassSet, Evaluation, EvaluationSettings, Failure
from sagittal.report.tables import (
    Cell,
    PaperTable,
    escape_latex,
    escape_markdown,
    evaluation_tables,
    spread_text,
    summary_csv,
    write_tables,
)

CLASSES = ClassSet.of_mapping({"left_kidney & co": 1, "50% *tail*": 2})
SETTINGS = EvaluationSettings(metrics=("dice", "hd95_mm", "volume_error_ml"))


def evaluation(dices: tuple[float, ...] = (0.8, 0.9, 0.7), failed: int = 0) -> Evaluation:
    scores = []
    for number, dice in enumerate(dices):
        classes = {
            name: ClassScore(
                reference_ml=1.0,
                prediction_ml=1.0,
                metrics={"dice": dice - 0.1 * place, "hd95_mm": 3.0, "volume_error_ml": -1.5},
            )
            for place, name in enumerate(CLASSES.names)
        }
        scores.append(CaseScore(case=str(number), shape=(3, 4, 5), spacing_mm=(1.0, 2.0, 3.0), classes=classes))
    failures = [Failure(case=f"f{number}", code="x", message="m") for number in range(failed)]
    return Evaluation.of_cases(CLASSES, scores, settings=SETTINGS, failures=failures)


def test_groups_of_metrics_are_tables_with_mean_spread_interval_and_number() -> None:
    found = evaluation()
    tables = evaluation_tables(found)
    assert [table.label for table in tables] == ["evaluation-overlap", "evaluation-surface", "evaluation-volume"]
    overlap = tables[0]
    assert overlap.header == ("Class", "Dice", "n")
    summary = found.summary.classes["left_kidney & co"].metrics["dice"]
    assert overlap.rows[0][1].text == f"0.800 ± 0.100 [{summary.low:.3f}, {summary.high:.3f}]"
    assert overlap.rows[0][2].text == "3"
    assert overlap.rows[2][0].text == "Mean over classes"
    assert overlap.rows[2][1].text.startswith("0.750 [")
    assert "could not be scored" not in overlap.notes[0]
    assert "2 could not be scored" in evaluation_tables(evaluation(failed=2))[0].notes[0]


def test_files_are_written_and_hold_the_same_numbers(tmp_path: Path) -> None:
    found = evaluation()
    written = write_tables(tmp_path / "out", found)
    assert [path.name for path in written] == ["tables.md", "tables.tex", "summary.csv"]
    markdown, latex, _ = (path.read_text() for path in written)
    for table in evaluation_tables(found):
        for row in table.rows:
            assert escape_markdown(row[1].text) in markdown
            assert escape_latex(row[1].text) in latex
    rows = list(csv.DictReader(io.StringIO(summary_csv(found))))
    assert written[2].read_text() == summary_csv(found)
    assert len(rows) == 3 * 3
    summary = found.summary.classes["50% *tail*"].metrics["dice"]
    told = next(row for row in rows if (row["class"], row["metric"]) == ("50% *tail*", "dice"))
    assert [float(told[key]) for key in ("mean", "std", "low", "high")] == [
        summary.mean,
        summary.std,
        summary.low,
        summary.high,
    ]
    assert float(rows[-3]["mean"]) == found.mean_dice


def test_latex_is_a_booktabs_table_whose_rows_have_as_many_cells_as_the_header() -> None:
    text = evaluation_tables(evaluation())[0].latex()
    assert r"\toprule" in text and r"\bottomrule" in text and text.count(r"\midrule") == 2
    assert text.count(r"\begin{tabular}{lrr}") == text.count(r"\end{tabular}") == 1
    assert r"left\_kidney \& co" in text and r"50\% *tail*" in text and r"95 \% interval" in text
    assert r"0.800 $\pm$ 0.100" in text
    rows = [line for line in text.splitlines() if line.endswith(r"\\")]
    assert {len(re.findall(r"(?<!\\)&", line)) for line in rows} == {2}


def test_markdown_reads_as_a_table_and_no_name_as_formatting() -> None:
    text = evaluation_tables(evaluation())[0].markdown()
    assert r"50% \*tail\*" in text and r"left\_kidney & co" in text
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert {len(re.findall(r"(?<!\\)\|", line)) for line in rows} == {4}


def test_best_is_bold_in_both_forms() -> None:
    table = PaperTable("a_b", "t", ("x", "y|z"), ((Cell("one"), Cell("-0.5 †", bold=True)), (Cell("two"), Cell("–"))))
    assert "**-0.5 †**" in table.markdown() and r"y\|z" in table.markdown()
    assert r"\textbf{$-$0.5 $^{\dagger}$}" in table.latex()
    assert r"\caption{a\_b}" in table.latex() and r"two & -- \\" in table.latex()


def test_a_single_case_has_a_mean_without_spread() -> None:
    assert spread_text(0.5, None, None, None, 2) == "0.50"
    assert spread_text(None, None, None, None, 2) == "–"
    assert spread_text(-0.012, None, -0.02, 0.001, 3) == "-0.012 [-0.020, 0.001]"
    assert spread_text(-0.0001, None, None, None, 3) == "0.000"
    assert evaluation_tables(evaluation((0.5,)))[0].rows[0][1].text == "0.500"


SPECIAL = "\\&%$#_{}~^<>|\n"


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.text(alphabet=SPECIAL + "ab -1", max_size=12))
def test_no_text_is_a_command_of_latex(text: str) -> None:
    escaped = escape_latex(text)
    # Once every command that we write is taken out, nothing that LaTeX treats specially is left.
    known = r"\\(textbackslash|textasciitilde|textasciicircum|textless|textgreater|textbar)\{\}|\\[&%$#_{}]|\$-\$"
    assert not set(re.sub(known, "", escaped)) & set(SPECIAL)


def test_a_folder_that_can_not_be_written_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ResourceError, match="can't be written"):
        write_tables(tmp_path / "file", evaluation())


def test_what_compiled_with_pdflatex_is_written_so() -> None:
    # Compiled once with T1 fonts and booktabs, without an error; a bracket after the end of a row was its distance.
    assert escape_latex("[left] Größe_5% & #1") == r"{[}left] Größe\_5\% \& \#1"
    assert escape_latex("κ ≥ 0.5 × µ") == r"$\kappa$ $\geq$ 0.5 $\times$ $\mu$"
    assert escape_latex("0.5 [0.1, 0.9]") == "0.5 [0.1, 0.9]"
