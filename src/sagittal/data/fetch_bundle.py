"""Fetch a packed bundle that an index lists (`bundle.index`): compared with the list before it appears."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urljoin, urlsplit
from urllib.request import url2pathname

from sagittal.bundle.index import WEB, ModelEntry, ModelIndex, parse_index, place_package
from sagittal.data.download import PAUSE_S, Progress, download, sha256_of
from sagittal.errors import BundleError
from sagittal.plan.base import cannot_write


@dataclass(frozen=True)
class LocatedIndex:
    """A list of models and where it was read.

    Attributes:
        index: the list.
        source: an address (https, http) or a path; relative files of the list begin there.
    """

    index: ModelIndex
    source: str | Path

    def location(self, entry: ModelEntry) -> str | Path:
        """Return the address or path of an entry's package."""
        if entry.is_address:
            return entry.file
        if isinstance(self.source, str):
            return urljoin(self.source, entry.file)
        return self.source.parent / entry.file


def read_index(source: str | Path, *, pause_s: float = PAUSE_S) -> LocatedIndex:
    """Read a list of models.

    Args:
        source: a path, or an address with https, http or file.
        pause_s: seconds between tries of a download.

    Raises:
        BundleError: it is not there, or no list of models.
        DataError: the server refuses.
        ResourceError: the connection fails.
    """
    where = _where(source)
    if isinstance(where, str):
        with tempfile.TemporaryDirectory(prefix="sagittal-") as folder:
            content = download(where, Path(folder) / "index.json", pause_s=pause_s).path.read_bytes()
    else:
        try:
            content = where.read_bytes()
        except OSError as error:
            raise BundleError(
                f"{where}: can't be read ({error.strerror}). Expected the index file that 'sagittal models add' "
                "writes. Check the path.",
                code="no_index",
            ) from None
    return LocatedIndex(parse_index(content, str(where)), where)


def fetch_bundle(
    wanted: str,
    listed: LocatedIndex,
    folder: Path,
    *,
    on_progress: Progress | None = None,
    say: Callable[[str], None] = lambda line: None,
    pause_s: float = PAUSE_S,
) -> Path:
    """Fetch a package into `folder` and return the file; it appears whole and as the index says, or not at all.

    Args:
        wanted: `NAME` or `NAME==VERSION`.
        listed: from `read_index`.
        folder: where it goes, as NAME-VERSION; one that is there with the right hash is not fetched again.
        on_progress: called as bytes arrive over HTTP.
        say: receives lines for a person.
        pause_s: seconds between tries.

    Raises:
        BundleError: no such model, another file is there, or the bytes are not those that the index lists.
        DataError: the server refuses.
        ResourceError: the connection fails, or the disk is full.
    """
    entry = listed.index.entry(wanted)
    target = folder / entry.file_name
    if target.exists():
        _require_listed(target, entry, f"Remove it, or choose another folder than {folder}.")
        say(f"{target}: there already, with the SHA-256 of the index")
        return target
    source = listed.location(entry)
    _make(folder)
    with tempfile.TemporaryDirectory(dir=folder, prefix=f".{target.name}.", suffix=".part") as staging:
        part = Path(staging) / target.name
        if isinstance(source, str):
            download(source, part, on_progress=on_progress, pause_s=pause_s)
        else:
            _copy(source, part)
        _require_listed(part, entry, f"It came from {source} and has been removed. Ask whoever keeps the list.")
        part.replace(target)
    say(f"{target}: {entry}, {entry.bytes} bytes, SHA-256 as the index says")
    return target


def _where(source: str | Path) -> str | Path:
    text = str(source)
    address = urlsplit(text)
    if address.scheme in WEB and address.netloc:
        return text
    if address.scheme == "file":
        return Path(url2pathname(address.path))
    return Path(source)


def _require_listed(path: Path, entry: ModelEntry, advice: str) -> None:
    size, sha256 = path.stat().st_size, sha256_of(path)
    if (size, sha256) != (entry.bytes, entry.sha256):
        raise BundleError(
            f"{path.name}: has {size} bytes and SHA-256 {sha256}; the index says {entry.bytes} bytes and "
            f"{entry.sha256}. {advice}",
            code="wrong_checksum",
        )


def _copy(source: Path, target: Path) -> None:
    if not source.is_file():
        raise BundleError(
            f"{source}: missing, but the index lists it. Ask whoever keeps the list.", code="missing_file"
        )
    place_package(source, target)


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise cannot_write(folder, error, code="disk") from None
