from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from sagittal.errors import DataError
from sagittal.inference import series_choice
from sagittal.inference.series_choice import modality_of, series_of
from sagittal.volumes.dicom_catalogue import SeriesInfo


def a_series(
    number: int, modality: str = "CT", depth: int = 9, *, usable: bool = True, lossy: bool = False
) -> SeriesInfo:
    return SeriesInfo(
        study_uid="1",
        series_uid=f"1.{number}",
        modality=modality,
        description="",
        study_description="",
        patient_key="",
        files=depth,
        frames=depth,
        shape=(depth, 8, 7),
        spacing_mm=(1.0, 1.0, 1.0) if usable else None,
        series_number=number,
        transfer_syntax="JPEG 2000",
        usable=usable,
        why_not="" if usable else "a gap",
        lossy=lossy,
    )


@pytest.fixture
def study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, list[SeriesInfo]]:
    """A folder, and the list of series that it will be said to hold."""
    found: list[SeriesInfo] = []
    monkeypatch.setattr(series_choice, "list_series", lambda path: tuple(found))
    folder = tmp_path / "study"
    folder.mkdir()
    return folder, found


def test_a_scan_that_is_no_dicom_and_the_only_series_stay_as_they_are(study: tuple[Path, list[SeriesInfo]]) -> None:
    folder, found = study
    image = folder / "c.nii.gz"
    image.touch()
    assert series_of([image], ["CT"]) == ((image,), ())
    found.append(a_series(1))
    assert series_of([folder], ["CT"]) == ((folder,), ())


def test_the_chosen_series_is_named_and_flagged(study: tuple[Path, list[SeriesInfo]]) -> None:
    folder, found = study
    found.extend([a_series(1, "MR"), a_series(2, depth=5), a_series(3), a_series(4, usable=False)])
    (path,), (flag,) = series_of([folder], ["CT"])
    assert path.name == "study#1.3"
    assert flag.code == "series"
    assert flag.message == "study: series 3 (CT, 9 x 8 x 7) was taken for CT, of 3 in it"


def test_the_only_usable_series_beside_others_is_named_without_a_flag(study: tuple[Path, list[SeriesInfo]]) -> None:
    folder, found = study
    found.extend([a_series(1), a_series(2, usable=False)])
    (path,), flags = series_of([folder], ["CT"])
    assert (path.name, flags) == ("study#1.1", ())


def test_loss_is_flagged_for_chosen_and_named_series(study: tuple[Path, list[SeriesInfo]]) -> None:
    folder, found = study
    found.append(a_series(1, lossy=True))
    assert [flag.code for flag in series_of([folder], ["CT"])[1]] == ["lossy"]
    found.append(a_series(2))
    for name, codes in (("1.1", ["lossy"]), ("1", ["lossy"]), ("1.2", []), ("2", [])):
        named = folder.with_name(f"study#{name}")
        (path,), flags = series_of([named], ["CT"])
        assert path == named
        assert [flag.code for flag in flags] == codes
    assert "compressed with loss (JPEG 2000)" in series_of([folder.with_name("study#1")], ["CT"])[1][0].message


def test_what_can_not_be_chosen_is_an_error_that_names_the_study(study: tuple[Path, list[SeriesInfo]]) -> None:
    folder, found = study
    found.extend([a_series(1), a_series(2)])
    with pytest.raises(DataError, match="study: 2 series fit equally well") as caught:
        series_of([folder], ["CT"])
    assert caught.value.code == "several_series"
    with pytest.raises(DataError, match="no MR among 2 series"):
        series_of([folder], ["T2"])


def test_where_nothing_is_usable_reading_says_why(study: tuple[Path, list[SeriesInfo]]) -> None:
    folder, found = study
    found.extend([a_series(1, usable=False), a_series(2, usable=False)])
    assert series_of([folder], ["CT"]) == ((folder,), ())


@pytest.mark.parametrize("others", [[], [a_series(2, depth=5)]], ids=["alone", "the largest"])
def test_one_series_is_not_taken_for_two_channels(
    study: tuple[Path, list[SeriesInfo]], others: list[SeriesInfo]
) -> None:
    folder, found = study
    found.extend([a_series(1), *others])
    with pytest.raises(DataError) as caught:
        series_of([folder, folder], ["arterial", "venous"])
    assert caught.value.code == "channel_count"
    assert "series 1 (CT, 9 x 8 x 7) would be both arterial and venous" in caught.value.message


@pytest.mark.parametrize("second", ["1.1", "1"])
def test_naming_one_series_for_two_channels_is_refused_by_uid_and_by_number(
    study: tuple[Path, list[SeriesInfo]], second: str
) -> None:
    folder, found = study
    found.extend([a_series(1), a_series(2)])
    named = [folder.with_name(f"study#{name}") for name in ("1.1", second)]
    with pytest.raises(DataError) as caught:
        series_of(named, ["T1", "T2"])
    assert caught.value.code == "channel_count"
    apart = (named[0], folder.with_name("study#2"))
    assert series_of(apart, ["T1", "T2"]) == (apart, ())


def test_volumes_of_one_series_are_channels_of_their_own(study: tuple[Path, list[SeriesInfo]]) -> None:
    folder, found = study
    found.extend([replace(a_series(1), series_uid="1.1@1"), replace(a_series(1), series_uid="1.1@2")])
    paths = (folder.with_name("study#1.1@1"), folder.with_name("study#1@2"))
    assert series_of(paths, ["echo 1", "echo 2"]) == (paths, ())
    with pytest.raises(DataError, match="both echo 1 and echo 2"):
        series_of((paths[1], folder.with_name("study#1.1@2")), ["echo 1", "echo 2"])


def test_series_of_two_folders_may_share_a_uid(study: tuple[Path, list[SeriesInfo]], tmp_path: Path) -> None:
    folder, found = study
    other = tmp_path / "other"
    other.mkdir()
    found.append(a_series(1))
    assert series_of([folder, other], ["T1", "T2"]) == ((folder, other), ())


@pytest.mark.parametrize(
    ("channel", "modality"), [("CT", "CT"), ("FLAIR", "MR"), ("t1ce", "MR"), ("PET", "PT"), ("intensity", None)]
)
def test_names_of_channels_stand_for_modalities(channel: str, modality: str | None) -> None:
    assert modality_of(channel) == modality
