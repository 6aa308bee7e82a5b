from __future__ import annotations

import gzip
import struct

import nibabel as nib
import numpy as np
import pytest
from other_libraries import REVERSED, nibabel_values
from reader_contract import PackedContract, WriterContract, a_scan

from sagittal.errors import DataError
from sagittal.volumes import read_volume


class Mgh:
    dtypes = (np.uint8, np.int16, np.uint16, np.int32, np.float32)
    tolerance_mm = 1e-3

    def oracle_read(self, path):
        # nibabel leaves the file open when it opens it itself.
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".mgz" else path.read_bytes()
        return nibabel_values(nib.MGHImage.from_bytes(content))

    def oracle_write(self, path, voxels, affine):
        nib.save(nib.MGHImage(voxels.T, affine @ REVERSED), path)
        return path

    def odd_scans(self, folder):
        path = folder / f"series{self.suffix}"
        nib.save(nib.MGHImage(np.zeros((5, 4, 3, 2), np.int16), np.eye(4)), path)
        return {"series": (path, "4D image of 5 x 4 x 3 x 2")}


class TestMgh(Mgh, WriterContract):
    suffix = ".mgh"


class TestMgz(Mgh, PackedContract):
    suffix = ".mgz"


def patched(path, at, value):
    content = bytearray(path.read_bytes())
    content[at : at + len(value)] = value
    path.write_bytes(content)
    return path


@pytest.mark.parametrize(
    ("at", "value", "cause"),
    [
        (0, struct.pack(">i", 2), "does not begin with an MGH header"),
        (4, struct.pack(">i", 0), "an axis without voxels, sizes 0 x 5 x 3 x 1"),
        (4, struct.pack(">i", -3), "an axis without voxels"),
        (20, struct.pack(">i", 7), "unknown type 7"),
        (30, struct.pack(">f", 0.0), "affine is not usable"),
        (30, struct.pack(">f", float("nan")), "affine is not usable"),
        (4, struct.pack(">iii", 30000, 30000, 30000), "it is truncated"),
    ],
)
def test_headers_that_make_no_sense_are_refused(tmp_path, at, value, cause):
    path = patched(a_scan().write(tmp_path / "scan.mgh"), at, value)
    with pytest.raises(DataError, match=cause) as caught:
        read_volume(path)
    assert caught.value.code == "unreadable"


def test_without_axes_of_its_own_a_file_gets_freesurfer_s_and_says_so(tmp_path):
    path = patched(a_scan().write(tmp_path / "scan.mgh"), 28, b"\0\0")
    volume = read_volume(path)
    assert not volume.geometry.has_world
    assert volume.spacing_mm == (1.0, 1.0, 1.0)
    assert np.array_equal(volume.array, a_scan().array)


def test_what_freesurfer_writes_behind_the_voxels_is_left_alone(tmp_path):
    path = a_scan().write(tmp_path / "scan.mgh")
    path.write_bytes(path.read_bytes() + b"mri_convert /home/somebody/scan.mgh")
    assert np.array_equal(read_volume(path).array, a_scan().array)
