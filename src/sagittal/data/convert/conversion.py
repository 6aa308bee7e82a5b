"""What a converter decides, as a value: which file becomes which, and what is declared; and writing it down."""

from __future__ import annotations

import csv
import io
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sagittal.data.convert.source import Source
from sagittal.data.dataset import JSON_NAME
from sagittal.data.split_files import PATIENTS_NAME, SPLITS_NAME, write_splits
from sagittal.data.splits import Fold
from sagittal.errors import DataError
from sagittal.plan.base import cannot_write, write_atomically
from sagittal.volumes.io import known_suffix
from sagittal.volumes.nifti import split_nifti_channels


@dataclass(frozen=True)
class Scan:
    """One case: the files of its channels in order, or one file that holds them all, and its label map."""

    id: str
    images: tuple[str, ...]
    labels: str | None = None


@dataclass(frozen=True)
class Conversion:
    """A data set in nnU-Net's layout before it is written.

    Attributes:
        channel_names: in order.
        labels: as dataset.json has them, background included.
        training: cases with labels.
        testing: cases for imagesTs; their labels, where there are any, go to labelsTs.
        regions_class_order: for regions, see `DatasetSpec`.
        patients: the patient of each training case, where patients have several.
        splits: own splits.
        notes: what a person should know.
    """

    channel_names: tuple[str, ...]
    labels: Mapping[str, int | list[int]]
    training: tuple[Scan, ...]
    testing: tuple[Scan, ...] = ()
    regions_class_order: tuple[int, ...] = ()
    patients: Mapping[str, str] = field(default_factory=dict)
    splits: tuple[Fold, ...] = ()
    notes: tuple[str, ...] = ()


def write_conversion(
    conversion: Conversion, source: Source, out: Path, facts: Mapping[str, str], on_case: Callable[[str], None]
) -> Path:
    """Write a data set in nnU-Net's layout; the folder appears whole or not at all.

    Image and label files are taken over byte for byte (from a folder as hard links where the disk allows it, so that
    they take no space twice); only a file that holds several channels is split.

    Args:
        conversion: what to write.
        source: where its files are.
        out: a folder that is not there yet, or empty.
        facts: further entries of dataset.json: name, licence, reference.
        on_case: called with the id of a case each time that a file of it is written.

    Raises:
        DataError: `out` exists, or a file is damaged or unlike its layout.
        ResourceError: the disk is full or the folder can't be written.
    """
    require_free(out)
    ending = _file_ending(conversion)
    targets = _targets(conversion, ending)
    staging: Path | None = None
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}.", suffix=".part"))
        for name in source.names:
            if name in targets:
                case, places = targets[name]
                _write_file(source, name, [staging / place for place in places], staging)
                on_case(case)
        _write_declarations(conversion, staging, facts, ending)
        staging.chmod(0o755)
        if out.is_dir():
            out.rmdir()
        staging.rename(out)
        staging = None
    except OSError as error:
        raise cannot_write(out, error) from None
    finally:
        if staging is not None:
            shutil.rmtree(staging, ignore_errors=True)
    return out


def require_free(out: Path) -> None:
    """Raise DataError where `out` is anything but missing or an empty folder."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise DataError(
            f"{out}: exists, and is never overwritten. Choose another --out, or remove it.", code="would_overwrite"
        )


def _file_ending(conversion: Conversion) -> str:
    scans = (*conversion.training, *conversion.testing)
    files = {file: known_suffix(file) for scan in scans for file in (*scan.images, scan.labels) if file is not None}
    endings = sorted({ending or "none" for ending in files.values()})
    if len(endings) != 1 or endings[0] not in (".nii", ".nii.gz"):
        raise DataError(
            f"files end in {', '.join(endings) or 'nothing'}. Expected .nii.gz or .nii throughout. Use the data set as "
            "its publisher distributes it."
        )
    return endings[0]


def _targets(conversion: Conversion, ending: str) -> dict[str, tuple[str, list[str]]]:
    """Return, of each file of the source, its case and where it goes."""
    targets: dict[str, tuple[str, list[str]]] = {}
    for scans, part in ((conversion.training, "Tr"), (conversion.testing, "Ts")):
        for scan in scans:
            places = [f"images{part}/{scan.id}_{number:04d}{ending}" for number in range(len(conversion.channel_names))]
            if len(scan.images) == 1:
                targets[scan.images[0]] = scan.id, places
            else:
                targets.update({image: (scan.id, [place]) for image, place in zip(scan.images, places, strict=True)})
            if scan.labels is not None:
                targets[scan.labels] = scan.id, [f"labels{part}/{scan.id}{ending}"]
    return targets


def _write_file(source: Source, name: str, targets: Sequence[Path], staging: Path) -> None:
    for target in targets:
        target.parent.mkdir(exist_ok=True)
    if len(targets) == 1:
        _place(source, name, targets[0])
        return
    stored = source.path(name)
    if stored is not None:
        split_nifti_channels(stored, targets)
        return
    copy = staging / f"channels{known_suffix(name)}"
    _place(source, name, copy)
    try:
        split_nifti_channels(copy, targets)
    except DataError as error:
        raise DataError(error.message.replace(str(copy), name), code=error.code) from None
    copy.unlink()


def _place(source: Source, name: str, target: Path) -> None:
    stored = source.path(name)
    if stored is not None:
        try:
            os.link(stored.resolve(), target)
            return
        except OSError:
            pass  # another disk, or one without hard links: copied
    with source.open(name) as file, target.open("xb") as copy:
        shutil.copyfileobj(file, copy, 1 << 20)


def _write_declarations(conversion: Conversion, folder: Path, facts: Mapping[str, str], ending: str) -> None:
    declared: dict[str, Any] = {
        **facts,
        "channel_names": {str(number): name for number, name in enumerate(conversion.channel_names)},
        "labels": conversion.labels,
        "numTraining": len(conversion.training),
        "file_ending": ending,
    }
    if conversion.regions_class_order:
        declared["regions_class_order"] = list(conversion.regions_class_order)
    write_atomically(folder / JSON_NAME, (json.dumps(declared, indent=2) + "\n").encode())
    if conversion.patients:
        table = io.StringIO()
        csv.writer(table, lineterminator="\n").writerows([("case", "patient"), *sorted(conversion.patients.items())])
        write_atomically(folder / PATIENTS_NAME, table.getvalue().encode())
    if conversion.splits:
        write_splits(folder / SPLITS_NAME, conversion.splits)
