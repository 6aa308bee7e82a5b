from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from faulty_sets import (
    AFFINE,
    SHAPE,
    a_label_map,
    an_image,
    coded,
    declare,
    look,
    only,
    write,
    write_case,
    write_sound_set,
)

from sagittal.data.dataset import read_dataset
from sagittal.data.doctor import diagnose
from sagittal.data.doctor.repair import open_repairable
from sagittal.errors import DataError
from sagittal.volumes import read_volume


@pytest.fixture
def folder(tmp_path) -> Path:
    """Three sound cases of two channels."""
    return write_sound_set(tmp_path)


def test_a_sound_dataset_has_facts_only(folder):
    diagnosis = look(folder)
    assert diagnosis.ok
    assert diagnosis.errors == diagnosis.warnings == ()
    facts = {finding.code: finding.message for finding in diagnosis.findings if finding.code != "label"}
    assert facts == {
        "cases": "3 cases with 2 channels each.",
        "shapes": "voxels along D, H, W: median 6 x 7 x 8, from 6 x 7 x 8 to 6 x 7 x 8.",
        "spacings": "spacing_mm along D, H, W: median 2.5 x 0.8 x 0.8, from 2.5 x 0.8 x 0.8 to 2.5 x 0.8 x 0.8.",
    }
    assert [finding.message for finding in diagnosis.findings if finding.code == "label"] == [
        "label tumour (1): 54 voxels, in 3 cases.",
        "label cyst (2): 3 voxels, in 3 cases.",
    ]


def break_missing_channel(folder: Path) -> None:
    (folder / "imagesTr/b_0001.nii.gz").unlink()


def break_missing_label(folder: Path) -> None:
    (folder / "labelsTr/b.nii.gz").unlink()


def break_truncated(folder: Path) -> None:
    path = folder / "imagesTr/b_0000.nii.gz"
    path.write_bytes(path.read_bytes()[:300])


def break_label_grid(folder: Path) -> None:
    affine = AFFINE.copy()
    affine[:, 1:3] *= 0.8 / 0.78
    write(folder / "labelsTr/b.nii.gz", a_label_map(), affine)


def break_channel_shape(folder: Path) -> None:
    write(folder / "imagesTr/b_0001.nii.gz", an_image(5)[1:])


def break_channel_origin(folder: Path) -> None:
    affine = AFFINE.copy()
    affine[0, 3] += 3.0
    write(folder / "imagesTr/b_0001.nii.gz", an_image(5), affine)


def break_channel_direction(folder: Path) -> None:
    affine = AFFINE.copy()
    affine[0, 2] *= -1
    write(folder / "imagesTr/b_0001.nii.gz", an_image(5), affine)


def break_undeclared(folder: Path) -> None:
    labels = a_label_map().astype(np.int16)
    labels[0, 0, :3] = 7
    labels[0, 1, 0] = -1
    write(folder / "labelsTr/b.nii.gz", labels)


def break_non_integer(folder: Path) -> None:
    write(folder / "labelsTr/b.nii.gz", a_label_map() * np.float32(0.5))


def break_nan(folder: Path) -> None:
    image = an_image(5)
    image[0, 0, :2] = np.nan
    image[0, 1, 0] = np.inf
    write(folder / "imagesTr/b_0001.nii.gz", image)


def break_2d(folder: Path) -> None:
    nib.save(nib.Nifti1Image(an_image()[0].T, np.eye(4)), folder / "imagesTr/b_0000.nii.gz")


def break_4d(folder: Path) -> None:
    nib.save(nib.Nifti1Image(np.zeros((3, 4, 5, 2), np.float32), np.eye(4)), folder / "labelsTr/b.nii.gz")


def break_complex(folder: Path) -> None:
    nib.save(nib.Nifti1Image(an_image().T.astype(np.complex64), np.eye(4)), folder / "imagesTr/b_0000.nii.gz")


def break_slice(folder: Path) -> None:
    for name in ("imagesTr/b_0000", "imagesTr/b_0001"):
        write(folder / f"{name}.nii.gz", an_image(len(name) + ord(name[-1]))[:1])
    write(folder / "labelsTr/b.nii.gz", a_label_map()[2:3])


def break_extra_channel(folder: Path) -> None:
    write(folder / "imagesTr/b_0002.nii.gz", an_image(9))


ERRORS: list[tuple[Callable[[Path], None], str, str]] = [
    (break_missing_channel, "missing_channel", "b: channel 1 (FLAIR) is missing: no file b_0001.nii.gz."),
    (break_missing_label, "missing_label", "b: the label map is missing: no file b.nii.gz."),
    (break_truncated, "unreadable", "truncated"),
    (break_label_grid, "other_grid", "(2.5, 0.8, 0.8) against (2.5, 0.820513, 0.820513), 2.6 % apart, tolerance 0.1 %"),
    (break_channel_shape, "other_grid", "shape (D, H, W) (6, 7, 8) against (5, 7, 8)"),
    (break_channel_origin, "other_grid", "3 mm apart"),
    (break_channel_direction, "other_grid", "axes (D, H, W) SAR against SAL, 180 degrees apart"),
    (break_undeclared, "undeclared_label", "-1 (1 voxels), 7 (3 voxels). Declared are 0, 1, 2."),
    (break_non_integer, "non_integer_label", "18 voxels are not whole numbers (for example 0.5)"),
    (break_nan, "non_finite", "b: channel 1 (FLAIR) has 3 voxels that are NaN or infinite."),
    (break_2d, "not_3d", "a 2D image"),
    (break_4d, "not_3d", "a 4D image"),
    (break_complex, "not_3d", "complex numbers"),
    (break_slice, "not_3d", "a single slice"),
    (break_extra_channel, "undeclared_channel", "b_0002.nii.gz in imagesTr is none of the 2 declared channels"),
]


@pytest.mark.parametrize(("damage", "code", "message"), ERRORS, ids=[damage.__name__ for damage, *_ in ERRORS])
def test_each_error_is_found_and_hides_nothing(folder, damage, code, message):
    damage(folder)
    (folder / "labelsTr/c.nii.gz").unlink()
    diagnosis = look(folder)
    assert not diagnosis.ok
    others = [finding for finding in diagnosis.errors if finding.case != "c"]
    assert {finding.code for finding in others} == {code}
    assert message in others[0].message
    assert others[0].fix
    assert others[0].case == ("" if code == "undeclared_channel" else "b")
    assert [finding.code for finding in diagnosis.errors if finding.case == "c"] == ["missing_label"]
    assert diagnosis.findings[0].level == "error"


def warn_float_label(folder: Path) -> None:
    write(folder / "labelsTr/b.nii.gz", a_label_map().astype(np.float32))


def warn_empty_label(folder: Path) -> None:
    write(folder / "labelsTr/b.nii.gz", np.zeros(SHAPE, dtype=np.uint8))


def warn_constant(folder: Path) -> None:
    for case in "ab":
        write(folder / f"imagesTr/{case}_0001.nii.gz", np.full(SHAPE, 7.0, dtype=np.float32))


def warn_scales(folder: Path) -> None:
    write(folder / "imagesTr/b_0001.nii.gz", an_image(5) * 1000)


def warn_orientation(folder: Path) -> None:
    affine = AFFINE.copy()
    affine[0, 2] *= -1
    for name in ("imagesTr/b_0000", "imagesTr/b_0001", "labelsTr/b"):
        image = nib.load(folder / f"{name}.nii.gz")
        write(folder / f"{name}.nii.gz", np.asarray(image.dataobj).T.copy(), affine)


def warn_no_world(folder: Path) -> None:
    for name in ("imagesTr/b_0000", "imagesTr/b_0001", "labelsTr/b"):
        image = nib.load(folder / f"{name}.nii.gz")
        bare = nib.Nifti1Image(np.asarray(image.dataobj), None)
        bare.header.set_zooms((0.8, 0.8, 2.5))
        nib.save(bare, folder / f"{name}.nii.gz")


def warn_sheared(folder: Path) -> None:
    affine = AFFINE.copy()
    affine[1, 0] = 0.4
    for name in ("imagesTr/b_0000", "imagesTr/b_0001", "labelsTr/b"):
        image = nib.load(folder / f"{name}.nii.gz")
        write(folder / f"{name}.nii.gz", np.asarray(image.dataobj).T.copy(), affine)


def warn_duplicate(folder: Path) -> None:
    image = nib.load(folder / "imagesTr/a_0000.nii.gz")
    write(folder / "imagesTr/b_0000.nii.gz", np.asarray(image.dataobj).T.copy())


def warn_unused(folder: Path) -> None:
    (folder / "labelsTr/notes.txt").write_text("seen")


def warn_count(folder: Path) -> None:
    content = json.loads((folder / "dataset.json").read_text())
    (folder / "dataset.json").write_text(json.dumps({**content, "numTraining": 5}))


WARNINGS: list[tuple[Callable[[Path], None], set[str], str]] = [
    (warn_float_label, {"float_label"}, "b: the label map is stored as float32"),
    (warn_empty_label, {"empty_label"}, "b: the label map is empty: no voxel of tumour, cyst."),
    (warn_constant, {"constant_image"}, "a: channel 1 (FLAIR) is constant: every voxel is 7."),
    (warn_scales, {"intensity_scale"}, "far from it is 1 case (b)"),
    (warn_orientation, {"orientation"}, "SAR 2 (a, c); SAL 1 (b)"),
    (warn_no_world, {"no_world", "orientation"}, "b: channel 0 (T1) says nothing of its orientation"),
    (warn_sheared, {"sheared"}, "b: channel 0 (T1) has a sheared affine"),
    (warn_duplicate, {"duplicate"}, "2 images have the same voxels: a channel 0, b channel 0."),
    (warn_unused, {"unused_file"}, "notes.txt in labelsTr belongs to no case"),
    (warn_count, {"case_count"}, "numTraining 5; 3 cases were found"),
]


@pytest.mark.parametrize(("change", "codes", "message"), WARNINGS, ids=[change.__name__ for change, *_ in WARNINGS])
def test_each_warning_is_found_and_refuses_nothing(folder, change, codes, message):
    change(folder)
    diagnosis = look(folder)
    assert diagnosis.ok, diagnosis.errors
    assert {finding.code for finding in diagnosis.warnings} == codes
    assert message in diagnosis.warnings[0].message
    assert all(finding.fix for finding in diagnosis.warnings)


def test_a_case_without_any_readable_image_does_not_stop_the_others(folder):
    for name in ("imagesTr/a_0000", "imagesTr/a_0001", "labelsTr/a"):
        (folder / f"{name}.nii.gz").write_bytes(b"")
    diagnosis = look(folder)
    assert [(finding.case, finding.code) for finding in diagnosis.errors] == [("a", "unreadable")] * 3
    assert "label tumour (1): 36 voxels, in 2 cases." in {finding.message for finding in diagnosis.findings}


def test_label_maps_without_any_foreground_are_refused_as_training_would(folder):
    for path in (folder / "labelsTr").iterdir():
        write(path, np.zeros(SHAPE, dtype=np.uint8))
    diagnosis = look(folder)
    assert [finding.code for finding in diagnosis.errors] == ["no_foreground"]
    assert "none of 3 label maps has a voxel of tumour, cyst" in diagnosis.errors[0].message


def test_the_ignore_value_is_declared(folder):
    content = json.loads((folder / "dataset.json").read_text())
    labels = {"background": 0, "tumour": 1, "ignore": 2}
    (folder / "dataset.json").write_text(json.dumps({**content, "labels": labels}))
    assert look(folder).ok


def test_the_number_of_workers_changes_nothing(folder):
    break_undeclared(folder)
    warn_duplicate(folder)
    assert look(folder, workers=1) == look(folder, workers=4) == look(folder, workers=0)


def test_json_has_the_agreed_shape(folder):
    break_missing_label(folder)
    text = json.loads(look(folder).to_json())
    assert set(text) == {"ok", "findings"}
    assert text["ok"] is False
    assert text["findings"][0] == {
        "level": "error",
        "code": "missing_label",
        "case": "b",
        "message": "b: the label map is missing: no file b.nii.gz.",
        "fix": "Add the file, or remove the case.",
    }
    assert {finding["level"] for finding in text["findings"]} == {"error", "fact"}


def test_hippocampus_is_usable_with_the_warnings_it_deserves(shared_data):
    start = time.process_time()  # of all its threads, and of no other program's
    diagnosis = look(shared_data / "hippocampus")
    assert time.process_time() - start < 30
    assert diagnosis.ok
    assert [finding.code for finding in diagnosis.warnings] == ["float_label", "float_label", "intensity_scale"]
    assert [finding.case for finding in diagnosis.warnings] == ["hippocampus_003", "hippocampus_243", ""]


def test_a_real_label_on_another_grid_is_told(shared_data, tmp_path):
    for name in ("imagesTr", "labelsTr"):
        (tmp_path / name).mkdir()
    source = shared_data / "hippocampus"
    (tmp_path / "dataset.json").write_bytes((source / "dataset.json").read_bytes())
    image = (source / "imagesTr/hippocampus_282_0000.nii.gz").read_bytes()
    (tmp_path / "imagesTr/hippocampus_281_0000.nii.gz").write_bytes(image)
    label = (shared_data / "odd_files/hippocampus_281_label_from_a_CT.nii.gz").read_bytes()
    (tmp_path / "labelsTr/hippocampus_281.nii.gz").write_bytes(label)
    error = only(look(tmp_path).errors)
    assert error.code == "other_grid"
    assert "against (94, 512, 512)" in error.message
    assert "spacing_mm (1, 1, 1) against (5, 0.734375, 0.734375)" in error.message


def test_ms_lesions_are_usable_and_nothing_is_suspected(shared_data):
    diagnosis = look(shared_data / "ms_lesions")
    assert diagnosis.ok
    assert diagnosis.warnings == ()


ODD = {
    "minimal.nii.gz": (True, {"no_world"}, "says nothing of its orientation"),
    "shear.nii.gz": (True, {"sheared"}, "its axes are not at right angles"),
    "rgb_test_file.nii.gz": (False, {"not_3d"}, "RGB colours"),
    "low_res.nii.gz": (True, set(), ""),
    "FLAIR.nrrd": (True, set(), ""),
    "mha.mha": (True, set(), ""),
    "ras.hdr": (True, set(), ""),
}


@pytest.mark.parametrize("name", ODD)
def test_odd_real_files(shared_data, tmp_path, name):
    ok, codes, told = ODD[name]
    source = shared_data / "odd_files" / name
    ending = "." + name.split(".", 1)[1]
    declare(tmp_path, {"thing": 1}, file_ending=ending)
    (tmp_path / "imagesTr").mkdir()
    (tmp_path / "imagesTr" / f"x_0000{ending}").write_bytes(source.read_bytes())
    if ending == ".hdr":
        (tmp_path / "imagesTr/x_0000.img").write_bytes(source.with_suffix(".img").read_bytes())
    (tmp_path / "labelsTr").mkdir()
    if ok:
        image = read_volume(source)
        labels = np.zeros(image.array.shape, np.uint8)
        labels[0, 1:3, 1:3, 1:3] = 1
        image.with_array(labels).write(tmp_path / "labelsTr" / f"x{ending}")
    diagnosis = look(tmp_path)
    assert diagnosis.ok is ok
    told_codes = {finding.code for finding in (*diagnosis.errors, *diagnosis.warnings)} - {"missing_label"}
    assert told_codes == codes
    assert any(told in finding.message for finding in diagnosis.findings)


def test_scans_in_all_axis_orders_are_one_image_and_one_warning_of_orientation(shared_data, tmp_path):
    declare(tmp_path, {"thing": 1})
    for name in ("RAI", "LPI", "SAL", "ASL"):
        source = shared_data / f"orientations/{name}.nii.gz"
        (tmp_path / "imagesTr").mkdir(exist_ok=True)
        (tmp_path / f"imagesTr/{name}_0000.nii.gz").write_bytes(source.read_bytes())
        image = read_volume(source)
        image.with_array((image.array > image.array.mean()).astype(np.uint8)).write(
            tmp_path / f"labelsTr/{name}.nii.gz"
        )
    diagnosis = look(tmp_path)
    assert diagnosis.ok
    assert {finding.code for finding in diagnosis.warnings} == {"orientation", "duplicate"}
    (same,) = coded(diagnosis, "duplicate")
    assert same.message.startswith("4 images have the same voxels: ")


def test_an_empty_image_is_called_empty(folder):
    write(folder / "imagesTr/a_0000.nii.gz", np.zeros(SHAPE, np.float32))
    assert "a: channel 0 (T1) is empty: every voxel is 0." in only(look(folder).warnings).message


@pytest.mark.parametrize(
    ("order", "wrong"),
    [
        ([2, 1], []),
        (
            [1, 2],
            ["value 1 (whole, core) is predicted as 2 (whole)", "value 2 (whole) is predicted as 1 (whole, core)"],
        ),
        ([2, 9], ["value 1 (whole, core) is predicted as 9 (no region)"]),
    ],
)
def test_an_order_of_regions_that_writes_a_value_into_other_regions_is_told(folder, order, wrong):
    labels = {"background": 0, "whole": [1, 2], "core": 1}
    declare(folder, labels, ("T1", "FLAIR"), regions_class_order=order)
    diagnosis = look(folder)
    assert diagnosis.ok
    assert all(finding.code == "regions_order" for finding in diagnosis.warnings)
    told = [finding.message for finding in diagnosis.warnings]
    assert len(told) == len(wrong) and all(part in line for part, line in zip(wrong, told, strict=True))


def test_a_label_that_no_case_has_is_told(folder):
    for path in (folder / "labelsTr").iterdir():
        write(path, np.minimum(a_label_map(), 1))
    finding = only(look(folder).warnings)
    assert finding.code == "absent_label"
    assert finding.message == "label cyst (2) is declared, and none of 3 label maps has a voxel of it."


def test_headers_that_differ_within_the_tolerances_are_a_fact(folder):
    affine = AFFINE.copy()
    affine[0, 3] += 1e-4
    write(folder / "labelsTr/b.nii.gz", a_label_map(), affine)
    diagnosis = look(folder)
    assert diagnosis.warnings == diagnosis.errors == ()
    assert (
        "in 1 case (b) image and label headers differ within the tolerances"
        in only(coded(diagnosis, "header_noise")).message
    )


def test_a_declared_value_that_no_file_may_hold_is_an_error_and_counts_under_its_stand_in(tmp_path):
    declare(tmp_path, {"tumour": 100000, "other": 1, "ignore": -1})
    labels = np.zeros(SHAPE, np.int32)
    labels[1, 1, 1:4] = 100000
    labels[2, 2, 2], labels[0, 0, 0] = 1, -1
    write_case(tmp_path, "a", labels)
    with pytest.raises(DataError, match="'sagittal doctor --fix' replaces the others"):
        read_dataset(tmp_path)
    dataset, declared = open_repairable(tmp_path)
    assert declared.replaced == {-1: 2, 100000: 3}
    diagnosis = diagnose(dataset, replaced=declared.replaced)
    assert [finding.code for finding in diagnosis.errors] == ["label_value", "label_value"]
    assert "label tumour the value 100000" in diagnosis.errors[1].message
    assert "label tumour (3): 3 voxels, in 1 cases." in {finding.message for finding in diagnosis.findings}
    # A file that holds a stand-in by itself holds an undeclared value.
    labels[3, 3, 3] = 3
    write_case(tmp_path, "a", labels)
    codes = {finding.code for finding in diagnose(dataset, replaced=declared.replaced).errors}
    assert codes == {"label_value", "undeclared_label"}
