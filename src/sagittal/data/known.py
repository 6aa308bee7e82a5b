"""What was measured of a data set before: a second look at unchanged files costs a `stat` of each and no more.

A file is recognised by its path, size and time of change, as make and rsync recognise theirs; one that was changed
while all three stayed the same goes unnoticed.
"""

from __future__ import annotations

import hashlib
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from sagittal.data.dataset import Dataset, Digest, content_hash, digest_of, files_of
from sagittal.data.fingerprint import Orientation, extract_fingerprint
from sagittal.errors import PlanError, ResourceError
from sagittal.plan import Fingerprint
from sagittal.plan.base import write_atomically

_VERSION = 3
"""Raise it whenever the rules of the fingerprint change."""


def known_digests(dataset: Dataset, store: Path | None, *, workers: int = 1) -> dict[Path, Digest]:
    """Return size and SHA-256 of every file of a data set; only files that changed since the last time are read.

    Args:
        dataset: what `read_dataset` found.
        store: folder of what is known; None means to read every file.
        workers: threads that read.

    Raises:
        DataError: a file can't be read.
    """
    memory = None
    if store is not None:
        memory = store / f"files-{hashlib.sha256(str(dataset.folder.resolve()).encode()).hexdigest()[:16]}.json"
    before = _remembered(memory)

    def digest(path: Path) -> tuple[Path, int, Digest]:
        changed_ns = path.stat().st_mtime_ns if path.is_file() else 0
        old = before.get(str(path))
        if old is not None and path.is_file() and old[:2] == [path.stat().st_size, changed_ns]:
            return path, changed_ns, (old[0], old[2])
        return path, changed_ns, digest_of(path)

    with ThreadPoolExecutor(max_workers=max(1, workers), thread_name_prefix="digest") as pool:
        found = list(pool.map(digest, (path for case in dataset.cases for path in files_of(case))))
    now = {str(path): [size, changed_ns, sha256] for path, changed_ns, (size, sha256) in found}
    if memory is not None and now != before:
        _keep(memory, json.dumps(now))
    return {path: value for path, _, value in found}


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
    if store is None:
        return extract_fingerprint(dataset, workers=workers, orientation=orientation), False
    content = content_hash(dataset, known_digests(dataset, store, workers=workers))
    path = store / f"fingerprint-{_VERSION}-{orientation}-{content[:24]}.json"
    if path.is_file():
        try:
            return Fingerprint.read(path), True
        except PlanError:
            path.unlink(missing_ok=True)  # damaged: it is measured again
    fingerprint = extract_fingerprint(dataset, workers=workers, orientation=orientation, content_sha256=content)
    _keep(path, fingerprint.to_json())
    return fingerprint, False


def _remembered(memory: Path | None) -> dict[str, list[Any]]:
    if memory is None or not memory.is_file():
        return {}
    try:
        known = json.loads(memory.read_bytes())
    except (OSError, ValueError):
        return {}
    return known if isinstance(known, dict) else {}


def _keep(path: Path, text: str) -> None:
    """Write what was measured; a store that can't be written only means that it is measured again."""
    try:
        write_atomically(path, text.encode())
    except ResourceError:
        return
