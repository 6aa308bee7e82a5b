from __future__ import annotations

import gc
import logging
import shutil
import warnings
import zipfile
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
from dicom_scans import SECRET, SERIES, along_z, one_slice, recode, save, write_enhanced, write_series
from pydicom import dcmread
from pydicom.fileset import FileSet
from pydicom.uid import (
    JPEG2000Lossless,
    JPEGBaseline8Bit,
    JPEGExtended12Bit,
    JPEGLosslessSV1,
    JPEGLSLossless,
    RLELossless,
)
from reader_contract import a_scan

from sagittal.errors import DataError
from sagittal.volumes import read_volume
from sagittal.volumes.dicom_catalogue import choose_series, list_series
from sagittal.volumes.dicom_files import split_series, with_series
from sagittal.volumes.io import is_dicom, is_scan, read_header, scan_files, scan_name

STUDY = "1.2.826.0.1.3680043.8.498.7"
SR, SEG, RTSTRUCT, CAPTURE = (f"1.2.840.10008.5.1.4.1.1.{end}" for end in ("88.11", "66.4", "481.3", "7"))


def of_study(number: int, description: str, study: str = STUDY, more=None):
    def change(data, index):
        data.StudyInstanceUID, data.StudyDescription = study, "abdomen"
        data.SeriesNumber, data.SeriesDescription = number, description
        data.InstanceNumber = index + 1
        data.StudyID, data.StudyDate, data.StudyTime = "1", "20200101", "120000"
        if more is not None:
            more(data, index)

    return change


def an_object(path, kind: str, number: int, modality: str, **values) -> None:
    data = one_slice(a_scan().array[0, 0], f"{SERIES}.{number}", modality)
    of_study(number, modality)(data, 0)
    data.SOPClassUID = data.file_meta.MediaStorageSOPClassUID = kind
    for name, value in values.items():
        setattr(data, name, value)
    path.parent.mkdir(parents=True, exist_ok=True)
    save(data, path)


def a_study(folder):
    """Write a CT of 6 slices, one of 4, an MR, and what comes with them."""
    uids = {number: f"{SERIES}.{number}" for number in (2, 3, 4)}
    write_series(
        folder / "a", a_scan(np.int16, (6, 5, 4)), series_uid=uids[2], modality="CT", change=of_study(2, "thin")
    )
    write_series(
        folder / "b", a_scan(np.int16, (4, 5, 4)), series_uid=uids[3], modality="CT", change=of_study(3, "thick")
    )
    other = f"{STUDY}.1"
    mr = of_study(4, "t2_tse", other)
    write_series(folder / "c" / "d", a_scan(np.int16, (3, 7, 9)), series_uid=uids[4], modality="MR", change=mr)
    place = {"ImagePositionPatient": [0, 0, 0], "ImageOrientationPatient": [1, 0, 0, 0, 1, 0]}
    ct = "1.2.840.10008.5.1.4.1.1.2"
    an_object(folder / "scout.dcm", ct, 1, "CT", ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"], **place)
    an_object(folder / "dose.dcm", CAPTURE, 501, "CT")
    an_object(folder / "report", SR, 600, "SR")
    an_object(folder / "seg.dcm", SEG, 601, "SEG")
    an_object(folder / "rt.dcm", RTSTRUCT, 602, "RTSTRUCT")
    (folder / "notes.txt").write_text("no DICOM")
    return uids


def as_zip(folder, path):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for file in sorted(folder.rglob("*")):
            if file.is_file():
                archive.write(file, file.relative_to(folder))
    return path


def as_dicomdir(folder, target):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        files = FileSet()
        for file in sorted(folder.rglob("*")):
            if file.is_file() and file.suffix != ".txt" and file.name not in ("seg.dcm", "rt.dcm", "report"):
                files.add(file)
        files.write(target)
        # It leaves its temporary folder to the collector, which would warn in the middle of some other test.
        del files
        gc.collect()
    return target / "DICOMDIR"


def test_every_series_of_a_study_is_listed_with_the_reason_why_it_is_no_volume(tmp_path):
    uids = a_study(tmp_path)
    found = list_series(tmp_path)
    assert [(info.series_number, info.modality, info.frames, info.usable) for info in found] == [
        (1, "CT", 1, False),
        (2, "CT", 6, True),
        (3, "CT", 4, True),
        (501, "CT", 1, False),
        (600, "SR", 1, False),
        (601, "SEG", 1, False),
        (602, "RTSTRUCT", 1, False),
        (4, "MR", 3, True),
    ]
    reasons = {info.series_number: info.why_not for info in found if not info.usable}
    assert reasons == {
        1: "a localizer",
        501: "a secondary capture, no scan",
        600: "Basic Text SR Storage, no scan",
        601: "Segmentation Storage, no scan",
        602: "RT Structure Set Storage, no scan",
    }
    thin = found[1]
    assert (thin.series_uid, thin.description, thin.study_description) == (uids[2], "thin", "abdomen")
    assert (thin.shape, thin.files, thin.study_uid) == ((6, 5, 4), 6, STUDY)
    assert thin.spacing_mm == pytest.approx(a_scan().spacing_mm)
    assert thin.transfer_syntax == "Explicit VR Little Endian"
    assert SECRET not in str([asdict(info) for info in found])
    assert {len(info.patient_key) for info in found} == {8}
    assert len({info.patient_key for info in found}) == 1


def test_a_zip_and_a_dicomdir_list_what_their_folder_does(tmp_path):
    uids = a_study(tmp_path / "study")
    found = list_series(tmp_path / "study")
    assert list_series(as_zip(tmp_path / "study", tmp_path / "study.zip")) == found
    directory = as_dicomdir(tmp_path / "study", tmp_path / "cd")
    images = [info for info in found if info.series_number < 600]
    assert sorted(list_series(directory), key=lambda info: info.series_number) == sorted(
        images, key=lambda info: info.series_number
    )
    assert sorted(list_series(tmp_path / "cd"), key=str) == sorted(list_series(directory), key=str)
    for path in (tmp_path / "study.zip", directory, tmp_path / "cd", tmp_path / "study"):
        assert is_scan(path) and is_dicom(path)
        expected = read_volume(tmp_path / "study" / "b")
        for read in (read_volume(path, series_uid=uids[3]), read_volume(with_series(path, "3"))):
            assert np.array_equal(read.array, expected.array) and np.array_equal(read.affine, expected.affine)
        with pytest.raises(DataError, match="3 series") as caught:
            read_volume(path)
        assert caught.value.code == "several_series" and SECRET not in caught.value.message


def test_a_path_may_name_a_series(tmp_path, monkeypatch):
    uids = a_study(tmp_path / "study")
    path = with_series(tmp_path / "study", uids[4])
    assert split_series(path) == (tmp_path / "study", uids[4])
    assert (is_scan(path), is_dicom(path), scan_name(path)) == (True, True, "study")
    assert read_volume(path).array.shape == (1, 3, 7, 9)
    assert read_header(path).geometry.shape == (3, 7, 9)
    assert scan_files(path) == scan_files(tmp_path / "study")
    real = tmp_path / "ward#7"
    shutil.copytree(tmp_path / "study" / "a", real)
    assert split_series(real) == (real, None)
    assert read_volume(real).array.shape == (1, 6, 5, 4)
    monkeypatch.chdir(tmp_path / "study")
    assert read_volume(with_series(Path(), uids[4])).array.shape == (1, 3, 7, 9)
    with pytest.raises(DataError, match="no series 9"):
        read_volume(with_series(tmp_path / "study", "9"))
    (tmp_path / "x.nii").write_bytes(b"")
    with pytest.raises(DataError, match=r"no DICOM, so that there is no series 1\.2"):
        read_volume(with_series(tmp_path / "x.nii", "1.2"))


def test_the_only_usable_series_is_chosen_else_the_largest_of_the_modality(tmp_path):
    a_study(tmp_path)
    found = list_series(tmp_path)
    assert choose_series(found, "CT").description == "thin"
    assert choose_series(found, "MR").description == "t2_tse"
    assert choose_series([info for info in found if info.description != "thin"], "CT").description == "thick"
    assert choose_series([info for info in found if info.modality != "CT"]).modality == "MR"
    with pytest.raises(DataError, match="no PT among 3 series") as caught:
        choose_series(found, "PT")
    assert caught.value.code == "no_series" and "thin" not in caught.value.message
    with pytest.raises(DataError, match=r"no series that is a volume.*a localizer"):
        choose_series([info for info in found if not info.usable])


def test_ambiguity_is_an_error_that_lists_the_series(tmp_path):
    a_study(tmp_path)
    thin = next(info for info in list_series(tmp_path) if info.description == "thin")
    twin = replace(thin, series_uid="1.9", series_number=9)
    with pytest.raises(DataError, match=r"2 series fit equally well: .*number 2.*number 9, 1\.9") as caught:
        choose_series([thin, twin], "CT")
    assert caught.value.code == "several_series"
    scout = replace(twin, description="Topogram 0.6")
    assert choose_series([thin, scout], "CT") == thin
    assert choose_series([thin, replace(twin, capture=True)], "CT") == thin


@pytest.mark.parametrize(
    ("channel", "expected"),
    [("T1", "t1_mprage"), ("T1ce", "t1_mprage +c"), ("t2w", "T2 TSE"), ("FLAIR", "t2_flair_dark-fluid")],
)
def test_contrasts_of_mr_are_told_by_their_descriptions(tmp_path, channel, expected):
    a_study(tmp_path)
    mr = next(info for info in list_series(tmp_path) if info.modality == "MR")
    names = ("t1_mprage", "t1_mprage +c", "T2 TSE", "t2_flair_dark-fluid")
    study = [replace(mr, description=name, series_uid=f"1.{place}") for place, name in enumerate(names)]
    assert choose_series(study, "MR", channel).description == expected
    with pytest.raises(DataError, match="is described as ADC"):
        choose_series(study, "MR", "ADC")
    with pytest.raises(DataError, match="2 series fit equally well"):
        choose_series([*study, *(replace(info, series_uid=info.series_uid + ".1") for info in study)], "MR", channel)


def test_secondary_captures_that_say_where_they_lie_win_only_where_there_is_nothing_else(tmp_path):
    def capture(data, index):
        data.SOPClassUID = data.file_meta.MediaStorageSOPClassUID = CAPTURE

    large, uid = a_scan(np.int16, (9, 5, 4)), f"{SERIES}.5"
    write_series(tmp_path / "captures", large, series_uid=uid, modality="CT", change=of_study(5, "mip", more=capture))
    assert read_volume(tmp_path).array.shape == large.array.shape
    write_series(tmp_path / "scan", a_scan(), modality="CT", change=of_study(2, "thin"))
    found = list_series(tmp_path)
    assert [(info.usable, info.capture) for info in found] == [(True, False), (True, True)]
    assert choose_series(found, "CT").description == "thin"
    assert read_volume(tmp_path).array.shape == a_scan().array.shape
    assert read_volume(tmp_path, series_uid=uid).array.shape == large.array.shape


def test_captures_without_a_place_under_the_scans_series_are_left_out(tmp_path):
    write_series(tmp_path, a_scan(), change=of_study(2, "scan"))
    an_object(tmp_path / "shot.dcm", CAPTURE, 2, "MR", SeriesInstanceUID=SERIES)
    assert np.array_equal(read_volume(tmp_path).array, a_scan().array)
    assert [(info.usable, info.frames) for info in list_series(tmp_path)] == [(True, 3), (False, 1)]


def test_why_a_series_is_no_volume(tmp_path):
    scan, place = along_z(5, [0, 3, 6, 12, 15])
    write_series(tmp_path / "gap", scan, change=of_study(1, "gap", more=place))
    (gap,) = list_series(tmp_path / "gap")
    assert (gap.usable, gap.shape, gap.spacing_mm) == (False, (5, 6, 7), None)
    assert gap.why_not == "5 slices, mostly 3 mm apart, but 6 mm between slices 3 and 4: 1 missing"
    write_series(tmp_path / "one", a_scan(np.int16, (1, 5, 4)))
    assert list_series(tmp_path / "one")[0].why_not == "a series of one slice"


def test_echoes_under_one_series_are_listed_and_chosen(tmp_path):
    scan, place = along_z(6, [0, 0, 3, 3, 6, 6])

    def echoes(data, index):
        place(data, index)
        data.EchoTime = 10 + 70 * (index % 2)

    write_series(tmp_path, scan, change=of_study(3, "dual echo", more=echoes))
    found = list_series(tmp_path)
    assert [(info.series_uid, info.part) for info in found] == [
        (f"{SERIES}@1", "EchoTime 10"),
        (f"{SERIES}@2", "EchoTime 80"),
    ]
    assert np.array_equal(read_volume(tmp_path, series_uid=f"{SERIES}@2").array[0], scan.array[0, 1::2])
    assert np.array_equal(read_volume(with_series(tmp_path, "3@1")).array[0], scan.array[0, ::2])
    with pytest.raises(DataError, match=r"2 series fit equally well.*EchoTime 10.*EchoTime 80"):
        choose_series(found, "MR")


def test_copies_of_files_count_once(tmp_path):
    write_series(tmp_path, a_scan())
    file = min(tmp_path.iterdir())
    (tmp_path / "copies").mkdir()
    shutil.copy(file, tmp_path / "copies" / "again.dcm")
    assert np.array_equal(read_volume(tmp_path).array, a_scan().array)
    (info,) = list_series(tmp_path)
    assert info.usable and info.frames == 3
    other = dcmread(file)
    other.PixelData = bytes(len(other.PixelData))
    other.save_as(tmp_path / "copies" / "again.dcm")
    with pytest.raises(DataError, match="4 slices at 3 places") as caught:
        read_volume(tmp_path)
    assert caught.value.code == "duplicate_slices"


def test_a_damaged_file_spoils_the_series_that_it_lies_with_and_no_other(tmp_path):
    uids = a_study(tmp_path)
    (tmp_path / "a" / "cut.dcm").write_bytes(min((tmp_path / "a").iterdir()).read_bytes()[:300])
    found = list_series(tmp_path)
    states = {info.description: info.usable for info in found if info.series_number in (2, 3, 4)}
    assert states == {"thin": False, "thick": True, "t2_tse": True}
    assert found[-1].why_not.startswith("damaged: a/cut.dcm: ") and found[-1].files == 1
    assert "a damaged file lies beside it: a/cut.dcm" in found[1].why_not
    assert choose_series(found, "CT").description == "thick"
    assert read_volume(tmp_path, series_uid=uids[3]).array.shape == (1, 4, 5, 4)
    with pytest.raises(DataError, match=r"a/cut\.dcm"):
        read_volume(tmp_path, series_uid=uids[2])


def _run_on(content: bytes, tag: bytes) -> bytes:
    """Forge the length of a tag so that its value runs on through the patient's name."""
    place = content.index(tag)
    return content[: place + 6] + b"\xf0\x01" + content[place + 8 :]


@pytest.mark.parametrize(
    ("tag", "in_header"), [(b"\x02\x00\x02\x00UI", True), (b"\x02\x00\x10\x00UI", True), (b"\x08\x00\x60\x00CS", False)]
)
def test_a_forged_length_puts_no_patient_into_a_message(tmp_path, tag, in_header):
    a_study(tmp_path)
    for path in list(tmp_path.rglob("*.dcm")):
        path.write_bytes(_run_on(path.read_bytes(), tag))
    try:
        found = list_series(tmp_path)
        told = str([replace(info, description="", study_description="") for info in found])
        choose_series(found)
    except DataError as error:
        told = error.message
    assert SECRET not in told and (not in_header or "no scan" in told or "makes no sense" in told or "damaged" in told)


def test_dicomdirs_that_refer_to_nothing_or_out_of_their_folder_are_refused(tmp_path):
    a_study(tmp_path / "study")
    directory = as_dicomdir(tmp_path / "study", tmp_path / "cd")
    assert sorted(scan_files(directory)) == sorted(file for file in (tmp_path / "cd").rglob("*") if file.is_file())
    victim = next(file for file in (tmp_path / "cd").rglob("*") if file.is_file() and file != directory)
    lower = victim.with_name(victim.name.lower())
    victim.rename(lower)
    count = sum(info.files for info in list_series(tmp_path / "cd"))
    lower.unlink()
    with pytest.raises(DataError, match=rf"1 of the {count} files that it refers to are not there") as caught:
        list_series(directory)
    assert caught.value.code == "missing"
    data = dcmread(directory)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for record in data.DirectoryRecordSequence:
            if "ReferencedFileID" in record:
                record.ReferencedFileID = ["..", "..", "etc", "passwd"]
    save(data, directory)
    with pytest.raises(DataError, match="refers to a file out of its folder") as caught:
        read_volume(directory)
    assert caught.value.code == "unsafe_archive"
    del data.DirectoryRecordSequence
    save(data, directory)
    with pytest.raises(DataError, match="it lists no files"):
        list_series(directory)


def test_folders_without_dicom_are_refused(tmp_path):
    with pytest.raises(DataError, match="no DICOM file in it"):
        list_series(tmp_path)


def mutated(content: bytes, rng) -> bytes:
    """Return a file with one kind of damage: cut, bytes changed, taken out or put in, or a forged length."""
    damage = bytearray(content)
    place = int(rng.integers(132, len(damage)))
    noise = rng.integers(0, 256, int(rng.integers(1, 40)), dtype=np.uint8).tobytes()
    match rng.integers(5):
        case 0:
            del damage[place:]
        case 1:
            damage[place : place + len(noise)] = noise
        case 2:
            del damage[place : place + len(noise)]
        case 3:
            damage[place:place] = noise
        case _:
            place = int(rng.integers(132, min(len(damage), 1500)))
            damage[place : place + 4] = rng.choice([b"\xff\xff\xff\xff", b"\xff\xff\xff\x7f", b"\0\0\0\0"])
    return bytes(damage)


@pytest.mark.parametrize(
    "syntax",
    [
        "plain",
        "enhanced",
        JPEGBaseline8Bit,
        JPEGExtended12Bit,
        JPEGLosslessSV1,
        JPEGLSLossless,
        JPEG2000Lossless,
        RLELossless,
    ],
)
def test_mutated_files_are_refused_by_name_or_read(tmp_path, syntax, caplog, capsys):
    caplog.set_level(logging.DEBUG)
    rng = np.random.default_rng(int.from_bytes(str(syntax).encode()) % 2**32)
    kind = np.uint8 if syntax in (JPEGBaseline8Bit, JPEGExtended12Bit) else np.int16
    scan = a_scan(kind, (3, 16, 17))
    if syntax == "enhanced":
        write_enhanced(tmp_path / "scan.dcm", scan)
    else:
        write_series(tmp_path, scan)
    if syntax not in ("plain", "enhanced"):
        recode(tmp_path, syntax)
    file = min(tmp_path.iterdir())
    whole, refused = file.read_bytes(), 0
    for _ in range(40):
        file.write_bytes(mutated(whole, rng))
        for info in list_series(tmp_path):
            assert SECRET not in info.why_not
        try:
            read_volume(tmp_path)
        except DataError as error:
            refused += 1
            assert error.message.startswith(f"{tmp_path}: ") and SECRET not in error.message
            assert error.__cause__ is None and (error.__context__ is None or error.__suppress_context__)
    assert refused > 5
    assert SECRET not in caplog.text and SECRET not in capsys.readouterr().out
