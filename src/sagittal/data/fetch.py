"""Get the files of a public data set, and remember the hash of each, so that a later change is noticed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sagittal.data.catalogue import Download, PublicDataset
from sagittal.data.download import Progress, download, sha256_of
from sagittal.errors import DataError
from sagittal.plan.base import write_atomically

RECORD = "downloads.json"
"""In the folder of the downloads: of each file its address, size, SHA-256 and whether a published checksum agreed."""


def fetch(
    entry: PublicDataset,
    folder: Path,
    *,
    say: Callable[[str], None] = lambda line: None,
    on_progress: Progress | None = None,
) -> tuple[Path, ...]:
    """Download what is not there yet into `folder` and return the files.

    Args:
        entry: of the catalogue.
        folder: where the archives go; a file that is there is checked against its recorded hash, never overwritten.
        say: receives lines for a person.
        on_progress: called as bytes arrive.

    Raises:
        DataError: the set can't be had without a login, a file is there that is not what was fetched, or the server
            refuses; the message says how to go on.
        ResourceError: the connection fails or the disk is full; the same call goes on where it was.
    """
    if not entry.downloads:
        raise DataError(
            f"{entry.name}: can't be fetched by a command. {entry.how} Page: {entry.address}. Then convert what you "
            f"got: sagittal datasets convert {entry.name} FILES --out FOLDER.",
            code="needs_login",
        )
    try:
        return tuple(_fetch_one(item, folder, say, on_progress) for item in entry.downloads)
    except DataError as error:
        if error.code != "refused":
            raise
        raise DataError(f"{error.message} Its page: {entry.address}", code=error.code) from None


def _fetch_one(item: Download, folder: Path, say: Callable[[str], None], on_progress: Progress | None) -> Path:
    target, record = folder / item.name, _record(folder)
    if target.is_file():
        _check_present(target, item, record.get(item.name))
        say(f"{target}: there already, with the recorded SHA-256")
        return target
    got = download(item.url, target, md5=item.md5, on_progress=on_progress)
    before = record.get(item.name, {}).get("sha256")
    if item.md5 is not None:
        told = f"MD5 as published by {item.md5_source}"
    elif before is None:
        told = "no checksum is published: this first download's SHA-256 is recorded, which vouches for nothing yet"
    elif before == got.sha256:
        told = "SHA-256 as recorded at the first download"
    else:
        target.replace(target.with_name(target.name + ".changed"))
        raise DataError(
            f"{target}: its SHA-256 is {got.sha256}; at the first download it was {before}. It is kept as "
            f"{target.name}.changed. The publisher changed it, or one of both is damaged: ask there; to take the new "
            f"one, remove its entry from {folder / RECORD}.",
            code="wrong_checksum",
        )
    record[item.name] = {
        "url": item.url,
        "bytes": got.size,
        "sha256": got.sha256,
        "checked_by": "published MD5" if item.md5 is not None else None,
    }
    write_atomically(folder / RECORD, (json.dumps(record, indent=2) + "\n").encode())
    say(f"{target}: {got.size} bytes{', gone on with' if got.resumed else ''}, SHA-256 {got.sha256}; {told}")
    return target


def _check_present(target: Path, item: Download, recorded: dict[str, Any] | None) -> None:
    if recorded is None:
        raise DataError(
            f"{target}: is there, but was not fetched by this command. Convert it as it is, remove it, or choose "
            "another folder.",
            code="exists",
        )
    found = sha256_of(target)
    if found != recorded.get("sha256"):
        raise DataError(
            f"{target}: its SHA-256 is {found}, recorded was {recorded.get('sha256')}. It was changed or damaged. "
            f"Remove it and fetch {item.name} again.",
            code="wrong_checksum",
        )


def _record(folder: Path) -> dict[str, dict[str, Any]]:
    path = folder / RECORD
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_bytes())
    except ValueError:
        content = None
    if not isinstance(content, dict) or not all(isinstance(entry, dict) for entry in content.values()):
        raise DataError(f"{path}: not a record of downloads. Expected what 'datasets fetch' wrote. Remove it.")
    return content
