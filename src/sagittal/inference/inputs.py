"""Which cases a prediction is asked for: files, folders of any depth, or a list; a bad one does not hide the others.

imagesTs/CASE_0000.nii.gz       one file per channel: _0000, _0001, ...; without a number where there is one channel
any/depth/CASE_0000.nii.gz      the case is any/depth/CASE, and so is the path of its output
any/depth/SERIES/*.dcm          a folder of DICOM files is one scan; a folder with nothing but series of one study, too
STUDY#1.2.3                     one series of a DICOM folder, archive or DICOMDIR, by its UID or number
list.csv, list.txt              a case per line: the paths of its channels
"""

from __future__ import annotations

import csv
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from sagittal.data.dataset import CHANNEL_NUMBER, JSON_NAME, Case
from sagittal.errors import DataError
from sagittal.volumes.dicom_catalogue import is_study
from sagittal.volumes.dicom_files import SLICE_SUFFIXES, is_archive, split_series
from sagittal.volumes.io import FORMATS, is_scan, known_suffix, scan_name

LIST_SUFFIXES = (".csv", ".txt", ".tsv")
_CASE_COLUMN = "case"
_MAGIC_AT, _MAGIC = 128, b"DICM"
_MOST_CHANNELS = 9
_UNSAFE = re.compile(r'[<>:"|?*\x00-\x1f]')

Inputs = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]


@dataclass(frozen=True)
class BadCase:
    """A case that can't be predicted, known before any scan is opened."""

    id: str
    error: DataError


@dataclass(frozen=True)
class FoundCases:
    """The cases to predict, sorted by id, and those that can't be."""

    good: tuple[Case, ...]
    bad: tuple[BadCase, ...] = ()


def find_cases(
    inputs: Inputs, channel_names: Sequence[str], *, out: Path | None = None, numbers: Sequence[int] | None = None
) -> FoundCases:
    """List the cases that a prediction is asked for; no scan is opened.

    Args:
        inputs: a scan; several files (the channels of one case in order, or of several by CASE_0000 names); a folder,
            searched to any depth, of which `imagesTs`, else `imagesTr`, is taken where it is a data set; the folder or
            zip archive of a DICOM series; a list, .csv, .tsv or .txt.
        channel_names: the channels of each case, in order.
        numbers: what their file names end in, where some of the model's are missing; by default 0, 1, ...
        out: the folder for the outputs, which is not searched.

    Raises:
        DataError: nothing is there, nothing of it is a scan, it is the folder for the outputs, or a list makes no
            sense.
    """
    paths = [Path(inputs)] if isinstance(inputs, str | os.PathLike) else [Path(item) for item in inputs]
    if not paths:
        raise DataError("no input. Expected scans, a folder of them or a list. Name one.")
    for path in paths:
        if not split_series(path)[0].exists():
            raise DataError(f"{path}: no such file. Expected a scan, a folder of scans or a list. Check the path.")
    lists = [path for path in paths if path.is_file() and path.suffix.lower() in LIST_SUFFIXES]
    scans: list[tuple[str, Path]] = []
    for path in paths:
        if path not in lists:
            scans.extend(_scans_at(path, out))
    found = _grouped(scans, channel_names, tuple(range(len(channel_names)) if numbers is None else numbers))
    for path in lists:
        found.extend(_of_list(path, channel_names))
    if not found:
        raise DataError(f"{paths[0]}: names no case. Expected a line per case. Check the list.")
    return _unambiguous(found)


def _scans_at(path: Path, out: Path | None) -> list[tuple[str, Path]]:
    """Return (folder within the input, scan) of every scan at a path."""
    if not path.is_dir():
        if not is_scan(path):
            raise DataError(
                f"{path}: not an image that can be read. Expected {', '.join(FORMATS)}, the folder or zip archive of a "
                f"DICOM series, or a list ({', '.join(LIST_SUFFIXES)}). Convert it first."
            )
        return [("", path)]
    if (path / JSON_NAME).is_file():
        path = next((path / name for name in ("imagesTs", "imagesTr") if (path / name).is_dir()), path)
    if out is not None and path.resolve() == out.resolve():
        raise DataError(
            f"{path}: scans and outputs in one folder; the next run would take label maps for scans. Choose another "
            "folder for the outputs, for example one within it.",
            code="bad_input",
        )
    if _holds_slices(path):
        return [("", path)]
    found = list(_below(path, PurePosixPath(), None if out is None else out.resolve()))
    if is_study(path, [item for _, item in found]):
        return [("", path)]
    images = [item for item in found if not is_archive(item[1])]
    # An archive beside images is more likely their download than a series.
    if not found:
        raise DataError(
            f"{path}: no image. Expected files like CASE_0000.nii.gz ({', '.join(FORMATS)}), or folders of DICOM "
            "slices, at any depth. Check the path."
        )
    return images or found


def _below(folder: Path, place: PurePosixPath, out: Path | None) -> Iterator[tuple[str, Path]]:
    try:
        children = sorted(child for child in folder.iterdir() if not child.name.startswith("."))
    except OSError as error:
        raise DataError(f"{folder}: can't be listed ({error.strerror}). Check its permissions.") from None
    for child in children:
        if child.is_dir():
            if out is not None and child.resolve() == out:
                continue
            if _holds_slices(child):
                yield str(place), child
            else:
                yield from _below(child, place / child.name, out)
        elif known_suffix(child) is not None or is_archive(child):
            yield str(place), child


def _holds_slices(folder: Path) -> bool:
    """Whether DICOM files, and no images of other formats, lie in the folder itself."""
    files = [child for child in sorted(folder.iterdir()) if child.is_file() and not child.name.startswith(".")]
    if any(known_suffix(file) is not None for file in files):
        return False
    return any(_is_slice(file) for file in files if not is_archive(file))


def _is_slice(file: Path) -> bool:
    if file.name.lower().endswith(SLICE_SUFFIXES):
        return True
    try:
        with file.open("rb") as opened:
            return opened.read(_MAGIC_AT + len(_MAGIC))[_MAGIC_AT:] == _MAGIC
    except OSError:
        return False


def _grouped(
    scans: Sequence[tuple[str, Path]], channel_names: Sequence[str], numbers: tuple[int, ...]
) -> list[Case | BadCase]:
    """Return the cases that channel files make, by the numbers at the ends of their names."""
    channels = len(channel_names)
    names = [scan_name(path) for _, path in scans]
    numbered = [CHANNEL_NUMBER.match(name) for name in names]
    if channels == len(scans) > 1 and not all(numbered):
        # Channels of one case under names of their own, in the order given.
        return [Case(_id("", names[0]), tuple(path for _, path in scans))]
    groups: dict[str, dict[int, Path]] = {}
    wrong: list[Case | BadCase] = []
    several = _with_several_channels(scans, numbered) if channels == 1 else frozenset()
    for (place, path), name, match in zip(scans, names, numbered, strict=True):
        # With one channel, a name may end in any four digits: scan_2021 is no channel 2021.
        counts = match is not None and (
            channels > 1 or int(match["channel"]) == numbers[0] or _id(place, match["case"]) in several
        )
        stem, channel = (match["case"], int(match["channel"])) if match is not None and counts else (name, numbers[0])
        group = groups.setdefault(_id(place, stem), {})
        if channel in group:
            wrong.append(BadCase(_id(place, stem), _twice(path, group[channel])))
        else:
            group[channel] = path
    return [_complete(case, group, channel_names, numbers) for case, group in groups.items()] + wrong


def _with_several_channels(
    scans: Sequence[tuple[str, Path]], numbered: Sequence[re.Match[str] | None]
) -> frozenset[str]:
    """Return the cases whose files are numbered like channels: 0, 1, ... without a gap, fewer than ten.

    Longer rows of numbers are more likely those of cases.
    """
    found: dict[str, set[int]] = {}
    for (place, _), match in zip(scans, numbered, strict=True):
        if match is not None:
            found.setdefault(_id(place, match["case"]), set()).add(int(match["channel"]))
    return frozenset(
        case for case, seen in found.items() if 1 < len(seen) <= _MOST_CHANNELS and seen == set(range(len(seen)))
    )


def _complete(
    case: str, channels: Mapping[int, Path], channel_names: Sequence[str], numbers: tuple[int, ...]
) -> Case | BadCase:
    some = next(iter(channels.values()))
    ending = some.name.removeprefix(scan_name(some))
    stem = case.rpartition("/")[2]
    for number, channel in zip(numbers, channel_names, strict=True):
        if number not in channels:
            missing = some.with_name(f"{stem}_{number:04d}{ending}")
            return BadCase(
                case,
                DataError(
                    f"{case}: channel {number} ({channel}) is missing. Expected {len(channel_names)} files per case, "
                    f"here {missing}. Add it, or name all channel files in order in a list.",
                    code="missing_channel",
                ),
            )
    extra = sorted(set(channels) - set(numbers))
    if extra:
        return BadCase(
            case,
            DataError(
                f"{channels[extra[0]]}: channel {extra[0]} of {case}, but {len(channel_names)} are expected "
                f"({', '.join(channel_names)}). Remove the file, name the scans in a list, or take another model.",
                code="undeclared_channel",
            ),
        )
    return Case(case, tuple(channels[number] for number in numbers))


def _of_list(path: Path, channel_names: Sequence[str]) -> list[Case | BadCase]:
    """Return the cases of a list; relative paths count from the list's folder."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: can't be read as text ({error}). Expected a case per line.") from None
    separator = "\t" if path.suffix.lower() == ".tsv" or ("\t" in text and "," not in text) else ","
    lines = [line for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    rows = [[cell.strip() for cell in row] for row in csv.reader(lines, delimiter=separator)]
    header = _header(rows[0], channel_names, path) if rows else None
    return [_row(row, header, channel_names, path) for row in (rows if header is None else rows[1:])]


def _header(row: Sequence[str], channel_names: Sequence[str], path: Path) -> dict[str, int] | None:
    """Return the columns by name where the first row names them."""
    known = {name.lower(): name for name in channel_names}
    if len(channel_names) == 1:
        known |= {"image": channel_names[0], "path": channel_names[0]}
    columns = {known.get(cell.lower(), cell.lower()): place for place, cell in enumerate(row)}
    if _CASE_COLUMN not in columns and not any(name in columns for name in channel_names):
        return None
    missing = [name for name in channel_names if name not in columns]
    if missing:
        raise DataError(
            f"{path}: the first line names no column for {', '.join(missing)}. Expected case (which may be left out), "
            f"{', '.join(channel_names)}. Name them.",
            code="list",
        )
    return columns


def _row(row: list[str], header: dict[str, int] | None, channel_names: Sequence[str], path: Path) -> Case | BadCase:
    places = list(range(len(row))) if header is None else [header[name] for name in channel_names]
    cells = [row[place] if place < len(row) else "" for place in places]
    named = row[header[_CASE_COLUMN]] if header is not None and header.get(_CASE_COLUMN, len(row)) < len(row) else ""
    images = [path.parent / cell for cell in cells if cell]
    first = scan_name(images[0]) if images else "line of " + path.name
    match = CHANNEL_NUMBER.match(first)
    case = _id("", named or (match["case"] if match is not None and int(match["channel"]) == 0 else first))
    if len(images) != len(channel_names):
        return BadCase(
            case,
            DataError(
                f"{path}: {case} has {len(images)} images. Expected {len(channel_names)}: {', '.join(channel_names)}. "
                "Name one path per channel.",
                code="missing_channel",
            ),
        )
    for image in images:
        if not split_series(image)[0].exists():
            return BadCase(case, DataError(f"{image}: no such file, but {path.name} names it.", code="unreadable"))
    return Case(case, tuple(images))


def _unambiguous(found: Sequence[Case | BadCase]) -> FoundCases:
    """Return the cases by id; of an id that occurs twice, neither is predicted: one would overwrite the other."""
    good: dict[str, Case] = {}
    bad: dict[str, BadCase] = {}
    for item in found:
        if isinstance(item, BadCase):
            bad[item.id] = item
        elif item.id in good:
            bad[item.id] = BadCase(item.id, _twice(item.images[0], good[item.id].images[0]))
        else:
            good[item.id] = item
    return FoundCases(
        tuple(good[name] for name in sorted(good) if name not in bad), tuple(bad[name] for name in sorted(bad))
    )


def _twice(path: Path, other: Path) -> DataError:
    return DataError(
        f"{path}: the same case and channel as {other}. Expected distinct names. Rename one.", code="twice"
    )


def _id(place: str, name: str) -> str:
    """Return a case's id, which is the path of its output: no part of it leads out of the folder."""
    whole = name if place in ("", ".") else f"{place}/{name}"
    parts = [_UNSAFE.sub("_", part) for part in whole.replace("\\", "/").split("/") if part not in ("", ".", "..")]
    return "/".join(parts) or "case"
