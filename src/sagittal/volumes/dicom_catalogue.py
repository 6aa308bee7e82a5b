"""Which series are in a study, which of them are volumes, and which one to take.

Descriptions are what a person chooses by, so they are listed; names and ids of patients are not, and no error message
holds a description: it may name the patient.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sagittal.errors import DataError
from sagittal.plan.base import Triple
from sagittal.volumes.dicom import assembled, damaged_beside, scans_first, slices_of
from sagittal.volumes.dicom_directory import DIRECTORY_NAME, is_directory_file
from sagittal.volumes.dicom_files import Member, members, split_series
from sagittal.volumes.dicom_frames import loses_something
from sagittal.volumes.dicom_headers import UNKNOWN_CLASS, WANTED, ImageHeader, class_name, image_header, read_tags
from sagittal.volumes.dicom_library import quiet, silent
from sagittal.volumes.dicom_parts import PART_MARK, Part, parts_of
from sagittal.volumes.geometry import spacing_of

_DESCRIBING = ("StudyInstanceUID", "StudyDescription", "SeriesDescription", "PatientID")
_MAX_TEXT = 64
_MAX_LISTED = 12
_WORD = re.compile(r"[A-Za-z0-9._-]{1,64}")
_SCOUT = re.compile(r"\b(scout|localizer|localiser|topogram|scanogram|surview|survey)\b", re.IGNORECASE)
_REASONS = {"localizer": "a localizer", "capture": "a secondary capture, no scan"}
_SEQUENCES = {
    "t1": r"t1(?!.*(\bgd\b|\bkm\b|\+c\b|\bce\b|contrast|post))",
    "t1c": r"t1.*(\bgd\b|\bkm\b|\+c\b|\bce\b|contrast|post)|t1c|t1gd",
    "t2": r"t2(?!.*(flair|\*|star))",
    "flair": r"flair|dark.?fluid",
    "adc": r"adc|apparent",
    "dwi": r"dwi|diff|trace",
    "pd": r"\bpd\b|proton.?dens",
}
"""What a description says of an MR contrast, by the channel's name."""
_SAME_SEQUENCE = {"t1w": "t1", "t1n": "t1", "t1ce": "t1c", "t1gd": "t1c", "t2w": "t2", "t2f": "flair"}


@dataclass(frozen=True)
class SeriesInfo:
    """What is known of a series, or of one of the volumes in it, without its voxels.

    Attributes:
        study_uid: the study's UID.
        series_uid: what `read_dicom` takes: the series' UID, with `@2` for the second of several volumes in it.
        modality: CT, MR, SEG and so on; empty where the files say nothing.
        description: of the series. It may hold what a person typed.
        study_description: of the study.
        patient_key: eight characters that differ from patient to patient and tell nothing else.
        files: how many.
        frames: slices, or images where it is no volume.
        shape: voxels along D, H and W, None where there are none.
        spacing_mm: of the voxels along D, H and W, None where it is no volume.
        series_number: the scanner's number of it, None where it has none.
        transfer_syntax: how the voxels are stored, in words.
        usable: whether it can be read as a volume, as it is.
        why_not: why it can't, empty where it can.
        part: what tells it from the other volumes of the series, `EchoTime 80` for example; else empty.
        lossy: whether its voxels were compressed with loss.
        capture: whether it is a secondary capture that says where it lies: read by hand, or where there is no scan.
    """

    study_uid: str
    series_uid: str
    modality: str
    description: str
    study_description: str
    patient_key: str
    files: int
    frames: int
    shape: Triple | None
    spacing_mm: tuple[float, float, float] | None
    series_number: int | None
    transfer_syntax: str
    usable: bool
    why_not: str
    part: str = ""
    lossy: bool = False
    capture: bool = False


@dataclass(frozen=True, eq=False)
class _Object:
    """One file: its tags, and its header where it is an image."""

    tags: Any
    header: ImageHeader | None
    what: str


def list_series(path: Path) -> tuple[SeriesInfo, ...]:
    """List every series of a folder (at any depth), zip archive, DICOMDIR or DICOM file; no voxels are read.

    What is no scan (localizers, secondary captures, reports, segmentations, plans, damaged files) is listed as not
    usable, with the reason. Where several volumes share a series, each is listed.

    Returns:
        by study in the order found, then by number.

    Raises:
        DataError: there is no DICOM file, the archive or DICOMDIR is damaged, or pydicom is not installed.
    """
    path, _ = split_series(path)
    with members(path) as files, silent():
        if not files:
            raise DataError(f"{path}: no DICOM file in it. Check the path.", code="unreadable")
        groups: dict[tuple[str, str], list[_Object]] = {}
        broken: dict[str, DataError] = {}
        for member in files:
            try:
                found = _looked_at(member, path)
            except DataError as error:
                if error.code == "missing_extra":
                    raise
                broken[member.name] = error
            else:
                if found is not None:
                    groups.setdefault((_text(found.tags, "SeriesInstanceUID"), found.what), []).append(found)
        with quiet("a series", path):
            listed = [info for group in groups.values() for info in _described(path, group, broken)]
    studies = list(dict.fromkeys(info.study_uid for info in listed))
    listed.sort(key=lambda info: (studies.index(info.study_uid), info.series_number is None, info.series_number or 0))
    return (*listed, *([_broken(path, [*broken.values()])] if broken else []))


def is_study(folder: Path, below: Sequence[Path]) -> bool:
    """Whether a folder is one study: it has a DICOMDIR, or all that lies in it are folders of series of one study.

    Args:
        folder: which.
        below: what holds scans within it; one file of each folder is looked at.
    """
    if is_directory_file(folder / DIRECTORY_NAME):
        return True
    if len(below) < 2 or not all(path.is_dir() for path in below):
        return False
    studies: set[str] = set()
    for path in below:
        studies.add(_study_of(path))
        if len(studies) > 1 or "" in studies:
            return False
    return True


def _study_of(folder: Path) -> str:
    """Return the UID of the study that the first file of a folder belongs to, empty where it tells none."""
    try:
        with members(folder) as files, silent():
            return _text(read_tags(files[0], folder, ("StudyInstanceUID",)), "StudyInstanceUID") if files else ""
    except DataError:
        return ""


def choose_series(found: Sequence[SeriesInfo], modality: str | None = None, channel: str = "") -> SeriesInfo:
    """Return the series to take: the only usable one, else the largest of the modality asked for.

    Localizers by their description and secondary captures never win beside a scan. Where MR contrasts differ, one is
    taken only if the channel's name (T1, T2, FLAIR, ...) fits the description of a single one.

    Args:
        found: as `list_series` returns them.
        modality: CT, MR and so on; None where any will do.
        channel: name of the model's channel, for MR.

    Raises:
        DataError: none is usable, or several fit equally well; the message lists them.
    """
    usable = [info for info in found if info.usable]
    if not usable:
        raise DataError(f"no series that is a volume. Found: {_listing(found)}. Give another folder.", code="no_series")
    scans = [info for info in usable if not info.capture] or usable
    candidates = [info for info in scans if _SCOUT.search(info.description) is None] or scans
    if len(candidates) == 1:
        return candidates[0]
    if modality is not None:
        candidates = [info for info in candidates if info.modality == modality]
        if not candidates:
            raise DataError(
                f"no {modality} among {len(usable)} series: {_listing(usable)}. Name one: --series.", code="no_series"
            )
    wanted = _SEQUENCES.get(_SAME_SEQUENCE.get(channel.lower(), channel.lower()))
    if wanted is not None and len(candidates) > 1:
        candidates = [info for info in candidates if re.search(wanted, info.description, re.IGNORECASE)]
        if not candidates:
            raise DataError(
                f"none of {len(usable)} series is described as {channel}: {_listing(usable)}. Name one: --series.",
                code="several_series",
            )
    sizes = [_voxels(info) for info in candidates]
    largest = [info for info, size in zip(candidates, sizes, strict=True) if size == max(sizes)]
    if len(largest) > 1 or (wanted is not None and len(candidates) > 1):
        raise DataError(
            f"{len(candidates)} series fit equally well: {_listing(candidates)}. Name one: --series.",
            code="several_series",
        )
    return largest[0]


def _looked_at(member: Member, path: Path) -> _Object | None:
    tags = read_tags(member, path, (*WANTED, *_DESCRIBING))
    header = image_header(tags, member, path)
    if header is not None:
        return _Object(tags, header, _REASONS.get(_kind(header), ""))
    name = class_name(tags, path) or ""
    if "Directory" in name:
        return None
    # A private class of objects has no name but its UID.
    return _Object(tags, None, f"{name if any(map(str.isalpha, name)) else UNKNOWN_CLASS}, no scan")


def _kind(header: ImageHeader) -> str:
    return "scan" if header.kind == "capture" and header.has_place else header.kind


def _described(path: Path, group: Sequence[_Object], broken: Mapping[str, DataError]) -> list[SeriesInfo]:
    """Return a line for a series, or for each of the volumes in it."""
    base = _bare(group)
    headers = scans_first([each.header for each in group if each.header is not None])
    if group[0].what or not headers:
        return [replace(base, why_not=group[0].what)]
    beside = damaged_beside(headers, broken)
    if beside is not None:
        return [replace(base, why_not=f"a damaged file lies beside it: {_reason(path, beside)}")]
    try:
        parts = parts_of(slices_of(path, headers))
    except DataError as error:
        return [replace(base, why_not=_reason(path, error))]
    base = replace(base, capture=headers[0].kind == "capture")
    if len(parts) == 1:
        return [_measured(path, base, parts[0])]
    return [
        _measured(path, replace(base, series_uid=f"{base.series_uid}{PART_MARK}{number}"), part)
        for number, part in enumerate(parts, start=1)
    ]


def _bare(group: Sequence[_Object]) -> SeriesInfo:
    first = group[0].tags
    headers = [each.header for each in group if each.header is not None]
    frames = sum(header.frames for header in headers)
    syntaxes = dict.fromkeys(_syntax(each.tags) for each in group)
    return SeriesInfo(
        study_uid=_word(first, "StudyInstanceUID"),
        series_uid=_word(first, "SeriesInstanceUID"),
        modality=_word(first, "Modality")[:16],
        description=_text(first, "SeriesDescription"),
        study_description=_text(first, "StudyDescription"),
        patient_key=hashlib.sha256(_text(first, "PatientID").encode()).hexdigest()[:8],
        files=len(group),
        frames=frames or len(group),
        shape=(frames, *headers[0].shape) if headers else None,
        spacing_mm=None,
        series_number=_number(first),
        transfer_syntax=", ".join(syntaxes),
        usable=False,
        why_not="",
        lossy=any(loses_something(each.tags) for each in group if each.header is not None),
    )


def _measured(path: Path, base: SeriesInfo, part: Part) -> SeriesInfo:
    frames = len(part.slices)
    files = len({piece.member.name for piece in part.slices})
    height, width = part.slices[0].shape
    info = replace(base, part=part.name, frames=frames, files=files, shape=(frames, height, width))
    try:
        geometry = assembled(path, part.slices).header().geometry
    except DataError as error:
        return replace(info, why_not=_reason(path, error))
    spacing = spacing_of(geometry.affine)
    return replace(info, usable=True, shape=geometry.shape, spacing_mm=spacing)


def _broken(path: Path, errors: Sequence[DataError]) -> SeriesInfo:
    more = f" (and {len(errors) - 1} more)" if len(errors) > 1 else ""
    count = len(errors)
    why = f"damaged: {_reason(path, errors[0])}{more}"
    return SeriesInfo("", "", "", "", "", "", count, count, None, None, None, "", False, why)


def _reason(path: Path, error: DataError) -> str:
    return error.message.removeprefix(f"{path}: ").partition(". Expected")[0]


def _syntax(tags: Any) -> str:
    syntax = tags.file_meta.get("TransferSyntaxUID")
    # Damaged, it may be several words, of which pydicom makes no UID.
    return str(syntax.name) if getattr(syntax, "is_transfer_syntax", False) else "unknown"


def _number(tags: Any) -> int | None:
    try:
        return int(tags.get("SeriesNumber"))
    except (TypeError, ValueError):
        return None


def _text(tags: Any, name: str) -> str:
    """Return a tag's text, one line, cut to the standard's length."""
    try:
        value = str(tags.get(name) or "")
    except Exception:
        # pydicom lets through whatever its conversions raise on damaged tags.
        return ""
    return "".join(letter if letter.isprintable() else " " for letter in value).strip()[:_MAX_TEXT]


def _word(tags: Any, name: str) -> str:
    """Return a tag's text where it is one word: with a forged length it runs on into what stands behind it."""
    text = _text(tags, name)
    return text if _WORD.fullmatch(text) else ""


def _voxels(info: SeriesInfo) -> int:
    depth, height, width = info.shape or (0, 0, 0)
    return depth * height * width


def _listing(found: Sequence[SeriesInfo]) -> str:
    """Return the series without their descriptions."""
    texts = []
    for info in found:
        size = " x ".join(map(str, info.shape)) if info.shape else f"{info.files} files"
        number = "" if info.series_number is None else f"number {info.series_number}, "
        part = f"{info.part}, " if info.part else ""
        why = "" if info.usable else f": {info.why_not}"
        texts.append(f"{info.modality or 'unknown'}, {size} ({number}{part}{info.series_uid}){why}")
    return "; ".join(texts[:_MAX_LISTED]) + (
        f"; and {len(texts) - _MAX_LISTED} more" if len(texts) > _MAX_LISTED else ""
    )
