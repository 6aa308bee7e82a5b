from __future__ import annotations

import numpy as np
import pytest

from sagittal.errors import DataError
from sagittal.volumes import Volume, read_labels, read_volume
from sagittal.volumes.io import (
    FORMATS,
    is_scan,
    known_suffix,
    read_header,
    read_stored,
    scan_files,
    scan_name,
    write_voxels,
)


@pytest.mark.parametrize("read", [read_volume, read_labels, read_stored])
def test_missing_files_folders_and_unknown_formats_are_named(tmp_path, read):
    with pytest.raises(DataError, match="no such file"):
        read(tmp_path / "absent.nii.gz")
    with pytest.raises(DataError, match="a folder without DICOM files"):
        read(tmp_path)
    (tmp_path / "scan.nni").write_bytes(b"x")
    with pytest.raises(DataError, match=r"'.nni' can't be read.*Did you mean '.nii'"):
        read(tmp_path / "scan.nni")
    (tmp_path / "scan.dcm").write_bytes(b"x")
    (tmp_path / "scan.jpg").write_bytes(b"x")
    with pytest.raises(DataError, match=r"'.jpg' can't be read.*Known: .hdr, .mgh, .mgz, .mha"):
        read(tmp_path / "scan.jpg")


@pytest.mark.parametrize(
    ("name", "advice"),
    [
        ("scan.dcm", "give the folder that holds the series"),
        ("scan.img", "give the .hdr file beside it"),
        ("scan.raw", "give the .mhd or .nhdr file beside it"),
        ("scan.ZRAW", "give the .mhd file beside it"),
    ],
)
def test_half_a_scan_is_refused_with_the_name_of_the_other_half(tmp_path, name, advice):
    (tmp_path / name).write_bytes(b"x")
    with pytest.raises(DataError, match=advice):
        read_volume(tmp_path / name)


def test_a_file_without_permission_is_named(tmp_path, monkeypatch):
    path = tmp_path / "locked.nii"
    path.write_bytes(b"x" * 400)

    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(type(path), "open", refuse)
    with pytest.raises(DataError, match="Permission denied"):
        read_volume(path)


def test_a_scan_larger_than_memory_is_named(tmp_path, monkeypatch):
    path = Volume(np.zeros((1, 2, 3, 4)), np.eye(4)).write(tmp_path / "scan.nii")

    def refuse(_: object) -> None:
        raise MemoryError

    monkeypatch.setitem(FORMATS, ".nii", FORMATS[".nii"]._replace(read=refuse))
    with pytest.raises(DataError, match="do not fit into memory"):
        read_volume(path)


def test_writing_an_unknown_or_read_only_format_is_refused(tmp_path, monkeypatch):
    volume = Volume(np.zeros((1, 2, 3, 4)), np.eye(4))
    with pytest.raises(DataError, match=r"'.npz' can't be written"):
        volume.write(tmp_path / "scan.npz")
    for name in ("series.zip", "slice.dcm"):
        with pytest.raises(DataError, match=r"DICOM is read only. Expected .nii, .nii.gz, .hdr"):
            volume.write(tmp_path / name)
    monkeypatch.setitem(FORMATS, ".ro", FORMATS[".nii"]._replace(write=None))
    with pytest.raises(DataError, match=r"read only. Expected .nii, .nii.gz"):
        volume.write(tmp_path / "scan.ro")
    assert list(tmp_path.iterdir()) == []


def test_voxels_must_fit_their_grid(tmp_path):
    volume = Volume(np.zeros((1, 2, 3, 4)), np.eye(4))
    with pytest.raises(DataError, match="do not fit their grid"):
        write_voxels(tmp_path / "scan.nii", volume.array[0, 1:], volume.geometry)


@pytest.mark.parametrize(
    ("name", "suffix"),
    [
        ("a.nii", ".nii"),
        ("a.b.NII.GZ", ".nii.gz"),
        ("a.nii.gz", ".nii.gz"),
        ("a.gz", None),
        ("nii", None),
        ("a.MHD", ".mhd"),
        ("a.zip", None),
    ],
)
def test_the_longest_known_suffix_counts_in_any_case(name, suffix):
    assert known_suffix(name) == suffix


def test_folders_are_made_where_a_file_is_written(tmp_path):
    path = Volume(np.zeros((1, 2, 3, 4)), np.eye(4)).write(tmp_path / "new" / "folder" / "scan.nii.gz")
    assert read_volume(path).array.shape == (1, 2, 3, 4)


def test_missing_scans_are_named_by_every_reader(tmp_path):
    for read in (read_header, scan_files):
        with pytest.raises(DataError, match="no such file"):
            read(tmp_path / "absent.nii")


def test_names_of_scans_lose_their_suffix_and_folders_lose_nothing(tmp_path):
    (tmp_path / "patient.nii.gz").mkdir()
    names = ("a.b.nii.gz", "a.NRRD", "a.zip", "a.txt")
    assert [scan_name(name) for name in names] == ["a.b", "a", "a", "a.txt"]
    assert scan_name(tmp_path / "patient.nii.gz") == "patient.nii.gz"
    assert [is_scan(name) for name in names] == [True, True, True, False]
    assert not is_scan(tmp_path / "patient.nii.gz")
    path = Volume(np.zeros((1, 2, 3, 4)), np.eye(4)).write(tmp_path / "x.nii")
    assert scan_files(path) == (path,)
