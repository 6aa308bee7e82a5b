from __future__ import annotations

import gzip
import struct
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from other_libraries import REVERSED, nibabel_values
from reader_contract import INTEGERS, PackedContract, WriterContract, a_scan

from sagittal.errors import DataError, ResourceError
from sagittal.testing.strategies import affines, label_maps, volumes
from sagittal.volumes import Volume, read_labels, read_volume
from sagittal.volumes.crop import Box, crop
from sagittal.volumes.geometry import reverse_axes, spacing_of
from sagittal.volumes.nifti import split_nifti_channels

quick = settings(max_examples=30, deadline=None, derandomize=True)

HEADER_FACTS = ("qform_code", "sform_code", "xyzt_units", "pixdim", "quatern_b", "quatern_c", "quatern_d")
HEADER_FACTS += ("qoffset_x", "qoffset_y", "qoffset_z", "srow_x", "srow_y", "srow_z")


class Nifti:
    dtypes = (*INTEGERS, np.float32, np.float64)
    # Writing rounds the affine to float32; the strategies draw numbers that float32 holds.
    tolerance_mm = 1e-4

    def oracle_read(self, path):
        return nibabel_values(nib.load(path, mmap=False))

    def oracle_write(self, path, voxels, affine):
        nib.save(self.image(voxels.T, affine @ REVERSED), path)
        return path

    image = nib.Nifti1Image

    def odd_scans(self, folder):
        odd = {
            "slice": (ramp((4, 5)), "a 2D image of 4 x 5 voxels"),
            "series": (ramp((4, 5, 6, 2)), "a 4D image of 4 x 5 x 6 x 2 voxels"),
            "complex": (ramp().astype(np.complex64), "complex numbers"),
            "colours": (np.zeros((4, 5, 6), dtype=[("R", "u1"), ("G", "u1"), ("B", "u1")]), "RGB colours"),
        }
        return {
            name: (saved(folder / f"{name}{self.suffix}", data, kind=self.image), message)
            for name, (data, message) in odd.items()
        }


class TestNii(Nifti, WriterContract):
    suffix = ".nii"


class TestNiiGz(Nifti, PackedContract):
    suffix = ".nii.gz"


class TestPair(Nifti, WriterContract):
    suffix = ".hdr"
    image = nib.Nifti1Pair


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("nifti")


def saved(path: Path, data: np.ndarray, affine: np.ndarray | None = None, kind=nib.Nifti1Image) -> Path:
    nib.save(kind(data, np.eye(4) if affine is None else affine), path)
    return path


def ramp(shape=(4, 5, 6), dtype=np.int16) -> np.ndarray:
    return np.arange(np.prod(shape)).reshape(shape).astype(dtype)


@quick
@given(volumes(), st.sampled_from((".nii", ".nii.gz")))
def test_writing_and_reading_an_image_is_exact(folder, volume, suffix):
    back = read_volume(volume.write(folder / f"image{suffix}"))
    assert back.array.dtype == np.float32
    assert np.array_equal(back.array, volume.array)
    assert np.array_equal(back.affine, volume.affine)
    assert back.header.qform_code == back.header.sform_code == 1


@quick
@given(volumes())
def test_nibabel_reads_the_same_scan(folder, volume):
    image = nib.load(volume.write(folder / "image.nii.gz"))
    assert np.array_equal(np.asarray(image.dataobj).T, volume.array[0])
    assert np.array_equal(reverse_axes(image.affine), volume.affine)
    assert np.allclose(image.get_qform(), image.affine, atol=1e-3)
    assert np.allclose(image.header.get_zooms(), spacing_of(volume.affine)[::-1])
    assert image.header.get_xyzt_units()[0] == "mm"
    assert image.header["scl_slope"] == 1 or np.isnan(image.header["scl_slope"])


@quick
@given(
    affines(),
    affines(),
    st.tuples(st.integers(0, 4), st.integers(0, 4)),
    st.sampled_from((nib.Nifti1Image, nib.Nifti2Image)),
    st.sampled_from(((None, None), ("mm", "sec"), ("mm", None), ("micron", "msec"), ("meter", None))),
    label_maps(),
)
def test_a_prediction_has_its_input_s_header_bit_for_bit(folder, qform, sform, codes, kind, units, labels):
    shape = labels.geometry.shape[::-1]
    image = kind(np.zeros(shape, dtype=np.float32), None)
    image.header.set_xyzt_units(*units)
    image.set_qform(qform, code=codes[0], strip_shears=True)
    image.set_sform(sform, code=codes[1])
    nib.save(image, folder / "scan.nii.gz")
    written = read_volume(folder / "scan.nii.gz").with_array(labels.array[0]).write(folder / "prediction.nii.gz")
    scan, prediction = nib.load(folder / "scan.nii.gz"), nib.load(written)
    assert type(prediction) is kind
    assert prediction.shape == scan.shape
    assert np.array_equal(prediction.affine, scan.affine)
    for fact in HEADER_FACTS:
        assert np.array_equal(prediction.header[fact], scan.header[fact]), fact
    assert prediction.get_data_dtype() == np.uint8
    assert np.array_equal(np.asarray(prediction.dataobj).T, labels.array[0])


def test_a_changed_grid_is_written_and_keeps_codes_and_version(folder):
    image = nib.Nifti2Image(ramp(), np.diag([2.0, 3, 4, 1]))
    image.set_qform(np.diag([2.0, 3, 4, 1]), code=2)
    image.set_sform(np.diag([2.0, 3, 4, 1]), code=3)
    nib.save(image, folder / "whole.nii")
    cut = crop(read_volume(folder / "whole.nii"), Box((1, 2, 3), (5, 4, 4)))
    back = nib.load(cut.write(folder / "cut.nii"))
    assert isinstance(back, nib.Nifti2Image)
    assert np.array_equal(reverse_axes(back.affine), cut.affine)
    assert tuple(back.affine[:3, 3]) == (6.0, 6.0, 4.0)
    assert np.allclose(back.get_qform(), back.affine)
    assert (back.header["qform_code"], back.header["sform_code"]) == (2, 3)


def test_without_qform_and_sform_a_changed_grid_still_keeps_its_place(folder):
    image = nib.Nifti1Image(ramp(), None)
    image.header.set_zooms((2.0, 3.0, 4.0))
    nib.save(image, folder / "nowhere.nii.gz")
    scan = read_volume(folder / "nowhere.nii.gz")
    assert not scan.geometry.has_world
    assert scan.spacing_mm == (4.0, 3.0, 2.0)
    back = nib.load(scan.with_array(scan.array).write(folder / "same.nii.gz"))
    assert (back.header["qform_code"], back.header["sform_code"]) == (0, 0)
    turned = scan.reoriented()
    assert np.array_equal(read_volume(turned.write(folder / "turned.nii.gz")).affine, turned.affine)


def test_metres_and_microns_become_mm(folder):
    for unit, factor in (("meter", 1000.0), ("micron", 0.001), ("mm", 1.0), (None, 1.0)):
        image = nib.Nifti1Image(ramp(), np.diag([2.0, 3, 4, 1]))
        image.header.set_xyzt_units(unit)
        nib.save(image, folder / "unit.nii")
        assert read_volume(folder / "unit.nii").spacing_mm == (4.0 * factor, 3.0 * factor, 2.0 * factor)


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.uint16, np.int32, np.float32, np.float64])
@pytest.mark.parametrize("order", ["<", ">"])
def test_every_type_and_byte_order_arrives_as_float32(folder, dtype, order):
    header = nib.Nifti1Header(endianness=order)
    header.set_data_dtype(np.dtype(dtype).newbyteorder(order))
    data = ramp(dtype=dtype)
    nib.save(nib.Nifti1Image(data, np.eye(4), header), folder / "typed.nii.gz")
    volume = read_volume(folder / "typed.nii.gz")
    assert volume.array.dtype == np.float32
    assert volume.array.flags.c_contiguous
    assert np.array_equal(volume.array[0].T, data)


def test_slope_and_intercept_are_applied_and_rounded_once(folder):
    header = nib.Nifti1Header()
    header.set_data_dtype(np.int16)
    header.set_data_shape((2, 3, 4))
    header["scl_slope"], header["scl_inter"], header["vox_offset"], header["sform_code"] = 0.1, -1024.3, 352, 1
    header.set_sform(np.eye(4))
    data = ramp((4, 3, 2), np.int16) * 97
    (folder / "scaled.nii").write_bytes(header.binaryblock + b"\0" * 4 + data.tobytes())
    exact = data * float(np.float32(0.1)) + float(np.float32(-1024.3))
    assert np.array_equal(read_volume(folder / "scaled.nii").array[0], exact.astype(np.float32))
    with pytest.raises(DataError, match="not whole numbers"):
        read_labels(folder / "scaled.nii")


def test_trailing_axes_of_one_are_dropped(folder):
    assert read_volume(saved(folder / "four.nii.gz", ramp((4, 5, 6, 1)))).array.shape == (1, 6, 5, 4)
    assert read_volume(saved(folder / "slice.nii.gz", ramp((4, 5, 1)))).array.shape == (1, 1, 5, 4)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (ramp((4, 5)), "a 2D image of 4 x 5 voxels"),
        (ramp((4, 5, 6, 2)), "a 4D image of 4 x 5 x 6 x 2 voxels"),
        (ramp().astype(np.complex64), "complex numbers"),
        (np.zeros((4, 5, 6), dtype=[("R", "u1"), ("G", "u1"), ("B", "u1")]), "RGB colours"),
    ],
    ids=["2D", "4D", "complex", "RGB"],
)
def test_what_is_no_volume_is_refused(folder, data, message):
    path = saved(folder / "odd.nii.gz", data)
    for read in (read_volume, read_labels):
        with pytest.raises(DataError, match=message) as caught:
            read(path)
        assert caught.value.code == "not_3d"
        assert str(path) in caught.value.message


def damaged_files(folder: Path) -> dict[str, tuple[str, bytes]]:
    whole = gzip.decompress(saved(folder / "whole.nii.gz", ramp((9, 10, 11), np.float32)).read_bytes())
    packed = gzip.compress(np.random.default_rng(0).bytes(352) + whole[352:])
    noisy = whole[:352] + np.random.default_rng(0).bytes(len(whole) - 352)
    flipped = bytearray(gzip.compress(noisy))
    flipped[len(flipped) // 2] ^= 0x10
    bad_checksum = bytearray(gzip.compress(whole))
    bad_checksum[-6] ^= 0xFF

    def patched(at: int, value: bytes) -> bytes:
        return whole[:at] + value + whole[at + len(value) :]

    return {
        "empty.nii": (".nii", b""),
        "empty gz": (".nii.gz", b""),
        "three bytes": (".nii", b"abc"),
        "text": (".nii", b"this is no image at all" * 40),
        "text as gz": (".nii.gz", b"this is no image at all" * 40),
        "noise in gz": (".nii.gz", packed),
        "truncated": (".nii", whole[:2000]),
        "truncated header": (".nii", whole[:100]),
        "header only": (".nii.gz", gzip.compress(whole[:352])),
        "voxels missing in gz": (".nii.gz", gzip.compress(whole[:2000])),
        "truncated gz": (".nii.gz", gzip.compress(noisy)[:2500]),
        "gz without its end": (".nii.gz", gzip.compress(noisy)[:-3]),
        "flipped bit in gz": (".nii.gz", bytes(flipped)),
        "wrong checksum": (".nii.gz", bytes(bad_checksum)),
        "not packed": (".nii.gz", whole),
        "packed": (".nii", gzip.compress(whole)),
        "analyze": (".nii", patched(344, b"\0\0\0\0")),
        "half a pair": (".nii", patched(344, b"ni1\0")),
        "unknown voxel type": (".nii", patched(70, struct.pack("<h", 31))),
        "no dimensions": (".nii", patched(40, struct.pack("<h", 0))),
        "axis of none": (".nii", patched(42, struct.pack("<h", 0))),
        "huge axes": (".nii", patched(42, struct.pack("<hhh", 32767, 32767, 32767))),
        "huge axes in gz": (".nii.gz", gzip.compress(patched(42, struct.pack("<hhh", 32767, 32767, 32767)))),
        "affine of NaN": (".nii", patched(280, struct.pack("<f", float("nan")))),
        "affine of zeros": (".nii", patched(280, b"\0" * 48)),
    }


def test_damaged_files_are_named_with_their_cause(folder):
    for name, (suffix, content) in damaged_files(folder).items():
        path = folder / f"damaged{suffix}"
        path.write_bytes(content)
        with pytest.raises(DataError) as caught:
            read_volume(path)
        assert caught.value.message.startswith(f"{path}: "), name
        assert caught.value.code in ("unreadable", "not_3d"), name


@pytest.mark.parametrize(
    ("name", "cause"),
    [
        ("empty.nii", "the file is empty"),
        ("empty gz", "the file is empty"),
        ("truncated", "truncated"),
        ("truncated gz", "truncated"),
        ("voxels missing in gz", "3960 bytes of voxels expected, 1648 found"),
        ("wrong checksum", "gzip"),
        ("not packed", "not a whole gzip file"),
        ("text", "does not begin with a NIfTI header"),
        ("half a pair", "hdr/.img pair"),
    ],
)
def test_the_cause_of_the_damage_is_said(folder, name, cause):
    suffix, content = damaged_files(folder)[name]
    path = folder / f"cause{suffix}"
    path.write_bytes(content)
    with pytest.raises(DataError, match=cause):
        read_volume(path)


@pytest.mark.parametrize("kind", [nib.Nifti1Image, nib.Nifti2Image])
@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
def test_random_damage_is_a_data_error_or_harmless(folder, kind, suffix):
    whole = saved(folder / f"sound{suffix}", ramp(), kind=kind).read_bytes()
    random = np.random.default_rng(7)
    path = folder / f"unsound{suffix}"
    refused = 0
    for _ in range(150):
        content = bytearray(whole)
        for place in random.integers(0, min(len(content), 600), size=2):
            content[place] = random.choice([0, 127, 128, 255])
        path.write_bytes(content)
        try:
            assert read_volume(path).array.dtype == np.float32
        except DataError:
            refused += 1
    assert refused > 8


def test_gzip_files_of_several_members_are_read(folder):
    whole = gzip.decompress(saved(folder / "members.nii.gz", ramp()).read_bytes())
    (folder / "members.nii.gz").write_bytes(gzip.compress(whole[:400]) + gzip.compress(whole[400:]))
    assert np.array_equal(read_volume(folder / "members.nii.gz").array[0].T, ramp())


def test_a_header_with_pixdim_zero_as_handedness_is_read(folder):
    content = bytearray(saved(folder / "qfac.nii", ramp()).read_bytes())
    content[76:80] = struct.pack("<f", 0.0)
    (folder / "qfac.nii").write_bytes(content)
    assert read_volume(folder / "qfac.nii").spacing_mm == (1.0, 1.0, 1.0)


def test_axes_too_long_for_nifti1_are_written_as_nifti2(folder):
    volume = Volume(np.zeros((1, 1, 2, 40000), dtype=np.uint8), np.eye(4))
    written = volume.write(folder / "long.nii.gz")
    assert isinstance(nib.load(written), nib.Nifti2Image)
    assert read_volume(written).array.shape == volume.array.shape


def test_a_folder_that_can_t_be_made_is_a_resource_error(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ResourceError, match="can't be written"):
        Volume(ramp((1, 4, 5, 6)), np.eye(4)).write(tmp_path / "file" / "scan.nii.gz")


def test_the_voxels_of_a_pair_may_be_gzipped(tmp_path):
    path = a_scan().write(tmp_path / "scan.hdr")
    voxels = tmp_path / "scan.img"
    (tmp_path / "scan.img.gz").write_bytes(gzip.compress(voxels.read_bytes()))
    voxels.unlink()
    assert np.array_equal(read_volume(path).array, a_scan().array)


def test_a_pair_without_its_voxels_or_with_another_header_is_refused(tmp_path):
    path = a_scan().write(tmp_path / "scan.hdr")
    header = path.read_bytes()
    path.write_bytes(header[:344] + b"\0\0\0\0")
    with pytest.raises(DataError, match=r"Analyze 7.5 header, which stores no orientation"):
        read_volume(path)
    path.write_bytes(header[:344] + b"n+1\0")
    with pytest.raises(DataError, match=r"name it .nii"):
        read_volume(path)
    path.write_bytes(header)
    (tmp_path / "scan.img").unlink()
    with pytest.raises(DataError, match=r"the voxels are missing. Expected scan.img beside it"):
        read_volume(path)


def test_a_real_pair(shared_data):
    path = shared_data / "odd_files" / "ras.hdr"
    volume, (values, affine) = read_volume(path), nibabel_values(nib.load(path, mmap=False))
    assert np.array_equal(volume.array[0], values)
    assert np.array_equal(volume.affine, affine)
    assert volume.geometry.has_world


@pytest.mark.parametrize("kind", [nib.Nifti1Image, nib.Nifti2Image])
@pytest.mark.parametrize("endian", ["<", ">"])
@pytest.mark.parametrize("suffixes", [(".nii.gz", ".nii.gz"), (".nii", ".nii.gz"), (".nii.gz", ".nii")])
def test_channels_of_a_4d_file_become_files_of_their_own_bit_for_bit(tmp_path, kind, endian, suffixes):
    data = np.random.default_rng(0).normal(size=(3, 5, 4, 2)).astype(np.float32)
    affine = np.array([[0, -1.5, 0, 7], [2.0, 0, 0, -4], [0, 0, 3.25, 9], [0, 0, 0, 1]])
    image = kind(data.astype(f"{endian}f4"), affine, header=kind.header_class(endianness=endian))
    image.header.set_xyzt_units("mm", "sec")
    source = tmp_path / f"both{suffixes[0]}"
    nib.save(image, source)
    targets = [tmp_path / f"one{suffixes[1]}", tmp_path / f"two{suffixes[1]}"]
    split_nifti_channels(source, targets)
    before = nib.load(source).header
    for channel, target in enumerate(targets):
        loaded = nib.load(target)
        assert np.array_equal(np.asanyarray(loaded.dataobj), data[..., channel])
        assert np.array_equal(loaded.affine, affine)
        for name in HEADER_FACTS:
            assert np.array_equal(loaded.header[name], before[name]), name
        assert np.array_equal(read_volume(target).array[0], data[..., channel].T)


def test_scaled_channels_keep_their_stored_numbers_and_their_slope(tmp_path):
    data = np.arange(2 * 3 * 4 * 2, dtype=np.int16).reshape(2, 3, 4, 2)
    image = nib.Nifti1Image(data, np.eye(4))
    image.header.set_slope_inter(0.5, -3)
    nib.save(image, tmp_path / "both.nii.gz")
    split_nifti_channels(tmp_path / "both.nii.gz", [tmp_path / "a.nii.gz", tmp_path / "b.nii.gz"])
    stored = nib.load(tmp_path / "b.nii.gz")
    assert np.array_equal(
        stored.dataobj.get_unscaled(), nib.load(tmp_path / "both.nii.gz").dataobj.get_unscaled()[..., 1]
    )
    assert np.array_equal(stored.get_fdata(), nib.load(tmp_path / "both.nii.gz").get_fdata()[..., 1])


def test_a_file_with_other_channels_is_not_split(tmp_path):
    nib.save(nib.Nifti1Image(np.zeros((2, 3, 4, 3), np.int16), np.eye(4)), tmp_path / "three.nii.gz")
    nib.save(nib.Nifti1Image(np.zeros((2, 3, 4), np.int16), np.eye(4)), tmp_path / "none.nii.gz")
    nib.save(nib.Nifti1Image(np.zeros((2, 3, 4, 2), np.complex64), np.eye(4)), tmp_path / "complex.nii")
    targets = [tmp_path / "a.nii.gz", tmp_path / "b.nii.gz"]
    for name, message in (
        ("three.nii.gz", "2 x 3 x 4 x 3 voxels. Expected three axes of space, then 2 channels"),
        ("none.nii.gz", "2 x 3 x 4 voxels. Expected three axes of space"),
        ("complex.nii", "complex numbers"),
    ):
        with pytest.raises(DataError, match=message):
            split_nifti_channels(tmp_path / name, targets)
    whole = (tmp_path / "three.nii.gz").read_bytes()
    (tmp_path / "cut.nii.gz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match="truncated"):
        split_nifti_channels(tmp_path / "cut.nii.gz", [*targets, tmp_path / "c.nii.gz"])
    assert not any(target.exists() for target in targets)
