"""DICOM files that gather in a folder, by series: for whoever watches it, without a look at their voxels."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sagittal.errors import DataError
from sagittal.volumes.dicom_files import Member, is_dicom_file
from sagittal.volumes.dicom_headers import read_tags
from sagittal.volumes.dicom_library import silent

_WANTED = (
    *("StudyInstanceUID", "SeriesInstanceUID", "Modality", "SeriesDescription", "StudyDescription"),
    *("BodyPartExamined", "SpecificCharacterSet"),
)


@dataclass(frozen=True)
class SeriesFiles:
    """The files of a series.

    Attributes:
        study_uid, series_uid: its UIDs.
        modality, description, study_description, body_part: what its first file says; empty where it says nothing.
        files: of it, by name.
        mark: another text once a file of it came or grew.
    """

    study_uid: str
    series_uid: str
    modality: str
    description: str
    study_description: str
    body_part: str
    files: tuple[Path, ...]
    mark: str


@dataclass(eq=False)
class WatchedFolder:
    """A folder whose DICOM files are grouped again and again; the header of each is read once, and when it changes.

    Args:
        folder: with files at any depth.
        without: name of a folder directly in it that is left out.
    """

    folder: Path
    without: str = ""
    _headers: dict[Path, tuple[tuple[int, int], dict[str, str]]] = field(default_factory=dict)

    def series(self) -> tuple[SeriesFiles, ...]:
        """Return the series that are there; files that can't be read (yet) are left out.

        Raises:
            DataError: pydicom is not installed.
        """
        groups: dict[str, list[tuple[Path, tuple[int, int], dict[str, str]]]] = {}
        seen: dict[Path, tuple[tuple[int, int], dict[str, str]]] = {}
        for path, stamp in self._files():
            known = self._headers.get(path)
            header = known[1] if known is not None and known[0] == stamp else _header(path)
            if header is None:
                continue
            seen[path] = (stamp, header)
            if header.get("SeriesInstanceUID"):
                groups.setdefault(header["SeriesInstanceUID"], []).append((path, stamp, header))
        self._headers = seen
        return tuple(_grouped(group) for group in groups.values())

    def _files(self) -> list[tuple[Path, tuple[int, int]]]:
        found = []
        for place, folders, names in os.walk(self.folder):
            if Path(place) == self.folder and self.without in folders:
                folders.remove(self.without)
            folders.sort()
            for name in sorted(names):
                path = Path(place) / name
                try:
                    stat = path.stat()
                except OSError:
                    continue  # it went as we looked
                if path.is_file() and not name.startswith("."):
                    found.append((path, (stat.st_size, stat.st_mtime_ns)))
        return found


def _header(path: Path) -> dict[str, str] | None:
    try:
        if not is_dicom_file(path):
            # Remembered too: it is looked at again when it changes.
            return {}
        with silent():
            member = Member(path.name, lambda: path.open("rb"), path.stat().st_size)
            tags = read_tags(member, path.parent, _WANTED)
            return {name: _text(tags, name) for name in _WANTED[:-1]}
    except DataError as error:
        if error.code == "missing_extra":
            raise
        return None
    except OSError:
        return None


def _text(tags: Any, name: str) -> str:
    try:
        return str(tags.get(name) or "").strip()
    except Exception:
        # pydicom lets through whatever its conversions raise on damaged tags.
        return ""


def _grouped(group: list[tuple[Path, tuple[int, int], dict[str, str]]]) -> SeriesFiles:
    header = group[0][2]
    return SeriesFiles(
        study_uid=header["StudyInstanceUID"],
        series_uid=header["SeriesInstanceUID"],
        modality=header["Modality"],
        description=header["SeriesDescription"],
        study_description=header["StudyDescription"],
        body_part=header["BodyPartExamined"],
        files=tuple(path for path, _, _ in group),
        mark=f"{len(group)} {sum(size for _, (size, _), _ in group)} {max(time for _, (_, time), _ in group)}",
    )
