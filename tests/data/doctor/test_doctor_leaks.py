from __future__ import annotations

import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from faulty_sets import AFFINE, coded, look, only, write, write_sound_set

from sagittal.data.doctor.leaks import leaks
from sagittal.data.splits import Fold


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_sound_set(tmp_path)


def split(folder: Path, *folds: tuple[str, str]) -> None:
    content = [{"train": list(train), "val": list(validation)} for train, validation in folds]
    (folder / "splits_final.json").write_text(json.dumps(content))


def test_a_patient_on_both_sides_names_the_cases_and_the_fold(folder):
    (folder / "patients.csv").write_text("case,patient\na,P1\nb,P2\nc,P1\n")
    split(folder, ("ac", "b"), ("ab", "c"), ("bc", "a"))
    finding = only(look(folder).warnings)
    assert finding.code == "leak"
    assert finding.message == (
        "patient P1 is in both training and validation: in fold 1 a trains and c validates; "
        "in fold 2 c trains and a validates."
    )
    assert finding.shown_cases == ("c", "a")


def test_patients_kept_together_are_no_leak(folder):
    (folder / "patients.csv").write_text("case,patient\na,P1\nb,P2\nc,P1\n")
    split(folder, ("ac", "b"), ("b", "ac"))
    assert look(folder).warnings == ()


def test_a_copied_image_on_both_sides_is_a_leak(folder):
    image = np.asarray(nib.load(folder / "imagesTr/a_0000.nii.gz").dataobj).T
    write(folder / "imagesTr/b_0000.nii.gz", np.ascontiguousarray(image[:, ::-1]), AFFINE)
    split(folder, ("bc", "a"), ("c", "ab"))
    diagnosis = look(folder)
    assert {finding.code for finding in diagnosis.warnings} == {"duplicate", "leak"}
    assert "turned or mirrored: a channel 0, b channel 0." in only(coded(diagnosis, "duplicate")).message
    message = only(coded(diagnosis, "leak")).message
    assert message == "the same image is in both training and validation: in fold 0 b trains and a validates."


def test_a_case_on_both_sides_of_a_fold_is_a_leak(folder):
    split(folder, ("abc", "c"))
    assert only(look(folder).warnings).message == "fold 0: 1 case in both training and validation (c)."


def test_many_folds_are_told_in_short():
    folds = [Fold(("a",), ("b",))] * 5
    message = only(list(leaks({"a": "P", "b": "P"}, [], folds))).message
    assert message.endswith("in fold 2 a trains and b validates; and in 2 more folds.")


@pytest.mark.parametrize(
    ("name", "text", "code", "told"),
    [
        ("patients.csv", "id,patient\na,P1\n", "patients_file", "case"),
        ("patients.csv", "case,patient\na,P1\nb,P2\n", "patients_file", "lacks cases: 1 (c)"),
        (
            "patients.csv",
            "case,patient\na,1\nb,2\nc,3\nd,4\n",
            "patients_file",
            "the data set lacks: 1 (d)",
        ),
        ("splits_final.json", "{", "splits_file", "no JSON"),
        ("splits_final.json", '[{"train": ["a", "b"], "val": ["c", "x"]}]', "splits_file", "lacks: 1 (x)"),
        (
            "splits_final.json",
            '[{"train": ["a"], "val": ["c"]}]',
            "splits_file",
            "lacks cases: 1 (b)",
        ),
    ],
)
def test_files_that_do_not_fit_are_told(folder, name, text, code, told):
    (folder / name).write_text(text)
    finding = only(look(folder).warnings)
    assert finding.code == code
    assert told in finding.message
