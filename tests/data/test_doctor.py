from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from sagittal.data.dataset import read_dataset
from sagittal.data.doctor import Diagnosis, Finding, diagnose
from sagittal.volumes import Volume

SHAPE = (6, 7, 8)
AFFINE = np.array([[0.0, 0, 0.8, -10], [0, 0.8, 0, -20], [2.5, 0, 0, 30], [0, 0, 0, 1]])


def an_image(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(100.0, 20.0, SHAPE).astype(np.float32)


def a_label_map() -> np.ndarray:
    labels = np.zeros(SHAPE, dtype=np.uint8)
    labels[1:3, 2:5, 3:6] = 1
    labels[3, 3, 3] = 2
    return labels


def write(path: Path, array: np.ndarray, affine: np.ndarray = AFFINE) -> None:
    Volume(array[None], affine).write(path)


@pytest.fixture
def folder(tmp_path) -> Path:
    """Three sound cases of two channels."""
    content = {
        "channel_names": {"0": "T1", "1": "FLAIR"},
        "labels": {"background": 0, "tumour": 1, "cyst": 2},
        "numTraining": 3,
        "file_ending": ".nii.gz",
    }
    (tmp_path / "dataset.json").write_text(json.dumps(content))
    for number, case in enumerate(("a", "b", "c")):
        for channel in range(2):
            write(tmp_path / f"imagesTr/{case}_{channel:04d}.nii.gz", an_image(10 * number + channel))
        write(tmp_path / f"labelsTr/{case}.nii.gz", a_label_map())
    return tmp_path


def look(folder: Path, workers: int = 2) -> Diagnosis:
    return diagnose(read_dataset(folder), workers=workers)


def only(findings: tuple[Finding, ...]) -> Finding:
    (finding,) = findings
    return finding


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
    (warn_scales, {"intensity_scale"}, "far from it are 1 cases (b)"),
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
    start = time.monotonic()
    diagnosis = look(shared_data / "hippocampus")
    assert time.monotonic() - start < 30
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
