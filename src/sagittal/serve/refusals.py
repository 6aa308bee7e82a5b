"""What the service refuses, with the HTTP status that says so."""

from __future__ import annotations

import re
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePath, PurePosixPath

from sagittal.errors import SagittalError
from sagittal.volumes.dicom_files import is_archive
from sagittal.volumes.io import scan_files

STATUSES = {
    "disk": 503,
    "archive_too_large": 413,
    "too_large": 413,
    "unknown_format": 415,
}
"""Status by the code of an error that is no RefusalError; every other error of a user's is a 422."""


_SHORT_NAME = 2
"""Letters of a name that tells nothing, and would be found in every word."""
_PATH = re.compile(r"(?<![\w.])/(?:[^/:,;'\"()]+/)*[^\s/:,;'\"()]+")


class RefusalError(SagittalError):
    """A request that is not answered, and why.

    Attributes:
        status: of HTTP.
        headers: that go with it, `Retry-After` for example.
    """

    def __init__(
        self, message: str, *, code: str | None = None, status: int = 400, headers: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(message, code=code)
        self.status = status
        self.headers = dict(headers or {})

    def __reduce__(self) -> tuple[object, ...]:
        return (_rebuild, (self.message, self.code, self.status, self.headers))


def _rebuild(message: str, code: str, status: int, headers: Mapping[str, str]) -> RefusalError:
    return RefusalError(message, code=code, status=status, headers=headers)


def status_of(error: SagittalError) -> int:
    """Return the HTTP status of an error that reached the border of the service."""
    return error.status if isinstance(error, RefusalError) else STATUSES.get(error.code, 422)


def not_found(what: str) -> RefusalError:
    """Return the refusal of what is not there, or is not this caller's: the two must look alike."""
    return RefusalError(f"{what}: not found, or no longer there.", code="not_found", status=404)


def without_paths(message: str, known: Iterable[str] = ()) -> str:
    """Return a message without paths of this machine and without names of files.

    Args:
        message: of the library, which begins with a path and may name files in it.
        known: paths and names to take out whatever letters they have; everything else that looks like an absolute path
            goes too.
    """
    for name in sorted({name for name in known if name.strip("./")}, key=len, reverse=True):
        # A series or a file below it belongs to it; within a longer word it is something else.
        message = re.sub(rf"(?<!\w){re.escape(name)}(?!\w)(#[0-9][0-9.@]*|/[^\s:,;'\"()]*)?", "a file", message)
    return _PATH.sub("a file", message)


def names_within(path: Path) -> set[str]:
    """Return the names of the files and folders that make a scan, which may be patients': for `without_paths`."""
    try:
        found = _parts(path)
    except (SagittalError, OSError, ValueError, zipfile.BadZipFile):
        return set()
    return {text for part in found for text in (part.as_posix(), *part.parts) if len(text) > _SHORT_NAME}


def _parts(path: Path) -> list[PurePath]:
    if path.is_file() and is_archive(path):
        with zipfile.ZipFile(path) as archive:
            return [PurePosixPath(name) for name in archive.namelist()]
    root = path if path.is_dir() else path.parent
    return [part.relative_to(root) for part in scan_files(path)]
