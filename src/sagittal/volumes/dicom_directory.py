"""DICOMDIR: the table of contents of a CD or an export, and the files that it refers to."""

from __future__ import annotations

from pathlib import Path

from sagittal.errors import DataError
from sagittal.volumes.dicom_library import BoundedFile, damaged, library, quiet

DIRECTORY_NAME = "DICOMDIR"
_MAX_PARTS = 8
"""The standard's limit of the folders in a file id."""
_MAX_LISTED = 3


def is_directory_file(path: Path) -> bool:
    """Whether the name says that the file is a DICOMDIR."""
    return path.name.upper() == DIRECTORY_NAME and path.is_file()


def referenced_files(path: Path) -> list[Path]:
    """Return the files that a DICOMDIR refers to, sorted; they lie below its folder.

    Raises:
        DataError: it is damaged, refers to files out of its folder, or to files that are not there.
    """
    pydicom = library(path)
    with quiet(path.name, path), BoundedFile(path.open("rb"), path.stat().st_size) as file:
        records = pydicom.dcmread(file, specific_tags=["DirectoryRecordSequence"]).get("DirectoryRecordSequence")
        if records is None:
            raise damaged(path.name, path, "it lists no files")
        ids = [record.get("ReferencedFileID") for record in records if record.get("ReferencedFileID")]
        names = {tuple([each] if isinstance(each, str) else map(str, each)) for each in ids}
    files, missing = [], 0
    for parts in sorted(names):
        file_path = _found(path, parts)
        if file_path is None:
            missing += 1
        else:
            files.append(file_path)
    if missing:
        raise DataError(
            f"{path}: {missing} of the {len(names)} files that it refers to are not there. Expected all of them "
            "beside it. Copy the whole medium again, or give the folder to take what is there.",
            code="missing",
        )
    return files


def _found(path: Path, parts: tuple[str, ...]) -> Path | None:
    """Return the file of an id, in any case of letters: media are often copied in lower case."""
    if not 0 < len(parts) <= _MAX_PARTS or any(
        part in ("", ".", "..") or set(part) & set("/\\:") or "\0" in part for part in parts
    ):
        raise DataError(
            f"{path}: it refers to a file out of its folder. Get the medium from its maker again.",
            code="unsafe_archive",
        )
    place = path.parent
    for names in (parts, tuple(part.lower() for part in parts), tuple(part.upper() for part in parts)):
        found = place.joinpath(*names)
        if found.is_file():
            return found
    return None
