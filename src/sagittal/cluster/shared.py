"""Storage that all machines of a cluster see: a folder on a shared disk, or a place in an object store (s3://, gs://).

A file is there whole or not at all: in a folder it is renamed to its name, and object stores show an object once it is
complete. Several files together are there with their list: `publish` stores each file under its hash and writes the
list last, so a reader gets the folder as it was before or as it is now, checked file by file, and files that did not
change are not sent again.

    NAME/blobs/SHA256      what files hold
    NAME/folder.json       which files there are; written last
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path, PurePosixPath

from pydantic import Field

from sagittal.cluster.shared_places import place_of, sha256_of, unreadable, whole
from sagittal.errors import DataError, PlanError, ResourceError
from sagittal.plan.base import Frozen
from sagittal.plan.urls import without_secrets

LISTING = "folder.json"
_BLOBS = "blobs"
_TRIES = 5
"""Of a reader whose files are published anew while it fetches them, before it gives up."""


class StoredFile(Frozen):
    """A file of a published folder."""

    size_bytes: int = Field(ge=0)
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")


class Listing(Frozen):
    """What a published folder holds."""

    files: dict[str, StoredFile]
    """By path in the folder, with forward slashes."""


class Store:
    """A shared place. Names are relative, with forward slashes; they are never absolute and never climb.

    Args:
        url: a folder that all machines see under the same path, or a URL that fsspec knows: s3://BUCKET/FOLDER. Keys
            and endpoints come from where that protocol's library takes them (AWS_ACCESS_KEY_ID, AWS_ENDPOINT_URL).

    Raises:
        PlanError: no place, or a protocol that nobody knows.
        ResourceError: a package is missing, or the folder can't be made.
    """

    def __init__(self, url: str | os.PathLike[str]) -> None:
        self.url = os.fspath(url)
        self._place = place_of(self.url)

    @property
    def shown(self) -> str:
        """The URL as it may be told: without a name and password or a signature that it may hold."""
        return without_secrets(self.url)

    def put(self, name: str, content: Path | bytes) -> None:
        """Store a file or bytes under a name; what was there is replaced whole.

        Raises:
            ResourceError: it can't be stored.
        """
        self._place.put(_checked(name), content)

    def get(self, name: str) -> bytes:
        """Return what is stored under a name.

        Raises:
            DataError: nothing is.
            ResourceError: the store can't be read.
        """
        return self._place.get(_checked(name))

    def fetch(self, name: str, target: Path) -> Path:
        """Write what is stored under a name to a file, which is there whole or not at all, and return it.

        Raises:
            DataError: nothing is stored there.
            ResourceError: the store can't be read, or the file can't be written.
        """
        _checked(name)
        with whole(target) as part:
            self._place.fetch(name, part)
        return target

    def exists(self, name: str) -> bool:
        """Whether a file is stored under a name."""
        return self._place.exists(_checked(name))

    def list(self, folder: str = "") -> list[str]:
        """Return the names of all files in a folder and below it, in order; none where there is no such folder."""
        return sorted(self._place.list(_checked(folder) if folder else ""))

    def delete(self, name: str) -> None:
        """Take a file away; one that is not there is no error."""
        self._place.delete(_checked(name))

    def delete_folder(self, name: str) -> None:
        """Take everything below a name away, a published folder's list first."""
        self._place.delete(f"{_checked(name)}/{LISTING}")
        for each in self.list(name):
            self._place.delete(each)
        self._place.forget(name)

    def publish(self, name: str, folder: Path, only: Callable[[str], bool] = lambda path: True) -> Listing:
        """Store the files of a folder under a name: readers see what was published before until all of it is there.

        One writer at a time for each name. Files that are renamed into the folder meanwhile may be part of it or not;
        each is stored as it was read.

        Args:
            name: of the published folder.
            folder: with the files.
            only: which of them, by path in the folder with forward slashes.

        Returns:
            What was stored.

        Raises:
            ResourceError: a file can't be read or stored.
        """
        paths = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
        wanted = {short: path for short, path in paths.items() if only(short) and not short.endswith(".part")}
        return self.publish_files(name, wanted)

    def publish_files(self, name: str, files: Mapping[str, Path]) -> Listing:
        """Store files from anywhere under a name, as `publish` does those of a folder.

        Args:
            name: of the published folder.
            files: by path in the published folder, with forward slashes.

        Returns:
            What was stored.

        Raises:
            ResourceError: a file can't be read or stored.
        """
        _checked(name)
        blobs = f"{name}/{_BLOBS}"
        there = {each.rpartition("/")[2] for each in self.list(blobs)}
        stored = {short: self._stored(blobs, path, there) for short, path in files.items()}
        listing = Listing(files=stored)
        self._place.put(f"{name}/{LISTING}", listing.to_json().encode())
        for unused in there - {each.sha256 for each in stored.values()}:
            self._place.delete(f"{blobs}/{unused}")
        return listing

    def published(self, name: str) -> Listing | None:
        """Return what is published under a name, None where nothing is."""
        path = f"{_checked(name)}/{LISTING}"
        if not self._place.exists(path):
            return None
        return Listing.from_json(self._place.get(path), source=f"{self.shown}/{path}")

    def fetch_folder(self, name: str, folder: Path) -> Listing:
        """Write a published folder to a folder and return what it holds; files that are there already stay.

        Raises:
            DataError: nothing is published under the name, or a file is damaged.
            ResourceError: the store can't be read, or the folder can't be written.
        """
        for attempt in range(_TRIES):
            listing = self.published(name)
            if listing is None:
                raise DataError(f"{self.shown}/{name}: nothing was published there.", code="not_published")
            try:
                for short, stored in listing.files.items():
                    self._fetch_file(name, stored, folder / _checked(short))
            except DataError as error:
                # A newer list replaced the one that was read, and took away what only the old one named.
                if error.code != "not_stored" or attempt == _TRIES - 1:
                    raise
                continue
            return listing
        raise AssertionError("unreachable")

    def _fetch_file(self, name: str, stored: StoredFile, target: Path) -> None:
        if target.is_file() and target.stat().st_size == stored.size_bytes and sha256_of(target) == stored.sha256:
            return
        with whole(target) as part:
            self._place.fetch(f"{name}/{_BLOBS}/{stored.sha256}", part)
            if sha256_of(part) != stored.sha256:
                raise DataError(
                    f"{self.shown}/{name}: {target.name} is not as it was stored. Expected the SHA-256 "
                    f"{stored.sha256}. Publish it again.",
                    code="damaged",
                )

    def _stored(self, blobs: str, path: Path, there: set[str]) -> StoredFile:
        for _ in range(_TRIES):
            try:
                before = _state(path)
                stored = StoredFile(size_bytes=before[0], sha256=sha256_of(path))
                if stored.sha256 not in there:
                    self._place.put(f"{blobs}/{stored.sha256}", path)
                if _state(path) == before:
                    there.add(stored.sha256)
                    return stored
                # Replaced between hashing and sending: what was sent has another file's hash as its name.
                self._place.delete(f"{blobs}/{stored.sha256}")
                there.discard(stored.sha256)
            except OSError as error:
                raise unreadable(path, error) from None
        raise ResourceError(
            f"{path}: changes faster than it can be stored. Publish it when it is finished.", code="changing"
        )


def _state(path: Path) -> tuple[int, int, int]:
    found = path.stat()
    return found.st_size, found.st_mtime_ns, found.st_ino


def _checked(name: str) -> str:
    parts = PurePosixPath(name).parts
    if not parts or name.startswith("/") or ".." in parts or "\\" in name or "\0" in name:
        raise PlanError(f"{name!r} can't name a file of a shared place: expected a relative path with forward slashes.")
    return name
