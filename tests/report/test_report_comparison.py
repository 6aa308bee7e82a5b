"""Folders of several methods: what is scored, read, joined, refused; and the page and tables that come of it."""

from __future__ import annotations

import csv
import json
import os
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from sagittal.errors import DataError
from sagittal.evaluation import ClassSet, EvaluationSettings, metrics_of
from sagittal.evaluation.comparison import Comparison, ComparisonSettings
from sagittal.report import comparison as comparison_module
from sagittal.report.comparison import Scoring, compare_folders, name_methods
from sagittal.report.comparison_page import render_comparison, verdict
from sagittal.report.comparison_plots import paired_plots
from sagittal.report.comparison_tables import comparison_tables, methods_table
from sagittal.report.evaluation import evaluate
from sagittal.volumes import Volume

SHAPE = (6, 9, 12)
AFFINE = np.diag([3.0, 0.8, 0.5, 1.0])[[2, 1, 0, 3]]  # (d, h, w) -> (x, y, z): spacing 3.0, 0.8, 0.5 mm
FEW = ComparisonSettings(resamples=200, flips=200, draws=50, simulations=0)
SETTINGS = EvaluationSettings(metrics=("dice", "volume_error_ml", "hd95_mm"))
CASES = ("p", "q", "r", "s")
Folders = dict[str, Path]


def labels(shift: int) -> np.ndarray:
    array = np.zeros(SHAPE, np.uint8)
    array[1:3, 2:4, 2 + shift : 7 + shift] = 1
    array[2:4, 5:8, 1 + shift : 6 + shift] = 2
    return array


def write(path: Path, array: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Volume(array[None], AFFINE).write(path)


@pytest.fixture
def folders(tmp_path: Path) -> Folders:
    """References and three methods that are wrong by none, one and several columns."""
    for number, case in enumerate(CASES):
        write(tmp_path / "set" / "labelsTr" / f"{case}.nii.gz", labels(1))
        for name, shift in {"good": 1, "fair": 2, "poor": 3 + number % 2}.items():
            write(tmp_path / name / f"{case}.nii.gz", labels(shift))
    declared = {"channel_names": {"0": "MR"}, "labels": {"background": 0, "head": 1, "tail": 2}}
    (tmp_path / "set" / "dataset.json").write_text(json.dumps(declared))
    return {name: tmp_path / name for name in ("good", "fair", "poor")}


@pytest.fixture
def references(tmp_path: Path) -> Path:
    return tmp_path / "set"


@pytest.fixture
def scored(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The folders that were scored, as they come."""
    seen: list[str] = []
    own: Callable[..., object] = comparison_module.evaluate

    def watched(predictions: Path, *arguments: object, **options: object) -> object:
        seen.append(predictions.name)
        return own(predictions, *arguments, **options)

    monkeypatch.setattr(comparison_module, "evaluate", watched)
    return seen


def compared(folders: Folders, references: Path, out: Path | None = None, **options: object) -> Comparison:
    options = {"settings": SETTINGS, "statistics": FEW, **options}
    return compare_folders(folders, references, out, **options)  # type: ignore[arg-type]


def record(folder: Path, references: Path, out: Path, **options: object) -> None:
    """Leave a metrics.json in `out`, without the page, which takes longer."""
    evaluate(folder, references, **{"settings": SETTINGS, **options}).write(out / "metrics.json")  # type: ignore[arg-type]


def test_every_method_has_the_scores_of_its_own_evaluation(folders: Folders, references: Path) -> None:
    found = compared(folders, references)
    assert found.methods == ("good", "fair", "poor")
    assert found.cases == CASES
    for name, folder in folders.items():
        own = evaluate(folder, references, settings=SETTINGS)
        assert found.metrics["dice"].mean.methods[name].mean == pytest.approx(own.mean_dice)
        assert found.metrics["hd95_mm"].classes["tail"].methods[name].mean == pytest.approx(
            own.summary.classes["tail"].metrics["hd95_mm"].mean
        )
    assert found.metrics["dice"].mean.best == "good"
    assert not found.failures


def test_files_are_written_and_agree(folders: Folders, references: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    found = compared(folders, references, out)
    names = ["comparison.csv", "comparison.html", "comparison.json", "tables.md", "tables.tex", "values.csv"]
    assert sorted(path.name for path in out.iterdir()) == names
    assert Comparison.read(out / "comparison.json") == found
    assert len(list(csv.DictReader((out / "comparison.csv").read_text().splitlines()))) == 3 * 3 * 3
    assert str(tmp_path) not in (out / "comparison.html").read_text()


def test_a_method_that_lacks_cases_is_refused_before_anything_is_scored(
    folders: Folders, references: Path, scored: list[str]
) -> None:
    (folders["fair"] / "q.nii.gz").unlink()
    with pytest.raises(DataError, match=r"fair lacks 1 of 4 cases: q\..*--missing worst") as caught:
        compared(folders, references)
    assert caught.value.code == "missing_cases"
    assert scored == []


def test_missing_cases_may_count_as_worst(folders: Folders, references: Path) -> None:
    (folders["fair"] / "q.nii.gz").unlink()
    found = compared(folders, references, statistics=FEW.replace(missing="worst"))
    assert found.missing == {"fair": ("q",)}
    assert found.metrics["dice"].values["head"]["fair"][1] == 0.0
    assert found.warnings[0] == "fair lacks 1 of 4 cases: q; counted as the worst result."


def test_cases_that_nobody_predicted_and_predictions_without_reference_are_told(
    folders: Folders, references: Path
) -> None:
    write(references / "labelsTr" / "z.nii.gz", labels(1))
    write(folders["poor"] / "y.nii.gz", labels(1))
    found = compared(folders, references)
    assert found.cases == CASES
    assert "References that no method predicted, left out (1): z." in found.warnings
    assert "poor: predictions without a reference, left out (1): y." in found.warnings


def test_no_common_cases_is_an_error_that_shows_the_names(folders: Folders, references: Path) -> None:
    for path in folders["fair"].iterdir():
        path.rename(path.with_name(f"pred_{path.name}"))
    with pytest.raises(DataError, match=r"no case in common.*references are p, q, r, s.*fair: pred_p") as caught:
        compared(folders, references, statistics=FEW.replace(missing="worst"))
    assert caught.value.code == "no_common_cases"


def test_a_case_that_fails_in_one_method_is_refused_with_its_reason_or_counts_as_worst(
    folders: Folders, references: Path
) -> None:
    write(folders["fair"] / "q.nii.gz", np.zeros((6, 9, 11), np.uint8))
    with pytest.raises(DataError, match=r"fair lacks 1 of 4 cases: q \(q: .*grids differ"):
        compared(folders, references)
    found = compared(folders, references, statistics=FEW.replace(missing="worst"))
    assert [failure.case for failure in found.failures["fair"]] == ["q"]
    assert "grids differ" in render_comparison(found)


def test_an_earlier_evaluation_is_read_where_it_is_what_is_asked_for(
    folders: Folders, references: Path, scored: list[str]
) -> None:
    expected = compared(folders, references)
    scored.clear()
    record(folders["fair"], references, folders["fair"])
    found = compared(folders, references)
    assert scored == ["good", "poor"]
    assert found.notes == ("fair: read from metrics.json, not scored again.",)
    assert found.metrics == expected.metrics
    scored.clear()
    compared(folders, references, scoring=Scoring(reuse=False))
    assert scored == ["good", "fair", "poor"]


def test_an_earlier_evaluation_with_other_settings_or_older_than_its_files_is_not_read(
    folders: Folders, references: Path, scored: list[str]
) -> None:
    record(folders["good"], references, folders["good"], settings=EvaluationSettings(metrics=("dice",)))
    record(folders["fair"], references, folders["fair"])
    later = (folders["fair"] / "metrics.json").stat().st_mtime + 10
    os.utime(folders["fair"] / "p.nii.gz", (later, later))
    assert compared(folders, references).notes == ()
    assert scored == ["good", "fair", "poor"]


def test_results_alone_are_a_method_and_other_settings_of_theirs_an_error(
    folders: Folders, references: Path, tmp_path: Path
) -> None:
    expected = compared(folders, references)
    for name, folder in folders.items():
        record(folder, references, tmp_path / "results" / name)
    results = {name: tmp_path / "results" / name for name in folders}
    found = compared(results, references)
    assert found.metrics == expected.metrics
    assert len(found.notes) == 3
    with pytest.raises(DataError, match="other settings, classes or cases"):
        compared(results, references, settings=EvaluationSettings(metrics=("dice",)))


def test_folds_of_a_run_are_one_method(folders: Folders, references: Path, tmp_path: Path) -> None:
    expected = compared(folders, references)
    run = tmp_path / "run"
    for number, case in enumerate(CASES):
        inner = run / f"fold_{number % 2}" / "validation"
        inner.mkdir(parents=True, exist_ok=True)
        (folders["fair"] / f"{case}.nii.gz").rename(inner / f"{case}.nii.gz")
    joined = compared({**folders, "fair": run}, references)
    assert joined.metrics == expected.metrics
    write(run / "fold_1" / "validation" / "p.nii.gz", labels(1))
    with pytest.raises(DataError, match="p is in fold_0 and in fold_1"):
        compared({**folders, "fair": run}, references)


def test_a_folder_without_predictions_is_told_with_what_was_expected(folders: Folders, references: Path) -> None:
    (folders["good"].parent / "empty").mkdir()
    with pytest.raises(DataError, match=r"no label maps\. Expected files like CASE.nii.gz") as caught:
        compared({**folders, "empty": folders["good"].parent / "empty"}, references)
    assert caught.value.code == "no_predictions"


def test_a_case_without_a_patient_is_refused_before_anything_is_scored(
    folders: Folders, references: Path, scored: list[str]
) -> None:
    with pytest.raises(DataError, match="no patient is given for r, s") as caught:
        compared(folders, references, patients={"p": "x", "q": "x"})
    assert caught.value.code == "bad_patients"
    assert scored == []
    assert compared(folders, references, patients=dict.fromkeys(CASES, "x")).patients == ("x",) * 4


def test_one_folder_is_no_comparison(folders: Folders, references: Path) -> None:
    with pytest.raises(DataError, match="Expected the folders of two or more") as caught:
        compared({"good": folders["good"]}, references)
    assert caught.value.code == "usage"


def test_given_labels_rule_for_all(folders: Folders, references: Path) -> None:
    assert compared(folders, references, labels={"front": 1}).classes.names == ("front",)
    (references / "dataset.json").unlink()
    assert compared(folders, references).classes.names == ("1", "2")


def test_classes_of_results_that_differ_are_refused(folders: Folders, references: Path, tmp_path: Path) -> None:
    for name, wanted in {"good": {"head": 1}, "fair": {"tail": 2}}.items():
        record(folders[name], references, tmp_path / "results" / name, labels=wanted)
    results = {name: tmp_path / "results" / name for name in ("good", "fair")}
    with pytest.raises(DataError, match="the classes differ"):
        compared(results, references)


def test_methods_are_named_by_folder_or_by_names() -> None:
    folders = [Path("x/a"), Path("y/b")]
    assert name_methods(folders) == {"a": Path("x/a"), "b": Path("y/b")}
    assert name_methods(folders, ["one ", "two"]) == {"one": Path("x/a"), "two": Path("y/b")}
    with pytest.raises(DataError, match="two methods are called a"):
        name_methods([Path("x/a"), Path("y/a")])
    with pytest.raises(DataError, match="3 names for 2 folders"):
        name_methods(folders, ["one", "two", "three"])
    with pytest.raises(DataError, match="has no name"):
        name_methods(folders, ["one", ""])


HOSTILE = "<script>alert('x')</script>\"&"
VOID = {"meta", "br", "wbr", "hr", "link", "img"}


class Nesting(HTMLParser):
    """Complains about elements that do not nest; keeps their names and attributes."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self._open: list[str] = []
        self.feed(html)
        self.close()
        assert not self._open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag


@pytest.fixture
def page(folders: Folders, references: Path) -> tuple[Comparison, str]:
    found = compared({f"good {HOSTILE}": folders["good"], "fair": folders["fair"], "poor": folders["poor"]}, references)
    return found, render_comparison(found, references=f"labels {HOSTILE}")


def test_the_page_nests_escapes_and_asks_for_nothing_from_elsewhere(page: tuple[Comparison, str]) -> None:
    html = page[1]
    found = Nesting(html).found
    assert "script" not in {tag for tag, _ in found}
    assert not [value for _, attributes in found for name, value in attributes.items() if name in {"src", "href"}]
    assert "url(" not in html and "http-equiv" in html and "@import" not in html
    assert "default-src 'none'" in html


def test_every_case_is_in_the_plots_and_every_plot_has_a_text(page: tuple[Comparison, str]) -> None:
    comparison, html = page
    dice = metrics_of(SETTINGS)["dice"]
    plots, hidden = paired_plots(comparison, "dice", dice)
    assert hidden == 0
    assert [plot.title for plot in plots] == ["Mean over classes", "head", "tail"]
    for plot in plots:
        assert len(plot.dots) == 4 * 3
        assert len(plot.lines) == 4 * 2
        assert all(0 < dot.y < 230 for dot in plot.dots)
    for case in CASES:
        assert f"{case}, fair: " in html
    figures = [attributes for tag, attributes in Nesting(html).found if tag in {"figure", "svg"}]
    told = [attributes.get("aria-label") for attributes in figures if attributes.get("role") in {"img", "group"}]
    assert len(told) > 6 and all(told)
    unlabelled = [item for item in figures if item.get("role") is None and item.get("aria-hidden") != "true"]
    assert all("x" in item or item.get("class") == "card plot" for item in unlabelled)


def test_the_page_tells_means_tests_ranks_patients_and_definitions(page: tuple[Comparison, str]) -> None:
    comparison, html = page
    mean = comparison.metrics["dice"].mean
    assert f"{mean.methods['fair'].mean:.3f}" in html
    for text in ("Kendall", "rank-biserial", "permutation", "80 % power", "Holm", "Bootstrap samples", "equal within"):
        assert text in html
    for metric in metrics_of(SETTINGS).values():
        assert metric.definition.split(".")[0].replace("'", "&#39;") in html
    assert "With 4 patients" in html


def test_verdict_says_who_is_better_or_that_nobody_is(page: tuple[Comparison, str]) -> None:
    comparison, _ = page
    dice = metrics_of(SETTINGS)["dice"]
    told = " ".join(verdict(comparison, dice, comparison.metrics["dice"].mean))
    # Four patients can't make a test of ranks significant.
    assert "has a better mean than fair" in told and "not significant" in told
    assert "not shown to be equal within 0.005" in told


def test_many_marks_are_cut_down_and_the_rest_counted(
    page: tuple[Comparison, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sagittal.report.comparison_plots.MAX_MARKS", 50)
    plots, hidden = paired_plots(page[0], "dice", metrics_of(SETTINGS)["dice"])
    assert (len(plots), hidden) == (2, 1)


def test_tables_name_the_best_and_have_every_pair(page: tuple[Comparison, str]) -> None:
    comparison, _ = page
    dice = metrics_of(SETTINGS)["dice"]
    table = methods_table(comparison, "dice", dice)
    assert table.header == ("Method", "head", "tail", "Mean over classes")
    assert [cell.bold for cell in table.rows[0]] == [False, True, True, True]
    assert not any(cell.bold for row in table.rows[1:] for cell in row)
    labels_ = [found.label for found in comparison_tables(comparison)]
    assert len(set(labels_)) == len(labels_) == 3 * 2 + 2
    for found in comparison_tables(comparison):
        assert {len(row) for row in found.rows} == {len(found.header)}
    assert re.search(r"\\textbf\{1\.000 ", table.latex())


def test_many_classes_are_rows(folders: Folders, references: Path) -> None:
    many = ClassSet.of_mapping({f"c{number}": [1, 2] if number % 2 else 1 for number in range(7)})
    found = compared(folders, references, labels=many)
    table = methods_table(found, "dice", metrics_of(SETTINGS)["dice"])
    assert table.header == ("Class", "good", "fair", "poor")
    assert len(table.rows) == 8


def test_an_outlier_lies_hollow_at_the_end_of_its_axis_and_presses_no_other_case_together(
    folders: Folders, references: Path
) -> None:
    for number in range(12):
        write(references / "labelsTr" / f"t{number:02}.nii.gz", labels(1))
        for folder in folders.values():
            write(folder / f"t{number:02}.nii.gz", labels(1 + number % 2))
    write(folders["poor"] / "p.nii.gz", np.zeros(SHAPE, np.uint8))
    found = compared(folders, references)
    plots, _ = paired_plots(found, "dice", metrics_of(SETTINGS)["dice"])
    hollow = [dot.title for dot in plots[0].dots if dot.beyond]
    assert hollow == ["p, poor: 0.000"]
    assert plots[0].axis.low > 0.2
