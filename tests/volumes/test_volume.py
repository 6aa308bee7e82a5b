from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest
from hypothesis import given, settings

from sagittal.errors import DataError
from sagittal.testing.strategies import volumes
from sagittal.volumes import Volume, read_channels, read_header, read_labels, read_scans, read_volume
from sagittal.volumes.geometry import Reorientation, axis_codes, is_sheared
from sagittal.volumes.volume import require_same_grid

quick = settings(max_examples=30, deadline=None, derandomize=True)


def a_volume(channels: int = 1, dtype=np.float32) -> Volume:
    return Volume(np.arange(channels * 60).reshape(channels, 3, 4, 5).astype(dtype), np.diag([2.0, 3.0, 4.0, 1.0]))


@quick
@given(volumes(channels=2))
def test_reoriented_is_the_same_scan(volume):
    turned = volume.reoriented()
    assert axis_codes(turned.affine) == "SAR"
    assert sorted(turned.array[0].ravel()) == sorted(volume.array[0].ravel())
    assert sorted(turned.spacing_mm) == pytest.approx(sorted(volume.spacing_mm))
    again = turned.reoriented()
    assert again is turned


@quick
@given(volumes(channels=2))
def test_reoriented_keeps_the_place_of_the_brightest_voxel(volume):
    turned = volume.reoriented()
    before = np.unravel_index(volume.array[0].argmax(), volume.array[0].shape)
    after = np.unravel_index(turned.array[0].argmax(), turned.array[0].shape)
    assert np.allclose(volume.affine @ [*before, 1], turned.affine @ [*after, 1])


@settings(max_examples=5, deadline=None, derandomize=True)
@given(volumes(channels=2, oblique=False))
def test_all_48_axis_orders_of_a_volume_are_one_volume(volume):
    home = volume.reoriented()
    orders = list(itertools.product(itertools.permutations(range(3)), itertools.product((True, False), repeat=3)))
    assert len(orders) == 48
    for order, flips in orders:
        stored_as = Reorientation(order, flips)
        shape = home.geometry.shape
        turned = Volume(stored_as.apply(home.array), stored_as.affine(home.affine, shape)).reoriented()
        assert np.array_equal(turned.array, home.array)
        assert np.allclose(turned.affine, home.affine, atol=1e-9)


def test_all_orientations_of_one_real_scan_are_one(shared_data):
    files = sorted((shared_data / "orientations").glob("*.nii.gz"))
    assert len(files) == 24
    scans = [read_volume(path) for path in files]
    assert len({axis_codes(scan.affine) for scan in scans}) == 24
    first = scans[0].reoriented()
    for path, scan in zip(files, scans, strict=True):
        turned = scan.reoriented()
        assert axis_codes(scan.affine) == path.name[:3][::-1]
        assert np.array_equal(turned.array, first.array)
        assert np.allclose(turned.affine, first.affine, atol=1e-5)


ODD = {
    "low_res.nii.gz": (1, 3, 5, 7),
    "minimal.nii.gz": (1, 10, 64, 64),
    "shear.nii.gz": (1, 54, 422, 306),
    "hippocampus_281_label_from_a_CT.nii.gz": (1, 94, 512, 512),
    "rgb_test_file.nii.gz": "RGB colours",
    "FLAIR.nrrd": (1, 140, 160, 124),
    "mha.mha": (1, 37, 64, 64),
    "ras.hdr": (1, 34, 41, 62),
    "ras.img": "the voxels of a pair: give the .hdr file beside it",
}


def test_the_label_on_another_grid_than_its_image_is_told_by_how_much(shared_data):
    path = shared_data / "odd_files" / "hippocampus_281_label_from_a_CT.nii.gz"
    image = read_header(shared_data / "hippocampus" / "imagesTr" / "hippocampus_001_0000.nii.gz")
    with pytest.raises(DataError, match=r"grids differ \(shape .* against .*; spacing_mm .* % apart") as caught:
        require_same_grid(image.geometry, read_labels(path)[1], "image and label")
    assert caught.value.code == "other_grid"


@pytest.mark.parametrize("name", ODD)
def test_odd_real_files(shared_data, name):
    expected = ODD[name]
    path = shared_data / "odd_files" / name
    if isinstance(expected, str):
        with pytest.raises(DataError, match=expected):
            read_volume(path)
    else:
        volume = read_volume(path)
        assert volume.array.shape == expected
        assert volume.geometry.has_world == (name != "minimal.nii.gz")
        assert is_sheared(volume.affine) == (name == "shear.nii.gz")
        header = read_header(path)
        assert header.geometry.shape == expected[1:]
        assert np.array_equal(header.geometry.affine, volume.affine)


def test_real_float_labels_become_integers(shared_data):
    labels, geometry = read_labels(shared_data / "hippocampus" / "labelsTr" / "hippocampus_003.nii.gz")
    assert labels.dtype == np.uint8
    assert set(np.unique(labels)) == {0, 1, 2}
    assert labels.shape == geometry.shape


def test_a_prediction_lies_on_the_grid_of_its_input():
    volume = a_volume(channels=2)
    labels = np.full((3, 4, 5), 300, dtype=np.uint16)
    prediction = volume.with_array(labels)
    assert prediction.array.dtype == np.uint16
    assert prediction.array.shape == (1, 3, 4, 5)
    assert np.array_equal(prediction.affine, volume.affine)
    with pytest.raises(DataError, match=r"on the grid \(3, 4, 5\)"):
        volume.with_array(labels[1:])


@pytest.mark.parametrize(
    ("array", "affine", "message"),
    [
        (np.zeros((3, 4, 5)), np.eye(4), r"Expected \(C, D, H, W\)"),
        (np.zeros((1, 3, 0, 5)), np.eye(4), r"Expected \(C, D, H, W\)"),
        (np.zeros((1, 3, 4, 5)), np.eye(3), "affine"),
        (np.zeros((1, 3, 4, 5)), np.diag([1.0, 0.0, 1.0, 1.0]), "invertible"),
        (np.zeros((1, 3, 4, 5)), np.diag([1.0, np.inf, 1.0, 1.0]), "finite"),
    ],
)
def test_what_is_no_volume_is_refused_at_once(array, affine, message):
    with pytest.raises(DataError, match=message):
        Volume(array, affine)


def test_a_volume_is_frozen_and_its_affine_protected():
    given_affine = np.diag([2.0, 3.0, 4.0, 1.0])
    volume = Volume(np.zeros((1, 2, 3, 4)), given_affine)
    given_affine[0, 0] = 9.0
    assert volume.spacing_mm == (2.0, 3.0, 4.0)
    with pytest.raises(ValueError, match="read-only"):
        volume.affine[0, 0] = 1.0
    with pytest.raises(dataclasses.FrozenInstanceError):
        volume.array = np.zeros((1, 1, 1, 1))


def test_the_text_of_a_volume_says_what_matters():
    assert repr(a_volume()) == "Volume((1, 3, 4, 5) float32, spacing_mm (2, 3, 4), axes RAS)"


def test_several_channels_are_not_written_into_one_file(tmp_path):
    with pytest.raises(DataError, match="2 channels"):
        a_volume(channels=2).write(tmp_path / "two.nii.gz")
    assert list(tmp_path.iterdir()) == []


def test_channels_are_read_from_one_file_each(tmp_path):
    both = a_volume(channels=2)
    paths = [both.with_array(both.array[i]).write(tmp_path / f"case_000{i}.nii.gz") for i in range(2)]
    case = read_channels(paths)
    assert np.array_equal(case.array, both.array)
    assert np.array_equal(case.affine, both.affine)
    assert np.array_equal(read_channels(paths[:1]).array, both.array[:1])
    with pytest.raises(DataError, match="no image files"):
        read_channels([])


def test_channels_on_other_grids_are_refused(tmp_path):
    first = a_volume()
    other = Volume(first.array, np.diag([2.0, 3.0, 4.1, 1.0]))
    paths = [first.write(tmp_path / "a_0000.nii.gz"), other.write(tmp_path / "a_0001.nii.gz")]
    with pytest.raises(DataError, match=r"a_0000.nii.gz and a_0001.nii.gz: grids differ \(spacing_mm .* 2.5 % apart"):
        read_channels(paths)


def test_same_grid_passes():
    require_same_grid(a_volume().geometry, a_volume(dtype=np.uint8).geometry, "image and label")
    with pytest.raises(DataError, match="image and label: grids differ") as caught:
        require_same_grid(a_volume().geometry, Volume(np.zeros((1, 3, 4, 6)), np.eye(4)).geometry, "image and label")
    assert caught.value.code == "other_grid"


def test_the_axis_names_of_all_orders_differ():
    names = set()
    for order, signs in itertools.product(itertools.permutations(range(3)), itertools.product((1, -1), repeat=3)):
        affine = np.eye(4)
        affine[:3, :3] = np.eye(3)[list(order)] * signs
        names.add(axis_codes(affine))
    assert len(names) == 48


@pytest.mark.parametrize(
    ("dtype", "kept"), [(np.int16, np.int16), (np.uint8, np.uint8), (np.int32, np.float32), (np.float64, np.float32)]
)
def test_scans_keep_the_types_that_float32_holds_exactly(tmp_path, dtype, kept):
    array = np.random.default_rng(0).integers(0, 200, (1, 3, 4, 5)).astype(dtype)
    paths = [Volume(array, np.eye(4)).write(tmp_path / f"case_000{channel}.nii.gz") for channel in range(2)]
    scans = read_scans(paths)
    assert [scan.array.dtype for scan in scans] == [kept, kept]
    np.testing.assert_array_equal(scans[1].array, array)
    together = read_channels(paths)
    assert together.array.dtype == np.float32
    np.testing.assert_array_equal(together.array, np.concatenate([array, array]))


def test_scans_on_different_grids_are_refused(tmp_path):
    array = np.zeros((1, 3, 4, 5), np.int16)
    first = Volume(array, np.eye(4)).write(tmp_path / "a.nii.gz")
    second = Volume(array, np.diag([2.0, 1, 1, 1])).write(tmp_path / "b.nii.gz")
    with pytest.raises(DataError, match=r"a\.nii\.gz and b\.nii\.gz: grids differ"):
        read_scans([first, second])
    with pytest.raises(DataError, match="no image files"):
        read_scans([])
