"""Where a data set comes from: a folder, or tar and zip archives that are read without being unpacked.

Nothing is ever written under a name that an archive gives: its names only tell which file is which. Archives are read
in the order in which they are stored, so that a packed tar is unpacked once or twice, not once per file.
"""

from __future__ import annotations

import os
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from io import BufferedIOBase
from pathlib import Path, PurePosixPath
from typing import cast

from sagittal.errors import DataError

MAX_FILES = 200_000
MAX_BYTES = 2 << 40
"""No public set is nearly so large; an archive that promises more is damaged or malicious."""
MAX_TEXT_BYTES = 16 << 20
ARCHIVE_SUFFIXES = (".tar", ".tar.gz", ".tgz", ".zip")


class _Folder:
    """Each of these three tells the paths of its files, `/` between their parts, in the order read fastest."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        found = sorted(Path(root, name) for root, _, names in os.walk(folder) for name in names)
        self.names = [path.relative_to(folder).as_posix() for path in found if not _is_junk(path.relative_to(folder))]
        _require_limits(folder, len(self.names), 0)

    def open(self, name: str) -> BufferedIOBase:
        return (self._folder / name).open("rb")

    def path(self, name: str) -> Path | None:
        return self._folder / name


class _Tar:
    def __init__(self, path: Path, archive: tarfile.TarFile) -> None:
        self._archive, self._members = archive, dict[str, tarfile.TarInfo]()
        for count, member in enumerate(archive):
            _require_limits(path, count, 0)
            if member.isdir():
                continue
            name = _safe_name(member.name, path)
            if not member.isfile():
                raise _unsafe(path, member.name, "a link or a device")
            if not _is_junk(PurePosixPath(name)):
                self._members[name] = member
        _require_limits(path, len(self._members), sum(member.size for member in self._members.values()))
        self.names = sorted(self._members, key=lambda name: self._members[name].offset)

    def open(self, name: str) -> BufferedIOBase:
        file = self._archive.extractfile(self._members[name])
        assert file is not None, "links were refused"
        return cast(BufferedIOBase, file)

    def path(self, name: str) -> Path | None:
        return None


class _Zip:
    def __init__(self, path: Path, archive: zipfile.ZipFile) -> None:
        self._archive, self._members = archive, dict[str, zipfile.ZipInfo]()
        for member in archive.infolist():
            if member.is_dir():
                continue
            name = _safe_name(member.filename, path)
            if stat.S_ISLNK(member.external_attr >> 16):
                raise _unsafe(path, member.filename, "a link")
            if member.flag_bits & 1:
                raise DataError(f"{path}: {name} is encrypted. Unpack the archive with its password first.")
            if not _is_junk(PurePosixPath(name)):
                self._members[name] = member
        _require_limits(path, len(self._members), sum(member.file_size for member in self._members.values()))
        self.names = sorted(self._members, key=lambda name: self._members[name].header_offset)

    def open(self, name: str) -> BufferedIOBase:
        return cast(BufferedIOBase, self._archive.open(self._members[name]))

    def path(self, name: str) -> Path | None:
        return None


_Part = _Folder | _Tar | _Zip


class Source:
    """One or several parts taken together; make it with `open_source`.

    Attributes:
        given: the names of the folders and archives.
    """

    def __init__(self, parts: Sequence[_Part], given: Sequence[str]) -> None:
        self.given = tuple(given)
        self._where: dict[str, _Part] = {}
        for part in parts:
            for name in part.names:
                if name in self._where:
                    raise DataError(f"{name}: in two of the sources. Expected every file once. Leave one out.")
                self._where[name] = part

    @property
    def names(self) -> tuple[str, ...]:
        """Every file, in the order in which they are read fastest."""
        return tuple(self._where)

    def __contains__(self, name: str) -> bool:
        return name in self._where

    def text(self, name: str) -> str:
        """Return a small text file.

        Raises:
            DataError: it is too long for one, damaged, or no UTF-8.
        """
        with self.open(name) as file:
            content = file.read(MAX_TEXT_BYTES + 1)
        try:
            if len(content) <= MAX_TEXT_BYTES:
                return content.decode("utf-8-sig")
        except UnicodeDecodeError:
            pass
        raise DataError(f"{name}: not a text file of at most {MAX_TEXT_BYTES} bytes. Fetch it again.")

    @contextmanager
    def open(self, name: str) -> Iterator[BufferedIOBase]:
        """Open a file for reading.

        Raises:
            DataError: what is read of it is damaged or missing.
        """
        try:
            with self._where[name].open(name) as file:
                yield file
        except (tarfile.TarError, zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError) as error:
            raise DataError(f"{name}: can't be read ({error}). The archive is damaged. Fetch it again.") from None

    def path(self, name: str) -> Path | None:
        """Return where a file lies on the disk; None in an archive."""
        return self._where[name].path(name)


@contextmanager
def open_source(paths: Iterable[Path]) -> Iterator[Source]:
    """Open folders and archives (tar, tar.gz, tgz, zip) as one source.

    Raises:
        DataError: one is missing, of another kind, damaged, encrypted, or holds unsafe names, links or far too much.
    """
    paths = [path.resolve() for path in paths]
    with ExitStack() as stack:
        yield Source([_open_part(path, stack) for path in paths], [path.name for path in paths])


def _open_part(path: Path, stack: ExitStack) -> _Part:
    if path.is_dir():
        return _Folder(path)
    if not path.is_file():
        raise DataError(f"{path}: no such file or folder. Expected an archive or a folder. Check the path.")
    if not path.name.lower().endswith(ARCHIVE_SUFFIXES):
        raise DataError(f"{path}: neither a folder nor one of {', '.join(ARCHIVE_SUFFIXES)}. Unpack it first.")
    try:
        if path.name.lower().endswith(".zip"):
            return _Zip(path, stack.enter_context(zipfile.ZipFile(path)))
        return _Tar(path, stack.enter_context(tarfile.open(path)))
    except (tarfile.TarError, zipfile.BadZipFile, zlib.error, EOFError) as error:
        raise DataError(f"{path}: can't be read ({error}). Expected a whole archive. Fetch it again.") from None
    except OSError as error:
        raise DataError(f"{path}: can't be read ({error.strerror or error}). Fetch it again.") from None


def _safe_name(name: str, archive: Path) -> str:
    """Return a member's name without `./`, or refuse one that leads out of the archive."""
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or "\\" in name or "\0" in name or ":" in name:
        raise _unsafe(archive, name, "a path that leads out of the archive")
    return path.as_posix()


def _is_junk(path: PurePosixPath | Path) -> bool:
    """Whether a path is what macOS leaves in archives, or hidden."""
    return any(part.startswith(".") or part == "__MACOSX" for part in path.parts)


def _require_limits(path: Path, count: int, size: int) -> None:
    if count > MAX_FILES or size > MAX_BYTES:
        raise DataError(
            f"{path}: more than {MAX_FILES} files or {MAX_BYTES} bytes. Expected one data set. Unpack what you need.",
            code="too_large",
        )


def _unsafe(archive: Path, name: str, what: str) -> DataError:
    return DataError(
        f"{archive}: '{name}' is {what}. Expected plain files. Don't unpack it; fetch it from its publisher.",
        code="unsafe_archive",
    )
