from __future__ import annotations

from pathlib import Path

import pytest

from sagittal.errors import DataError
from sagittal.report.layout import find_declaration, find_image, match_cases


def touch(*paths: Path) -> None:
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


def test_cases_match_across_endings_and_other_files_are_no_cases(tmp_path: Path) -> None:
    p, r = tmp_path / "p", tmp_path / "r"
    touch(p / "x.1.nii", p / "dataset.json", p / ".x.nii.gz", r / "x.1.nii.gz", r / "notes.txt")
    (r / "folder.nii").mkdir()
    (found,) = match_cases(p, r).cases
    assert (found.case, found.prediction.name, found.reference.name) == ("x.1", "x.1.nii", "x.1.nii.gz")


def test_two_files_of_one_case_are_refused(tmp_path: Path) -> None:
    touch(tmp_path / "p" / "x.nii", tmp_path / "p" / "x.nii.gz", tmp_path / "r" / "x.nii")
    with pytest.raises(DataError, match=r"x\.nii and x\.nii\.gz are both case 'x'"):
        match_cases(tmp_path / "p", tmp_path / "r")


def test_empty_and_absent_folders_are_refused(tmp_path: Path) -> None:
    touch(tmp_path / "p" / "x.nii")
    (tmp_path / "r").mkdir()
    with pytest.raises(DataError, match="no label maps"):
        match_cases(tmp_path / "p", tmp_path / "r")
    with pytest.raises(DataError, match="no such file or folder"):
        match_cases(tmp_path / "absent", tmp_path / "p")


def test_many_missing_predictions_are_counted_and_the_first_named(tmp_path: Path) -> None:
    touch(*(tmp_path / "r" / f"{number:02d}.nii" for number in range(30)))
    (tmp_path / "p").mkdir()
    with pytest.raises(DataError, match=r"30 of 30 .* 00, 01, .* 11 and 18 more"):
        match_cases(tmp_path / "p", tmp_path / "r")


@pytest.mark.parametrize(
    ("content", "message"),
    [("{", "not JSON"), ("[]", 'no "labels"'), ('{"labels": [1]}', 'no "labels"'), (b"\xff\xfe{", "not JSON")],
)
def test_declaration_that_makes_no_sense_is_an_error(tmp_path: Path, content: str | bytes, message: str) -> None:
    path = tmp_path / "dataset.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError, match=message):
        find_declaration(tmp_path, tmp_path / "p")


def test_declaration_of_the_references_comes_before_that_of_the_predictions(tmp_path: Path) -> None:
    references, predictions = tmp_path / "set" / "labelsTr", tmp_path / "p"
    touch(references / "x.nii", predictions / "x.nii")
    assert find_declaration(references, predictions) is None
    (predictions / "dataset.json").write_text('{"labels": {"a": 1}}')
    first = find_declaration(references, predictions)
    (tmp_path / "set" / "dataset.json").write_text('{"labels": {"b": 1}, "channel_names": {"0": "CT"}}')
    second = find_declaration(references / "x.nii", predictions)
    assert first is not None
    assert second is not None
    assert (first.labels, first.first_channel) == ({"a": 1}, None)
    assert (second.labels, second.first_channel) == ({"b": 1}, "CT")


def test_first_channel_of_a_scan_is_found(tmp_path: Path) -> None:
    touch(
        tmp_path / "imagesTr" / "x_0000.nii.gz",
        tmp_path / "imagesTr" / "x_0001.nii.gz",
        tmp_path / "labelsTr" / "x.nii",
    )
    other = tmp_path / "other" / "x.nii"
    touch(other)
    assert find_image("x", tmp_path / "labelsTr", None) == tmp_path.resolve() / "imagesTr" / "x_0000.nii.gz"
    assert find_image("x", tmp_path, None) == tmp_path.resolve() / "imagesTr" / "x_0000.nii.gz"
    assert find_image("x", tmp_path / "labelsTr", tmp_path / "other") == other
    assert find_image("y", tmp_path / "labelsTr", None) is None
    assert find_image("x", tmp_path / "imagesTr", None) is None
