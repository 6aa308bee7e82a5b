from __future__ import annotations

import zipfile

import numpy as np
import pytest
from dicom_scans import write_series
from reader_contract import a_scan

from sagittal.errors import DataError
from sagittal.volumes import dicom_files, read_volume
from sagittal.volumes.dicom_files import holds_dicom, is_archive, members


def packed(path, entries: dict[str, bytes], method=zipfile.ZIP_DEFLATED):
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, content in entries.items():
            archive.writestr(zipfile.ZipInfo(name) if method == zipfile.ZIP_STORED else name, content)
    return path


def a_slice(tmp_path) -> bytes:
    folder = write_series(tmp_path / "slices", a_scan())
    return next(folder.iterdir()).read_bytes()


def refuse(path, message: str, code: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        read_volume(path)
    assert caught.value.code == code
    assert caught.value.message.startswith(f"{path}: ")


@pytest.mark.parametrize("name", ["../evil", "/etc/evil", "a/../../evil", "C:\\evil", "..\\evil", "\\\\host\\evil"])
def test_names_that_lead_out_of_the_archive_are_refused(tmp_path, name):
    path = packed(tmp_path / "scan.zip", {"good": a_slice(tmp_path), name: b"x"})
    refuse(path, "named so that it leads out of it", "unsafe_archive")
    assert not (tmp_path.parent / "evil").exists()


def test_archives_that_unpack_to_too_much_are_refused_before_they_are_read(tmp_path, monkeypatch):
    path = packed(tmp_path / "scan.zip", {"zeros": b"\0" * 200_000, "more": b"\0" * 200_000})
    assert path.stat().st_size < 2000
    monkeypatch.setattr(dicom_files, "MAX_UNPACKED_BYTES", 300_000)
    refuse(path, "2 files of 0.0 GiB unpacked. Expected at most", "archive_too_large")
    monkeypatch.undo()
    monkeypatch.setattr(dicom_files, "MAX_FILES", 1)
    refuse(path, "2 files .* Expected at most 1 of 16 GiB", "archive_too_large")


def test_archives_of_other_methods_or_with_a_password_are_refused(tmp_path):
    refuse(packed(tmp_path / "b.zip", {"x": a_slice(tmp_path)}, zipfile.ZIP_BZIP2), "other than deflate", "unreadable")
    path = packed(tmp_path / "p.zip", {"x": a_slice(tmp_path)}, zipfile.ZIP_STORED)
    content = bytearray(path.read_bytes())
    content[content.index(b"PK\x01\x02") + 8] |= 1
    path.write_bytes(content)
    refuse(path, "encrypted", "unreadable")


def test_damaged_archives_are_refused(tmp_path):
    path = tmp_path / "scan.zip"
    path.write_bytes(b"no zip at all")
    refuse(path, "the archive is damaged", "unreadable")
    content = packed(path, {"1": a_slice(tmp_path)}, zipfile.ZIP_STORED).read_bytes()
    flipped = bytearray(content)
    flipped[content.index(b"SECRET")] ^= 4
    path.write_bytes(flipped)
    refuse(path, "the archive is damaged: Bad CRC-32", "unreadable")


def test_an_archive_without_slices_is_refused(tmp_path):
    refuse(packed(tmp_path / "scan.zip", {"notes.txt": b"x"}), "no DICOM file in it", "unreadable")
    refuse(packed(tmp_path / "empty.zip", {}), "no DICOM file in it", "unreadable")


def test_members_are_dicom_files_only_sorted_by_name(tmp_path):
    folder = write_series(tmp_path / "scan", a_scan())
    (folder / "sub").mkdir()
    (folder / "000_1.dcm").rename(folder / "sub" / "000_1.dcm")
    (folder / "Thumbs.db").write_bytes(b"x" * 400)
    with members(folder) as found:
        assert [member.name for member in found] == ["001_1.dcm", "002_1.dcm", "sub/000_1.dcm"]
    assert holds_dicom(folder)
    assert not holds_dicom(folder / "001_1.dcm")


def test_a_folder_may_be_called_like_an_archive(tmp_path):
    folder = write_series(tmp_path / "scan.zip", a_scan())
    assert is_archive(folder)
    assert np.array_equal(read_volume(folder).array, a_scan().array)


def test_nothing_is_unpacked_onto_the_disk(tmp_path, monkeypatch):
    folder = write_series(tmp_path / "scan", a_scan())
    path = packed(tmp_path / "scan2.zip", {file.name: file.read_bytes() for file in folder.iterdir()})

    def refuse_to(*_: object, **__: object) -> None:
        raise AssertionError("an archive was unpacked")

    monkeypatch.setattr(zipfile.ZipFile, "extract", refuse_to)
    monkeypatch.setattr(zipfile.ZipFile, "extractall", refuse_to)
    monkeypatch.setattr("tempfile.mkstemp", refuse_to)
    assert np.array_equal(read_volume(path).array, a_scan().array)
