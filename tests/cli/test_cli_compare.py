"""`sagittal compare` as a user types it: what it prints, which code it ends with, and what it leaves behind."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from sagittal.cli import run
from sagittal.evaluation.comparison import Comparison
from sagittal.volumes import Volume

AFFINE = np.diag([3.0, 0.8, 0.5, 1.0])[[2, 1, 0, 3]]


def labels(shift: int) -> np.ndarray:
    array = np.zeros((5, 8, 11), np.uint8)
    array[1:3, 2:6, 1 + shift : 6 + shift] = 1
    return array


def write(path: Path, array: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Volume(array[None], AFFINE).write(path)


@pytest.fixture
def folders(tmp_path: Path) -> list[str]:
    """References `set`, and methods A and B of which A is right."""
    for case in ("p", "q", "r"):
        write(tmp_path / "set" / "labelsTr" / f"{case}.nii.gz", labels(1))
        write(tmp_path / "A" / f"{case}.nii.gz", labels(1))
        write(tmp_path / "B" / f"{case}.nii.gz", labels(2))
    declared = {"channel_names": {"0": "MR"}, "labels": {"background": 0, "head": 1}}
    (tmp_path / "set" / "dataset.json").write_text(json.dumps(declared))
    return [str(tmp_path / "A"), str(tmp_path / "B"), "--reference", str(tmp_path / "set"), "--metrics", "dice,nsd"]


def test_a_comparison_is_printed_and_written(
    folders: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    options = ["--out", str(out), "--names", "ours,theirs", "--tolerance-mm", "1", "--margin", "0.01"]
    assert run(["compare", *folders, *options]) == 0
    shown = capsys.readouterr().out
    assert "ours has a better mean than theirs" in shown and "0.01" in shown
    assert "With 3 patients" in shown and f"report: {out / 'comparison.html'}" in shown
    found = Comparison.read(out / "comparison.json")
    assert found.methods == ("ours", "theirs")
    assert list(found.metrics) == ["dice", "nsd_1mm"]
    assert found.statistics.margin == 0.01


def test_json_is_the_whole_comparison_and_without_out_nothing_is_written(
    folders: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(tmp_path.iterdir())
    assert run(["compare", *folders, "--json"]) == 0
    assert Comparison.from_json(capsys.readouterr().out).methods == ("A", "B")
    assert sorted(tmp_path.iterdir()) == before


def test_patients_and_labels_come_from_files(
    folders: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "patients.csv").write_text("case,patient\np,x\nq,x\nr,y\n")
    (tmp_path / "own.json").write_text(json.dumps({"labels": {"background": 0, "front": 1}}))
    options = ["--patients", str(tmp_path / "patients.csv"), "--labels", str(tmp_path / "own.json"), "--json"]
    assert run(["compare", *folders, *options]) == 0
    found = Comparison.from_json(capsys.readouterr().out)
    assert found.patients == ("x", "x", "y")
    assert found.classes.names == ("front",)


def test_a_case_that_can_not_be_scored_ends_with_one(
    folders: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path / "B" / "q.nii.gz", np.zeros((5, 8, 10), np.uint8))
    assert run(["compare", *folders]) == 1
    assert "B lacks 1 of 3 cases: q" in capsys.readouterr().err
    assert run(["compare", *folders, "--missing", "worst"]) == 1
    assert "failed: B, q: " in capsys.readouterr().out


def test_missing_cases_are_an_error_unless_they_count_as_worst(
    folders: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "B" / "q.nii.gz").unlink()
    assert run(["compare", *folders]) == 1
    assert "--missing worst" in capsys.readouterr().err
    assert run(["compare", *folders, "--missing", "worst"]) == 0
    assert "warning: B lacks 1 of 3 cases: q; counted as the worst result." in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        (["--margin", "0"], "--margin 0"),
        (["--margin", "inf"], "--margin inf"),
        (["--names", "one"], "1 names for 2 folders"),
        (["--names", "one,one"], "two methods are called one"),
        (["--protocol", "nnunett"], "Did you mean 'nnunet'"),
        (["--tolerance-mm", "-1"], "positive"),
    ],
)
def test_what_was_typed_wrongly_ends_with_two(
    folders: list[str], changed: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["compare", *folders, *changed]) == 2
    assert told in capsys.readouterr().err


def test_one_folder_ends_with_two_and_a_missing_one_with_one(
    folders: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["compare", folders[0], "--reference", str(tmp_path / "set")]) == 2
    assert "two or more" in capsys.readouterr().err
    assert run(["compare", folders[0], str(tmp_path / "absent"), "--reference", str(tmp_path / "set")]) == 1
    assert "no such file or folder" in capsys.readouterr().err


def test_errors_are_json_where_json_is_asked_for(folders: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["compare", *folders, "--names", "x,x", "--json"]) == 2
    assert json.loads(capsys.readouterr().out)["error"]["code"] == "usage"
