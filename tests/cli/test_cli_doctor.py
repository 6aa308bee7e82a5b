"""`sagittal doctor`: exit codes, the table, JSON, the page and the repaired copy."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from sagittal.cli import run
from sagittal.testing.datasets import write_tiny_dataset
from sagittal.volumes import Volume, read_labels


def _call(*arguments: str | Path) -> int:
    return run([str(argument) for argument in arguments])


def _relabel(dataset: Path, case: str, **values: int) -> None:
    """Turn values of a label map into others; `v1=7` turns 1 into 7."""
    path = dataset / f"labelsTr/{case}.nii.gz"
    labels, grid = read_labels(path)
    changed = labels.astype(np.int32)
    for name, new in values.items():
        changed[labels == int(name[1:])] = new
    Volume.on(grid, changed).write(path)


def test_errors_end_with_one_and_warnings_with_zero(tiny_dataset: Path, capsys: pytest.CaptureFixture[str]) -> None:
    labels, grid = read_labels(tiny_dataset / "labelsTr/case_0.nii.gz")
    Volume.on(grid, labels.astype(np.float32)).write(tiny_dataset / "labelsTr/case_0.nii.gz")
    assert _call("doctor", tiny_dataset) == 0
    assert "float_label" in capsys.readouterr().out
    _relabel(tiny_dataset, "case_1", v1=9)
    assert _call("doctor", tiny_dataset) == 1
    assert "not usable" in capsys.readouterr().out
    assert _call("doctor", tiny_dataset, "--json") == 1
    told = json.loads(capsys.readouterr().out)
    assert set(told) == {"ok", "findings"}
    assert {tuple(sorted(finding)) for finding in told["findings"]} == {("case", "code", "fix", "level", "message")}
    assert told["findings"][0]["code"] == "undeclared_label"


@pytest.mark.parametrize("as_folder", [False, True])
def test_the_page_is_written(
    tiny_dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], as_folder: bool
) -> None:
    (tmp_path / "out").mkdir()
    asked = tmp_path / "out" if as_folder else tmp_path / "out/doctor.html"
    assert _call("doctor", tiny_dataset, "--report", asked) == 0
    assert "report: " in capsys.readouterr().out
    assert (tmp_path / "out/doctor.html").read_text().startswith("<!doctype html>")


def test_with_json_the_page_is_written_and_nothing_else_is_printed(
    tiny_dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _call("doctor", tiny_dataset, "--json", "--report", tmp_path / "page.html") == 0
    assert json.loads(capsys.readouterr().out)["ok"] is True
    assert (tmp_path / "page.html").exists()


def test_a_repair_names_values_and_tells_what_it_did(
    tiny_dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _relabel(tiny_dataset, "case_1", v1=9, v2=-5)
    assert _call("doctor", tiny_dataset, "--fix", tmp_path / "left") == 1
    assert "1 errors could not be repaired: undeclared_label" in capsys.readouterr().out
    named = ["--label", "9=lump", "--label=-5=ignore"]
    assert _call("doctor", tiny_dataset, "--fix", tmp_path / "out", *named) == 0
    told = capsys.readouterr().out
    assert "labelsTr/case_1.nii.gz: values -5 to 3" in told
    assert "label value -5 is 3 in the copy; predictions hold -5 again" in told
    assert _call("doctor", tmp_path / "out", "--json") == 0
    assert json.loads(capsys.readouterr().out)["ok"] is True


def test_a_repair_as_json_holds_the_changes(
    tiny_dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    labels, grid = read_labels(tiny_dataset / "labelsTr/case_0.nii.gz")
    Volume.on(grid, labels.astype(np.float64)).write(tiny_dataset / "labelsTr/case_0.nii.gz")
    assert _call("doctor", tiny_dataset, "--fix", tmp_path / "out", "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert set(told) == {"ok", "findings", "repair"}
    changes = told["repair"]["changes"]
    assert changes == [{"case": "case_0", "file": "labelsTr/case_0.nii.gz", "what": "float64 to uint8"}]


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--label", "9=lump"], "Expected --fix OUT"),
        (["--label", "lump", "--fix", "OUT"], "VALUE=NAME"),
        (["--label", "x=lump", "--fix", "OUT"], "VALUE=NAME"),
        (["--fix", "."], "not empty"),
    ],
)
def test_options_that_make_no_sense_are_told(
    tiny_dataset: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    options: list[str],
    told: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert _call("doctor", tiny_dataset, *options) == 1
    assert told in capsys.readouterr().err


def _cells(shown: str, column: int) -> str:
    """Return the text of a table's column, put together from its lines."""
    return "".join(line.split("│")[column].strip() for line in shown.splitlines() if line.startswith("│"))


def test_a_long_path_is_broken_into_lines_and_not_cut(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    dataset = write_tiny_dataset(tmp_path / "a_folder_whose_name_alone_is_wider_than_its_column", cases=2)
    broken = dataset / "imagesTr/case_1_0000.nii.gz"
    broken.write_bytes(b"no scan")
    assert _call("doctor", dataset) == 1
    assert "case_1_0000.nii.gz" in _cells(capsys.readouterr().out, 4)
