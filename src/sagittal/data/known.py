"""What was measured of a data set before: a second look at unchanged files costs a `stat` of each and no more.

A data set is recognised by its declaration and by the path, size and time of change of every file, as make and rsync
recognise theirs; a file that was changed while all three stayed the same goes unnoticed.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from sagittal.data.dataset import Dataset, content_hash, files_of
from sagittal.data.fingerprint import Orientation, extract_fingerprint
from sagittal.errors import PlanError, ResourceError
from sagittal.plan import Fingerprint
from sagittal.plan.base import canonical_json, write_atomically

_VERSION = 1
"""Raise it whenever the rules of the fingerprint change."""


def known_content_hash(dataset: Dataset, store: Path | None) -> str:
    """Return `content_hash(dataset)`, from `store` where nothing changed since it was taken.

    Args:
        dataset: what `read_dataset` found.
        store: folder of what is known; None means to read every file.
    """
    path = None if store is None else store / f"{_stamp(dataset)}-content.txt"
    if path is not None and path.is_file():
        return path.read_text().strip()
    content = content_hash(dataset)
    _keep(path, content + "\n")
    return content


def known_fingerprint(
    dataset: Dataset, store: Path | None, *, workers: int, orientation: Orientation = "RAS"
) -> tuple[Fingerprint, bool]:
    """Return the fingerprint of a data set, and whether it was known.

    Args:
        dataset: labelled cases.
        store: folder of what is known; None means to measure in any case.
        workers: threads, as for `extract_fingerprint`.
        orientation: as for `extract_fingerprint`.

    Raises:
        DataError: a case can't be used; the message names it.
    """
    path = None if store is None else store / f"{_stamp(dataset)}-fingerprint-{orientation}.json"
    if path is not None and path.is_file():
        try:
            return Fingerprint.read(path), True
        except PlanError:
            path.unlink(missing_ok=True)  # of another version, or damaged: it is measured again
    fingerprint = extract_fingerprint(dataset, workers=workers, orientation=orientation)
    _keep(path, fingerprint.to_json())
    if store is not None:
        _keep(store / f"{_stamp(dataset)}-content.txt", fingerprint.content_sha256 + "\n")
    return fingerprint, False


def _stamp(dataset: Dataset) -> str:
    total = hashlib.sha256(f"{_VERSION}\n{canonical_json(dataset.spec)}\n".encode())
    for case in dataset.cases:
        entries = []
        for path in files_of(case):
            try:
                status = path.stat()
                entries.append((str(path.resolve()), status.st_size, status.st_mtime_ns))
            except OSError:
                entries.append((str(path), -1, 0))
        total.update(json.dumps([case.id, entries]).encode() + b"\n")
    return total.hexdigest()[:24]


def _keep(path: Path | None, text: str) -> None:
    """Write what was measured; a store that can't be written only means that it is measured again."""
    if path is None:
        return
    try:
        write_atomically(path, text.encode())
    except ResourceError:
        return
