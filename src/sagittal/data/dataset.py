"""A folder of labelled scans in nnU-Net v2's layout.

    DATASET/dataset.json                   channel_names, labels (classes, regions, ignore), file_ending
    DATASET/imagesTr/CASE_0000.nii.gz      one file per channel: _0000, _0001, ...
    DATASET/labelsTr/CASE.nii.gz           one label map per case

Or the files stand in dataset.json under "dataset". Reading a data set opens no scan: what is missing or wrong in the
files is the doctor's business, so that one bad case does not hide the next.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from sagittal.errors import DataError, did_you_mean
from sagittal.plan.base import canonical_json, describe_validation_error
from sagittal.plan.dataset import DatasetSpec, Label
from sagittal.volumes.io import FORMATS, known_suffix, scan_files

Digest = tuple[int, str]
"""Size in bytes and SHA-256 of a file."""
CHANNEL_NUMBER = re.compile(r"^(?P<case>.+)_(?P<channel>\d{4})$")
JSON_NAME = "dataset.json"


@dataclass(frozen=True)
class Case:
    """One scan: its images in channel order, and its label map where there is one.

    In a training set the paths are those that should exist; the doctor tells which don't.
    """

    id: str
    images: tuple[Path, ...]
    labels: Path | None = None


@dataclass(frozen=True)
class Dataset:
    """A folder of labelled scans.

    Attributes:
        folder: where dataset.json lies.
        spec: what dataset.json declares.
        cases: sorted by id.
        declared_cases: `numTraining`, where dataset.json says it.
        unused: files beside the images and labels that belong to no case: an undeclared channel, another file ending.
    """

    folder: Path
    spec: DatasetSpec
    cases: tuple[Case, ...]
    declared_cases: int | None = None
    unused: tuple[Path, ...] = ()


def read_declaration(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """Return what dataset.json holds, not yet checked.

    Raises:
        DataError: the folder or its dataset.json is missing, or it is not a JSON object.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise DataError(
            f"{folder}: no such folder. Expected dataset.json, imagesTr and labelsTr in it. Check the path."
        )
    return _read_json(folder / JSON_NAME)


def read_dataset(folder: str | os.PathLike[str], declaration: Mapping[str, Any] | None = None) -> Dataset:
    """Read dataset.json and list the cases; `imagesTs` is left alone.

    Args:
        folder: where dataset.json, imagesTr and labelsTr are.
        declaration: taken instead of the content of dataset.json.

    Raises:
        DataError: the folder or its dataset.json is missing or makes no sense, or there is no case.
    """
    folder = Path(folder)
    source = folder / JSON_NAME
    content = read_declaration(folder) if declaration is None else declaration
    spec = parse_spec(content, str(source), default_name=folder.resolve().name)
    listed = content.get("dataset")
    if listed is not None:
        cases: tuple[Case, ...] = _listed_cases(folder, listed, spec, source)
        unused: tuple[Path, ...] = ()
    else:
        cases, unused = _found_cases(folder, spec)
    declared = content.get("numTraining")
    return Dataset(folder, spec, cases, declared if type(declared) is int else None, unused)


def parse_spec(content: Mapping[str, Any], source: str, default_name: str) -> DatasetSpec:
    """Return what a dataset.json declares; keys that mean nothing to Sagittal are left alone.

    Labels follow nnU-Net: `background` is 0 and not listed, `ignore` is set apart, lists of several values are regions.

    Raises:
        DataError: a key is missing or of the wrong kind, values clash, or files of that ending can't be read.
    """
    labels, channels = content.get("labels"), content.get("channel_names")
    swapped = isinstance(labels, dict) and any(isinstance(value, str) for value in labels.values())
    if swapped or (channels is None and "modality" in content):
        raise _wrong(
            source,
            "this is the layout of nnU-Net v1 ('modality', labels as number: name)",
            'rename "modality" to "channel_names", swap "labels" to {"background": 0, "name": 1}, add "file_ending"',
        )
    if not isinstance(channels, dict) or not channels:
        raise _wrong(source, f"channel_names is {_shown(channels)}", 'write for example {"0": "T1", "1": "FLAIR"}')
    if sorted(channels) != sorted(str(number) for number in range(len(channels))):
        raise _wrong(
            source, f"channel_names has the keys {sorted(channels)}", 'number the channels "0", "1", ... in a row'
        )
    if not isinstance(labels, dict) or not labels:
        raise _wrong(source, f"labels is {_shown(labels)}", 'write for example {"background": 0, "tumour": 1}')
    ending = content.get("file_ending")
    if not isinstance(ending, str) or known_suffix("x" + ending) != ending:
        hint = did_you_mean(ending, FORMATS) if isinstance(ending, str) else f" Known: {', '.join(FORMATS)}."
        raise _wrong(
            source, f"file_ending is {_shown(ending)}, which can't be read", f"name a format.{hint}".rstrip(".")
        )
    values = {name: _label_values(name, value, source) for name, value in labels.items()}
    if values.pop("background", (0,)) != (0,):
        raise _wrong(source, f"background is {labels['background']}", "give it the value 0")
    ignore = values.pop("ignore", None)
    has_regions = any(len(several) > 1 for several in values.values())
    order = content.get("regions_class_order") if has_regions else None
    # Regions keep the order of dataset.json, which their outputs follow; classes are ordered by value.
    entries = list(values.items()) if has_regions else sorted(values.items(), key=lambda entry: entry[1])
    try:
        return DatasetSpec(
            name=content.get("name", default_name),
            channel_names=tuple(channels[str(number)] for number in range(len(channels))),
            labels=tuple(Label(name=name, values=several) for name, several in entries),
            ignore_value=None if ignore is None else ignore[0],
            regions_class_order=tuple(order) if isinstance(order, list) else order,
            label_map=_label_map(content.get("label_map", {}), source),
            codes=_codes(content.get("codes", {}), source),
            file_ending=ending,
        )
    except ValidationError as error:
        raise DataError(
            describe_validation_error(error, source) + ". Correct dataset.json.", code="dataset_json"
        ) from None


def content_hash(dataset: Dataset, digests: Mapping[Path, Digest] | None = None) -> str:
    """Return a SHA-256 over what dataset.json means and over every case's file names, sizes and contents.

    It does not depend on where the folder lies. Files are read piece by piece. A missing file counts as missing.

    Args:
        dataset: what `read_dataset` found.
        digests: `digest_of` each file, where they were just taken.
    """
    found = digests or {}
    total = hashlib.sha256(canonical_json(dataset.spec).encode())
    for case in dataset.cases:
        entry = [
            case.id,
            *([_relative(path, dataset.folder), *(found.get(path) or digest_of(path))] for path in files_of(case)),
        ]
        total.update(json.dumps(entry).encode() + b"\n")
    return total.hexdigest()


def files_of(case: Case) -> tuple[Path, ...]:
    """Return every file that a case is made of, headers and the voxels beside them; they may be missing."""
    scans = [*case.images, *([] if case.labels is None else [case.labels])]
    return tuple(file for scan in scans for file in _parts(scan))


def _parts(scan: Path) -> tuple[Path, ...]:
    """Return the files of a scan; the scan alone where it is missing or damaged, which is the doctor's business."""
    try:
        return scan_files(scan)
    except DataError:
        return (scan,)


def digest_of(path: Path) -> Digest:
    """Return the size and SHA-256 of a file, (-1, "missing") where there is none.

    Raises:
        DataError: it can't be read.
    """
    if not path.is_file():
        return -1, "missing"
    try:
        with path.open("rb") as file:
            return path.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise DataError(f"{path}: can't be read ({error.strerror}). Check the file and its permissions.") from None


def _relative(path: Path, folder: Path) -> str:
    return path.relative_to(folder).as_posix() if path.is_relative_to(folder) else path.name


def _read_json(source: Path) -> dict[str, Any]:
    try:
        content = json.loads(source.read_bytes())
    except FileNotFoundError:
        raise _wrong(
            source, "no such file", "add a dataset.json as nnU-Net v2 has it, or name the folder that holds it"
        ) from None
    except OSError as error:
        raise _wrong(source, f"can't be read ({error.strerror})", "check its permissions") from None
    except ValueError as error:
        raise _wrong(source, f"not valid JSON ({error})", "correct it") from None
    if not isinstance(content, dict):
        raise _wrong(source, f"holds {_shown(content)}", "write an object with channel_names, labels and file_ending")
    return content


def _label_values(name: str, value: Any, source: str) -> tuple[int, ...]:
    several = value if isinstance(value, list) else [value]
    if not several or any(type(item) is not int for item in several):
        raise _wrong(
            source, f"label '{name}' is {_shown(value)}", "give a whole number, or a list of them for a region"
        )
    if name != "background" and (min(several) < 1 or max(several) > 65535):
        remedy = "use values from 1 to 65535; 0 is the background. 'sagittal doctor --fix' replaces the others"
        raise _wrong(source, f"label '{name}' is {_shown(value)}", remedy)
    return tuple(sorted(several))


def _label_map(given: Any, source: str) -> tuple[tuple[int, int], ...]:
    """Return the pairs of value and original value that 'sagittal doctor --fix' wrote."""
    pairs = given.items() if isinstance(given, dict) else [("", given)]
    if not all(key.isascii() and key.isdigit() and type(original) is int for key, original in pairs):
        raise _wrong(source, f"label_map is {_shown(given)}", 'write {"VALUE": original value}, or leave it out')
    return tuple(sorted((int(key), original) for key, original in pairs))


def _codes(given: Any, source: str) -> tuple[tuple[str, str], ...]:
    if not isinstance(given, dict) or not all(isinstance(code, str) for code in given.values()):
        raise _wrong(source, f"codes is {_shown(given)}", 'write {"liver": "SCT:10200004:Liver"}, or leave it out')
    return tuple(sorted(given.items()))


def _wrong(source: str | Path, what: str, remedy: str) -> DataError:
    return DataError(f"{source}: {what}. Expected nnU-Net v2's dataset.json: {remedy}.", code="dataset_json")


def _shown(value: Any) -> str:
    text = "missing" if value is None else json.dumps(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _listed_cases(folder: Path, listed: Any, spec: DatasetSpec, source: Path) -> tuple[Case, ...]:
    """Return the cases under "dataset" in dataset.json; paths are relative to the folder or absolute."""
    if not isinstance(listed, dict) or not listed:
        raise _wrong(source, f'"dataset" is {_shown(listed)}', 'write {"CASE": {"images": ["..."], "label": "..."}}')
    cases = []
    for name, entry in sorted(listed.items()):
        images = entry.get("images") if isinstance(entry, dict) else None
        label = entry.get("label") if isinstance(entry, dict) else None
        if (
            not isinstance(images, list)
            or not isinstance(label, str)
            or not all(isinstance(one, str) for one in images)
        ):
            raise _wrong(
                source, f'"dataset" has {_shown(entry)} for {name}', 'write {"images": ["..."], "label": "..."}'
            )
        if len(images) != len(spec.channel_names):
            found = f"{len(images)} images for {name} and {len(spec.channel_names)} channel_names"
            raise _wrong(source, f'"dataset" has {found}', "list one image per channel")
        cases.append(Case(name, tuple(folder / image for image in images), folder / label))
    return tuple(cases)


def _found_cases(folder: Path, spec: DatasetSpec) -> tuple[tuple[Case, ...], tuple[Path, ...]]:
    images, labels = folder / "imagesTr", folder / "labelsTr"
    example = f"imagesTr/CASE_0000{spec.file_ending}"
    for needed in (images, labels):
        if not needed.is_dir():
            raise DataError(
                f"{needed}: no such folder. Expected {example} and labelsTr/CASE{spec.file_ending}. Add it."
            )
    names, unused = set(), []
    beside = FORMATS[spec.file_ending].beside
    for path in _visible(images, but=beside):
        stem = _stem(path.name, spec.file_ending)
        match = CHANNEL_NUMBER.match(stem) if stem is not None else None
        if match is None or int(match["channel"]) >= len(spec.channel_names):
            unused.append(path)
        if match is not None:
            names.add(match["case"])
    if not names:
        endings = sorted({"".join(path.suffixes[-2:]) for path in unused})
        found = f"{len(unused)} files ending in {', '.join(endings)}" if unused else "it is empty"
        raise DataError(f"{images}: no case ({found}). Expected files like {example}. Check names and file_ending.")
    # A label map without images is a case whose images are missing: the doctor says so.
    for path in _visible(labels, but=beside):
        stem = _stem(path.name, spec.file_ending)
        if stem is None:
            unused.append(path)
        else:
            names.add(stem)
    cases = tuple(
        Case(
            name,
            tuple(images / f"{name}_{channel:04d}{spec.file_ending}" for channel in range(len(spec.channel_names))),
            labels / f"{name}{spec.file_ending}",
        )
        for name in sorted(names)
    )
    return cases, tuple(unused)


def _visible(folder: Path, but: tuple[str, ...] = ()) -> list[Path]:
    """Return what lies in a folder, without hidden files and those that end in `but`: voxels beside their header."""
    return sorted(path for path in folder.iterdir() if not path.name.startswith(".") and not path.name.endswith(but))


def _stem(name: str, ending: str) -> str | None:
    return name[: -len(ending)] if name.endswith(ending) and len(name) > len(ending) else None
