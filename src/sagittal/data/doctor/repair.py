"""A repaired copy of a data set: what can be put right without a guess, and a record of every change.

    OUT/dataset.json     as the source's, for .nii.gz files; `label_map` where values were replaced
    OUT/imagesTr, OUT/labelsTr
    OUT/repair.json      what was changed, file by file, and what is left

Nothing is interpolated, no intensity is changed and no value is guessed: what needs that is left as it is and told.
The source is only read. `imagesTs` stays where it is: predicting needs no repaired copy.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

from sagittal.data.dataset import JSON_NAME, Dataset, read_dataset, read_declaration
from sagittal.data.doctor.diagnosis import diagnose
from sagittal.data.doctor.findings import Diagnosis
from sagittal.data.doctor.label_values import Declared, declare, label_map
from sagittal.data.doctor.repaired_case import ENDING, Change, Values, present_values, repair_case
from sagittal.data.split_files import PATIENTS_NAME, SPLITS_NAME
from sagittal.errors import DataError
from sagittal.plan.base import write_atomically

REPORT_NAME = "repair.json"
_DROPPED_KEYS = ("dataset", "overwrite_image_reader_writer", "file_ending", "numTraining", "labels", "label_map")


@dataclass(frozen=True)
class Repair:
    """What a repair did.

    Attributes:
        out: the copy.
        label_map: value in the copy's label maps, as text, to the value it had.
        changes: file by file.
        left: what the doctor finds in the copy.
    """

    out: Path
    label_map: Mapping[str, int]
    changes: tuple[Change, ...]
    left: Diagnosis

    def as_dict(self) -> dict[str, object]:
        """Return the diagnosis of the copy with `"repair": {"label_map", "changes": [{"case", "file", "what"}]}`."""
        changes = [asdict(change) for change in self.changes]
        return {**self.left.as_dict(), "repair": {"label_map": dict(self.label_map), "changes": changes}}

    def to_json(self) -> str:
        """Return `as_dict` as indented JSON."""
        return json.dumps(self.as_dict(), indent=2)

    @property
    def report(self) -> Path:
        """Where the same is written."""
        return self.out / REPORT_NAME


def open_repairable(
    folder: Path, names: Mapping[int, str] | None = None, avoid: frozenset[int] = frozenset()
) -> tuple[Dataset, Declared]:
    """Return a data set that may declare values which no label map may hold, with usable values in their place.

    Args:
        folder: the data set.
        names, avoid: see `declare`.

    Raises:
        DataError: as `read_dataset` and `declare`.
    """
    declared = declare(read_declaration(folder), names, avoid)
    return read_dataset(folder, declared.content), declared


def repair(folder: Path, out: Path, workers: int = 1, names: Mapping[int, str] | None = None) -> Repair:
    """Write a repaired copy of a data set and say what is left.

    Axes are brought into RAS order, headers of one case that differ within the tolerances are made equal, whole numbers
    stored as floats become integers, label values that can't be declared get others, and all files become .nii.gz. A
    file that can't be read is left out; one that can't be repaired is copied as it is.

    Args:
        folder: the data set; it is only read.
        out: folder to write; it must be empty or not exist, and not lie within `folder`.
        workers: threads, each with one image in memory.
        names: names for label values that dataset.json lacks; they are declared in the copy.

    Raises:
        DataError: the data set's declaration makes no sense, `names` do not fit it, or `out` is in use.
        ResourceError: the copy can't be written.
    """
    _refuse_used(folder, out)
    dataset, declared = open_repairable(folder, names)
    with ThreadPoolExecutor(max_workers=max(1, workers), thread_name_prefix="repair") as pool:
        if declared.replaced:
            # A value that some label map holds without a name must not get the meaning of the one that it stands for.
            held = frozenset(value for several in pool.map(present_values, dataset.cases) for value in several)
            dataset, declared = open_repairable(folder, names, avoid=held)
        values = Values(declared.replaced, dataset.spec.declared_values)
        repaired = pool.map(lambda case: repair_case(case, out, values), dataset.cases)
        changes = [*_left_out(dataset), *(change for several in repaired for change in several)]
    originals = label_map(declared)
    content = {key: value for key, value in declared.content.items() if key not in _DROPPED_KEYS}
    content |= {"labels": declared.content["labels"], "numTraining": len(dataset.cases), "file_ending": ENDING}
    if originals:
        content["label_map"] = originals
    write_atomically(out / JSON_NAME, (json.dumps(content, indent=2) + "\n").encode())
    for name in (PATIENTS_NAME, SPLITS_NAME):
        if (folder / name).is_file():
            shutil.copyfile(folder / name, out / name)
    done = Repair(out, originals, tuple(changes), diagnose(read_dataset(out), workers=workers))
    write_atomically(done.report, (done.to_json() + "\n").encode())
    return done


def _left_out(dataset: Dataset) -> Iterator[Change]:
    for path in dataset.unused:
        yield Change("", f"{path.parent.name}/{path.name}", "left out: it belongs to no case")


def _refuse_used(folder: Path, out: Path) -> None:
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise DataError(
            f"{out}: exists and is not empty. Expected a new folder, so that nothing is overwritten. Choose another.",
            code="overwrites",
        )
    if out.resolve().is_relative_to(folder.resolve()):
        raise DataError(
            f"{out}: lies within the data set, which is never changed. Choose a folder outside of it.",
            code="overwrites",
        )
