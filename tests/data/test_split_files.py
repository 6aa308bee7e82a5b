from __future__ import annotations

import json

import pytest

from sagittal.data.dataset import read_dataset
from sagittal.data.split_files import label_sets, read_patients, read_splits, write_splits
from sagittal.data.splits import Fold
from sagittal.errors import DataError
from sagittal.volumes import Volume, read_volume


def test_a_table_of_patients_is_read_with_further_columns_and_spaces(tmp_path):
    path = tmp_path / "patients.csv"
    path.write_text("\ufeffcase, age, patient\na_1, 70, A\n\na_2, 71, A\nb, 50, B\nb, 50, B\n")
    assert read_patients(path) == {"a_1": "A", "a_2": "A", "b": "B"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "columns none. Expected a table 'case,patient'"),
        ("case;patient\na;b\n", "columns case;patient"),
        ("case,patient\na,\n", "line 2 has an empty case or patient"),
        ("case,patient\na\n", "line 2 has an empty case or patient"),
        ("case,patient\na,A\na,B\n", "line 3: a is B here and A above"),
    ],
)
def test_a_wrong_table_of_patients_is_refused(tmp_path, text, message):
    path = tmp_path / "patients.csv"
    path.write_text(text)
    with pytest.raises(DataError, match=message):
        read_patients(path)


def test_nnunet_s_splits_are_read_as_they_are(tmp_path):
    path = tmp_path / "splits_final.json"
    path.write_text(json.dumps([{"train": ["b", "a"], "val": ["c"], "test": ["d"]}, {"train": ["c"], "val": ["b"]}]))
    assert read_splits(path) == (Fold(("b", "a"), ("c",)), Fold(("c",), ("b",)))


def test_folds_are_written_as_nnunet_s_splits(tmp_path):
    folds = (Fold(("a", "b"), ("c",)), Fold(("c",), ("a", "b")))
    assert read_splits(write_splits(tmp_path / "run" / "splits_final.json", folds)) == folds


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "no JSON"),
        ("[]", "a JSON list without entries"),
        ('{"train": [], "val": []}', "a JSON dict"),
        ('[{"train": ["a"]}]', "entry 0 has not the lists 'train' and 'val'"),
        ('[{"train": ["a"], "val": ["b"]}, {"train": ["a"], "val": [1]}]', "entry 1 has not the lists"),
    ],
)
def test_splits_of_another_form_are_refused(tmp_path, text, message):
    path = tmp_path / "splits_final.json"
    path.write_text(text)
    with pytest.raises(DataError, match=message) as caught:
        read_splits(path)
    assert caught.value.code == "bad_splits"


def test_files_that_are_missing_or_no_text_are_refused(tmp_path):
    with pytest.raises(DataError, match="No such file"):
        read_splits(tmp_path / "none.json")
    (tmp_path / "patients.csv").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match="not a text file"):
        read_patients(tmp_path / "patients.csv")


def test_the_labels_of_each_case_are_found(tiny_dataset):
    path = tiny_dataset / "labelsTr" / "case_3.nii.gz"
    volume = read_volume(path)
    Volume((volume.array == 2).astype("uint8") * 2, volume.affine).write(path)
    found = label_sets(read_dataset(tiny_dataset), workers=2)
    assert found.pop("case_3") == {2}
    assert set(map(frozenset, found.values())) == {frozenset({1, 2})} and len(found) == 5
