from __future__ import annotations

import warnings

import highdicom
import numpy as np
import pytest
import SimpleITK
from dicom_scans import SECRET, SERIES, write_enhanced, write_series
from other_libraries import itk_read
from pydicom import dcmread
from reader_contract import a_scan

from sagittal.errors import DataError
from sagittal.volumes import Volume, read_header, read_volume
from sagittal.volumes.dicom_catalogue import list_series
from sagittal.volumes.dicom_parts import split_part
from sagittal.volumes.io import is_dicom, is_scan, scan_files, scan_name

OBLIQUE = a_scan(np.int16, (4, 6, 5))


def several(count: int) -> Volume:
    values = np.random.default_rng(4).integers(0, 3000, (count, 4, 6, 5)).astype(np.int16)
    return OBLIQUE.with_array(values)


@pytest.mark.parametrize("modality", ["CT", "MR"])
def test_frames_lie_where_their_functional_groups_say(tmp_path, modality):
    path = write_enhanced(tmp_path / "scan.dcm", OBLIQUE, modality=modality)
    read = read_volume(path)
    backwards = read.affine[:3, 0] @ OBLIQUE.affine[:3, 0] < 0
    expected = OBLIQUE.array[:, ::-1] if backwards else OBLIQUE.array
    assert np.array_equal(read.array, expected)
    first = OBLIQUE.affine @ [3 if backwards else 0, 0, 0, 1]
    assert np.allclose(read.affine[:, 3], first, atol=1e-6)
    assert np.array_equal(read_header(path).geometry.affine, read.affine)
    assert is_scan(path) and is_dicom(path)
    assert (scan_name(path), scan_files(path)) == ("scan", (path,))


def test_another_library_places_the_frames_alike(tmp_path):
    path = write_enhanced(tmp_path / "scan.dcm", OBLIQUE)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        image = highdicom.Image.from_dataset(dcmread(path))
        oracle = image.get_volume(dtype=np.int16)
    read = read_volume(path)
    # Theirs is LPS, and its slices may run the other way.
    affine = np.diag([-1.0, -1.0, 1.0, 1.0]) @ oracle.affine
    values = oracle.array
    if affine[:3, 0] @ read.affine[:3, 0] < 0:
        affine[:3, 3] += (len(values) - 1) * affine[:3, 0]
        affine[:3, 0] *= -1
        values = values[::-1]
    assert np.array_equal(values, read.array[0])
    assert np.allclose(affine, read.affine, atol=1e-5)


def test_each_frame_has_a_slope_of_its_own(tmp_path):
    path = write_enhanced(tmp_path / "scan.dcm", OBLIQUE, rescale=lambda number: (2.0, -1024.0))
    assert np.array_equal(np.sort(read_volume(path).array.ravel()), np.sort(OBLIQUE.array.ravel() * 2 - 1024))
    uneven = write_enhanced(tmp_path / "uneven.dcm", OBLIQUE, rescale=lambda number: (1.0 + number, 0.0))
    order = np.random.default_rng(5).permutation(4)
    slopes = 1.0 + np.argsort(order).reshape(4, 1, 1)
    found, expected = read_volume(uneven).array[0], OBLIQUE.array[0] * slopes
    assert np.array_equal(found, expected) or np.array_equal(found, expected[::-1])


@pytest.mark.parametrize(("name", "told"), [("echo", "EchoTime"), ("b", "DiffusionBValue")])
def test_volumes_at_the_same_places_are_listed_and_chosen_by_number(tmp_path, name, told):
    scan = several(3)
    path = write_enhanced(tmp_path / "scan.dcm", scan, modality="MR", values={name: [800.0, 0.0, 50.0]})
    found = list_series(path)
    assert [(info.series_uid, info.part, info.usable, info.frames, info.files) for info in found] == [
        (f"{SERIES}@1", f"{told} 0", True, 4, 1),
        (f"{SERIES}@2", f"{told} 50", True, 4, 1),
        (f"{SERIES}@3", f"{told} 800", True, 4, 1),
    ]
    with pytest.raises(DataError, match=rf"12 slices at 4 places.*{told}.*{SERIES}@1 \({told} 0\)") as caught:
        read_volume(path)
    assert caught.value.code == "duplicate_slices" and SECRET not in caught.value.message
    for info, channel in zip(found, (1, 2, 0), strict=True):
        read = read_volume(path, series_uid=info.series_uid).array[0]
        assert any(np.array_equal(read, scan.array[channel][::step]) for step in (1, -1))
        named = path.with_name(f"{path.name}#{info.series_uid}")
        assert np.array_equal(read_volume(named).array[0], read)
    with pytest.raises(DataError, match=r"no volume 4 in series .* There are 3"):
        read_volume(path, series_uid=f"{SERIES}@4")


def test_two_numbers_may_be_needed_to_tell_volumes_apart(tmp_path):
    values = {"b": [0.0, 0.0, 800.0, 800.0], "echo": [10.0, 70.0, 10.0, 70.0]}
    path = write_enhanced(tmp_path / "scan.dcm", several(4), modality="MR", values=values)
    parts = [info.part for info in list_series(path)]
    assert parts == [f"EchoTime {echo}, DiffusionBValue {b}" for echo in (10, 70) for b in (0, 800)]


def test_stacks_are_volumes_of_their_own(tmp_path):
    def move(data):
        for frame in data.PerFrameFunctionalGroupsSequence:
            if frame.FrameContentSequence[0].StackID == "2":
                position = frame.PlanePositionSequence[0]
                position.ImagePositionPatient = [value + 100.0 for value in position.ImagePositionPatient]

    path = write_enhanced(tmp_path / "scan.dcm", several(2), values={"stack": [1, 2]}, change=move)
    assert [(info.part, info.usable) for info in list_series(path)] == [("stack 1", True), ("stack 2", True)]
    with pytest.raises(DataError, match=r"2 volumes under one series.*@1.*@2") as caught:
        read_volume(path)
    assert caught.value.code == "several_series"


def test_frames_that_nothing_tells_apart_are_refused(tmp_path):
    path = write_enhanced(tmp_path / "scan.dcm", several(2))
    with pytest.raises(DataError, match="8 slices at 4 places") as caught:
        read_volume(path)
    assert caught.value.code == "duplicate_slices"
    (info,) = list_series(path)
    assert not info.usable and "8 slices at 4 places" in info.why_not


def test_a_missing_frame_is_refused_as_a_missing_slice_is(tmp_path):
    def without_one(data):
        places = [
            frame.PlanePositionSequence[0].ImagePositionPatient for frame in data.PerFrameFunctionalGroupsSequence
        ]
        middle = int(np.argsort([place[2] for place in places])[2])
        data.PerFrameFunctionalGroupsSequence = [
            frame for number, frame in enumerate(data.PerFrameFunctionalGroupsSequence) if number != middle
        ]
        size = len(data.PixelData) // data.NumberOfFrames
        data.PixelData = data.PixelData[: middle * size] + data.PixelData[(middle + 1) * size :]
        data.NumberOfFrames -= 1

    scan = a_scan(np.int16, (6, 4, 6))
    path = write_enhanced(tmp_path / "scan.dcm", scan, change=without_one)
    with pytest.raises(DataError, match=r"5 slices, mostly .* 1 missing") as caught:
        read_volume(path)
    assert caught.value.code == "slice_gap"
    assert read_volume(path, resample_slices=True).array.shape == scan.array.shape


def damaged_groups(name):
    def change(data):
        match name:
            case "positions":
                for frame in data.PerFrameFunctionalGroupsSequence:
                    del frame.PlanePositionSequence
            case "orientation":
                del data.SharedFunctionalGroupsSequence[0].PlaneOrientationSequence
            case "few":
                data.PerFrameFunctionalGroupsSequence = data.PerFrameFunctionalGroupsSequence[:2]
            case "none":
                del data.PerFrameFunctionalGroupsSequence

    return change


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("positions", "ImagePositionPatient is missing"),
        ("orientation", "ImageOrientationPatient is missing"),
        ("few", "4 frames, but not as many functional groups"),
        ("none", "4 frames, but not as many functional groups"),
    ],
)
def test_groups_that_do_not_place_every_frame_are_refused(tmp_path, name, message):
    path = write_enhanced(tmp_path / "scan.dcm", OBLIQUE, change=damaged_groups(name))
    with pytest.raises(DataError, match=message) as caught:
        read_volume(path)
    assert caught.value.code == "unreadable"
    assert message in list_series(path)[0].why_not


def test_a_series_may_have_several_enhanced_files(tmp_path):
    halves = [OBLIQUE.array[:, :2], OBLIQUE.array[:, 2:]]
    for number, half in enumerate(halves):
        affine = OBLIQUE.affine.copy()
        affine[:, 3] = OBLIQUE.affine @ [2 * number, 0, 0, 1]
        write_enhanced(tmp_path / "scan" / f"{number}.dcm", Volume(np.ascontiguousarray(half), affine))
    read = read_volume(tmp_path / "scan").array
    assert any(np.array_equal(read[0], OBLIQUE.array[0, ::step]) for step in (1, -1))


def test_names_of_parts():
    assert split_part("1.2.3") == ("1.2.3", None)
    assert split_part("1.2.3@12") == ("1.2.3", 12)
    assert split_part("1.2.3@x") == ("1.2.3@x", None)


def test_itk_reads_the_same_grid_from_single_slices(tmp_path):
    """The enhanced reader and the classic one agree, and ITK with the latter."""
    classic = read_volume(write_series(tmp_path / "classic", OBLIQUE))
    enhanced = read_volume(write_enhanced(tmp_path / "scan.dcm", OBLIQUE))
    assert np.array_equal(classic.array, enhanced.array) and np.allclose(classic.affine, enhanced.affine, atol=1e-6)
    files = SimpleITK.ImageSeriesReader.GetGDCMSeriesFileNames(str(tmp_path / "classic"))
    values, affine = itk_read(list(files))
    assert np.array_equal(values, enhanced.array[0]) and np.allclose(affine, enhanced.affine, atol=1e-4)
