from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sagittal.data.dataset import Case, content_hash, parse_spec, read_dataset
from sagittal.errors import DataError
from sagittal.volumes import Volume

DECLARED: dict[str, Any] = {
    "channel_names": {"0": "T1", "1": "FLAIR"},
    "labels": {"background": 0, "tumour": 2, "oedema": 1},
    "numTraining": 2,
    "file_ending": ".nii.gz",
    "licence": "none of our business",
    "overwrite_image_reader_writer": "SimpleITKIO",
}


def a_dataset(folder: Path, cases: tuple[str, ...] = ("b", "a"), channels: int = 2, **changes: Any) -> Path:
    """A data set of empty files: reading the layout opens no scan."""
    for name in ("imagesTr", "labelsTr"):
        (folder / name).mkdir(parents=True)
    for case in cases:
        for channel in range(channels):
            (folder / "imagesTr" / f"{case}_{channel:04d}.nii.gz").write_bytes(b"x")
        (folder / "labelsTr" / f"{case}.nii.gz").write_bytes(b"y")
    content = {key: value for key, value in {**DECLARED, **changes}.items() if value is not None}
    (folder / "dataset.json").write_text(json.dumps(content))
    return folder


def test_a_dataset_in_nnunet_s_layout(tmp_path):
    dataset = read_dataset(a_dataset(tmp_path / "Dataset001_Heads"))
    folder = tmp_path / "Dataset001_Heads"
    assert dataset.cases == (
        Case(
            "a",
            (folder / "imagesTr/a_0000.nii.gz", folder / "imagesTr/a_0001.nii.gz"),
            folder / "labelsTr/a.nii.gz",
        ),
        Case(
            "b",
            (folder / "imagesTr/b_0000.nii.gz", folder / "imagesTr/b_0001.nii.gz"),
            folder / "labelsTr/b.nii.gz",
        ),
    )
    spec = dataset.spec
    assert spec.name == "Dataset001_Heads"
    assert spec.channel_names == ("T1", "FLAIR")
    assert [(label.name, label.values) for label in spec.labels] == [("oedema", (1,)), ("tumour", (2,))]
    assert spec.ignore_value is None
    assert not spec.has_regions
    assert dataset.declared_cases == 2
    assert dataset.unused == ()


def test_real_datasets(shared_data):
    hippocampus, lesions = read_dataset(shared_data / "hippocampus"), read_dataset(shared_data / "ms_lesions")
    assert len(hippocampus.cases) == hippocampus.declared_cases == 200
    assert hippocampus.spec.name == "Hippocampus"
    assert [len(case.images) for case in lesions.cases] == [4, 4]
    for case in hippocampus.cases + lesions.cases:
        assert all(path.is_file() for path in (*case.images, case.labels))


def test_regions_keep_their_order_and_ignore_is_set_apart(tmp_path):
    labels = {"background": 0, "whole": [1, 3, 2], "core": [2, 3], "enhancing": 3, "ignore": 4}
    spec = read_dataset(a_dataset(tmp_path / "d", labels=labels, regions_class_order=[1, 2, 3])).spec
    assert [(label.name, label.values) for label in spec.labels] == [
        ("whole", (1, 2, 3)),
        ("core", (2, 3)),
        ("enhancing", (3,)),
    ]
    assert spec.regions_class_order == (1, 2, 3)
    assert spec.ignore_value == 4
    assert spec.declared_values == {0, 1, 2, 3, 4}


def test_an_order_without_regions_means_nothing(tmp_path):
    assert read_dataset(a_dataset(tmp_path / "d", regions_class_order=[1, 2])).spec.regions_class_order is None


def test_files_listed_in_dataset_json(tmp_path):
    listed = {
        "x": {"images": ["there/x1.nii.gz", "there/x2.nii.gz"], "label": "there/x_seg.nii.gz"},
        "c": {"images": ["/else/c1.nii.gz", "/else/c2.nii.gz"], "label": "/else/seg.nii.gz"},
    }
    dataset = read_dataset(a_dataset(tmp_path / "d", dataset=listed))
    assert [case.id for case in dataset.cases] == ["c", "x"]
    assert dataset.cases[1].images == (tmp_path / "d/there/x1.nii.gz", tmp_path / "d/there/x2.nii.gz")
    assert dataset.cases[0].labels == Path("/else/seg.nii.gz")


def test_what_is_missing_is_left_to_the_doctor(tmp_path):
    folder = a_dataset(tmp_path / "d")
    (folder / "imagesTr/a_0001.nii.gz").unlink()
    (folder / "labelsTr/b.nii.gz").unlink()
    assert [case.id for case in read_dataset(folder).cases] == ["a", "b"]


def test_files_that_belong_to_no_case_are_kept_apart(tmp_path):
    folder = a_dataset(tmp_path / "d")
    for name in ("imagesTr/a_0002.nii.gz", "imagesTr/notes.txt", "labelsTr/c.txt", "imagesTr/.hidden"):
        (folder / name).write_bytes(b"")
    dataset = read_dataset(folder)
    assert [case.id for case in dataset.cases] == ["a", "b"]
    assert [path.name for path in dataset.unused] == ["a_0002.nii.gz", "notes.txt", "c.txt"]


def test_a_label_map_without_images_is_a_case_whose_images_are_missing(tmp_path):
    folder = a_dataset(tmp_path / "d")
    (folder / "labelsTr/c.nii.gz").write_bytes(b"")
    dataset = read_dataset(folder)
    assert [case.id for case in dataset.cases] == ["a", "b", "c"]
    assert not any(path.exists() for path in dataset.cases[2].images)


def test_images_for_testing_are_left_alone(tmp_path):
    folder = a_dataset(tmp_path / "d")
    (folder / "imagesTs").mkdir()
    (folder / "imagesTs/z_0000.nii.gz").write_bytes(b"")
    assert [case.id for case in read_dataset(folder).cases] == ["a", "b"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"channel_names": None}, "channel_names is missing"),
        ({"channel_names": {}}, "channel_names is {}"),
        ({"channel_names": ["T1"]}, "channel_names is"),
        ({"channel_names": {"0": "T1", "2": "FLAIR"}}, "number the channels"),
        ({"channel_names": {"0": "T1", "1": 7}}, r"channel_names\.1"),
        ({"channel_names": None, "modality": {"0": "T1"}}, 'nnU-Net v1.*rename "modality"'),
        ({"labels": {"0": "background", "1": "tumour"}}, 'nnU-Net v1.*swap "labels"'),
        ({"labels": None}, "labels is missing"),
        ({"labels": {"background": 0}}, "at least one foreground label"),
        ({"labels": {"background": 1, "tumour": 2}}, "background is 1"),
        ({"labels": {"background": 0, "tumour": 0}}, "label 'tumour' is 0"),
        ({"labels": {"background": 0, "tumour": 1.5}}, "label 'tumour' is 1.5"),
        ({"labels": {"background": 0, "tumour": True}}, "label 'tumour' is true"),
        ({"labels": {"background": 0, "tumour": []}}, "label 'tumour' is"),
        ({"labels": {"background": 0, "tumour": 70000}}, "from 1 to 65535"),
        ({"labels": {"background": 0, "a": 1, "b": 1}}, "distinct values"),
        ({"labels": {"background": 0, "a": 1, "ignore": 1}}, "ignore value 1 is also"),
        ({"labels": {"background": 0, "a": [1, 2], "b": 2}}, "need regions_class_order"),
        ({"labels": {"background": 0, "a": [1, 2], "b": 2}, "regions_class_order": [1]}, "1 values for 2 regions"),
        ({"file_ending": None}, "file_ending is missing"),
        ({"file_ending": "nii.gz"}, "Did you mean '.nii.gz'"),
        ({"file_ending": ".png"}, r'file_ending is ".png", which can\'t be read'),
        ({"name": 5}, "name"),
        ({"dataset": []}, '"dataset" is'),
        ({"dataset": {"a": {"images": "a.nii.gz", "label": "b.nii.gz"}}}, "for a"),
        ({"dataset": {"a": {"images": ["a.nii.gz"], "label": "b.nii.gz"}}}, "1 images for a and 2 channel_names"),
    ],
)
def test_a_dataset_json_that_makes_no_sense_is_named(tmp_path, changes, message):
    folder = a_dataset(tmp_path / "d", **changes)
    with pytest.raises(DataError, match=message) as caught:
        read_dataset(folder)
    assert caught.value.message.startswith(str(folder / "dataset.json"))
    assert caught.value.code == "dataset_json"


@pytest.mark.parametrize(
    ("text", "message"), [("{", "not valid JSON"), ("[1]", r"holds \[1\]"), ("\xff", "not valid JSON")]
)
def test_a_dataset_json_that_is_none(tmp_path, text, message):
    folder = a_dataset(tmp_path / "d")
    (folder / "dataset.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(DataError, match=message):
        read_dataset(folder)


def test_missing_and_empty_folders_are_named(tmp_path):
    with pytest.raises(DataError, match="no such folder"):
        read_dataset(tmp_path / "absent")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"dataset.json: no such file"):
        read_dataset(tmp_path / "empty")
    folder = a_dataset(tmp_path / "d")
    shutil.rmtree(folder / "labelsTr")
    with pytest.raises(DataError, match="labelsTr: no such folder"):
        read_dataset(folder)
    (tmp_path / "d2" / "dataset.json").parent.mkdir()
    (tmp_path / "d2" / "dataset.json").mkdir()
    with pytest.raises(DataError, match="can't be read"):
        read_dataset(tmp_path / "d2")


def test_a_folder_without_cases_says_what_it_found(tmp_path):
    folder = a_dataset(tmp_path / "d", cases=())
    with pytest.raises(DataError, match=r"no case \(it is empty\).*imagesTr/CASE_0000.nii.gz"):
        read_dataset(folder)
    (folder / "imagesTr" / "a_0000.nrrd").write_bytes(b"")
    (folder / "imagesTr" / "b.nii.gz").write_bytes(b"")
    with pytest.raises(DataError, match=r"2 files ending in .nii.gz, .nrrd"):
        read_dataset(folder)


def touch(folder: Path, *names: str) -> list[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / name).write_bytes(b"")
    return [folder / name for name in names]


def test_the_content_hash_moves_with_the_content_and_not_with_the_place(tmp_path):
    folder = a_dataset(tmp_path / "d")
    first = content_hash(read_dataset(folder))
    shutil.copytree(folder, tmp_path / "else" / "d")
    assert content_hash(read_dataset(tmp_path / "else" / "d")) == first
    touch(folder / "imagesTs", "z_0000.nii.gz")
    assert content_hash(read_dataset(folder)) == first

    seen = {first}
    (folder / "labelsTr/a.nii.gz").write_bytes(b"z")
    seen.add(content_hash(read_dataset(folder)))
    (folder / "labelsTr/a.nii.gz").unlink()
    seen.add(content_hash(read_dataset(folder)))
    (folder / "labelsTr/a.nii.gz").write_bytes(b"y")
    assert content_hash(read_dataset(folder)) == first
    (folder / "dataset.json").write_text(json.dumps({**DECLARED, "licence": "another"}))
    assert content_hash(read_dataset(folder)) == first
    (folder / "dataset.json").write_text(json.dumps({**DECLARED, "labels": {"background": 0, "tumour": 1}}))
    seen.add(content_hash(read_dataset(folder)))
    assert len(seen) == 4


def test_a_file_that_can_t_be_hashed_is_named(tmp_path, monkeypatch):
    dataset = read_dataset(a_dataset(tmp_path / "d"))

    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(DataError, match=r"a_0000.nii.gz: can't be read \(Permission denied\)"):
        content_hash(dataset)


def test_voxels_beside_their_header_belong_to_the_case_and_to_its_hash(tmp_path):
    folder = a_dataset(tmp_path / "d", cases=())
    (folder / "dataset.json").write_text(json.dumps({**DECLARED, "channel_names": {"0": "CT"}, "file_ending": ".mhd"}))
    scan = Volume(np.zeros((1, 2, 3, 4), np.uint8), np.eye(4))
    scan.write(folder / "imagesTr" / "a_0000.mhd")
    scan.write(folder / "labelsTr" / "a.mhd")
    dataset = read_dataset(folder)
    assert [case.id for case in dataset.cases] == ["a"] and dataset.unused == ()
    before = content_hash(dataset)
    voxels = folder / "imagesTr" / "a_0000.zraw"
    scan.with_array(scan.array + 1).write(folder / "imagesTr" / "a_0000.mhd")
    assert content_hash(read_dataset(folder)) != before
    voxels.unlink()
    assert content_hash(read_dataset(folder)) != before


@pytest.mark.parametrize("ending", [".nii", ".hdr", ".mgz", ".nrrd", ".nhdr", ".mha", ".mhd"])
def test_every_format_may_be_a_data_set_s(ending):
    assert parse_spec({**DECLARED, "file_ending": ending}, "here", "name").file_ending == ending


@pytest.mark.parametrize("ending", [".zip", ".dcm", ".img"])
def test_series_and_halves_are_no_data_set_s_format(ending):
    with pytest.raises(DataError, match="which can't be read"):
        parse_spec({**DECLARED, "file_ending": ending}, "here", "name")


@pytest.mark.parametrize("wrong", [[], 5, {"x": -1}, {"1": "a"}, {"1": -1.5}, {"1": True}])
def test_a_label_map_that_makes_no_sense_is_told(wrong):
    content = {"channel_names": {"0": "MR"}, "labels": {"background": 0, "a": 1}, "file_ending": ".nii.gz"}
    with pytest.raises(DataError, match="label_map"):
        parse_spec({**content, "label_map": wrong}, "dataset.json", "d")
