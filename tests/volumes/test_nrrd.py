from __future__ import annotations

import gzip

import numpy as np
import pytest
from other_libraries import itk_odd_scans, itk_read, itk_write
from reader_contract import INTEGERS, PackedContract, a_scan

from sagittal.errors import DataError
from sagittal.volumes import Volume, read_volume
from sagittal.volumes.io import scan_files


class Nrrd(PackedContract):
    dtypes = (*INTEGERS, np.float32, np.float64)
    tolerance_mm = 1e-9

    def oracle_read(self, path):
        return itk_read(path)

    def oracle_write(self, path, voxels, affine):
        return itk_write(path, voxels, affine)

    def odd_scans(self, folder):
        return itk_odd_scans(folder, self.suffix)


class TestNrrd(Nrrd):
    suffix = ".nrrd"


class TestNhdr(Nrrd):
    suffix = ".nhdr"


def lines(**changed: str | None) -> bytes:
    """Return the header of 4 x 3 x 2 int16 voxels with some lines changed or left out; _ stands for a space."""
    fields: dict[str, str | None] = {
        "type": "short",
        "dimension": "3",
        "space": "left-posterior-superior",
        "sizes": "4 3 2",
        "space_directions": "(1,0,0) (0,2,0) (0,0,3)",
        "space_origin": "(5,6,7)",
        "endian": "little",
        "encoding": "raw",
        **changed,
    }
    text = "".join(f"{key.replace('_', ' ')}: {value}\n" for key, value in fields.items() if value is not None)
    return f"NRRD0004\n# a comment\n{text}patient:=somebody\n\n".encode()


VOXELS = np.arange(24, dtype=np.int16).reshape(2, 3, 4)
LPS_AS_RAS = [[0, 0, -1, -5], [0, -2, 0, -6], [3, 0, 0, 7], [0, 0, 0, 1]]


def read(tmp_path, head: bytes, voxels: bytes = VOXELS.tobytes()) -> Volume:
    path = tmp_path / "scan.nrrd"
    path.write_bytes(head + voxels)
    return read_volume(path)


@pytest.mark.parametrize(
    ("space", "affine"),
    [
        ("left-posterior-superior", LPS_AS_RAS),
        ("LPS", LPS_AS_RAS),
        ("right-anterior-superior", [[0, 0, 1, 5], [0, 2, 0, 6], [3, 0, 0, 7], [0, 0, 0, 1]]),
        ("RAS", [[0, 0, 1, 5], [0, 2, 0, 6], [3, 0, 0, 7], [0, 0, 0, 1]]),
        ("left-anterior-superior", [[0, 0, -1, -5], [0, 2, 0, 6], [3, 0, 0, 7], [0, 0, 0, 1]]),
    ],
)
def test_every_anatomical_space_becomes_ras_by_hand_and_as_itk_has_it(tmp_path, space, affine):
    volume = read(tmp_path, lines(space=space))
    assert np.array_equal(volume.affine, affine)
    assert np.array_equal(volume.array[0], VOXELS)
    assert np.allclose(itk_read(tmp_path / "scan.nrrd")[1], affine)
    assert volume.geometry.has_world


@pytest.mark.parametrize(
    "changed",
    [
        {"space": "scanner-xyz"},
        {"space": None, "space_dimension": "3"},
        {"space": None, "space_directions": None, "space_origin": None, "spacings": "1 2 3"},
        {"space": None, "space_directions": None, "space_origin": None},
    ],
)
def test_without_an_anatomical_space_the_place_is_a_guess(tmp_path, changed):
    volume = read(tmp_path, lines(**changed))
    assert not volume.geometry.has_world
    if "spacings" in changed:
        assert volume.spacing_mm == (3.0, 2.0, 1.0)


def test_big_endian_voxels(tmp_path):
    assert np.array_equal(read(tmp_path, lines(endian="big"), VOXELS.astype(">i2").tobytes()).array[0], VOXELS)


def test_bytes_need_no_endian(tmp_path):
    head = lines(type="unsigned char", endian=None)
    assert np.array_equal(read(tmp_path, head, VOXELS.astype(np.uint8).tobytes()).array[0], VOXELS)


@pytest.mark.parametrize("packed", [True, False])
def test_itk_writes_it_packed_or_not(tmp_path, packed):
    path = itk_write(tmp_path / "scan.nrrd", a_scan().array[0], a_scan().affine, packed)
    assert np.array_equal(read_volume(path).array, a_scan().array)


@pytest.mark.parametrize(
    ("sizes", "directions", "kinds"),
    [
        ("1 4 3 2", "none (1,0,0) (0,2,0) (0,0,3)", "list domain domain domain"),
        ("4 3 2 1", "(1,0,0) (0,2,0) (0,0,3) none", "domain domain domain time"),
    ],
)
def test_an_axis_of_one_that_is_none_of_space_is_dropped(tmp_path, sizes, directions, kinds):
    volume = read(tmp_path, lines(dimension="4", sizes=sizes, space_directions=directions, kinds=kinds))
    assert np.array_equal(volume.affine, LPS_AS_RAS)
    assert np.array_equal(volume.array[0], VOXELS)


def test_slicer_s_several_segmentations_in_one_file_are_refused(tmp_path):
    directions = "none (1,0,0) (0,2,0) (0,0,3)"
    with pytest.raises(DataError, match="4D image of 2 x 4 x 3 x 2 voxels") as caught:
        read(
            tmp_path,
            lines(dimension="4", sizes="2 4 3 2", space_directions=directions, kinds="list domain domain domain"),
        )
    assert caught.value.code == "not_3d"


@pytest.mark.parametrize("skip", ["9", "-1"])
def test_bytes_before_the_voxels_are_skipped(tmp_path, skip):
    (tmp_path / "scan.raw").write_bytes(b"something" + VOXELS.tobytes())
    (tmp_path / "scan.nhdr").write_bytes(lines(byte_skip=skip, data_file="scan.raw").rstrip(b"\n"))
    assert np.array_equal(read_volume(tmp_path / "scan.nhdr").array[0], VOXELS)
    assert scan_files(tmp_path / "scan.nhdr") == (tmp_path / "scan.nhdr", tmp_path / "scan.raw")


def test_packed_voxels_in_a_file_of_their_own(tmp_path):
    (tmp_path / "voxels.gz").write_bytes(gzip.compress(VOXELS.tobytes()))
    (tmp_path / "scan.nhdr").write_bytes(lines(encoding="gz", data_file="voxels.gz"))
    assert np.array_equal(read_volume(tmp_path / "scan.nhdr").array[0], VOXELS)


@pytest.mark.parametrize(
    ("changed", "cause"),
    [
        ({"dimension": "4"}, "dimension is 4, sizes are 3"),
        ({"sizes": None}, "sizes is 'missing'"),
        ({"sizes": "4 3 -2"}, "sizes is '4 3 -2'"),
        ({"sizes": "4 3 3"}, "it is truncated"),
        ({"type": "block"}, "type 'block', known are int8"),
        ({"encoding": "ascii"}, "encoding 'ascii', known are raw and gzip"),
        ({"encoding": "gzip"}, "not a whole gzip file"),
        ({"encoding": None}, "encoding 'missing'"),
        ({"endian": None}, "endian is missing"),
        ({"endian": "middle"}, "endian is middle"),
        ({"line_skip": "3"}, "skips lines"),
        ({"byte_skip": "x"}, "byte skip is x"),
        ({"byte_skip": "9" * 5000}, "byte skip is 999"),
        ({"byte_skip": "9" * 18}, "said to begin at byte 1000000000"),
        ({"sizes": f"4 3 {'9' * 5000}"}, "sizes is '4 3 999"),
        ({"byte_skip": "-1", "encoding": "gzip"}, "byte skip is -1 with gzip voxels"),
        ({"space_units": '"um" "um" "um"'}, "space units are um, expected mm"),
        ({"space_directions": "(1,0,0) (0,2,0)"}, "has 2 vectors for 3 axes"),
        ({"space_directions": "(1,0,0) (0,2,0) (0,3)"}, "expected 3 numbers"),
        ({"space_directions": "(1,0,0) (0,2,0) (0,2,0)"}, "affine is not usable"),
        ({"space_origin": "(nan,0,0)"}, "affine is not usable"),
        ({"data_file": "LIST"}, "spread over several files"),
        ({"data_file": "absent.raw"}, "the voxels are missing"),
        ({"data_file": "../elsewhere.raw"}, "Expected a file in the header's folder"),
    ],
)
def test_headers_that_make_no_sense_are_refused(tmp_path, changed, cause):
    (tmp_path.parent / "elsewhere.raw").write_bytes(VOXELS.tobytes())
    with pytest.raises(DataError, match=cause) as caught:
        read(tmp_path, lines(**changed))
    assert caught.value.code == "unreadable"
    assert "somebody" not in caught.value.message


def test_what_is_no_nrrd_is_refused(tmp_path):
    with pytest.raises(DataError, match="does not begin with a NRRD header"):
        read(tmp_path, b"JPEG or what\n\n")


def test_real_nrrd(shared_data):
    path = shared_data / "odd_files" / "FLAIR.nrrd"
    volume, (values, affine) = read_volume(path), itk_read(path)
    assert np.array_equal(volume.array[0], values)
    assert np.allclose(volume.affine, affine, atol=1e-9)
    assert volume.geometry.has_world
