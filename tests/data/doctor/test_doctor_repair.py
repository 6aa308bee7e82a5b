from __future__ import annotations

import hashlib
import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from faulty_sets import AFFINE, SHAPE, a_label_map, an_image, coded, declare, look, write, write_case, write_sound_set

from sagittal.data.dataset import read_dataset
from sagittal.data.doctor.label_values import declare as declare_values
from sagittal.data.doctor.repair import Repair, repair
from sagittal.errors import DataError
from sagittal.volumes import Volume, read_header, read_labels, read_volume
from sagittal.volumes.geometry import axis_codes


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_sound_set(tmp_path / "set")


def contents(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def what(done: Repair, file: str) -> str:
    return "; ".join(change.what for change in done.changes if change.file == file)


def world_of(path: Path) -> dict[tuple[float, ...], float]:
    """The value at every place in the world."""
    volume = read_volume(path)
    index = np.indices(volume.array.shape[1:]).reshape(3, -1)
    places = (volume.affine[:3, :3] @ index + volume.affine[:3, 3:]).T.round(3) + 0.0
    return dict(zip(map(tuple, places.tolist()), volume.array.ravel().tolist(), strict=True))


def test_a_sound_set_is_copied_bit_for_bit(folder, tmp_path):
    before = contents(folder)
    done = repair(folder, tmp_path / "out", workers=2)
    assert done.changes == ()
    assert done.left.ok
    assert contents(folder) == before
    for name in ("imagesTr/a_0000.nii.gz", "labelsTr/b.nii.gz"):
        one, other = read_volume(folder / name), read_volume(tmp_path / "out" / name)
        np.testing.assert_array_equal(one.array, other.array)
        np.testing.assert_array_equal(one.affine, other.affine)
    assert json.loads((tmp_path / "out/dataset.json").read_text()) == json.loads((folder / "dataset.json").read_text())


def test_everything_is_turned_to_ras_and_stays_where_it_is(folder, tmp_path):
    affine = np.array([[0, -0.8, 0.1, 40], [0.9, 0, 0, -20], [0, 0, -2.5, 30], [0, 0, 0, 1.0]])
    for channel in range(2):
        write(folder / f"imagesTr/b_{channel:04d}.nii.gz", an_image(50 + channel), affine)
    write(folder / "labelsTr/b.nii.gz", a_label_map(), affine)
    assert coded(look(folder), "orientation")
    out = tmp_path / "out"
    done = repair(folder, out)
    assert "to SAR" in what(done, "imagesTr/b_0000.nii.gz")
    assert not coded(look(out), "orientation")
    for name in ("imagesTr/b_0000.nii.gz", "imagesTr/b_0001.nii.gz", "labelsTr/b.nii.gz"):
        assert axis_codes(read_header(out / name).geometry.affine) == "SAR"
        assert world_of(out / name) == world_of(folder / name)


def test_image_and_label_stored_in_different_orders_agree_afterwards(folder, tmp_path):
    volume = Volume(a_label_map()[None, :, :, ::-1].copy(), AFFINE @ np.diag([1.0, 1, -1, 1]))
    shifted = volume.affine.copy()
    shifted[0, 3] += 0.8 * (SHAPE[2] - 1)
    Volume(volume.array, shifted).write(folder / "labelsTr/b.nii.gz")
    assert [finding.code for finding in look(folder).errors] == ["other_grid"]
    done = repair(folder, tmp_path / "out")
    assert done.left.ok
    np.testing.assert_array_equal(read_labels(tmp_path / "out/labelsTr/b.nii.gz")[0], a_label_map())


def test_headers_within_the_tolerances_become_equal_and_others_stay_errors(folder, tmp_path):
    near, far = AFFINE.copy(), AFFINE.copy()
    near[0, 3] += 1e-4
    far[0, 3] += 3
    write(folder / "labelsTr/b.nii.gz", a_label_map(), near)
    write(folder / "labelsTr/c.nii.gz", a_label_map(), far)
    done = repair(folder, tmp_path / "out")
    assert "header made equal to the first channel's, 0.0001 mm away" in what(done, "labelsTr/b.nii.gz")
    assert [(finding.code, finding.case) for finding in done.left.errors] == [("other_grid", "c")]
    assert not coded(done.left, "header_noise")


def test_float_labels_become_integers(folder, tmp_path):
    write(folder / "labelsTr/a.nii.gz", a_label_map().astype(np.float64))
    write(folder / "labelsTr/b.nii.gz", a_label_map().astype(np.float32) * np.float32(1.00001))
    write(folder / "labelsTr/c.nii.gz", a_label_map().astype(np.float32) * np.float32(0.5))
    done = repair(folder, tmp_path / "out")
    assert what(done, "labelsTr/a.nii.gz") == "float64 to uint8"
    assert "values rounded to whole numbers, at most 2e-05 away" in what(done, "labelsTr/b.nii.gz")
    assert [(finding.code, finding.case) for finding in done.left.errors] == [("non_integer_label", "c")]
    assert not coded(done.left, "float_label")
    for case in "ab":
        labels, _ = read_labels(tmp_path / f"out/labelsTr/{case}.nii.gz")
        assert labels.dtype == np.uint8
        np.testing.assert_array_equal(labels, a_label_map())


def test_labels_that_are_not_numbers_are_left_as_they_are(folder, tmp_path):
    labels = a_label_map().astype(np.float32)
    labels[0, 0, 0], labels[0, 0, 1] = np.nan, np.inf
    write(folder / "labelsTr/a.nii.gz", labels)
    done = repair(folder, tmp_path / "out")
    assert what(done, "labelsTr/a.nii.gz") == ""
    assert [finding.code for finding in done.left.errors] == ["non_integer_label"]


def test_values_that_cant_be_declared_are_replaced_and_the_map_is_kept(tmp_path):
    folder, out = tmp_path / "set", tmp_path / "out"
    declare(folder, {"tumour": 100000, "cyst": 7, "ignore": -1}, note="kept")
    labels = np.zeros(SHAPE, np.int32)
    labels[1, 1, 1:4], labels[2, 2, 2], labels[0, 0, 0] = 100000, 7, -1
    write_case(folder, "a", labels)
    done = repair(folder, out)
    content = json.loads((out / "dataset.json").read_text())
    assert content["labels"] == {"background": 0, "tumour": 2, "cyst": 7, "ignore": 1}
    assert content["label_map"] == {"1": -1, "2": 100000} == done.label_map
    assert content["note"] == "kept"
    assert done.left.ok
    spec = read_dataset(out).spec
    assert spec.label_map == ((1, -1), (2, 100000))
    repaired, _ = read_labels(out / "labelsTr/a.nii.gz")
    assert repaired.dtype == np.uint8
    np.testing.assert_array_equal(
        np.select([repaired == 1, repaired == 2], [-1, 100000], repaired.astype(np.int64)), labels
    )
    # A second repair keeps the map.
    again = repair(out, tmp_path / "again")
    assert again.changes == ()
    assert read_dataset(tmp_path / "again").spec == spec.replace(name="again")


def test_a_value_that_some_file_holds_never_stands_for_another(tmp_path):
    folder, out = tmp_path / "set", tmp_path / "out"
    declare(folder, {"tumour": 100000})
    labels = np.zeros(SHAPE, np.int32)
    labels[1, 1, 1] = 1
    write_case(folder, "a", labels)
    labels[1, 1, 1] = 100000
    write_case(folder, "b", labels)
    done = repair(folder, out)
    assert done.label_map == {"2": 100000}
    assert [(finding.code, finding.case) for finding in done.left.errors] == [("undeclared_label", "a")]


def test_undeclared_values_stay_errors_until_they_are_named(folder, tmp_path):
    labels = a_label_map().astype(np.int16)
    labels[0, 0, :3], labels[5, 5, 5] = 7, -2
    write(folder / "labelsTr/b.nii.gz", labels)
    done = repair(folder, tmp_path / "unnamed")
    assert [(finding.code, finding.case) for finding in done.left.errors] == [("undeclared_label", "b")]
    np.testing.assert_array_equal(read_labels(tmp_path / "unnamed/labelsTr/b.nii.gz")[0], labels)
    named = repair(folder, tmp_path / "named", names={7: "lump", -2: "ignore"})
    assert named.left.ok
    assert named.label_map == {"3": -2}
    spec = read_dataset(tmp_path / "named").spec
    assert [label.name for label in spec.labels] == ["tumour", "cyst", "lump"]
    assert spec.ignore_value == 3


@pytest.mark.parametrize(
    ("names", "told"),
    [
        ({7: "cyst"}, "two values would become one"),
        ({-1: "background"}, "two values would become one"),
        ({2: "lump"}, "the value 2 is 'cyst' already"),
    ],
)
def test_names_that_would_merge_values_are_refused(folder, tmp_path, names, told):
    with pytest.raises(DataError, match=told):
        repair(folder, tmp_path / "out", names=names)
    assert not (tmp_path / "out").exists()


def test_regions_keep_their_order_and_take_no_further_names():
    content = {"labels": {"background": 0, "whole": [1, 70000], "core": [70000]}, "regions_class_order": [1, 70000]}
    declared = declare_values(content)
    assert declared.content["labels"] == {"background": 0, "whole": [1, 2], "core": [2]}
    assert declared.content["regions_class_order"] == [1, 2]
    with pytest.raises(DataError, match="the data set has regions"):
        declare_values(content, {9: "edge"})


def test_a_background_that_is_not_zero_is_left_to_the_reader_of_the_declaration():
    assert declare_values({"labels": {"background": -1, "a": 1}}).replaced == {}
    assert declare_values({"labels": "none"}).content == {"labels": "none"}


def test_other_formats_become_nifti(tmp_path):
    folder, out = tmp_path / "set", tmp_path / "out"
    declare(folder, {"tumour": 1, "cyst": 2}, file_ending=".nrrd", overwrite_image_reader_writer="X")
    write(folder / "imagesTr/a_0000.nrrd", an_image())
    write(folder / "labelsTr/a.nrrd", a_label_map())
    done = repair(folder, out)
    assert done.left.ok
    assert what(done, "labelsTr/a.nii.gz") == "a.nrrd converted to .nii.gz"
    assert world_of(out / "imagesTr/a_0000.nii.gz") == world_of(folder / "imagesTr/a_0000.nrrd")
    content = json.loads((out / "dataset.json").read_text())
    assert content["file_ending"] == ".nii.gz"
    assert "overwrite_image_reader_writer" not in content


def test_a_scaled_image_keeps_its_values(folder, tmp_path):
    image = nib.Nifti1Image(np.arange(336, dtype=np.int16).reshape(8, 7, 6), AFFINE[:, [2, 1, 0, 3]])
    image.header.set_slope_inter(0.5, -10)
    path = folder / "imagesTr/a_0000.nii.gz"
    nib.save(image, path)
    expected = read_volume(path).array
    done = repair(folder, tmp_path / "out")
    assert "slope and intercept applied" in what(done, "imagesTr/a_0000.nii.gz")
    np.testing.assert_array_equal(read_volume(tmp_path / "out/imagesTr/a_0000.nii.gz").array, expected)


def bare(path: Path, array: np.ndarray) -> None:
    image = nib.Nifti1Image(array.T, None)
    image.header.set_zooms((0.8, 0.8, 2.5))
    nib.save(image, path)


def test_no_orientation_is_made_up(folder, tmp_path):
    for channel in range(2):
        bare(folder / f"imagesTr/b_{channel:04d}.nii.gz", an_image(60 + channel))
    bare(folder / "labelsTr/b.nii.gz", a_label_map())
    done = repair(folder, tmp_path / "out")
    assert done.left.ok
    assert [finding.case for finding in coded(done.left, "no_world")] == ["b", "b"]
    assert what(done, "imagesTr/b_0000.nii.gz") == ""


def test_nor_when_another_format_is_converted(tmp_path):
    folder, out = tmp_path / "set", tmp_path / "out"
    declare(folder, {"tumour": 1, "cyst": 2}, file_ending=".mha")
    write(folder / "imagesTr/a_0000.mha", an_image(), AFFINE)
    write(folder / "labelsTr/a.mha", a_label_map(), AFFINE)
    for path in (folder / "imagesTr/a_0000.mha", folder / "labelsTr/a.mha"):
        head, rest = path.read_bytes().split(b"TransformMatrix", 1)
        path.write_bytes(head + rest.split(b"\n", 1)[1])
    assert coded(look(folder), "no_world")
    done = repair(folder, out)
    assert done.left.ok
    assert coded(done.left, "no_world")
    np.testing.assert_array_equal(read_labels(out / "labelsTr/a.nii.gz")[0], a_label_map())
    np.testing.assert_allclose(read_header(out / "labelsTr/a.nii.gz").geometry.spacing_mm, (2.5, 0.8, 0.8), rtol=1e-6)


def test_a_label_without_orientation_takes_its_images_when_the_grids_agree(folder, tmp_path):
    bare(folder / "labelsTr/b.nii.gz", a_label_map())
    guess = read_header(folder / "labelsTr/b.nii.gz").geometry.affine
    for channel in range(2):
        write(folder / f"imagesTr/b_{channel:04d}.nii.gz", an_image(70 + channel), guess)
    done = repair(folder, tmp_path / "out")
    assert done.left.ok
    assert "orientation taken from the case's other files" in what(done, "labelsTr/b.nii.gz")
    assert not coded(done.left, "no_world")
    assert not coded(done.left, "orientation")


def test_what_cant_be_read_or_belongs_to_no_case_is_left_out_and_told(folder, tmp_path):
    (folder / "imagesTr/b_0001.nii.gz").write_bytes(b"broken")
    (folder / "labelsTr/notes.txt").write_text("seen")
    done = repair(folder, tmp_path / "out")
    assert what(done, "imagesTr/b_0001.nii.gz").startswith("left out: ")
    assert what(done, "labelsTr/notes.txt") == "left out: it belongs to no case"
    assert [(finding.code, finding.case) for finding in done.left.errors] == [("missing_channel", "b")]


def test_patients_and_splits_come_along(folder, tmp_path):
    (folder / "patients.csv").write_text("case,patient\na,1\nb,2\nc,3\n")
    (folder / "splits_final.json").write_text('[{"train": ["a", "b"], "val": ["c"]}]')
    repair(folder, tmp_path / "out")
    for name in ("patients.csv", "splits_final.json"):
        assert (tmp_path / "out" / name).read_text() == (folder / name).read_text()


@pytest.mark.parametrize("where", ["used", "within", "itself"])
def test_nothing_is_overwritten(folder, tmp_path, where):
    out = {"used": tmp_path / "used", "within": folder / "out", "itself": folder}[where]
    (tmp_path / "used").mkdir()
    (tmp_path / "used/file").write_text("mine")
    before = contents(tmp_path)
    with pytest.raises(DataError, match=r"exists and is not empty|lies within the data set"):
        repair(folder, out)
    assert contents(tmp_path) == before


def test_the_report_tells_every_change_as_json(folder, tmp_path):
    write(folder / "labelsTr/a.nii.gz", a_label_map().astype(np.float32))
    done = repair(folder, tmp_path / "out")
    told = json.loads((tmp_path / "out/repair.json").read_text())
    assert told == json.loads(done.to_json())
    assert set(told) == {"ok", "findings", "repair"}
    changed = {"case": "a", "file": "labelsTr/a.nii.gz", "what": "float32 to uint8"}
    assert told["repair"] == {"label_map": {}, "changes": [changed]}


def test_real_scans_in_four_axis_orders_agree_afterwards(shared_data, tmp_path):
    folder, out = tmp_path / "set", tmp_path / "out"
    declare(folder, {"thing": 1})
    (folder / "imagesTr").mkdir()
    for name in ("RAI", "LPI", "SAL", "ASL"):
        source = shared_data / f"orientations/{name}.nii.gz"
        (folder / f"imagesTr/{name}_0000.nii.gz").write_bytes(source.read_bytes())
        image = read_volume(source)
        image.with_array((image.array > image.array.mean()).astype(np.uint8)).write(folder / f"labelsTr/{name}.nii.gz")
    done = repair(folder, out)
    assert done.left.ok
    assert not coded(done.left, "orientation")
    images = [read_volume(path) for path in sorted((out / "imagesTr").iterdir())]
    for image in images[1:]:
        np.testing.assert_array_equal(image.array, images[0].array)
        np.testing.assert_allclose(image.affine, images[0].affine, atol=1e-4)
