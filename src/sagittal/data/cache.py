"""Prepared cases on disk, made once per data set and preprocessing, read through memory maps.

    FOLDER/<key>/images/CASE.npy      float16 (C, D, H, W); float32 where that would lose range
                /labels/CASE.npy      label indices (D, H, W)
                /locations/CASE.npz   per foreground index, voxels (n, 3) to place patches on; written last

The key is a hash of all that the content depends on, so another plan never reads the wrong arrays. Every file appears
whole or not at all, and a case counts as done when all of its files are readable: a killed run goes on where
it stopped.
"""

from __future__ import annotations

import hashlib
import itertools
import os
import re
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO
from zipfile import BadZipFile

import numpy as np
from jaxtyping import Float, Int32, UInt

from sagittal.data.dataset import Case, Dataset, content_hash
from sagittal.data.label_index import LabelIndex, label_index
from sagittal.data.labelled_case import named, read_case
from sagittal.data.preprocessing import Prepared, prepare
from sagittal.errors import DataError, ResourceError
from sagittal.plan.base import canonical_json
from sagittal.plan.plan import Plan

FORMAT_VERSION = 2
"""Raise it whenever preprocessing code changes what the files hold."""
_MIN_LOCATIONS = 10_000
_MIN_LOCATION_SHARE = 0.01
_STALE_S = 3600.0
_UNREADABLE = (OSError, ValueError, EOFError, BadZipFile)


@dataclass(frozen=True)
class Cache:
    """The prepared cases of one data set under one plan."""

    folder: Path
    case_ids: tuple[str, ...]
    """In the order of the data set; the index `i` of the methods below counts through them."""

    def image(self, i: int) -> Float[np.ndarray, "C D H W"]:
        """Return the prepared image, float16 or float32, memory-mapped and read-only."""
        return _open_array(image_path(self.folder, self.case_ids[i]))

    def labels(self, i: int) -> UInt[np.ndarray, "D H W"]:
        """Return the prepared label indices, memory-mapped and read-only."""
        return _open_array(labels_path(self.folder, self.case_ids[i]))

    def locations(self, i: int) -> dict[int, Int32[np.ndarray, "n 3"]]:
        """Return voxels (d, h, w) of each foreground index, (0, 3) where the case has none of it.

        A sample without replacement: all of them, or the larger of 10 000 and 1 % (nnU-Net's rule).
        """
        path = locations_path(self.folder, self.case_ids[i])
        try:
            # np.load leaves a damaged file open when it is given a path.
            with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
                return {int(index): arrays[index] for index in arrays.files}
        except _UNREADABLE as error:
            raise _unreadable(path, error) from None


def image_path(folder: Path, case_id: str) -> Path:
    """Return where a case's image lies."""
    return folder / "images" / f"{safe_name(case_id)}.npy"


def labels_path(folder: Path, case_id: str) -> Path:
    """Return where a case's label indices lie."""
    return folder / "labels" / f"{safe_name(case_id)}.npy"


def locations_path(folder: Path, case_id: str) -> Path:
    """Return where a case's foreground locations lie."""
    return folder / "locations" / f"{safe_name(case_id)}.npz"


def safe_name(case_id: str) -> str:
    """Return a file name for a case: the id itself where it is plain, else its plain part and a hash."""
    plain = re.sub(r"[^A-Za-z0-9._-]", "_", case_id)[:80].lstrip(".")
    if plain == case_id:
        return plain
    return f"{plain}-{hashlib.sha256(case_id.encode()).hexdigest()[:12]}"


def cache_key(dataset_sha256: str, plan: Plan) -> str:
    """Return the name of the sub-folder: a hash over everything that the cached arrays depend on."""
    labels = canonical_json(plan.dataset.replace(name=""))
    parts = (str(FORMAT_VERSION), dataset_sha256, canonical_json(plan.preprocessing), labels)
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def build_cache(
    dataset: Dataset,
    plan: Plan,
    folder: str | os.PathLike[str],
    *,
    workers: int,
    on_case: Callable[[str], None] | None = None,
    dataset_sha256: str | None = None,
) -> Cache:
    """Prepare every case that is not in the cache yet and return the cache.

    Args:
        dataset: the labelled training cases.
        plan: its preprocessing and label declaration decide the content.
        folder: where caches lie; this one gets a sub-folder named by its key.
        workers: threads; each holds one case in memory.
        on_case: called with the id of each case once it is prepared, not for those that were there.
        dataset_sha256: `content_hash(dataset)` where it was just taken, for example by the fingerprint.

    Raises:
        DataError: a case can't be used; the message names it. Cases done before stay.
        ResourceError: the disk is full or the folder can't be written; no half-written file is left.
    """
    _require_same_declaration(dataset, plan)
    target = Path(folder) / cache_key(dataset_sha256 or content_hash(dataset), plan)
    _make_folders(target)
    cache = Cache(target, tuple(case.id for case in dataset.cases))
    index = label_index(plan.dataset)
    missing = [case for case in dataset.cases if not _is_complete(target, case.id)]
    stop = threading.Event()

    def work(case: Case) -> str:
        try:
            if not stop.is_set():
                _build_case(case, plan, index, target)
        except BaseException:
            stop.set()
            raise
        return case.id

    with ThreadPoolExecutor(max_workers=max(1, workers), thread_name_prefix="cache") as pool:
        try:
            for future in as_completed([pool.submit(work, case) for case in missing]):
                case_id = future.result()
                if on_case is not None:
                    on_case(case_id)
        except BaseException:
            # Ctrl-C: cases in work finish, those that wait do not start.
            stop.set()
            raise
    return cache


def prepare_case(case: Case, plan: Plan, index: LabelIndex, *, compact: bool = False) -> Prepared:
    """Read and prepare one case, with its labels as indices; `compact` as for `prepare`.

    Raises:
        DataError: the case can't be used; the message names it.
    """
    with named(case):
        image, labels = read_case(case, index)
        return prepare(image, plan.preprocessing, labels, compact=compact)


def foreground_locations(labels: UInt[np.ndarray, "D H W"], num_indices: int) -> dict[int, Int32[np.ndarray, "n 3"]]:
    """Return a sample of each foreground index's voxels, without replacement (nnU-Net's _sample_foreground_locations).

    All of them up to 10 000; beyond, the larger of 10 000 and 1 %.
    """
    random = np.random.RandomState(1234)
    places = np.flatnonzero(labels)
    seen = labels.reshape(-1)[places]
    # One stable sort groups the voxels of all indices, each group in ascending order.
    order = np.argsort(seen, kind="stable")
    borders = np.searchsorted(seen[order], np.arange(1, num_indices + 1))
    found = {}
    for index, (start, stop) in enumerate(itertools.pairwise(borders), start=1):
        flat = places[order[start:stop]]
        if flat.size:
            wanted = max(min(_MIN_LOCATIONS, flat.size), int(np.ceil(flat.size * _MIN_LOCATION_SHARE)))
            flat = flat[random.choice(flat.size, wanted, replace=False)]
        found[index] = np.stack(np.unravel_index(flat, labels.shape), axis=1).astype(np.int32)
    return found


def _build_case(case: Case, plan: Plan, index: LabelIndex, folder: Path) -> None:
    prepared = prepare_case(case, plan, index, compact=True)
    assert prepared.labels is not None
    image, labels = prepared.image, prepared.labels
    locations = foreground_locations(labels, index.num_indices)
    _write(image_path(folder, case.id), lambda file: np.save(file, image, allow_pickle=False))
    _write(labels_path(folder, case.id), lambda file: np.save(file, labels, allow_pickle=False))
    arrays = {str(number): voxels for number, voxels in locations.items()}
    _write(locations_path(folder, case.id), lambda file: np.savez(file, **arrays))  # type: ignore[arg-type]  # its stub takes them for flags


def _is_complete(folder: Path, case_id: str) -> bool:
    # Opening reads only headers, and fails where a power cut left a file shorter than its header says.
    paths = (locations_path(folder, case_id), image_path(folder, case_id), labels_path(folder, case_id))
    if not all(path.exists() for path in paths):
        return False
    try:
        with paths[0].open("rb") as file, np.load(file, allow_pickle=False):
            return all(np.load(path, mmap_mode="r", allow_pickle=False).size > 0 for path in paths[1:])
    except _UNREADABLE:
        return False


def _open_array(path: Path) -> np.ndarray:
    try:
        array: np.ndarray = np.load(path, mmap_mode="r", allow_pickle=False)
    except _UNREADABLE as error:
        raise _unreadable(path, error) from None
    return array


def _unreadable(path: Path, error: Exception) -> ResourceError:
    return ResourceError(
        f"{path}: can't be read ({error}). It was whole when the cache was built. Delete its folder and start again.",
        code="damaged_cache",
    )


def _write(path: Path, save: Callable[[BinaryIO], None]) -> None:
    """Write a file so that it appears whole or not at all."""
    temporary: str | None = None
    try:
        descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
        with os.fdopen(descriptor, "wb") as file:
            save(file)
        # A temporary file is its owner's alone; a cache may be shared.
        Path(temporary).chmod(0o644)
        Path(temporary).replace(path)
    except OSError as error:
        raise ResourceError(
            f"{path}: can't be written ({error.strerror or error}). Free space or choose another cache folder; "
            "cases done before are kept.",
            code="disk",
        ) from None
    finally:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)


def _make_folders(target: Path) -> None:
    try:
        for name in ("images", "labels", "locations"):
            (target / name).mkdir(parents=True, exist_ok=True)
        for stale in target.glob("*/.*.part"):
            # Left by a run that was killed while writing; a younger one may be another run's work.
            if time.time() - stale.stat().st_mtime > _STALE_S:
                stale.unlink(missing_ok=True)
    except OSError as error:
        raise ResourceError(
            f"{target}: can't be made ({error.strerror}). Choose another cache folder.", code="disk"
        ) from None


def _require_same_declaration(dataset: Dataset, plan: Plan) -> None:
    declared, planned = dataset.spec, plan.dataset.replace(name=dataset.spec.name)
    if declared != planned:
        raise DataError(
            f"{dataset.folder}: dataset.json differs from the plan's: channels {list(declared.channel_names)} against "
            f"{list(planned.channel_names)}, labels {[label.name for label in declared.labels]} against "
            f"{[label.name for label in planned.labels]}, or their values. Make a plan of this data set.",
            code="other_dataset",
        )
