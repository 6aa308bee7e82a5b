from __future__ import annotations

import errno
from pathlib import Path

import pytest
from distributed import btcv, packed, write_image, write_labels

from sagittal.data.catalogue import CATALOGUE
from sagittal.data.convert import conversion as module
from sagittal.data.convert import convert
from sagittal.data.convert.conversion import Conversion, Scan, write_conversion
from sagittal.data.convert.source import open_source
from sagittal.errors import DataError, ResourceError


def left(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_files_of_a_folder_take_no_space_twice_and_are_copied_where_links_are_not_to_be_had(tmp_path, monkeypatch):
    source = btcv(tmp_path)
    convert(CATALOGUE["btcv"], [source], tmp_path / "linked")
    first = source / "Training" / "img" / "img0001.nii.gz"
    assert (tmp_path / "linked" / "imagesTr" / "img0001_0000.nii.gz").samefile(first)

    def refuse(*paths: object) -> None:
        raise OSError(errno.EXDEV, "another disk")

    monkeypatch.setattr(module.os, "link", refuse)
    convert(CATALOGUE["btcv"], [source], tmp_path / "copied")
    copy = tmp_path / "copied" / "imagesTr" / "img0001_0000.nii.gz"
    assert not copy.samefile(first) and copy.read_bytes() == first.read_bytes()


def test_an_empty_folder_is_filled_and_anything_else_is_never_overwritten(tmp_path):
    source, out = btcv(tmp_path), tmp_path / "out"
    out.mkdir()
    convert(CATALOGUE["btcv"], [source], out)
    before = (out / "dataset.json").stat().st_mtime_ns
    (tmp_path / "file").write_bytes(b"mine")
    for taken in (out, tmp_path / "file"):
        with pytest.raises(DataError, match="exists, and is never overwritten") as caught:
            convert(CATALOGUE["btcv"], [source], taken)
        assert caught.value.code == "would_overwrite"
    assert (out / "dataset.json").stat().st_mtime_ns == before and (tmp_path / "file").read_bytes() == b"mine"


def test_a_conversion_that_fails_leaves_nothing(tmp_path, monkeypatch):
    archive = packed(btcv(tmp_path), ".tar.gz")
    before = left(tmp_path)

    def fail(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(module.shutil, "copyfileobj", fail)
    with pytest.raises(ResourceError, match="No space left on device"):
        convert(CATALOGUE["btcv"], [archive], tmp_path / "out")
    assert left(tmp_path) == before


def test_a_torn_archive_leaves_nothing(tmp_path):
    archive = packed(btcv(tmp_path), ".zip")
    content = bytearray(archive.read_bytes())
    middle = content.index(b"img0002.nii.gz") + 200
    content[middle : middle + 50] = b"x" * 50
    archive.write_bytes(content)
    before = left(tmp_path)
    with pytest.raises(DataError, match="archive is damaged"):
        convert(CATALOGUE["btcv"], [archive], tmp_path / "out")
    assert left(tmp_path) == before


def test_mixed_kinds_of_files_are_refused(tmp_path):
    source = btcv(tmp_path)
    write_image(source / "Training" / "img" / "img0009.nii", 9)
    write_labels(source / "Training" / "label" / "label0009.nii", (1,))
    with pytest.raises(DataError, match=r"files end in \.nii, \.nii\.gz\. Expected"):
        convert(CATALOGUE["btcv"], [source], tmp_path / "out")
    nothing = Conversion(("CT",), {"background": 0, "x": 1}, (Scan("a", ("a.mha",), "b.mha"),))
    with open_source([source]) as opened, pytest.raises(DataError, match=r"files end in \.mha"):
        write_conversion(nothing, opened, tmp_path / "out", {}, lambda case: None)


def test_each_case_is_told(tmp_path):
    told: list[str] = []
    convert(CATALOGUE["btcv"], [btcv(tmp_path)], tmp_path / "out", on_case=told.append)
    assert sorted(set(told)) == ["img0001", "img0002", "img0005", "img0021", "img0061"] and len(told) == 9
