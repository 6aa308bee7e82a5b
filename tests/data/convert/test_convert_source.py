from __future__ import annotations

import io
import stat
import tarfile
import zipfile
from pathlib import Path

import pytest

from sagittal.data.convert import source as module
from sagittal.data.convert.source import open_source
from sagittal.errors import DataError

CONTENT = {"a/one.txt": b"1", "a/deep/two.txt": b"22", "three.txt": b"333"}


def tar_of(path: Path, members: list[tarfile.TarInfo], mode: str = "w") -> Path:
    with tarfile.open(path, mode) as archive:  # type: ignore[call-overload]
        for member in members:
            member.size = 3 if member.isfile() else 0
            archive.addfile(member, io.BytesIO(b"abc") if member.isfile() else None)
    return path


def member(name: str, kind: bytes = tarfile.REGTYPE, link: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, link
    return info


def zip_of(path: Path, name: str, content: bytes = b"abc", mode: int = 0) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        info = zipfile.ZipInfo(name)
        info.external_attr = mode << 16
        archive.writestr(info, content)
    return path


@pytest.fixture(params=["folder", ".tar", ".tar.gz", ".tgz", ".zip"])
def given(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    folder = tmp_path / "given"
    for name, content in {**CONTENT, "__MACOSX/a/one.txt": b"", "a/._one.txt": b"", ".DS_Store": b""}.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    if request.param == "folder":
        return folder
    path = tmp_path / f"given{request.param}"
    files = [file for file in sorted(folder.rglob("*")) if file.is_file()]
    if request.param == ".zip":
        with zipfile.ZipFile(path, "w") as archive:
            archive.mkdir("a")
            for file in files:
                archive.write(file, file.relative_to(folder).as_posix())
    else:
        with tarfile.open(path, "w" if request.param == ".tar" else "w:gz") as tar:
            tar.add(folder / "a", "./a", recursive=False)
            for file in files:
                tar.add(file, "./" + file.relative_to(folder).as_posix())
    return path


def test_files_are_found_and_read_wherever_they_are(given: Path) -> None:
    with open_source([given]) as source:
        assert sorted(source.names) == sorted(CONTENT)
        assert source.given == (given.name,)
        for name, content in CONTENT.items():
            assert source.text(name) == content.decode()
            with source.open(name) as file:
                assert file.read() == content
            path = source.path(name)
            assert path is None if given.is_file() else path is not None and path.read_bytes() == content


@pytest.mark.parametrize("name", ["../evil", "a/../../evil", "/etc/evil", "a\\..\\evil", "C:/evil"])
@pytest.mark.parametrize("kind", [".tar", ".zip"])
def test_names_that_lead_out_of_an_archive_are_refused(tmp_path: Path, name: str, kind: str) -> None:
    path = tmp_path / f"bad{kind}"
    archive = zip_of(path, name) if kind == ".zip" else tar_of(path, [member(name)])
    with pytest.raises(DataError, match="leads out of the archive") as caught, open_source([archive]):
        pass
    assert caught.value.code == "unsafe_archive"


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE])
def test_links_and_devices_are_refused(tmp_path: Path, kind: bytes) -> None:
    archive = tar_of(tmp_path / "bad.tar", [member("a/link", kind, "/etc/hostname")])
    with pytest.raises(DataError, match="'a/link' is a link or a device"), open_source([archive]):
        pass
    archive = zip_of(tmp_path / "bad.zip", "link", b"/etc/hostname", stat.S_IFLNK | 0o777)
    with pytest.raises(DataError, match="'link' is a link"), open_source([archive]):
        pass


def test_far_too_many_files_or_bytes_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    archives = [
        tar_of(tmp_path / "many.tar", [member(f"{number}") for number in range(4)]),
        zip_of(tmp_path / "long.zip", "x", b"0" * 1000),
    ]
    monkeypatch.setattr(module, "MAX_FILES", 2)
    monkeypatch.setattr(module, "MAX_BYTES", 999)
    (tmp_path / "folder").mkdir()
    for number in range(3):
        (tmp_path / "folder" / str(number)).write_bytes(b"")
    for path in (*archives, tmp_path / "folder"):
        with pytest.raises(DataError, match="more than 2 files or 999 bytes") as caught, open_source([path]):
            pass
        assert caught.value.code == "too_large"


def test_what_is_no_archive_is_told(tmp_path: Path) -> None:
    for name, message in (
        ("none.zip", "no such file or folder"),
        ("scan.nii.gz", r"neither a folder nor one of \.tar"),
        ("torn.zip", "Expected a whole archive"),
        ("torn.tar", "Expected a whole archive"),
        ("torn.tar.gz", "can't be read"),
    ):
        if name != "none.zip":
            (tmp_path / name).write_bytes(b"torn" * 400)
        with pytest.raises(DataError, match=message), open_source([tmp_path / name]):
            pass


def test_an_encrypted_archive_is_told(tmp_path: Path) -> None:
    archive = zip_of(tmp_path / "secret.zip", "x")
    content = bytearray(archive.read_bytes())
    content[content.index(b"PK\x01\x02") + 8] |= 1
    archive.write_bytes(content)
    with pytest.raises(DataError, match="x is encrypted"), open_source([archive]):
        pass


def test_a_damaged_member_is_told_when_it_is_read(tmp_path: Path) -> None:
    archive = zip_of(tmp_path / "flipped.zip", "x", b"voxels")
    content = archive.read_bytes().replace(b"voxels", b"voxelz")
    archive.write_bytes(content)
    with open_source([archive]) as source, pytest.raises(DataError, match=r"x: can't be read .*archive is damaged"):
        source.text("x")


def test_a_text_that_is_far_too_long_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_TEXT_BYTES", 2)
    archive = zip_of(tmp_path / "long.zip", "x", b"abc")
    with open_source([archive]) as source, pytest.raises(DataError, match="not a text file of at most 2 bytes"):
        source.text("x")


def test_a_packed_tar_is_read_in_its_order(tmp_path: Path) -> None:
    archive = tar_of(tmp_path / "b.tar.gz", [member("b"), member("a"), member("c")], "w:gz")
    with open_source([archive]) as source:
        assert source.names == ("b", "a", "c")
    assert list(tmp_path.iterdir()) == [archive]
