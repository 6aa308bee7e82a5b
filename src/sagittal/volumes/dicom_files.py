"""The files of a DICOM folder, zip archive or DICOMDIR, opened one at a time; nothing is unpacked onto the disk.

A path may name one series of a study: STUDY#1.2.3 is the series 1.2.3 of the folder, archive or DICOMDIR STUDY.
"""

from __future__ import annotations

import os
import re
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import BinaryIO, cast

from sagittal.errors import DataError
from sagittal.volumes.dicom_directory import is_directory_file, referenced_files

ARCHIVE_SUFFIX = ".zip"
SLICE_SUFFIXES = (".dcm", ".ima")
MAX_UNPACKED_BYTES = 16 << 30
"""A CT of 512 x 512 x 10 000 voxels has 5 GiB; an archive that unpacks to more is refused before it is read."""
MAX_FILES = 100_000
SERIES_MARK = "#"
"""Stands between the path of a study and the series in it."""
_MAGIC_AT, _MAGIC = 128, b"DICM"
_WITH_SERIES = re.compile(r"(?P<study>.+)#(?P<series>\d[\d.]*(@\d{1,6})?)", re.DOTALL)


@dataclass(frozen=True)
class Member:
    """One file of a folder or an archive.

    Attributes:
        name: its path within the folder or archive, for messages.
        open: opens it for reading; only while `members` is open.
        size: its bytes.
    """

    name: str
    open: Callable[[], BinaryIO]
    size: int


def split_series(path: Path) -> tuple[Path, str | None]:
    """Return the path of the study and the series that the path names after `#`; None where it names none."""
    found = _WITH_SERIES.fullmatch(path.name)
    if found is None or path.exists():
        return path, None
    return path.with_name(found["study"]), found["series"]


def with_series(path: Path, series_uid: str) -> Path:
    """Return a path that names one series of the study at `path`."""
    whole = path if path.name not in ("", "..") else path.resolve()
    return whole.with_name(f"{whole.name}{SERIES_MARK}{series_uid}")


def is_archive(path: Path) -> bool:
    """Whether the name says that the file is a zip archive."""
    return path.name.lower().endswith(ARCHIVE_SUFFIX)


def is_dicom_file(path: Path) -> bool:
    """Whether a file is DICOM by its content; `DICOMDIR` is one."""
    try:
        return path.is_file() and _has_magic(lambda: path.open("rb"))
    except OSError:
        return False


def holds_dicom(folder: Path) -> bool:
    """Whether a folder holds a DICOM file at any depth."""
    return folder.is_dir() and any(_is_dicom(member) for member in _of_folder(folder))


def folder_files(folder: Path) -> tuple[Path, ...]:
    """Return the DICOM files of a folder at any depth, sorted."""
    return tuple(folder / member.name for member in _of_folder(folder) if _is_dicom(member))


@contextmanager
def members(path: Path) -> Iterator[list[Member]]:
    """List the DICOM files of a folder (at any depth), zip archive or DICOMDIR; files of other kinds are left out.

    Args:
        path: a folder, an archive, a DICOMDIR (its files are those that it refers to), or one DICOM file.

    Raises:
        DataError: the archive is damaged, encrypted or unpacks to too much, or a name in it leads out of it. Errors
            while a member of it is read become the same. A DICOMDIR is damaged, or refers to files that are not there.
    """
    if path.is_dir():
        yield [member for member in _of_folder(path) if _is_dicom(member)]
        return
    if not is_archive(path):
        yield [_of_file(file, path.parent) for file in (referenced_files(path) if is_directory_file(path) else [path])]
        return
    try:
        with zipfile.ZipFile(path) as archive:
            try:
                found = [member for member in _of_archive(archive, path) if _is_dicom(member)]
            except (ValueError, NotImplementedError) as error:
                # Names and fields that make no sense.
                raise zipfile.BadZipFile(type(error).__name__) from None
            yield found
    except (zipfile.BadZipFile, zlib.error, EOFError) as error:
        raise DataError(
            f"{path}: can't be read (the archive is damaged: {error}). Expected a whole zip file. Copy or export it "
            "again.",
            code="unreadable",
        ) from None


def _of_folder(folder: Path) -> Iterator[Member]:
    for place, folders, files in os.walk(folder):
        folders.sort()
        for name in sorted(files):
            file = Path(place) / name
            if file.is_file():
                yield _of_file(file, folder)


def _of_file(file: Path, folder: Path) -> Member:
    return Member(file.relative_to(folder).as_posix(), _opener(file), file.stat().st_size)


def _opener(file: Path) -> Callable[[], BinaryIO]:
    return lambda: file.open("rb")


def _of_archive(archive: zipfile.ZipFile, path: Path) -> Iterator[Member]:
    entries = [entry for entry in archive.infolist() if not entry.is_dir()]
    unpacked = sum(entry.file_size for entry in entries)
    if unpacked > MAX_UNPACKED_BYTES or len(entries) > MAX_FILES:
        raise DataError(
            f"{path}: {len(entries)} files of {unpacked / 2**30:.1f} GiB unpacked. Expected at most {MAX_FILES} of "
            f"{MAX_UNPACKED_BYTES >> 30} GiB. Unpack it yourself if you trust it, and give the folder.",
            code="archive_too_large",
        )
    for entry in sorted(entries, key=lambda each: each.filename):
        _require_inside(entry.filename, path)
        if entry.flag_bits & 1:
            raise DataError(f"{path}: the archive is encrypted. Unpack it, and give the folder.", code="unreadable")
        if entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise DataError(
                f"{path}: packed by a method other than deflate. Unpack it, and give the folder.", code="unreadable"
            )
        yield Member(entry.filename, _archive_opener(archive, entry), entry.file_size)


def _archive_opener(archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> Callable[[], BinaryIO]:
    return lambda: cast(BinaryIO, archive.open(entry))


def _require_inside(name: str, path: Path) -> None:
    # Nothing is written, but an archive made to escape its folder is not a scan to trust.
    as_windows = PureWindowsPath(name)
    if PurePosixPath(name).is_absolute() or as_windows.drive or as_windows.root or ".." in as_windows.parts:
        raise DataError(
            f"{path}: a file in the archive is named so that it leads out of it. Get the archive from its maker again.",
            code="unsafe_archive",
        )


def _is_dicom(member: Member) -> bool:
    """Whether the file is DICOM by its content, or claims to be by its name: a damaged slice must not go unnoticed."""
    name = PurePosixPath(member.name).name
    if name.startswith("."):
        return False
    if name.lower().endswith(SLICE_SUFFIXES):
        return True
    return _has_magic(member.open)


def _has_magic(opener: Callable[[], BinaryIO]) -> bool:
    with opener() as file:
        return file.read(_MAGIC_AT + len(_MAGIC))[_MAGIC_AT:] == _MAGIC
