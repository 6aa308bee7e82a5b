"""The Medical Segmentation Decathlon: TASK/dataset.json (nnU-Net v1's form), imagesTr, labelsTr, imagesTs.

Tasks with several channels keep them in one 4D file, which is split.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import PurePosixPath
from typing import Any

from sagittal.data.catalogue import Protocol
from sagittal.data.convert.conversion import Conversion, Scan
from sagittal.data.convert.files import take_apart
from sagittal.data.convert.source import Source
from sagittal.errors import DataError

# nnFormer's split of task 1, by the numbers in BRATS_001 ... BRATS_484; the other 387 train
# (github.com/282857341/nnFormer, nnFormerTrainerV2_nnformer_tumor.py at 00856d6). It has the sizes of SegFormer3D's.
_VALIDATION = (
    *(11, 12, 18, 20, 21, 28, 29, 32, 34, 36, 41, 47, 49, 53, 56, 57, 69, 71, 89, 90, 92, 95, 103, 105, 106, 107),
    *(109, 118, 145, 147, 156, 161, 172, 176, 181, 194, 196, 198, 204, 205, 209, 220, 221, 227, 234, 235, 245, 250),
    *(256, 257, 260, 269, 270, 271, 281, 282, 287, 289, 291, 292, 310, 314, 323, 327, 330, 333, 337, 346, 350, 352),
    *(361, 382, 397),
)
_TESTING = (
    *(58, 59, 76, 77, 99, 113, 114, 124, 139, 151, 152, 157, 190, 240, 242, 295, 305, 325, 331, 362, 389, 425, 432),
    450,
)
_REGIONS: Mapping[str, int | list[int]] = {
    "background": 0,
    "whole tumour": [1, 2, 3],
    "tumour core": [2, 3],
    "enhancing tumour": 3,
}
_TASK = re.compile(r"Task(\d\d)_")


def read_msd(source: Source, name: str, protocol: Protocol | None) -> Conversion:
    """Return what becomes of a task's files; `name` is that of the catalogue, `msd-task04`.

    Protocol `nnformer`, of task 1: nnFormer's split, its 24 test cases in imagesTs, and the three overlapping regions
    that the papers score.

    Raises:
        DataError: it is another task, or files are missing.
    """
    where, content = _declaration(source, name.removeprefix("msd-task"))
    try:
        channels = tuple(str(content["modality"][str(number)]) for number in range(len(content["modality"])))
        labels = {str(title): int(value) for value, title in content["labels"].items()}
        training = tuple(_scan(entry["image"], entry["label"], where, source) for entry in content["training"])
        testing = tuple(_scan(entry, None, where, source) for entry in content.get("test", []))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DataError(
            f"{where}: not the dataset.json of a Decathlon task ({type(error).__name__}: {error}). Fetch it again.",
            code="other_layout",
        ) from None
    if not training or sorted(labels.values())[0] != 0:
        raise DataError(f"{where}: declares no training case or no background. Fetch it again.", code="other_layout")
    background = next(title for title, value in labels.items() if value == 0)
    labels = {"background": labels.pop(background), **labels}
    if protocol is None:
        return Conversion(channels, labels, training, testing)
    validation, held_out = ({f"BRATS_{number:03d}" for number in numbers} for numbers in (_VALIDATION, _TESTING))
    training, testing, fold = take_apart(training, validation, held_out, whose="nnFormer's")
    return Conversion(
        channels,
        _REGIONS,
        training,
        testing,
        regions_class_order=(1, 2, 3),
        splits=(fold,),
        notes=("nnFormer's split; its 24 test cases, with labels, are in imagesTs, the Decathlon's own are left out",),
    )


def _declaration(source: Source, number: str) -> tuple[str, Mapping[str, Any]]:
    found = [name for name in source.names if PurePosixPath(name).name == "dataset.json"]
    folders = {part for name in source.names for part in PurePosixPath(name).parts[:-1]}
    tasks = {match[1] for match in map(_TASK.match, (*folders, *source.given)) if match}
    is_other = bool(tasks) and tasks != {number}
    if len(found) != 1 or is_other:
        holds = f"task {' and '.join(sorted(tasks))}" if is_other else f"{len(found)} files dataset.json"
        raise DataError(
            f"{', '.join(source.given)}: holds {holds}. Expected task {number} of the Decathlon alone: dataset.json, "
            "imagesTr, labelsTr. Give the task's own archive or folder.",
            code="other_layout",
        )
    try:
        content = json.loads(source.text(found[0]))
    except ValueError as error:
        raise DataError(f"{found[0]}: not valid JSON ({error}). Fetch it again.", code="other_layout") from None
    return found[0], content


def _scan(image: str, labels: str | None, where: str, source: Source) -> Scan:
    """Return a case by the paths in dataset.json, which begin at its folder: ./imagesTr/BRATS_001.nii.gz."""
    folder = PurePosixPath(where).parent
    files = [(folder / path).as_posix() for path in (image, labels) if path is not None]
    for file in files:
        if file not in source:
            raise DataError(f"{file}: missing, but {where} lists it. Fetch the data set again.", code="incomplete")
    case = PurePosixPath(image).name
    for ending in (".nii.gz", ".nii"):
        case = case.removesuffix(ending)
    return Scan(case, (files[0],), files[1] if labels is not None else None)
