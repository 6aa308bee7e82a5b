"""What a fold reads, carried to its node through a store: prepared cases, held-out scans, weights to start from.

Each case is published by itself, under its number and not its name, so that a node fetches what its folds need, several
at a time, and goes on where it was cut off. On the node, paths in the data set's folder are as they were in it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from sagittal.bundle import Bundle, read_bundle
from sagittal.cluster.node_folder import NodeFolder
from sagittal.cluster.shared import Listing, Store
from sagittal.data.cache import image_path, labels_path, locations_path
from sagittal.data.dataset import JSON_NAME, Case, Dataset
from sagittal.data.split_files import PATIENTS_NAME
from sagittal.errors import ResourceError
from sagittal.training.cross_validation import Run
from sagittal.volumes.io import scan_files

AT_ONCE = 4
"""So many cases are sent or fetched at a time."""
INPUTS = "inputs"
_DATA, _SOURCE, _CACHE, _ELSEWHERE = "data", "source", "cache", "elsewhere"
_LONGEST_WAIT_S = 30.0
_Result = TypeVar("_Result")


@dataclasses.dataclass(frozen=True)
class Inputs:
    """What is in the store for folds to read.

    Attributes:
        contents: hash of what each part holds, by its name.
        scans: images of each case, by where they are in the data set's folder on a node.
        size_bytes: of everything.
    """

    contents: Mapping[str, str]
    scans: Mapping[str, tuple[str, ...]]
    size_bytes: int

    def of_fold(self, run: Run, name: str) -> Inputs:
        """Return what one fold reads."""
        train, held_out = run.cases(name)
        wanted = {_part_of(number) for number in {*train, *held_out}} | {_DATA, _SOURCE}
        contents = {part: content for part, content in self.contents.items() if part in wanted}
        return dataclasses.replace(self, contents=contents)


def send_inputs(store: Store, prefix: str, run: Run, names: Sequence[str]) -> Inputs:
    """Publish what folds read and return what that is; what an earlier command put there is not sent again.

    Args:
        store: where to.
        prefix: of all that is in the store of this run.
        run: of the folds.
        names: the folds.

    Raises:
        ResourceError: a file can't be read or stored.
    """
    used = {number for name in names for part in run.cases(name) for number in part}
    held_out = {number for name in names for number in run.cases(name)[1]}
    by_id = {case.id: case for case in run.data.cases}
    parts: dict[str, dict[str, Path]] = {_DATA: _tables(run.data)}
    scans: dict[str, tuple[str, ...]] = {}
    for number in sorted(used):
        entry = run.cache.entries[number]
        prepared = [place(run.cache.folder, entry) for place in (image_path, labels_path, locations_path)]
        files = {f"{_CACHE}/{path.relative_to(run.cache.folder).as_posix()}": path for path in prepared}
        if number in held_out:
            case = by_id[entry.case_id]
            scans[case.id] = tuple(_add_scan(files, run.data.folder, image, number) for image in case.images)
            if case.labels is not None:
                _add_scan(files, run.data.folder, case.labels, number)
        parts[_part_of(number)] = files
    if run.source is not None:
        parts[_SOURCE] = _files_of_bundle(run.source)

    def send(part: str) -> Listing:
        return patiently(lambda: store.publish_files(f"{prefix}/{INPUTS}/{part}", parts[part]))

    listings = dict(zip(parts, at_once(send, parts), strict=True))
    contents = {part: hashlib.sha256(listing.to_json().encode()).hexdigest() for part, listing in listings.items()}
    size = sum(file.size_bytes for listing in listings.values() for file in listing.files.values())
    return Inputs(contents, scans, size)


def fetch_inputs(
    store: Store, prefix: str, inputs: Inputs, folder: NodeFolder, stopped: Callable[[], object]
) -> int | None:
    """Write what a fold reads below `folder.inputs`; return how many parts were fetched, None where it was stopped.

    Raises:
        DataError: something is not in the store, or damaged.
        ResourceError: the store can't be read, or the disk is full.
    """

    def fetch(part: str) -> bool | None:
        if stopped():
            return None
        name = f"{prefix}/{INPUTS}/{part}"
        return folder.once(
            part, inputs.contents[part], lambda: patiently(lambda: store.fetch_folder(name, folder.inputs))
        )

    fetched = at_once(fetch, inputs.contents)
    return None if None in fetched else sum(map(bool, fetched))


def read_here(run: Run, inputs: Inputs, folder: NodeFolder, run_folder: Path) -> Run:
    """Return a run that reads what was fetched, and writes to a folder of this node.

    Args:
        run: with the paths of the machine that gave it out.
        inputs: what was fetched.
        folder: where.
        run_folder: what is `OUT.run` there.

    Raises:
        BundleError: the weights to start from are damaged.
    """
    data = folder.inputs / _DATA
    cases = tuple(
        Case(case.id, tuple(data / image for image in inputs.scans[case.id])) if case.id in inputs.scans else case
        for case in run.data.cases
    )
    source = run.source
    if source is not None:
        whole = read_bundle(folder.inputs / _SOURCE)
        source = whole if source.whole is None else whole.low
    kernels = None if run.options.known_kernels is None else folder.path / "kernels.json"
    options = dataclasses.replace(run.options, cache=None, splits=None, known=None, known_kernels=kernels)
    return dataclasses.replace(
        run,
        folder=run_folder,
        cache=dataclasses.replace(run.cache, folder=folder.inputs / _CACHE),
        data=dataclasses.replace(run.data, folder=data, cases=cases, unused=()),
        options=options,
        source=source,
    )


def at_once(act: Callable[[str], _Result], names: Iterable[str]) -> list[_Result]:
    """Do the same for several names, a few at a time, and return the results in order."""
    with ThreadPoolExecutor(AT_ONCE, thread_name_prefix="carry") as pool:
        try:
            return list(pool.map(act, names))
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def patiently(
    act: Callable[[], _Result],
    *,
    within_s: float = 60.0,
    told: Callable[[ResourceError], None] = lambda error: None,
    first_s: float = 1.0,
) -> _Result:
    """Do what may fail for a moment, as a store's network does, again after a while.

    Args:
        act: raises a ResourceError where it is to be tried again.
        within_s: how long.
        told: receives each error after which it is tried again.
        first_s: pause after the first failure; each further one is twice as long, up to half a minute.

    Raises:
        ResourceError: the last one.
    """
    until, wait_s = time.monotonic() + within_s, first_s
    while True:
        try:
            return act()
        except ResourceError as error:
            if time.monotonic() + wait_s > until or error.code == "missing_package":
                raise
            told(error)
        time.sleep(wait_s)
        wait_s = min(2 * wait_s, _LONGEST_WAIT_S)


def _part_of(number: int) -> str:
    return f"case-{number:05d}"


def _tables(data: Dataset) -> dict[str, Path]:
    paths = [data.folder / JSON_NAME, data.folder / PATIENTS_NAME]
    return {f"{_DATA}/{path.name}": path for path in paths if path.is_file()}


def _files_of_bundle(source: Bundle) -> dict[str, Path]:
    files = (path for path in source.path.rglob("*") if path.is_file())
    return {f"{_SOURCE}/{path.relative_to(source.path).as_posix()}": path for path in files}


def _add_scan(files: dict[str, Path], folder: Path, scan: Path, number: int) -> str:
    """Add the files of a scan or a label map; return where it is in the data set's folder on a node."""
    if scan.is_relative_to(folder) and ".." not in scan.relative_to(folder).parts:
        there = scan.relative_to(folder).as_posix()
    else:
        there = f"{_ELSEWHERE}/{number}/{hashlib.sha256(str(scan.parent).encode()).hexdigest()[:8]}/{scan.name}"
    for part in scan_files(scan):
        base = scan if part.is_relative_to(scan) else scan.parent
        inside = part.relative_to(base).as_posix() if part.is_relative_to(base) else part.name
        name = there if base == scan else there.rpartition("/")[0]
        files["/".join(each for each in (_DATA, name, inside) if each not in ("", "."))] = part
    return there
