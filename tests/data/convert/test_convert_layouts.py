"""Every layout, from folders and from archives that a test makes: what becomes of each file, and what is declared."""

from __future__ import annotations

import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from distributed import BUILDERS, acdc, brain_tumours, btcv, msd, packed, write_image, write_labels

from sagittal.data.catalogue import CATALOGUE
from sagittal.data.convert import LAYOUTS, convert
from sagittal.data.convert.source import open_source
from sagittal.data.dataset import Dataset, read_dataset
from sagittal.data.split_files import read_patients, read_splits
from sagittal.errors import DataError
from sagittal.plan import DatasetSpec
from sagittal.volumes import read_labels, read_volume

TRAINING = {
    "msd-task01": ("BRATS_001", "BRATS_002", "BRATS_003"),
    "msd-task04": ("hippocampus_001", "hippocampus_002", "hippocampus_003"),
    "acdc": ("patient001_frame01", "patient001_frame10", "patient002_frame01", "patient002_frame11"),
    "btcv": ("img0001", "img0002", "img0005", "img0021"),
    "amos22": ("amos_0001", "amos_0004", "amos_0500"),
    "amos22-mr": ("amos_0507", "amos_0600"),
    "kits19": ("case_00000", "case_00001", "case_00209"),
    "kits23": ("case_00000", "case_00001", "case_00209"),
    "brats2021": ("BraTS2021_00000", "BraTS2021_00002"),
    "lits": ("volume-0", "volume-1", "volume-130", "volume-28"),
}
TESTING = {
    "msd-task01": {"BRATS_900"},
    "msd-task04": {"hippocampus_900"},
    "acdc": {"patient101_frame01", "patient101_frame11"},
    "btcv": {"img0061"},
    "amos22": {"amos_0008"},
    "amos22-mr": {"amos_0508"},
    "kits19": {"case_00210"},
    "kits23": set(),
    "brats2021": {"BraTS2021_00003"},
    "lits": {"test-volume-0"},
}
CHANNELS = {
    "msd-task01": ("FLAIR", "T1w", "t1gd", "T2w"),
    "msd-task04": ("MRI",),
    "acdc": ("MR",),
    "amos22-mr": ("MR",),
    "brats2021": ("T1", "T1ce", "T2", "FLAIR"),
}
LABELLED_TESTS = {"acdc", "amos22", "amos22-mr"}


def converted(name: str, source: Path, out: Path, **options: object) -> Dataset:
    convert(CATALOGUE[name], [source], out, **options)  # type: ignore[arg-type]
    return read_dataset(out)


def labels_of(spec: DatasetSpec) -> dict[str, tuple[int, ...]]:
    return {label.name: label.values for label in spec.labels}


def files(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("name", BUILDERS)
def test_a_set_becomes_nnunet_s_layout_from_a_folder_and_from_every_archive(name, tmp_path):
    source = BUILDERS[name](tmp_path)
    data = converted(name, source, tmp_path / "out")
    assert tuple(case.id for case in data.cases) == TRAINING[name]
    assert data.declared_cases == len(data.cases) and data.unused == ()
    spec = data.spec
    assert spec.name == name
    assert spec.channel_names == CHANNELS.get(name, ("CT",))
    for case in data.cases:
        assert case.labels is not None and all(image.is_file() for image in case.images)
        labels, _ = read_labels(case.labels)
        assert set(np.unique(labels)) == {0, *spec.foreground_values}
        assert read_volume(case.images[-1]).array.shape == (1, *labels.shape)
    number, ending = len(spec.channel_names) - 1, spec.file_ending
    tests = {path.name for path in (tmp_path / "out").glob(f"imagesTs/*_{number:04d}{ending}")}
    assert tests == {f"{case}_{number:04d}{ending}" for case in TESTING[name]}
    with_labels = {path.name for path in (tmp_path / "out").glob("labelsTs/*")}
    assert with_labels == ({f"{case}{ending}" for case in TESTING[name]} if name in LABELLED_TESTS else set())
    declared = json.loads((tmp_path / "out" / "dataset.json").read_text())
    assert declared["licence"] == CATALOGUE[name].licence and CATALOGUE[name].address in declared["reference"]
    whole = files(tmp_path / "out")
    for suffix in (".zip", ".tar.gz", ".tar"):
        convert(CATALOGUE[name], [packed(source, suffix)], tmp_path / f"out{suffix}")
        assert files(tmp_path / f"out{suffix}") == whole, suffix


@pytest.mark.parametrize("name", ["msd-task04", "btcv", "lits", "brats2021"])
def test_files_that_need_no_change_are_taken_over_byte_for_byte(name, tmp_path):
    source = BUILDERS[name](tmp_path)
    stored = {content for path, content in files(source).items() if ".nii" in path}
    data = converted(name, source, tmp_path / "out")
    for case in data.cases:
        assert {path.read_bytes() for path in (*case.images, case.labels) if path is not None} <= stored


def test_the_channels_of_one_file_become_one_file_each(tmp_path):
    source = brain_tumours(tmp_path)
    data = converted("msd-task01", source, tmp_path / "out")
    before = nib.load(source / "imagesTr" / "BRATS_002.nii.gz")
    for channel, path in enumerate(data.cases[1].images):
        loaded = nib.load(path)
        assert np.array_equal(np.asanyarray(loaded.dataobj), np.asanyarray(before.dataobj)[..., channel])
        assert np.array_equal(loaded.affine, before.affine)


def test_a_single_modality_that_is_stored_as_channels_is_told(tmp_path):
    source = brain_tumours(tmp_path)
    write_image(source / "imagesTr" / "BRATS_002.nii.gz", 0, channels=3)
    for given, named in ((source, str(source)), (packed(source, ".zip"), "Task01_BrainTumour/imagesTr")):
        with pytest.raises(DataError, match=r"then 4 channels") as caught:
            convert(CATALOGUE["msd-task01"], [given], tmp_path / "out")
        assert named in caught.value.message
        assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".out*"))


def test_labels_and_regions_are_those_of_the_challenges(tmp_path):
    spec = converted("acdc", BUILDERS["acdc"](tmp_path), tmp_path / "a").spec
    assert labels_of(spec) == {"right ventricle": (1,), "myocardium": (2,), "left ventricle": (3,)}
    spec = converted("brats2021", BUILDERS["brats2021"](tmp_path), tmp_path / "b").spec
    assert labels_of(spec) == {"whole tumour": (1, 2, 4), "tumour core": (1, 4), "enhancing tumour": (4,)}
    assert spec.regions_class_order == (2, 1, 4)
    spec = converted("kits23", BUILDERS["kits23"](tmp_path), tmp_path / "c").spec
    assert labels_of(spec) == {"kidney and masses": (1, 2, 3), "masses": (2, 3), "tumour": (2,)}
    assert spec.regions_class_order == (1, 3, 2)
    spec = converted("btcv", BUILDERS["btcv"](tmp_path), tmp_path / "d").spec
    assert [label.name for label in spec.labels][7:11] == [
        "aorta", "inferior vena cava", "portal vein and splenic vein", "pancreas",
    ]  # fmt: skip


def test_two_frames_of_a_patient_are_listed_as_such(tmp_path):
    converted("acdc", acdc(tmp_path), tmp_path / "out")
    patients = read_patients(tmp_path / "out" / "patients.csv")
    assert patients == {case: case[:10] for case in TRAINING["acdc"]}
    assert not (tmp_path / "out" / "splits_final.json").exists()


def test_nnformer_s_split_of_btcv_is_18_cases_against_12(tmp_path):
    cases = (*range(1, 11), *range(21, 41))
    source = btcv(tmp_path, cases)
    made = convert(CATALOGUE["btcv"], [source], tmp_path / "out", protocol="nnformer")
    assert (made.training, made.testing) == (30, 1)
    assert len(made.notes) == 1 and "twelve cases" in made.notes[0]
    (fold,) = read_splits(tmp_path / "out" / "splits_final.json")
    assert len(fold.train) == 18
    assert [int(case[3:]) for case in fold.validation] == [1, 2, 3, 4, 8, 22, 25, 29, 32, 35, 36, 38]
    assert json.loads((tmp_path / "out" / "dataset.json").read_text())["name"] == "btcv-nnformer"


def test_nnformer_s_split_of_acdc_is_70_10_and_20_patients(tmp_path):
    made = convert(CATALOGUE["acdc"], [acdc(tmp_path, range(1, 101))], tmp_path / "out", protocol="nnformer")
    assert (made.training, made.testing) == (160, 40)
    assert made.notes == (
        "nnFormer's split; its 20 test patients are in imagesTs, the challenge's own 50 are left out",
    )
    (fold,) = read_splits(tmp_path / "out" / "splits_final.json")
    assert (len(fold.train), len(fold.validation)) == (140, 20)
    assert sorted({case[:10] for case in fold.validation})[:3] == ["patient089", "patient090", "patient091"]
    assert (tmp_path / "out" / "labelsTs" / "patient002_frame01.nii.gz").is_file()
    assert len(read_patients(tmp_path / "out" / "patients.csv")) == 160


def test_nnformer_s_split_of_the_brain_tumours_is_387_73_and_24_cases_in_regions(tmp_path):
    with open_source([brain_tumours(tmp_path, 484)]) as source:
        made = LAYOUTS["msd"](source, "msd-task01", "nnformer")
    assert (len(made.training), len(made.testing)) == (460, 24)
    (fold,) = made.splits
    assert (len(fold.train), len(fold.validation)) == (387, 73)
    assert {"BRATS_011", "BRATS_397"} <= set(fold.validation) and "BRATS_484" in fold.train
    assert made.labels == {"background": 0, "whole tumour": [1, 2, 3], "tumour core": [2, 3], "enhancing tumour": 3}
    assert made.regions_class_order == (1, 2, 3)


@pytest.mark.parametrize("name", ["btcv", "acdc", "msd-task01"])
def test_a_split_of_cases_that_are_not_there_is_refused(name, tmp_path):
    with pytest.raises(DataError, match="more cases: not there, but in nnFormer's split") as caught:
        convert(CATALOGUE[name], [BUILDERS[name](tmp_path)], tmp_path / "out", protocol="nnformer")
    assert caught.value.code == "incomplete" and not (tmp_path / "out").exists()


def test_a_protocol_that_a_set_lacks_is_refused(tmp_path):
    with pytest.raises(DataError, match="--protocol nnformer: kits19 has none"):
        convert(CATALOGUE["kits19"], [tmp_path], tmp_path / "out", protocol="nnformer")


def test_what_is_missing_is_told_and_a_smaller_set_is_noted(tmp_path):
    source = btcv(tmp_path)
    made = convert(CATALOGUE["btcv"], [source], tmp_path / "whole")
    assert made.notes == ("4 labelled cases were there; as published the set has 30",)
    (source / "Training" / "label" / "label0002.nii.gz").unlink()
    (source / "Training" / "img" / "img0005.nii.gz").unlink()
    with pytest.raises(DataError, match="img0002 and 1 more cases: the label map is missing"):
        convert(CATALOGUE["btcv"], [source], tmp_path / "out")
    source = BUILDERS["brats2021"](tmp_path)
    (source / "BraTS2021_00002" / "BraTS2021_00002_t2.nii.gz").unlink()
    with pytest.raises(DataError, match="BraTS2021_00002_t2 is missing"):
        convert(CATALOGUE["brats2021"], [source], tmp_path / "out")


@pytest.mark.parametrize("name", sorted({*BUILDERS} - {"msd-task01", "msd-task04"}))
def test_another_data_set_is_refused(name, tmp_path):
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "readme.txt").write_text("no data set")
    with pytest.raises(DataError, match=r"no case found|no CASE_seg"):
        convert(CATALOGUE[name], [tmp_path / "notes"], tmp_path / "out")


def test_another_task_or_a_damaged_declaration_is_refused(tmp_path):
    source = msd(tmp_path)
    for given in (source, source.parent, packed(source, ".tar"), packed(source / "imagesTr", ".zip")):
        with pytest.raises(DataError, match=r"holds (task 04|0 files dataset.json)\. Expected task 09"):
            convert(CATALOGUE["msd-task09"], [given], tmp_path / "out")
    declared = json.loads((source / "dataset.json").read_text())
    for changes, message in (
        ({"modality": None}, "not the dataset.json of a Decathlon task"),
        ({"labels": {"zero": "x"}}, "not the dataset.json of a Decathlon task"),
        ({"labels": {"1": "x"}}, "no background"),
        ({"training": []}, "declares no training case"),
        ({"training": [{"image": "../x.nii.gz", "label": "y.nii.gz"}]}, "missing, but .*dataset.json lists it"),
    ):
        (source / "dataset.json").write_text(json.dumps({**declared, **changes}))
        with pytest.raises(DataError, match=message):
            convert(CATALOGUE["msd-task04"], [source], tmp_path / "out")
    for text, message in (("{", "not valid JSON"), (b"\xff\xfe", "not a text file")):
        (source / "dataset.json").write_bytes(text if isinstance(text, bytes) else text.encode())
        with pytest.raises(DataError, match=message):
            convert(CATALOGUE["msd-task04"], [source], tmp_path / "out")
    (source / "dataset.json").unlink()
    with pytest.raises(DataError, match=r"holds 0 files dataset\.json\. Expected task 04"):
        convert(CATALOGUE["msd-task04"], [source], tmp_path / "out")


def test_parts_of_a_set_are_taken_together_and_a_case_in_two_of_them_is_refused(tmp_path):
    lits = BUILDERS["lits"](tmp_path)
    parts = [packed(lits / f"Training Batch {number}", ".zip") for number in (1, 2)]
    made = convert(CATALOGUE["lits"], parts, tmp_path / "out")
    assert (made.training, made.testing) == (4, 0)
    write_image(lits / "again" / "volume-0.nii", 0)
    write_labels(lits / "again" / "segmentation-0.nii", (1,))
    with pytest.raises(DataError, match="the same case as"):
        convert(CATALOGUE["lits"], [lits], tmp_path / "other")
    with pytest.raises(DataError, match="in two of the sources"):
        convert(CATALOGUE["lits"], [parts[0], parts[0]], tmp_path / "other")


def test_every_layout_is_tested():
    assert {CATALOGUE[name].layout for name in BUILDERS} == set(LAYOUTS)
