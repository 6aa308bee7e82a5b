from __future__ import annotations

import sys
import tracemalloc

import numpy as np
import pytest
import SimpleITK
from dicom_scans import SECRET, recode, write_enhanced, write_series
from pydicom import dcmread
from pydicom.encaps import encapsulate, generate_frames
from pydicom.uid import (
    JPEG2000,
    MPEG2MPML,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    HTJ2KLossless,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGBaseline8Bit,
    JPEGExtended12Bit,
    JPEGLossless,
    JPEGLosslessSV1,
    JPEGLSLossless,
    JPEGLSNearLossless,
    RLELossless,
)

from sagittal.errors import DataError
from sagittal.volumes import Volume, read_volume
from sagittal.volumes.dicom_catalogue import list_series
from sagittal.volumes.io import read_stored

AFFINE = np.array([[0, 0, 0.7, -9], [0, 0.8, 0, 4], [2.5, 0, 0, 11], [0, 0, 0, 1]], dtype=float)


def smooth(dtype, bits: int, shape=(3, 24, 37)) -> Volume:
    """Return a scan without hard edges, that a lossy codec changes little, over the range of `bits`."""
    d, h, w = np.meshgrid(*(np.arange(size) for size in shape), indexing="ij")
    values = np.sin(h / 9 + d) * np.cos(w / 7) * 0.45 + (0.0 if np.dtype(dtype).kind == "i" else 0.5)
    return Volume((values * (2**bits - 1)).astype(dtype)[None], AFFINE)


def stored_in(bits: int):
    def change(data, index):
        data.BitsStored, data.HighBit = bits, bits - 1

    return change


def series(folder, dtype, bits, syntax):
    scan = smooth(dtype, bits)
    recode(write_series(folder, scan, change=stored_in(bits)), syntax)
    return scan


@pytest.mark.parametrize(("dtype", "bits"), [(np.uint8, 8), (np.uint16, 12), (np.int16, 16), (np.int16, 12)])
@pytest.mark.parametrize(
    "syntax", [JPEGLossless, JPEGLosslessSV1, JPEGLSLossless, JPEG2000Lossless, RLELossless], ids=lambda uid: uid.name
)
def test_lossless_syntaxes_give_the_voxels_that_were_written(tmp_path, syntax, dtype, bits):
    scan = series(tmp_path, dtype, bits, syntax)
    stored = read_stored(tmp_path)
    assert np.array_equal(stored.voxels, scan.array[0]) and stored.voxels.dtype == dtype
    assert np.allclose(stored.affine, scan.affine)
    (info,) = list_series(tmp_path)
    assert (info.usable, info.lossy, info.transfer_syntax) == (True, False, syntax.name)


@pytest.mark.parametrize(
    ("syntax", "dtype", "bits"),
    [
        (JPEGBaseline8Bit, np.uint8, 8),
        (JPEGExtended12Bit, np.uint8, 8),
        (JPEGExtended12Bit, np.uint16, 12),
        (JPEGLSNearLossless, np.uint16, 12),
        (JPEG2000, np.int16, 16),
    ],
)
def test_lossy_syntaxes_are_read_as_itk_reads_them_and_flagged(tmp_path, syntax, dtype, bits):
    scan = series(tmp_path, dtype, bits, syntax)
    read = read_stored(tmp_path).voxels
    assert np.abs(read.astype(int) - scan.array[0].astype(int)).max() <= 2
    files = SimpleITK.ImageSeriesReader.GetGDCMSeriesFileNames(str(tmp_path))
    oracle = SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(list(files)))
    assert np.abs(read.astype(int) - oracle.astype(int)).max() <= 1
    (info,) = list_series(tmp_path)
    assert (info.usable, info.lossy) == (True, True)


def test_what_was_compressed_with_loss_once_stays_flagged(tmp_path):
    def once(data, index):
        data.LossyImageCompression = "01"

    write_series(tmp_path, smooth(np.uint8, 8), change=once)
    assert list_series(tmp_path)[0].lossy


@pytest.mark.parametrize("syntax", [ImplicitVRLittleEndian, ExplicitVRBigEndian, DeflatedExplicitVRLittleEndian])
def test_frames_of_one_file_in_every_uncompressed_syntax(tmp_path, syntax):
    scan = smooth(np.int16, 14)
    path = write_enhanced(tmp_path / "scan.dcm", scan, syntax=syntax)
    assert np.array_equal(read_volume(path).array, scan.array)


@pytest.mark.parametrize("syntax", [JPEGLSLossless, RLELossless], ids=lambda uid: uid.name)
@pytest.mark.parametrize("has_bot", [True, False])
def test_frames_of_one_file_compressed(tmp_path, syntax, has_bot):
    scan = smooth(np.uint16, 16)
    path = write_enhanced(tmp_path / "scan.dcm", scan)
    data = dcmread(path)
    data.compress(syntax, generate_instance_uid=False)
    if not has_bot:
        frames = list(generate_frames(data.PixelData, number_of_frames=3))
        data.PixelData = encapsulate(frames, has_bot=False)
    data.save_as(path)
    assert np.array_equal(read_volume(path).array, scan.array)


def test_other_compressions_are_refused_by_name(tmp_path):
    def called(syntax):
        def change(data, index):
            data.file_meta.TransferSyntaxUID = syntax
            data.PixelData = encapsulate([b"\0\0"])

        return change

    for name, syntax, todo in (("h", HTJ2KLossless, "pip install pylibjpeg"), ("m", MPEG2MPML, "gdcmconv")):
        folder = write_series(tmp_path / name, smooth(np.uint8, 8), change=called(syntax))
        with pytest.raises(DataError, match=todo) as caught:
            read_volume(folder)
        assert caught.value.code == "compressed" and syntax.name in caught.value.message
        (info,) = list_series(folder)
        assert not info.usable and syntax.name in info.why_not


def test_without_gdcm_its_extra_is_named(tmp_path, monkeypatch):
    series(tmp_path, np.uint16, 12, JPEGExtended12Bit)
    monkeypatch.setitem(sys.modules, "gdcm", None)
    with pytest.raises(DataError, match=r"GDCM, which is not installed. Run: pip install 'sagittal\[dicom\]'"):
        read_volume(tmp_path)


def forged(folder, syntax, **values):
    if syntax is not None:
        recode(folder, syntax)
    for file in sorted(folder.iterdir()):
        data = dcmread(file)
        for name, value in values.items():
            setattr(data, name, value)
        data.save_as(file)
    return folder


@pytest.mark.parametrize(
    ("syntax", "rows", "message"),
    [
        (None, 8000, "bytes of voxels expected, 1776 found: it is truncated or forged"),
        (None, 65535, "65535 x 65535 voxels"),
        (RLELossless, 8000, "truncated or forged"),
        (JPEGLosslessSV1, 8000, "24 x 37 voxels of 1 values compressed, 8000 x 8000 in the header"),
        (JPEGLSLossless, 8000, "24 x 37 voxels of 1 values compressed, 8000 x 8000 in the header"),
        (JPEG2000Lossless, 8000, "24 x 37 voxels of 1 values compressed, 8000 x 8000 in the header"),
        (JPEG2000Lossless, 23, "24 x 37 voxels of 1 values compressed, 23 x 23 in the header"),
    ],
)
def test_forged_sizes_are_refused_before_there_is_room_for_them(tmp_path, syntax, rows, message):
    folder = write_series(tmp_path, smooth(np.uint16, 12), change=stored_in(12))
    forged(folder, syntax, Rows=rows, Columns=rows)
    tracemalloc.start()
    try:
        with pytest.raises(DataError, match=message) as caught:
            read_volume(folder)
        assert tracemalloc.get_traced_memory()[1] < 20 << 20
    finally:
        tracemalloc.stop()
    assert SECRET not in caught.value.message


def test_more_frames_than_there_are_voxels_are_refused(tmp_path):
    path = write_enhanced(tmp_path / "scan.dcm", smooth(np.uint16, 12))
    data = dcmread(path)
    data.NumberOfFrames = 100_000
    data.save_as(path)
    with pytest.raises(DataError, match="100000 frames, but not as many functional groups"):
        read_volume(path)
    data.NumberOfFrames, data.PixelData = 3, data.PixelData[:4000]
    data.save_as(path)
    with pytest.raises(DataError, match="5328 bytes of voxels expected, 4000 found: it is truncated"):
        read_volume(path)


def test_more_than_memory_should_hold_is_refused(tmp_path, monkeypatch):
    write_series(tmp_path, smooth(np.uint16, 12))
    monkeypatch.setattr("sagittal.volumes.dicom.MAX_UNPACKED_BYTES", 5000)
    with pytest.raises(DataError, match=r"3 slices of 24 x 37 voxels, 0 GiB. Expected at most") as caught:
        read_volume(tmp_path)
    assert caught.value.code == "too_large"


def test_a_deflated_bomb_is_refused_before_it_is_unpacked(tmp_path, monkeypatch):
    write_series(tmp_path, smooth(np.uint8, 8), syntax=DeflatedExplicitVRLittleEndian)
    monkeypatch.setattr("sagittal.volumes.dicom_library.MAX_INFLATED_BYTES", 800)
    with pytest.raises(DataError, match="unpacks to more than 0 GiB") as caught:
        read_volume(tmp_path)
    assert caught.value.code == "too_large"
    monkeypatch.undo()
    for file in tmp_path.iterdir():
        content = bytearray(file.read_bytes())
        content[500:520] = bytes(20)
        file.write_bytes(content)
    with pytest.raises(DataError, match=r"its deflated part is damaged|makes no sense|truncated"):
        read_volume(tmp_path)


@pytest.mark.parametrize(
    "syntax",
    [JPEGBaseline8Bit, JPEG2000Lossless, JPEGLSLossless, JPEGLosslessSV1, RLELossless],
    ids=lambda uid: uid.name,
)
def test_compressed_voxels_that_are_cut_or_damaged(tmp_path, syntax):
    series(tmp_path, np.uint8, 8, syntax)
    file = min(tmp_path.iterdir())
    whole = file.read_bytes()
    start = whole.index(b"\xe0\x7f\x10\x00OB")
    for length in (len(whole) - 20, (start + len(whole)) // 2 + 20):
        file.write_bytes(whole[:length])
        with pytest.raises(DataError, match="its compressed voxels end too early: it is truncated") as caught:
            read_volume(tmp_path)
        assert file.name in caught.value.message and caught.value.code == "unreadable"
    file.write_bytes(whole[:start])
    with pytest.raises(DataError, match="no compressed voxels in it: it is truncated"):
        read_volume(tmp_path)
    file.write_bytes(whole[: start + 30] + bytes(len(whole) - start - 38) + whole[-8:])
    with pytest.raises(DataError, match=rf"{file.name}: .*(damaged|truncated or forged|too early)"):
        read_volume(tmp_path)


@pytest.mark.parametrize("form", ["files", "frames"])
def test_reading_takes_little_more_memory_than_the_voxels(tmp_path, form):
    scan = smooth(np.uint16, 12, (40, 128, 120))
    if form == "files":
        recode(write_series(tmp_path / "scan", scan, change=stored_in(12)), JPEGLSLossless)
    else:
        write_enhanced(tmp_path / "scan" / "scan.dcm", scan)
    read_stored(tmp_path / "scan")  # imports, and what pydicom keeps
    tracemalloc.start()
    try:
        voxels = read_stored(tmp_path / "scan").voxels
        assert tracemalloc.get_traced_memory()[1] < 1.8 * voxels.nbytes
    finally:
        tracemalloc.stop()
