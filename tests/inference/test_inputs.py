from __future__ import annotations

from pathlib import Path

import pytest

from sagittal.data.dataset import Case
from sagittal.errors import DataError
from sagittal.inference.inputs import find_cases

TWO = ["T1", "FLAIR"]


def touch(folder: Path, *names: str) -> list[Path]:
    paths = [folder / name for name in names]
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return paths


def ids(folder: Path, channels: list[str]) -> list[str]:
    return [case.id for case in find_cases(folder, channels).good]


def test_a_flat_folder_with_what_does_not_belong_in_it(tmp_path: Path) -> None:
    touch(tmp_path, "b_0000.nii.gz", "a_0000.nii.gz", "notes.txt", ".hidden_0000.nii.gz", "download.zip")
    assert ids(tmp_path, ["CT"]) == ["a", "b"]


def test_a_data_set_gives_its_test_cases_else_those_to_train_on(tmp_path: Path) -> None:
    touch(tmp_path, "dataset.json", "imagesTr/a_0000.nii.gz", "labelsTr/a.nii.gz")
    assert ids(tmp_path, ["CT"]) == ["a"]
    touch(tmp_path, "imagesTs/z_0000.nii.gz")
    assert ids(tmp_path, ["CT"]) == ["z"]


def test_nested_folders_give_their_place(tmp_path: Path) -> None:
    touch(tmp_path, "a/one_0000.nii", "a/one_0001.nii", "b/c/one_0000.nii", "b/c/one_0001.nii")
    found = find_cases(tmp_path, TWO)
    assert [case.id for case in found.good] == ["a/one", "b/c/one"]
    assert found.good[1].images == (tmp_path / "b/c/one_0000.nii", tmp_path / "b/c/one_0001.nii")


def test_the_output_folder_is_not_searched(tmp_path: Path) -> None:
    touch(tmp_path, "a_0000.nii", "out/a.nii")
    assert [case.id for case in find_cases(tmp_path, ["CT"], out=tmp_path / "out").good] == ["a"]
    assert len(find_cases(tmp_path, ["CT"]).good) == 2


def test_folders_of_slices_are_scans_at_any_depth(tmp_path: Path) -> None:
    touch(tmp_path, "readme.txt", "p1/s1/1.dcm", "p1/s1/2.dcm", "p1/s2/1.IMA", "p2/0001")
    (tmp_path / "p2" / "0001").write_bytes(bytes(128) + b"DICM")
    found = find_cases(tmp_path, ["CT"])
    assert [case.id for case in found.good] == ["p1/s1", "p1/s2", "p2"]
    assert find_cases(tmp_path / "p1" / "s1", ["CT"]).good == (Case("s1", (tmp_path / "p1" / "s1",)),)


def test_a_year_at_the_end_of_a_name_is_no_channel(tmp_path: Path) -> None:
    touch(tmp_path, "scan_2021.nii.gz", "scan_2022.nii.gz")
    assert ids(tmp_path, ["CT"]) == ["scan_2021", "scan_2022"]


def test_channels_of_one_case_are_not_cases_of_a_model_with_one_channel(tmp_path: Path) -> None:
    touch(tmp_path, *(f"p1_{number:04d}.nii.gz" for number in range(4)), "p2_0000.nii.gz", "p3_0001.nii.gz")
    found = find_cases(tmp_path, ["CT"])
    assert [case.id for case in found.good] == ["p2", "p3_0001"]
    assert [(bad.id, bad.error.code) for bad in found.bad] == [("p1", "undeclared_channel")]
    assert "p1_0001.nii.gz" in found.bad[0].error.message


def test_a_folder_of_scans_is_not_the_one_for_outputs(tmp_path: Path) -> None:
    touch(tmp_path, "scan_0000.nii.gz")
    with pytest.raises(DataError, match="in one folder"):
        find_cases(tmp_path, ["CT"], out=tmp_path / ".")
    assert len(find_cases(tmp_path, ["CT"], out=tmp_path / "out").good) == 1


def test_a_long_row_of_numbers_is_one_of_cases(tmp_path: Path) -> None:
    touch(tmp_path, *(f"scan_{number:04d}.nii.gz" for number in range(12)))
    assert len(ids(tmp_path, ["CT"])) == 12


@pytest.mark.parametrize(
    ("name", "case"), [("scan.nii.gz", "scan"), ("scan_0000.nii", "scan"), ("a_2021.nii", "a_2021")]
)
def test_one_file_is_a_case_under_any_name(tmp_path: Path, name: str, case: str) -> None:
    (path,) = touch(tmp_path, name)
    assert find_cases(path, ["CT"]).good == find_cases(str(path), ["CT"]).good == (Case(case, (path,)),)


def test_files_of_one_channel_are_cases(tmp_path: Path) -> None:
    files = touch(tmp_path, "b.nii.gz", "a.nii.gz")
    assert [case.id for case in find_cases(files, ["CT"]).good] == ["a", "b"]


def test_files_of_the_same_name_in_two_folders_are_both_refused(tmp_path: Path) -> None:
    found = find_cases(touch(tmp_path, "one/s.nii.gz", "two/s.nii.gz", "two/t.nii.gz"), ["CT"])
    assert [case.id for case in found.good] == ["t"]
    assert [(bad.id, bad.error.code) for bad in found.bad] == [("s", "twice")]


def test_files_in_order_are_the_channels_of_a_case_but_for_numbers_in_their_names(tmp_path: Path) -> None:
    files = touch(tmp_path, "my_t1.nii", "flair.nii")
    assert find_cases(files, TWO).good == (Case("my_t1", tuple(files)),)
    first, second = touch(tmp_path, "c_0000.nii.gz", "c_0001.nii.gz")
    assert find_cases([second, first], TWO).good == (Case("c", (first, second)),)


def test_the_folder_or_archive_of_a_series_is_one_scan(tmp_path: Path) -> None:
    touch(tmp_path, "patient 1.2/series/1.dcm", "patient 1.2/series/2.dcm", "archives/a.zip", "archives/b_0000.zip")
    series, archive = tmp_path / "patient 1.2/series", tmp_path / "archives/a.zip"
    assert find_cases(series, ["CT"]).good == (Case("series", (series,)),)
    assert find_cases([series], ["CT"]).good == (Case("series", (series,)),)
    assert ids(tmp_path / "archives", ["CT"]) == ["a", "b"]
    assert find_cases(archive, ["CT"]).good == (Case("a", (archive,)),)
    (bad,) = find_cases(series, TWO).bad
    assert bad.error.code == "missing_channel" and "series_0001" in bad.error.message


def test_a_bad_case_does_not_hide_the_others(tmp_path: Path) -> None:
    touch(tmp_path, "a_0000.nii", "b_0000.nii", "b_0001.nii", "c_0000.nii", "c_0001.nii", "c_0002.nii")
    touch(tmp_path, "d_0000.nii", "d_0001.nii", "d_0001.nii.gz")
    found = find_cases(tmp_path, TWO)
    assert [case.id for case in found.good] == ["b"]
    assert [(bad.id, bad.error.code) for bad in found.bad] == [
        ("a", "missing_channel"),
        ("c", "undeclared_channel"),
        ("d", "twice"),
    ]
    assert "FLAIR" in found.bad[0].error.message and "a_0001.nii" in found.bad[0].error.message


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("list.csv", "flair,case,t1\nx/f.nii,one,x/t.nii\nf2.nii,two,t2.nii\n"),
        ("list.txt", "# T1, FLAIR\nx/t.nii,x/f.nii\n\nt2.nii , f2.nii\n"),
        ("list.tsv", "t1\tflair\tcase\nx/t.nii\tx/f.nii\tone\nt2.nii\tf2.nii\ttwo\n"),
    ],
)
def test_a_list(tmp_path: Path, name: str, text: str) -> None:
    touch(tmp_path, "x/t.nii", "x/f.nii", "t2.nii", "f2.nii")
    (tmp_path / name).write_text(text)
    found = find_cases(tmp_path / name, TWO)
    names = ["one", "two"] if "case" in text else ["t", "t2"]
    assert sorted(case.id for case in found.good) == names and found.bad == ()
    assert (tmp_path / "x/t.nii", tmp_path / "x/f.nii") in {case.images for case in found.good}


def test_bad_lines_of_a_list_fail_alone(tmp_path: Path) -> None:
    touch(tmp_path, "a.nii", "b.nii", "e.nii")
    (tmp_path / "list.csv").write_text("case,image\nok,a.nii\nempty,\ngone,absent.nii\ntwice,b.nii\ntwice,e.nii\n")
    found = find_cases(tmp_path / "list.csv", ["CT"])
    assert [case.id for case in found.good] == ["ok"]
    assert {bad.id: bad.error.code for bad in found.bad} == {
        "empty": "missing_channel",
        "gone": "unreadable",
        "twice": "twice",
    }


def test_no_name_leads_out_of_the_output_folder(tmp_path: Path) -> None:
    touch(tmp_path, "a.nii", "b.nii")
    (tmp_path / "list.csv").write_text("case,image\n../../evil,a.nii\n/etc/x:y,b.nii\n")
    assert ids(tmp_path / "list.csv", ["CT"]) == ["etc/x_y", "evil"]


@pytest.mark.parametrize("text", ["", "# nothing\n", "case,image\n"])
def test_a_list_of_nothing(tmp_path: Path, text: str) -> None:
    (tmp_path / "list.csv").write_text(text)
    with pytest.raises(DataError, match="names no case"):
        find_cases(tmp_path / "list.csv", ["CT"])


def test_a_list_that_names_half_of_the_channels(tmp_path: Path) -> None:
    (tmp_path / "list.csv").write_text("case,t1\none,a.nii\n")
    with pytest.raises(DataError, match="no column for FLAIR"):
        find_cases(tmp_path / "list.csv", TWO)


def test_what_is_no_input_is_refused(tmp_path: Path) -> None:
    touch(tmp_path, "empty/notes.md", "picture.png")
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00")
    wrong = {
        "absent": "no such file",
        "empty": "no image",
        "picture.png": "not an image that can be read",
        "binary.txt": "can't be read as text",
    }
    for name, why in wrong.items():
        with pytest.raises(DataError, match=why):
            find_cases(tmp_path / name, ["CT"])
    with pytest.raises(DataError, match="no input"):
        find_cases([], ["CT"])


def test_files_keep_the_numbers_of_the_channels_that_are_there(tmp_path: Path) -> None:
    touch(tmp_path, "a_0000.nii.gz", "a_0002.nii.gz", "b_0000.nii.gz", "b_0001.nii.gz")
    found = find_cases(tmp_path, ["T1", "T2"], numbers=(0, 2))
    assert [[image.name for image in case.images] for case in found.good] == [["a_0000.nii.gz", "a_0002.nii.gz"]]
    assert "channel 2 (T2) is missing" in found.bad[0].error.message
    (case,) = find_cases(tmp_path / "a_0002.nii.gz", ["T2"], numbers=(2,)).good
    assert case.id == "a"
