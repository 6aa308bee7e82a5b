from __future__ import annotations

import numpy as np
import pytest
from other_libraries import itk_odd_scans, itk_read, itk_write
from reader_contract import INTEGERS, PackedContract, a_scan

from sagittal.errors import DataError
from sagittal.volumes import Volume, read_header, read_volume
from sagittal.volumes.io import scan_files


class MetaImage(PackedContract):
    dtypes = (*INTEGERS, np.float32, np.float64)
    tolerance_mm = 1e-9

    def oracle_read(self, path):
        return itk_read(path)

    def oracle_write(self, path, voxels, affine):
        return itk_write(path, voxels, affine)

    def odd_scans(self, folder):
        return itk_odd_scans(folder, self.suffix)


class TestMha(MetaImage):
    suffix = ".mha"


class TestMhd(MetaImage):
    suffix = ".mhd"


def lines(**changed: str | None) -> bytes:
    """Return the header of 4 x 3 x 2 int16 voxels with some lines changed or left out."""
    fields: dict[str, str | None] = {
        "ObjectType": "Image",
        "NDims": "3",
        "BinaryData": "True",
        "TransformMatrix": "1 0 0 0 1 0 0 0 1",
        "Offset": "5 6 7",
        "ElementSpacing": "1 2 3",
        "DimSize": "4 3 2",
        "ElementType": "MET_SHORT",
        **changed,
        "ElementDataFile": changed.get("ElementDataFile", "LOCAL"),
    }
    return "".join(f"{key} = {value}\n" for key, value in fields.items() if value is not None).encode()


VOXELS = np.arange(24, dtype=np.int16).reshape(2, 3, 4)


def read(tmp_path, head: bytes, voxels: bytes = VOXELS.tobytes()) -> Volume:
    path = tmp_path / "scan.mha"
    path.write_bytes(head + voxels)
    return read_volume(path)


def test_lps_becomes_ras_by_hand(tmp_path):
    volume = read(tmp_path, lines())
    assert np.array_equal(volume.affine, [[0, 0, -1, -5], [0, -2, 0, -6], [3, 0, 0, 7], [0, 0, 0, 1]])
    assert np.array_equal(volume.array[0], VOXELS)


@pytest.mark.parametrize("packed", [True, False])
def test_itk_writes_it_packed_or_not(tmp_path, packed):
    path = itk_write(tmp_path / "scan.mha", a_scan().array[0], a_scan().affine, packed)
    assert np.array_equal(read_volume(path).array, a_scan().array)


def test_older_names_of_the_same_fields(tmp_path):
    head = lines(TransformMatrix=None, Rotation="1 0 0 0 1 0 0 0 1", Offset=None, Position="5 6 7")
    volume = read(tmp_path, head)
    assert np.array_equal(volume.affine, read(tmp_path, lines()).affine)
    assert volume.geometry.has_world


@pytest.mark.parametrize("missing", [{"TransformMatrix": None}, {"ElementSpacing": None}])
def test_without_direction_or_spacing_the_place_is_a_guess(tmp_path, missing):
    assert not read(tmp_path, lines(**missing)).geometry.has_world


def test_big_endian_voxels(tmp_path):
    volume = read(tmp_path, lines(ElementByteOrderMSB="True"), VOXELS.astype(">i2").tobytes())
    assert np.array_equal(volume.array[0], VOXELS)


def test_a_fourth_axis_of_one_is_dropped(tmp_path):
    head = lines(
        NDims="4",
        DimSize="4 3 2 1",
        ElementSpacing="1 2 3 1",
        Offset="5 6 7 0",
        TransformMatrix="1 0 0 0 0 1 0 0 0 0 1 0 0 0 0 1",
    )
    volume = read(tmp_path, head)
    assert np.array_equal(volume.affine, read(tmp_path, lines()).affine)
    assert volume.array.shape == (1, 2, 3, 4)


@pytest.mark.parametrize("header_size", ["9", "-1"])
def test_a_foreign_header_before_the_voxels_is_skipped(tmp_path, header_size):
    (tmp_path / "scan.raw").write_bytes(b"something" + VOXELS.tobytes())
    (tmp_path / "scan.mhd").write_bytes(lines(HeaderSize=header_size, ElementDataFile="scan.raw"))
    assert np.array_equal(read_volume(tmp_path / "scan.mhd").array[0], VOXELS)
    assert scan_files(tmp_path / "scan.mhd") == (tmp_path / "scan.mhd", tmp_path / "scan.raw")


@pytest.mark.parametrize(
    ("changed", "cause"),
    [
        ({"NDims": None}, "does not begin with a whole MetaImage header"),
        ({"NDims": "4"}, "NDims is 4, but DimSize has 3 numbers"),
        ({"DimSize": None}, "DimSize is 'missing'"),
        ({"DimSize": "4 3 two"}, "DimSize is '4 3 two'"),
        ({"DimSize": "4 0 2"}, "DimSize is '4 0 2'"),
        ({"DimSize": "4000 3000 2000"}, "it is truncated"),
        ({"DimSize": "4 3 3"}, "it is truncated"),
        ({"ElementSpacing": "0 1 1"}, "affine is not usable"),
        ({"ElementSpacing": "nan 1 1"}, "affine is not usable"),
        ({"ElementSpacing": "1 1"}, "ElementSpacing is '1 1', expected 3 numbers"),
        ({"TransformMatrix": "0 0 0 0 1 0 0 0 1"}, "affine is not usable"),
        ({"TransformMatrix": "1 0 0"}, "expected 9 numbers"),
        ({"Offset": "a b c"}, "expected 3 numbers"),
        ({"ElementType": "MET_FOO"}, "type 'MET_FOO', known are int8, uint8"),
        ({"BinaryData": "False"}, "written as text"),
        ({"CompressedData": "True"}, "the packed stream is damaged"),
        ({"HeaderSize": "x", "ElementDataFile": "scan.mha"}, "HeaderSize is 'x'"),
        ({"ElementDataFile": "LIST"}, "spread over several files"),
        ({"ElementDataFile": "slice%03d.raw 1 9 1"}, "spread over several files"),
        ({"ElementDataFile": "absent.raw"}, "the voxels are missing. Expected absent.raw beside it"),
        ({"ElementDataFile": "/etc/hostname"}, "Expected a file in the header's folder"),
        ({"ElementDataFile": "../elsewhere.raw"}, "Expected a file in the header's folder"),
    ],
)
def test_headers_that_make_no_sense_are_refused(tmp_path, changed, cause):
    (tmp_path.parent / "elsewhere.raw").write_bytes(VOXELS.tobytes())
    with pytest.raises(DataError, match=cause) as caught:
        read(tmp_path, lines(**changed))
    assert caught.value.code == "unreadable"


def test_a_file_without_the_end_of_a_header_is_not_read_to_its_end(tmp_path):
    (tmp_path / "scan.mha").write_bytes(b"NDims = 3\n" * 200_000)
    with pytest.raises(DataError, match="its header does not end"):
        read_header(tmp_path / "scan.mha")


def test_real_metaimage(shared_data):
    path = shared_data / "odd_files" / "mha.mha"
    volume, (values, affine) = read_volume(path), itk_read(path)
    assert np.array_equal(volume.array[0], values)
    assert np.allclose(volume.affine, affine, atol=1e-9)
