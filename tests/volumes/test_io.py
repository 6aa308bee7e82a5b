from __future__ import annotations

import numpy as np
import pytest

from sagittal.errors import DataError
from sagittal.volumes import Volume, read_labels, read_volume
from sagittal.volumes.io import FORMATS, Format, known_suffix, read_stored, write_voxels


@pytest.mark.parametrize("read", [read_volume, read_labels, read_stored])
def test_missing_files_folders_and_unknown_formats_are_named(tmp_path, read):
    with pytest.raises(DataError, match="no such file"):
        read(tmp_path / "absent.nii.gz")
    with pytest.raises(DataError, match="a folder"):
        read(tmp_path)
    (tmp_path / "scan.nni").write_bytes(b"x")
    with pytest.raises(DataError, match=r"'.nni' can't be read.*Did you mean '.nii'"):
        read(tmp_path / "scan.nni")
    (tmp_path / "scan.dcm").write_bytes(b"x")
    with pytest.raises(DataError, match=r"'.dcm' can't be read.*Known: .nii, .nii.gz"):
        read(tmp_path / "scan.dcm")


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

    monkeypatch.setitem(FORMATS, ".nii", Format(refuse, None))
    with pytest.raises(DataError, match="do not fit into memory"):
        read_volume(path)


def test_writing_an_unknown_or_read_only_format_is_refused(tmp_path, monkeypatch):
    volume = Volume(np.zeros((1, 2, 3, 4)), np.eye(4))
    with pytest.raises(DataError, match=r"'.npz' can't be written"):
        volume.write(tmp_path / "scan.npz")
    monkeypatch.setitem(FORMATS, ".ro", Format(FORMATS[".nii"].read, None))
    with pytest.raises(DataError, match=r"read only. Expected .nii, .nii.gz"):
        volume.write(tmp_path / "scan.ro")
    assert list(tmp_path.iterdir()) == []


def test_voxels_must_fit_their_grid(tmp_path):
    volume = Volume(np.zeros((1, 2, 3, 4)), np.eye(4))
    with pytest.raises(DataError, match="do not fit their grid"):
        write_voxels(tmp_path / "scan.nii", volume.array[0, 1:], volume.geometry)


@pytest.mark.parametrize(
    ("name", "suffix"),
    [("a.nii", ".nii"), ("a.b.NII.GZ", ".nii.gz"), ("a.nii.gz", ".nii.gz"), ("a.gz", None), ("nii", None)],
)
def test_the_longest_known_suffix_counts_in_any_case(name, suffix):
    assert known_suffix(name) == suffix


def test_folders_are_made_where_a_file_is_written(tmp_path):
    path = Volume(np.zeros((1, 2, 3, 4)), np.eye(4)).write(tmp_path / "new" / "folder" / "scan.nii.gz")
    assert read_volume(path).array.shape == (1, 2, 3, 4)
