from __future__ import annotations

import sys
import zipfile

import numpy as np
import pytest
import SimpleITK
from dicom_scans import LPS, SECRET, SERIES, along_z, one_slice, save, write_series
from hypothesis import given
from other_libraries import itk_read
from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ImplicitVRLittleEndian,
)
from reader_contract import ReaderContract, a_scan, quick

from sagittal.errors import DataError
from sagittal.testing.strategies import volumes
from sagittal.volumes import read_channels, read_header, read_volume
from sagittal.volumes.dicom import dicom_modality
from sagittal.volumes.io import read_stored, scan_files


def refuse(path, message: str, code: str, **options) -> str:
    """Require that a scan is refused with a message that keeps the patient's name to itself; return the message."""
    with pytest.raises(DataError, match=message) as caught:
        read_volume(path, **options)
    assert caught.value.code == code
    assert SECRET not in caught.value.message
    assert (caught.value.__cause__ is None and caught.value.__suppress_context__) or caught.value.__context__ is None
    return caught.value.message


def sorted_series(folder) -> list[str]:
    return list(SimpleITK.ImageSeriesReader.GetGDCMSeriesFileNames(str(folder), recursive=True))


class Dicom:
    dtypes = (np.uint8, np.uint16, np.int16, np.int8, np.int32, np.uint32)
    tolerance_mm = 1e-6

    def oracle_read(self, path):
        folder = path
        if path.suffix == ".zip":
            folder = path.with_suffix("")
            zipfile.ZipFile(path).extractall(folder)
        return itk_read(sorted_series(folder))

    def odd_scans(self, folder):
        def coloured(data, index):
            data.SamplesPerPixel, data.PhotometricInterpretation, data.PlanarConfiguration = 3, "RGB", 0
            data.PixelData = data.PixelData * 3

        def with_frames(data, index):
            data.NumberOfFrames, data.PixelData = 2, data.PixelData * 2

        def with_table(data, index):
            data.ModalityLUTSequence = []

        def at_one_place(data, index):
            data.ImagePositionPatient = [1.0, 2.0, 3.0 + index // 2]

        odd = {
            "colours": (coloured, "RGB colours"),
            "frames": (with_frames, "MR Image Storage, 2 frames in one file"),
            "table": (with_table, "Modality LUT"),
        }
        scans = {}
        for name, (change, message) in odd.items():
            scan = a_scan(np.uint8)
            scans[name] = (self.save(folder, name, scan, change=change), message)
        scans["slice"] = (self.save(folder, "slice", a_scan(np.uint8, (1, 3, 4))), "a series of one slice")
        return scans


class TestFolder(Dicom, ReaderContract):
    def save(self, folder, name, volume, **options):
        return write_series(folder / name, volume, **options)


class TestArchive(Dicom, ReaderContract):
    def save(self, folder, name, volume, **options):
        slices = write_series(folder / f".{name}", volume, **options)
        path = folder / f"{name}.zip"
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            for file in sorted(slices.iterdir()):
                archive.write(file, f"study/série/{file.name}")
                file.unlink()
        slices.rmdir()
        return path

    def cut_voxels(self, path):
        with zipfile.ZipFile(path) as archive:
            files = {name: archive.read(name) for name in archive.namelist()}
        with zipfile.ZipFile(path, "w") as archive:
            for name, content in files.items():
                archive.writestr(name, content[:-1])


@quick
@given(volumes(dtype=np.int16).filter(lambda volume: volume.array.shape[1] > 1))
def test_any_grid_is_read_back_sorted_along_its_normal(tmp_path_factory, volume):
    """A left-handed grid comes back with its slices the other way round: DICOM sorts along row x column."""
    read = read_volume(write_series(tmp_path_factory.mktemp("any"), volume))
    turned = np.linalg.det(volume.affine[:3, :3] * LPS[:, None]) > 0
    expected = volume.array[:, ::-1] if turned else volume.array
    assert np.array_equal(read.array, expected)
    index = np.array([(volume.array.shape[1] - 1) if turned else 0, 0, 0, 1])
    assert np.allclose(read.affine @ [0, 0, 0, 1], volume.affine @ index, atol=1e-6)
    assert np.allclose(read.affine[:3, 1:3], volume.affine[:3, 1:3], atol=1e-9)
    assert np.allclose(read.affine[:3, 0], volume.affine[:3, 0] * (-1 if turned else 1), atol=1e-6)


@pytest.mark.parametrize("syntax", [ImplicitVRLittleEndian, ExplicitVRBigEndian, DeflatedExplicitVRLittleEndian])
def test_every_uncompressed_transfer_syntax_is_read(tmp_path, syntax):
    assert np.array_equal(read_volume(write_series(tmp_path, a_scan(), syntax=syntax)).array, a_scan().array)


def test_thickness_is_never_the_distance_of_slices(tmp_path):
    volume = read_volume(write_series(tmp_path, a_scan()))
    assert volume.spacing_mm[0] == pytest.approx(a_scan().spacing_mm[0])


def test_slope_and_intercept_are_applied(tmp_path):
    def scaled(data, index):
        data.RescaleSlope, data.RescaleIntercept = "0.5", "-1024"

    stored = read_stored(write_series(tmp_path, a_scan(), change=scaled, modality="CT"))
    assert (stored.slope, stored.intercept, stored.voxels.dtype) == (0.5, -1024.0, np.int16)
    assert np.array_equal(stored.image(), a_scan().array[0] * 0.5 - 1024)
    values, _ = itk_read(sorted_series(tmp_path))
    assert np.array_equal(stored.image(), values)


def test_each_slice_may_have_a_slope_of_its_own(tmp_path):
    def scaled(data, index):
        data.RescaleSlope, data.RescaleIntercept = str(1.0 + index), "3"

    folder = write_series(tmp_path, a_scan(), change=scaled, modality="PT")
    slopes = np.arange(1.0, 4.0).reshape(3, 1, 1)
    assert np.array_equal(read_volume(folder).array[0], a_scan().array[0] * slopes + 3)
    assert read_header(folder).dtype == np.float32


def test_monochrome1_is_turned_unless_the_numbers_have_a_unit(tmp_path):
    def white_is_low(data, index):
        data.PhotometricInterpretation, data.BitsStored, data.HighBit = "MONOCHROME1", 12, 11

    scan = a_scan(np.uint16)
    turned = read_volume(write_series(tmp_path / "mr", scan, change=white_is_low))
    assert np.array_equal(turned.array, 4095 - scan.array.astype(np.float32))
    assert np.array_equal(turned.array[0], itk_read(sorted_series(tmp_path / "mr"))[0])
    kept = read_volume(write_series(tmp_path / "ct", scan, change=white_is_low, modality="CT"))
    assert np.array_equal(kept.array, scan.array)
    signed = read_volume(write_series(tmp_path / "signed", a_scan(np.int16), change=white_is_low))
    assert np.array_equal(signed.array, -1 - a_scan(np.int16).array)


def test_bits_that_do_not_count_are_left_out_and_the_sign_is_spread(tmp_path):
    values = (np.arange(60).reshape(1, 3, 5, 4) * 68 - 2048).astype(np.int16)

    def packed(data, index):
        data.BitsStored, data.HighBit = 12, 11
        noise = (np.arange(20, dtype=np.uint16) % 16) << 12
        data.PixelData = ((values[0, index].ravel().astype(np.uint16) & 0x0FFF) | noise).tobytes()

    assert np.array_equal(read_volume(write_series(tmp_path, a_scan().with_array(values), change=packed)).array, values)


def test_a_missing_slice_is_refused_with_the_numbers(tmp_path):
    scan, place = along_z(5, [0, 3, 6, 12, 15])
    folder = write_series(tmp_path, scan, change=place)
    refuse(folder, "5 slices, mostly 3 mm apart, but 6 mm between slices 3 and 4: 1 missing", "slice_gap")
    with pytest.raises(DataError, match="1 missing"):
        read_header(folder)
    filled = read_volume(folder, resample_slices=True)
    assert filled.spacing_mm == (3.0, 2.0, 2.0)
    assert np.array_equal(filled.array[0, [0, 1, 2, 4, 5]], scan.array[0].astype(np.float32))
    assert np.allclose(filled.array[0, 3], scan.array[0, 2:4].mean(axis=0))


def test_mixed_spacings_are_refused_with_the_numbers(tmp_path):
    scan, place = along_z(6, [0, 1, 2, 3, 5.5, 8])
    folder = write_series(tmp_path, scan, change=place)
    refuse(folder, "6 slices, mostly 1 mm apart, but 2.5 mm .* mixed spacings", "slice_spacing")
    assert read_volume(folder, resample_slices=True).array.shape == (1, 9, 6, 7)


def test_a_gantry_tilt_is_refused_with_its_angle(tmp_path):
    scan, place = along_z(6, tilt=np.tan(np.radians(12.0)))
    folder = write_series(tmp_path, scan, change=place)
    refuse(folder, r"drift sideways by 3.188 mm, a gantry tilt of 12 degrees", "gantry_tilt")
    straight = read_volume(folder, resample_slices=True)
    assert straight.array.shape == (1, 6, 8, 7)
    assert np.array_equal(straight.array[0, 0, :6], scan.array[0, 0])
    assert np.allclose(straight.affine[:3, 0], (0, 0, 3.0))
    assert read_stored(folder, resample_slices=True).voxels.dtype == np.float32


def test_a_stack_that_would_need_endless_slices_is_refused(tmp_path):
    scan, place = along_z(4, [0, 1, 2, 400])
    refuse(write_series(tmp_path, scan, change=place), "398 mm between slices 3 and 4", "slice_gap")
    refuse(tmp_path, "A regular grid would need 401 x 6 x 7 voxels", "slice_gap", resample_slices=True)


def test_several_images_at_one_place_are_refused_and_said_to_differ_in(tmp_path):
    scan, place = along_z(6, [0, 0, 3, 3, 6, 6])

    def echoes(data, index):
        place(data, index)
        data.EchoTime = 10 + 70 * (index % 2)

    folder = write_series(tmp_path, scan, change=echoes)
    message = r"6 slices at 3 places, up to 2 at the same one \(they differ in EchoTime (10, 80|80, 10)\)"
    refuse(folder, message, "duplicate_slices")
    refuse(folder, message, "duplicate_slices", resample_slices=True)


def test_several_series_are_listed_and_one_can_be_named(tmp_path):
    other = SERIES[:-1] + "2"
    write_series(tmp_path, a_scan())
    write_series(tmp_path, a_scan(np.int16, (4, 6, 7)), series_uid=other, modality="CT")
    message = refuse(tmp_path, "2 series: .*MR, 3 images of 5 x 4 .*CT, 4 images of 6 x 7", "several_series")
    assert SERIES in message and other in message
    assert read_volume(tmp_path, series_uid=other).array.shape == (1, 4, 6, 7)
    assert read_volume(tmp_path, series_uid=SERIES).array.shape == (1, 3, 5, 4)
    refuse(tmp_path, "no series 1.2. There are: ", "several_series", series_uid="1.2")


def changed_at(number: int, **values):
    def change(data, index):
        if index == number:
            for name, value in values.items():
                setattr(data, name, value)

    return change


@pytest.mark.parametrize(
    ("change", "message", "code"),
    [
        (changed_at(1, PixelSpacing=[1.0, 1.0]), r"voxels of 1 x 1 to 2 x 1.5 mm in the plane", "mixed_slices"),
        (changed_at(1, ImageOrientationPatient=[1, 0, 0, 0, 1, 0]), "several orientations, .* degrees", "mixed_slices"),
        (changed_at(1, Rows=4, Columns=3), "several sizes: 2 of 5 x 4, 1 of 4 x 3 voxels", "mixed_slices"),
        (changed_at(1, ImagePositionPatient=None), "ImagePositionPatient is missing", "unreadable"),
        (changed_at(1, PixelSpacing=None), "PixelSpacing is missing", "unreadable"),
        (changed_at(1, PixelSpacing=[0.0, 1.0]), r"PixelSpacing \[0.0, 1.0\]", "unreadable"),
        (changed_at(1, ImageOrientationPatient=[1, 0, 0, 1, 0, 0]), "not two unit vectors", "unreadable"),
        (changed_at(1, ImageOrientationPatient=[1, 0, 0]), "not 6 finite numbers", "unreadable"),
        (changed_at(1, RescaleSlope=0, RescaleIntercept=0), "RescaleSlope is 0", "unreadable"),
        (changed_at(1, BitsAllocated=12), "12 bits allocated", "unreadable"),
        (changed_at(1, BitsAllocated=64, BitsStored=64), "64 bits allocated", "unreadable"),
        (changed_at(1, PhotometricInterpretation="PALETTE COLOR"), r"RGB colours \(PALETTE COLOR\)", "not_3d"),
    ],
)
def test_slices_that_make_no_volume_are_refused_with_the_numbers(tmp_path, change, message, code):
    refuse(write_series(tmp_path, a_scan(), change=change), message, code)


def test_what_is_no_slice_is_left_alone(tmp_path):
    write_series(tmp_path, a_scan())
    localizer = one_slice(a_scan().array[0, 0], SERIES)
    localizer.ImageType = ["ORIGINAL", "PRIMARY", "LOCALIZER"]
    save(localizer, tmp_path / "000_localizer.dcm")
    screenshot = one_slice(a_scan().array[0, 1], SERIES + ".9")
    save(screenshot, tmp_path / "000_screenshot")
    report = one_slice(a_scan().array[0, 2], SERIES + ".8")
    report.SOPClassUID = report.file_meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.88.11"
    save(report, tmp_path / "000_report")
    (tmp_path / "Thumbs.db").write_bytes(b"no DICOM")
    (tmp_path / "LICENSE").write_text("free")
    assert np.array_equal(read_volume(tmp_path).array, a_scan().array)
    for file in tmp_path.iterdir():
        if "localizer" not in file.name and "report" not in file.name:
            file.unlink()
    refuse(tmp_path, "2 DICOM files, but no slice of a scan", "unreadable")


def test_slices_are_found_in_folders_of_folders(tmp_path):
    write_series(tmp_path / "patient" / "study" / "series", a_scan())
    assert np.array_equal(read_volume(tmp_path).array, a_scan().array)
    assert len(scan_files(tmp_path)) == 3
    assert all(file.is_file() for file in scan_files(tmp_path))


def test_folders_are_channels_of_a_case(tmp_path):
    paths = [write_series(tmp_path / name, a_scan(), series_uid=SERIES + name) for name in ("1", "2")]
    assert read_channels(paths).array.shape == (2, 3, 5, 4)


def test_without_pydicom_the_extra_is_named(tmp_path, monkeypatch):
    write_series(tmp_path, a_scan())
    monkeypatch.setitem(sys.modules, "pydicom", None)
    refuse(tmp_path, r"needs pydicom, which is not installed. Run: pip install 'sagittal\[dicom\]'", "missing_extra")


def test_a_good_real_series_is_read_as_itk_reads_it(shared_data):
    folder = shared_data / "dicom" / "ProstateX-0001_t2tsetra"
    volume, (values, affine) = read_volume(folder), itk_read(sorted_series(folder))
    assert volume.array.shape == (1, 19, 384, 384)
    assert np.array_equal(volume.array[0], values)
    assert np.allclose(volume.affine, affine, atol=1e-4)
    assert volume.spacing_mm == pytest.approx((3.0, 0.5, 0.5), abs=1e-4)


def test_a_real_series_with_a_missing_slice(shared_data):
    folder = shared_data / "dicom" / "ProstateX-missing-slice"
    with pytest.raises(
        DataError, match=r"18 slices, mostly 3 mm apart, but 6 mm between slices 13 and 14: 1 missing"
    ) as caught:
        read_volume(folder)
    assert caught.value.code == "slice_gap"
    assert read_volume(folder, resample_slices=True).array.shape == (1, 19, 128, 84)
    with pytest.raises(DataError, match=r"2 series: MR, 19 images of 384 x 384 .*MR, 18 images of 128 x 84"):
        read_volume(shared_data / "dicom")


def test_the_modality_is_that_of_the_header(tmp_path):
    assert dicom_modality(write_series(tmp_path / "ct", a_scan(shape=(3, 4, 5)), modality="CT")) == "CT"
    (tmp_path / "empty").mkdir()
    assert dicom_modality(tmp_path / "empty") is None
