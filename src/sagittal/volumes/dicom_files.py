"""The files of a DICOM folder or zip archive, opened one at a time; nothing is unpacked onto the disk."""

from __future__ import annotations

import os
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import BinaryIO, cast

from sagittal.errors import DataError

ARCHIVE_SUFFIX = ".zip"
SLICE_SUFFIXES = (".dcm", ".ima")
MAX_UNPACKED_BYTES = 16 << 30
"""A CT of 512 x 512 x 10 000 voxels has 5 GiB; an archive that unpacks to more is refused before it is read."""
MAX_FILES = 100_000
_MAGIC_AT, _MAGIC = 128, b"DICM"


@dataclass(frozen=True)
class Member:
    """One file of a folder or an archive.

    Attributes:
        name: its path within the folder or archive, for messages.
        open: opens it for reading; only while `members` is open.
    """

    name: str
    open: Callable[[], BinaryIO]


def is_archive(path: Path) -> bool:
    """Whether the name says that the file is a zip archive."""
    return path.name.lower().endswith(ARCHIVE_SUFFIX)


def holds_dicom(folder: Path) -> bool:
    """Whether a folder holds a DICOM file at any depth."""
    return folder.is_dir() and any(_is_dicom(member) for member in _of_folder(folder))


def folder_files(folder: Path) -> tuple[Path, ...]:
    """Return the DICOM files of a folder at any depth, sorted."""
    return tuple(folder / member.name for member in _of_folder(folder) if _is_dicom(member))


@contextmanager
def members(path: Path) -> Iterator[list[Member]]:
    """List the DICOM files of a folder (at any depth) or zip archive; files of other kinds are left out.

    Raises:
        DataError: the archive is damaged, encrypted or unpacks to too much, or a name in it leads out of it. Errors
            while a member of it is read become the same.
    """
    if not is_archive(path) or path.is_dir():
        yield [member for member in _of_folder(path) if _is_dicom(member)]
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
                yield Member(file.relative_to(folder).as_posix(), _opener(file))


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
        yield Member(entry.filename, _archive_opener(archive, entry))


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
    with member.open() as file:
        return file.read(_MAGIC_AT + len(_MAGIC))[_MAGIC_AT:] == _MAGIC
