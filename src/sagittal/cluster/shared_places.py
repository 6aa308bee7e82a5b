"""Where the bytes of shared storage are kept: a folder of a shared disk, or an object store.

A file appears whole or not at all: in a folder it is renamed to its name, and object stores show an object once it is
complete.
"""

from __future__ import annotations

import hashlib
import importlib
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Protocol

from sagittal.errors import DataError, PlanError, ResourceError
from sagittal.plan.base import cannot_write, write_atomically
from sagittal.plan.urls import URL, without_secrets

_READ_BYTES = 4 << 20
_INSTALLS = {"s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "az": "adlfs", "abfs": "adlfs"}


class Place(Protocol):
    """Where bytes are kept under names with forward slashes."""

    def put(self, name: str, source: Path | bytes) -> None:
        """Store a file or bytes; what was there is replaced whole."""

    def get(self, name: str) -> bytes:
        """Return what is stored."""

    def fetch(self, name: str, target: Path) -> None:
        """Write what is stored to a file."""

    def list(self, folder: str) -> list[str]:
        """Return the names of all files below a folder; none where there is no such folder."""

    def exists(self, name: str) -> bool:
        """Whether a file is stored."""

    def delete(self, name: str) -> None:
        """Take a file away, where it is there."""

    def forget(self, folder: str) -> None:
        """Take what is left of an empty folder away."""


def place_of(url: str) -> Place:
    """Return the place of a folder or a URL.

    Raises:
        PlanError: no place, or a protocol that nobody knows.
        ResourceError: a package is missing, or the folder can't be made.
    """
    if not url.strip():
        raise PlanError("the shared place has no name. Expected a folder or a URL such as s3://BUCKET/FOLDER.")
    match = URL.fullmatch(url)
    if match is None or match[1] == "file":
        return _Folder(Path(url if match is None else match[2]))
    return _Objects(url, match[1])


def sha256_of(path: Path) -> str:
    """Return the hash of a file's contents."""
    digest = hashlib.sha256()
    for block in _blocks(path):
        digest.update(block)
    return digest.hexdigest()


@contextmanager
def whole(target: Path) -> Iterator[Path]:
    """Yield a path to write to, which gets its name once the block is done."""
    part: Path | None = None
    try:
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            descriptor, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.", suffix=".part")
            os.close(descriptor)
            part = Path(name)
            yield part
            part.chmod(0o644)
            part.replace(target)
        except OSError as error:
            raise cannot_write(target, error) from None
    finally:
        if part is not None:
            part.unlink(missing_ok=True)


def _blocks(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while block := file.read(_READ_BYTES):
            yield block


def _read_from(source: Path) -> Iterator[bytes]:
    """Yield what a file holds; that it can't be read is told as such, also where the reader is writing it elsewhere."""
    try:
        yield from _blocks(source)
    except OSError as error:
        raise unreadable(source, error) from None


class _Folder:
    """A folder on a disk that all machines see."""

    def __init__(self, root: Path) -> None:
        self._root = root.absolute()
        try:
            self._root.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise cannot_write(root, error) from None

    def put(self, name: str, source: Path | bytes) -> None:
        target = self._root / name
        if isinstance(source, bytes):
            write_atomically(target, source)
            return
        with whole(target) as part, part.open("wb") as file:
            file.writelines(_read_from(source))

    def get(self, name: str) -> bytes:
        return b"".join(self._read(name))

    def fetch(self, name: str, target: Path) -> None:
        with target.open("wb") as file:
            file.writelines(self._read(name))

    def list(self, folder: str) -> list[str]:
        found = (self._root / folder).rglob("*")
        return [path.relative_to(self._root).as_posix() for path in found if path.is_file() and path.suffix != ".part"]

    def exists(self, name: str) -> bool:
        return (self._root / name).is_file()

    def delete(self, name: str) -> None:
        path = self._root / name
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            raise cannot_write(path, error) from None

    def forget(self, folder: str) -> None:
        top = self._root / folder
        for path in (*sorted(top.rglob("*"), reverse=True), top):
            with suppress(OSError):  # a file, or a folder that holds one again
                path.rmdir()

    def _read(self, name: str) -> Iterator[bytes]:
        path = self._root / name
        try:
            yield from _blocks(path)
        except FileNotFoundError:
            raise _not_stored(str(path)) from None
        except OSError as error:
            raise unreadable(path, error) from None


class _Objects:
    """An object store by fsspec, whose objects appear once they are complete."""

    def __init__(self, url: str, protocol: str) -> None:
        self._url = without_secrets(url).rstrip("/")
        self._secret = url != without_secrets(url)
        try:
            fsspec = importlib.import_module("fsspec")
            # Without its cache of listings: other machines write there.
            self._files, root = fsspec.core.url_to_fs(url, use_listings_cache=False)
        except ImportError:
            package = _INSTALLS.get(protocol, "fsspec")
            raise ResourceError(
                f"{self._url}: needs {package}, which is not installed: pip install {package}, or 'sagittal[ray]' for "
                "s3.",
                code="missing_package",
            ) from None
        except ValueError as error:
            why = type(error).__name__ if self._secret else str(error)
            raise PlanError(
                f"{self._url}: not a place that fsspec knows ({why}). Expected a folder, or s3://BUCKET/FOLDER or gs://."
            ) from None
        self._root = str(root).rstrip("/")

    def put(self, name: str, source: Path | bytes) -> None:
        if isinstance(source, bytes):
            self._tried("written", name, lambda path: self._files.pipe_file(path, source))
        else:
            try:
                source.open("rb").close()  # else its absence would be told as the store's
            except OSError as error:
                raise unreadable(source, error) from None
            self._tried("written", name, lambda path: self._files.put_file(str(source), path))

    def get(self, name: str) -> bytes:
        content: bytes = self._tried("read", name, self._files.cat_file)
        return content

    def fetch(self, name: str, target: Path) -> None:
        self._tried("read", name, lambda path: self._files.get_file(path, str(target)))

    def list(self, folder: str) -> list[str]:
        def found(path: str) -> list[str]:
            self._files.invalidate_cache()
            try:
                return list(self._files.find(path))
            except FileNotFoundError:
                return []

        return [path.removeprefix(f"{self._root}/") for path in self._tried("listed", folder, found)]

    def exists(self, name: str) -> bool:
        def asked(path: str) -> bool:
            self._files.invalidate_cache()
            return bool(self._files.isfile(path))

        found: bool = self._tried("read", name, asked)
        return found

    def delete(self, name: str) -> None:
        def gone(path: str) -> None:
            try:
                self._files.rm_file(path)
            except FileNotFoundError:
                return

        self._tried("changed", name, gone)

    def forget(self, folder: str) -> None:
        """Do nothing: there are no folders, only names of objects."""

    def _tried(self, what: str, name: str, act: Callable[[str], Any]) -> Any:
        try:
            return act(f"{self._root}/{name}".rstrip("/"))
        except FileNotFoundError:
            if what == "written":
                raise self._refused(what, name, "no such bucket or folder") from None
            raise _not_stored(f"{self._url}/{name}") from None
        except Exception as error:  # each store's library has its own, of the network, of keys, of the service
            # What a library says may quote the address as it was given.
            said = "refused" if self._secret else " ".join(str(error).split())[:200]
            raise self._refused(what, name, f"{type(error).__name__}: {said}") from None

    def _refused(self, what: str, name: str, why: str) -> ResourceError:
        return ResourceError(
            f"{self._url}/{name}: can't be {what} ({why}). Check the address, the keys and the network.", code="store"
        )


def unreadable(path: Path, error: OSError) -> ResourceError:
    """Return the error of a file that can't be read."""
    return ResourceError(f"{path}: can't be read ({error.strerror}).", code="unreadable")


def _not_stored(where: str) -> DataError:
    return DataError(f"{where}: no such file.", code="not_stored")
