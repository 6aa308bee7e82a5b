from __future__ import annotations

import gzip
import io
import zlib

import numpy as np
import pytest

from sagittal.errors import DataError
from sagittal.volumes import streams
from sagittal.volumes.streams import (
    MAX_RATIO,
    ZlibReader,
    damaged,
    explained,
    in_native_order,
    packed_zlib,
    read_voxels,
    require_room,
)

NOISE = np.random.default_rng(0).bytes(3_000_000)


@pytest.mark.parametrize("content", [b"", b"x", NOISE, b"\0" * 9_000_000], ids=["none", "one", "noise", "zeros"])
@pytest.mark.parametrize("piece", [1 << 20, 700_001])
def test_a_zlib_stream_is_unpacked_in_pieces_of_any_size(content, piece):
    reader = ZlibReader(io.BytesIO(zlib.compress(content, 1) + b"what follows"))
    found = bytearray()
    while got := reader.read(piece):
        found += got
    assert bytes(found) == content
    assert reader.readable()
    assert reader.readinto(bytearray(8)) == 0


@pytest.mark.parametrize("cut", [1, 4, 5, 1000])
def test_a_zlib_stream_without_its_end_is_no_end(cut):
    reader = ZlibReader(io.BytesIO(zlib.compress(NOISE[:5000])[:-cut]))
    with pytest.raises(EOFError):
        while reader.read(1 << 20):
            pass


def test_zlib_unpacks_what_is_packed():
    body = np.arange(60, dtype=np.int16).reshape(3, 4, 5)
    assert zlib.decompress(packed_zlib(body)) == body.tobytes()


def test_a_promise_that_the_file_can_t_hold_is_refused_before_memory_is_taken(tmp_path):
    path = tmp_path / "scan.mha"
    path.write_bytes(b"x" * 100)
    require_room(path, 100, packed=False, kind="MetaImage")
    require_room(path, 100 * MAX_RATIO, packed=True, kind="MetaImage")
    with pytest.raises(DataError, match="promises 101 bytes of voxels, the file has 100 bytes"):
        require_room(path, 101, packed=False, kind="MetaImage")
    with pytest.raises(DataError, match="it is truncated"), path.open("rb") as file:
        read_voxels(file, (30000, 30000, 30000), np.dtype("<i8"), path, packed=True, kind="MetaImage")


def test_a_packed_stream_that_goes_on_after_its_voxels_is_left_alone(tmp_path, monkeypatch):
    path = tmp_path / "scan.nii.gz"
    monkeypatch.setattr(streams, "MOST_BEHIND", 100)
    path.write_bytes(gzip.compress(bytes(8 + 100), 9))
    with streams.opened(path) as file:
        assert not read_voxels(file, (2, 2, 2), np.dtype("u1"), path, packed=True, kind="NIfTI").any()
    path.write_bytes(gzip.compress(bytes(8 + 101), 9))
    with pytest.raises(DataError, match="more than 100 bytes follow the 8"), streams.opened(path) as file:
        read_voxels(file, (2, 2, 2), np.dtype("u1"), path, packed=True, kind="NIfTI")


def test_voxels_behind_the_file_s_end_are_not_looked_for(tmp_path):
    path = tmp_path / "scan.nii"
    path.write_bytes(b"x" * 100)
    streams.require_start(path, 100, packed=False, kind="NIfTI")
    streams.require_start(path, 100 * MAX_RATIO, packed=True, kind="NIfTI")
    for offset, packed in ((101, False), (2**61, True)):
        with pytest.raises(DataError, match=f"begin at byte {offset}, the file has 100 bytes"):
            streams.require_start(path, offset, packed=packed, kind="NIfTI")


def test_voxels_come_in_the_machine_s_byte_order(tmp_path):
    body = np.arange(24, dtype=">i4").reshape(2, 3, 4)
    path = tmp_path / "scan.mgh"
    path.write_bytes(body.tobytes())
    with path.open("rb") as file:
        voxels = read_voxels(file, (2, 3, 4), body.dtype, path, packed=False, kind="MGH")
    assert voxels.dtype == np.int32 and voxels.dtype.isnative
    assert np.array_equal(voxels, body)
    assert in_native_order(body.transpose()).flags.c_contiguous
    assert in_native_order(body > 3).dtype == np.uint8


def test_what_isal_raises_names_the_file_and_its_cause(tmp_path):
    path = tmp_path / "scan.mgz"
    message = r"scan.mgz: can't be read \(the packed stream ends too early"
    with pytest.raises(DataError, match=message) as caught, explained(path, "MGH"):
        raise EOFError
    assert caught.value.code == damaged(path, "x", "MGH").code == "unreadable"
    assert "Expected a whole MGH file" in caught.value.message
