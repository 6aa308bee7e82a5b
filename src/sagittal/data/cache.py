"""Prepared cases on disk, made once per data set and preprocessing, read through memory maps.

    FOLDER/images/CASE-<key>.npy      float16 (C, D, H, W); float32 where that would lose range
          /labels/CASE-<key>.npy      label indices (D, H, W)
          /locations/CASE-<key>.npz   per foreground index, voxels (n, 3) to place patches on; written last

A key is a hash of all that a file's content depends on: of an image, the scan's files and the plan's preprocessing; of
labels, the label file and its declaration too. So another plan never reads the wrong arrays, a changed label map costs
no image, a changed case no other, and several plans can share a folder. Every file appears whole or not at all, and a
case counts as done when all of its files are readable: a killed run goes on where it stopped.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import math
import os
import re
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import BinaryIO, NamedTuple
from zipfile import BadZipFile, ZipFile

import numpy as np
import torch
from jaxtyping import Float, Int32, UInt

from sagittal.data.dataset import Case, Dataset, Digest, files_of
from sagittal.data.device_resampling import products_on
from sagittal.data.known import known_digests
from sagittal.data.label_index import LabelIndex, label_index
from sagittal.data.labelled_case import named, read_case
from sagittal.data.preprocessing import Prepared, frame_of, network_order, prepare, prepare_image, prepare_labels
from sagittal.data.resampling import PIECE_BYTES, Products
from sagittal.errors import DataError, ResourceError
from sagittal.plan.base import cannot_write, canonical_json
from sagittal.plan.plan import Plan
from sagittal.volumes import read_header
from sagittal.volumes.geometry import spacing_of
from sagittal.volumes.resampling import new_shape
from sagittal.volumes.work_memory import SHARE, Room, available_bytes, run_in

FORMAT_VERSION = 2
"""Raise it whenever preprocessing code changes what the files hold."""
_MIN_LOCATIONS = 10_000
_MIN_LOCATION_SHARE = 0.01
_STALE_S = 3600.0
_MEMORY_ADVICE = "Use a machine with more memory, or a coarser spacing (--set preprocessing.spacing_mm=...)."
_NO_VOXELS_BYTES = 128
"""Size of an array (0, 3) in numpy's format: its header, which is padded to a multiple of 64."""
_UNREADABLE = (OSError, ValueError, EOFError, BadZipFile)


class Entry(NamedTuple):
    """One case: its id, and what its files are called."""

    case_id: str
    image: str
    labels: str


@dataclass(frozen=True)
class Cache:
    """The prepared cases of one data set under one plan."""

    folder: Path
    entries: tuple[Entry, ...]
    """In the order of the data set; the index `i` of the methods below counts through them."""

    @property
    def case_ids(self) -> tuple[str, ...]:
        """The cases in the order of the data set."""
        return tuple(entry.case_id for entry in self.entries)

    def image(self, i: int) -> Float[np.ndarray, "C D H W"]:
        """Return the prepared image, float16 or float32, memory-mapped and read-only."""
        return _open_array(image_path(self.folder, self.entries[i]))

    def labels(self, i: int) -> UInt[np.ndarray, "D H W"]:
        """Return the prepared label indices, memory-mapped and read-only."""
        return _open_array(labels_path(self.folder, self.entries[i]))

    def locations(self, i: int) -> dict[int, Int32[np.ndarray, "n 3"]]:
        """Return voxels (d, h, w) of each foreground index, (0, 3) where the case has none of it.

        A sample without replacement: all of them, or the larger of 10 000 and 1 % (nnU-Net's rule).
        """
        path = locations_path(self.folder, self.entries[i])
        try:
            # np.load leaves a damaged file open when it is given a path.
            with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
                return {int(index): arrays[index] for index in arrays.files}
        except _UNREADABLE as error:
            raise _unreadable(path, error) from None

    def classes(self, i: int) -> tuple[int, ...]:
        """Return the foreground indices that the case has, ascending; only the file's list of contents is read."""
        path = locations_path(self.folder, self.entries[i])
        try:
            with path.open("rb") as file, ZipFile(file) as archive:
                members = archive.infolist()
        except _UNREADABLE as error:
            raise _unreadable(path, error) from None
        found = (int(member.filename.removesuffix(".npy")) for member in members if member.file_size > _NO_VOXELS_BYTES)
        return tuple(sorted(found))

    def voxels(self, i: int, index: int) -> Int32[np.ndarray, "n 3"]:
        """Return the voxels (d, h, w) of one foreground index that `locations` has; the others are not read."""
        path = locations_path(self.folder, self.entries[i])
        try:
            with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
                voxels: np.ndarray = arrays[str(index)]
        except (*_UNREADABLE, KeyError) as error:
            raise _unreadable(path, error) from None
        return voxels


def image_path(folder: Path, entry: Entry) -> Path:
    """Return where a case's image lies."""
    return folder / "images" / f"{entry.image}.npy"


def labels_path(folder: Path, entry: Entry) -> Path:
    """Return where a case's label indices lie."""
    return folder / "labels" / f"{entry.labels}.npy"


def locations_path(folder: Path, entry: Entry) -> Path:
    """Return where a case's foreground locations lie."""
    return folder / "locations" / f"{entry.labels}.npz"


def safe_name(case_id: str) -> str:
    """Return a file name for a case: the id itself where it is plain, else its plain part and a hash."""
    plain = re.sub(r"[^A-Za-z0-9._-]", "_", case_id)[:80].lstrip(".")
    if plain == case_id:
        return plain
    return f"{plain}-{hashlib.sha256(case_id.encode()).hexdigest()[:12]}"


def entry_of(case: Case, digests: Mapping[Path, Digest], plan: Plan) -> Entry:
    """Return what a case's files are called under a plan.

    Args:
        case: a labelled case.
        digests: of every file of the case.
        plan: its preprocessing and labels count.
    """
    scans = dataclasses.replace(case, labels=None)
    name, index = safe_name(case.id), label_index(plan.dataset)
    image = _key(str(FORMAT_VERSION), canonical_json(plan.preprocessing), _hashes(scans, digests))
    meaning = json.dumps([list(index.values), plan.dataset.ignore_value])
    return Entry(case.id, f"{name}-{image}", f"{name}-{_key(image, meaning, _hashes(case, digests))}")


def build_cache(
    dataset: Dataset,
    plan: Plan,
    folder: str | os.PathLike[str],
    *,
    workers: int,
    on_case: Callable[[str], None] | None = None,
    digests: Mapping[Path, Digest] | None = None,
    device: torch.device | str = "cpu",
) -> Cache:
    """Prepare every case that is not in the cache yet and return the cache.

    Cases are at work side by side as far as the memory goes, so fewer than `workers` where it is short.

    Args:
        dataset: the labelled training cases.
        plan: its preprocessing and label declaration decide the content.
        folder: where cached files lie; several data sets and plans may share it.
        workers: threads; each holds one case in memory.
        on_case: called with the id of each case once it is prepared, not for those that were there.
        digests: of every file, where they were just taken (`known_digests`).
        device: where images are resampled.

    Raises:
        DataError: a case can't be used; the message names it. Cases done before stay.
        ResourceError: the disk is full, the folder can't be written or a case does not fit into memory; no half-written
            file is left.
    """
    _require_same_declaration(dataset, plan)
    target = Path(folder)
    _make_folders(target)
    digests = digests or known_digests(dataset, None, workers=workers)
    entries = {case.id: entry_of(case, digests, plan) for case in dataset.cases}
    missing = [case for case in dataset.cases if not _is_complete(target, entries[case.id])]
    free = available_bytes()
    products = products_on(device)
    room, index, stop = Room(None if free is None else int(SHARE * free)), label_index(plan.dataset), threading.Event()

    def work(case: Case) -> str:
        try:
            if not stop.is_set():
                with named(case):
                    build = partial(_build_case, case, entries[case.id], plan, index, target, products)
                    run_in(room, need_bytes(case, plan), build, advice=_MEMORY_ADVICE)
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
    return Cache(target, tuple(entries.values()))


def need_bytes(case: Case, plan: Plan) -> int:
    """Return about how much memory preparing a case takes, from its headers; 0 where one can't be read."""
    try:
        headers = [read_header(path) for path in case.images]
    except DataError:
        return 0
    grid, channels = headers[0].geometry, len(headers)
    order = network_order(grid.affine, plan.preprocessing)
    spacing = spacing_of(order.affine(grid.affine, grid.shape))
    stored = math.prod(grid.shape)
    prepared = math.prod(new_shape(order.shape(grid.shape), spacing, plan.preprocessing.target_mm(spacing)))
    # Voxels as read and as float32, one channel between the two grids, the float16 result, labels and their indices.
    return stored * (4 * channels + headers[0].dtype.itemsize + 4) + prepared * (2 * channels + 10) + 4 * PIECE_BYTES


def prepare_case(case: Case, plan: Plan, index: LabelIndex) -> Prepared:
    """Read and prepare one case, with its labels as indices.

    Raises:
        DataError: the case can't be used; the message names it.
    """
    with named(case):
        channels, labels = read_case(case, index)
        return prepare(channels, plan.preprocessing, labels)


def foreground_locations(labels: UInt[np.ndarray, "D H W"], num_indices: int) -> dict[int, Int32[np.ndarray, "n 3"]]:
    """Return a sample of each foreground index's voxels, without replacement (nnU-Net's _sample_foreground_locations).

    All of them up to 10 000; beyond, the larger of 10 000 and 1 %.
    """
    random = np.random.RandomState(1234)
    places = np.flatnonzero(labels != 0)
    seen = labels.reshape(-1)[places]
    # One stable sort groups the voxels of all indices, each group in ascending order.
    order = np.argsort(seen, kind="stable")
    borders = np.cumsum(np.bincount(seen, minlength=num_indices))[:num_indices]
    found = {}
    for index, (start, stop) in enumerate(itertools.pairwise(borders), start=1):
        flat = places[order[start:stop]]
        if flat.size:
            wanted = max(min(_MIN_LOCATIONS, flat.size), int(np.ceil(flat.size * _MIN_LOCATION_SHARE)))
            flat = flat[random.choice(flat.size, wanted, replace=False)]
        found[index] = np.stack(np.unravel_index(flat, labels.shape), axis=1).astype(np.int32)
    return found


def _build_case(case: Case, entry: Entry, plan: Plan, index: LabelIndex, folder: Path, products: Products) -> None:
    channels, stored_labels = read_case(case, index)
    frame = frame_of(channels, plan.preprocessing)
    labels = prepare_labels(stored_labels, frame)
    if not _opens(image_path(folder, entry)):
        image = prepare_image(channels, plan.preprocessing, frame, compact=True, products=products)
        _write(image_path(folder, entry), lambda file: np.save(file, image, allow_pickle=False))
    locations = foreground_locations(labels, index.num_indices)
    _write(labels_path(folder, entry), lambda file: np.save(file, labels, allow_pickle=False))
    arrays = {str(number): voxels for number, voxels in locations.items()}
    _write(locations_path(folder, entry), lambda file: np.savez(file, **arrays))  # type: ignore[arg-type]  # its stub takes them for flags


def _hashes(case: Case, digests: Mapping[Path, Digest]) -> str:
    return "\n".join(digests[path][1] for path in files_of(case))


def _key(*parts: str) -> str:
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def _is_complete(folder: Path, entry: Entry) -> bool:
    try:
        with locations_path(folder, entry).open("rb") as file, np.load(file, allow_pickle=False):
            return _opens(image_path(folder, entry)) and _opens(labels_path(folder, entry))
    except _UNREADABLE:
        return False


def _opens(path: Path) -> bool:
    # Opening reads only the header, and fails where a power cut left a file shorter than that says.
    try:
        return bool(np.load(path, mmap_mode="r", allow_pickle=False).size > 0)
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
        f"{path}: can't be read ({error}). It was whole when the cache was built. Delete it and start again.",
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
        note = "Cases done before are kept."
        raise cannot_write(path, error, note=note, other="another cache folder", code="disk") from None
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
        raise cannot_write(target, error, other="another cache folder", code="disk") from None


def _require_same_declaration(dataset: Dataset, plan: Plan) -> None:
    declared, planned = dataset.spec, plan.dataset.replace(name=dataset.spec.name)
    if declared != planned:
        raise DataError(
            f"{dataset.folder}: dataset.json differs from the plan's: channels {list(declared.channel_names)} against "
            f"{list(planned.channel_names)}, labels {[label.name for label in declared.labels]} against "
            f"{[label.name for label in planned.labels]}, or their values. Make a plan of this data set.",
            code="other_dataset",
        )
