from __future__ import annotations

import numpy as np
import pytest
from dicom_scans import SECRET, write_enhanced
from dicom_targets import ORIENTATIONS, labels_of, scan_of, whole, world_voxels, written_series

from sagittal.errors import DataError
from sagittal.volumes import Volume, read_volume
from sagittal.volumes.dicom_source import planes_of, read_source


@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_the_source_has_the_readers_grid_and_planes_are_found_by_place(tmp_path, orientation):
    scan = scan_of(orientation)
    series = written_series(tmp_path / "series", scan)
    source, read = read_source(series), read_volume(series)
    assert source.is_even
    assert np.array_equal(source.geometry.affine, read.affine) and source.shape == read.array.shape[1:]
    labels = labels_of(scan)
    planes = planes_of(labels, source)
    assert np.shares_memory(planes, labels.array)
    for value in (1, 2, 5):
        expected = world_voxels(labels.array[0] == value, labels.affine)
        assert np.allclose(world_voxels(planes == value, read.affine), expected, atol=0.02)


def test_another_grid_is_refused_or_resampled_on_request(tmp_path):
    scan = scan_of("oblique", (6, 10, 8))
    source = read_source(written_series(tmp_path / "series", scan))
    coarse = Volume(np.arange(1, 121, dtype=np.uint8).reshape(1, 6, 5, 4), scan.affine @ np.diag([1, 2, 2, 1]))
    coarse = Volume(coarse.array, _moved(coarse.affine, (0, 0.25, 0.25)))
    with pytest.raises(DataError, match=r"lies on another grid than the series \(shape .*--nearest") as caught:
        planes_of(coarse, source, "x.nii.gz")
    assert caught.value.code == "other_grid"
    planes = planes_of(coarse, source, nearest=True)
    twice = coarse.array[0].repeat(2, axis=1).repeat(2, axis=2)
    backwards = source.geometry.affine[:3, 0] @ scan.affine[:3, 0] < 0
    assert np.array_equal(planes[::-1] if backwards else planes, twice)


def test_a_shifted_or_smaller_label_map_is_refused_and_lies_where_it_lay(tmp_path):
    scan = scan_of("axial")
    source = read_source(written_series(tmp_path / "series", scan))
    labels = labels_of(scan)
    with pytest.raises(DataError, match="origin"):
        planes_of(Volume(labels.array, _moved(labels.affine, (1, 0, 0))), source)
    with pytest.raises(DataError, match="shape"):
        planes_of(Volume(labels.array[:, 1:], _moved(labels.affine, (1, 0, 0))), source)
    part = Volume(labels.array[:, 1:], _moved(labels.affine, (1, 0, 0)))
    planes, everything = planes_of(part, source, nearest=True), planes_of(labels, source).copy()
    everything[0 if labels.affine[:3, 0] @ source.geometry.affine[:3, 0] > 0 else -1] = 0
    assert np.array_equal(planes, everything)
    turned = Volume(labels.array, labels.affine @ _rotation(5.0))
    with pytest.raises(DataError, match="direction"):
        planes_of(turned, source)


def test_a_gantry_tilt_and_a_gap_need_the_request(tmp_path):
    scan = scan_of("axial")

    def tilted(data, index):
        position = [float(value) for value in data.ImagePositionPatient]
        data.ImagePositionPatient = [position[0], position[1] + 0.08 + 0.4 * index, position[2]]

    source = read_source(written_series(tmp_path / "tilted", scan, change=tilted))
    assert not source.is_even
    labels = labels_of(scan)
    with pytest.raises(DataError, match=r"no regular grid .*gantry tilt"):
        planes_of(labels, source)
    planes = planes_of(labels, source, nearest=True)
    straight = planes_of(labels, read_source(written_series(tmp_path / "straight", scan)))
    # Each frame lies 0.4 mm further to the back than the one below: half a voxel, 0.6 voxels with the start.
    for index, (plane, before) in enumerate(zip(planes, straight, strict=True)):
        rows = np.floor(np.arange(11) + (0.08 + 0.4 * index) / 0.8 + 0.5).astype(int)
        expected = np.zeros_like(plane)
        expected[rows < 11] = before[rows[rows < 11]]
        assert np.array_equal(plane, expected)


def test_a_label_map_must_be_one_channel_of_integers_with_a_place(tmp_path):
    scan = scan_of("axial")
    source = read_source(written_series(tmp_path / "series", scan))
    with pytest.raises(DataError, match="1 channels of float32"):
        planes_of(scan.with_array(scan.array.astype(np.float32)), source)
    nowhere = scan.write(tmp_path / "nowhere.nii")
    content = bytearray(nowhere.read_bytes())
    content[252:256] = bytes(4)  # qform_code and sform_code
    nowhere.write_bytes(content)
    read = read_volume(nowhere)
    with pytest.raises(DataError, match="says nothing of where it lies"):
        planes_of(read.with_array(read.array.astype(np.int16)), source)


@pytest.mark.parametrize("name", ["StudyInstanceUID", "FrameOfReferenceUID"])
def test_what_can_not_be_referred_to_is_refused(tmp_path, name):
    def without(data, index):
        if index == 2:
            del data[name]

    series = written_series(tmp_path / "series", scan_of("axial"), change=without)
    with pytest.raises(DataError, match=f"1 of 6 files have no {name}") as caught:
        read_source(series)
    assert caught.value.code == "not_referable" and SECRET not in caught.value.message

    def other(data, index):
        if index == 2:
            data[name].value = "1.2.3"

    series = written_series(tmp_path / "other", scan_of("axial"), change=other)
    with pytest.raises(DataError, match=f"2 values of {name}"):
        read_source(series)


def test_frames_of_one_file_keep_their_numbers(tmp_path):
    scan = scan_of("oblique")
    source = read_source(write_enhanced(tmp_path / "scan.dcm", scan, change=lambda data: whole(data, 0)))
    assert sorted(frame.number or 0 for frame in source.frames) == [1, 2, 3, 4, 5, 6]
    assert [len(frames) for frames in source.instances.values()] == [6]
    assert all(frame.number is None for frame in read_source(written_series(tmp_path / "single", scan)).frames)


def test_a_source_keeps_the_patient_to_itself(tmp_path):
    assert SECRET not in repr(read_source(written_series(tmp_path / "series", scan_of("axial"))))


def _moved(affine: np.ndarray, voxels: tuple[float, float, float]) -> np.ndarray:
    moved = affine.copy()
    moved[:3, 3] += affine[:3, :3] @ voxels
    return moved


def _rotation(degrees: float) -> np.ndarray:
    angle = np.radians(degrees)
    matrix = np.eye(4)
    matrix[1:3, 1:3] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
    return matrix
