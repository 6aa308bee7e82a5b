"""What an uploaded file is, by its first bytes; the name that it was sent under is never looked at."""

from __future__ import annotations

import re
import zlib
from pathlib import Path
from typing import Literal, TypeAlias

from sagittal.serve.refusals import RefusalError

Kind: TypeAlias = Literal[".nii", ".nii.gz", ".nrrd", ".mha", ".mgh", ".mgz", "zip", "dicom"]
HEAD_BYTES = 4096
EXPECTED = "NIfTI (one file), NRRD, MetaImage (.mha), MGH, a DICOM file of many frames, or a zip of a DICOM series"
_NIFTI_SIZES = (348, 540)
_META = re.compile(rb"\s*(#[^\n]*\n\s*)*(ObjectType|NDims|ID|Comment|Name)\s*=")
_ARCHIVES = (
    b"PK\x03\x04",
    b"PK\x05\x06",
    b"PK\x07\x08",
    b"7z\xbc\xaf\x27\x1c",
    b"Rar!\x1a\x07",
    b"\xfd7zXZ\x00",
    b"BZh",
    b"\x1f\x8b",
    b"\x28\xb5\x2f\xfd",
    b"MSCF",
)


def kind_of(path: Path) -> Kind:
    """Return what a file is.

    Raises:
        RefusalError: nothing that is read (415).
    """
    with path.open("rb") as file:
        head = file.read(HEAD_BYTES)
    if head.startswith(b"PK\x03\x04"):
        return "zip"
    if is_dicom(head):
        return "dicom"
    if head.startswith(b"\x1f\x8b"):
        inner = _image(_start_of_gzip(head))
        if inner in (".nii", ".mgh"):
            return ".nii.gz" if inner == ".nii" else ".mgz"
        raise _unknown("a gzip file of something else")
    found = _image(head)
    if found is None:
        raise _unknown("an empty file" if not head else "something else")
    return found


def is_dicom(head: bytes) -> bool:
    """Whether the first bytes are those of a DICOM file."""
    return head[128:132] == b"DICM"


def is_archive(head: bytes) -> bool:
    """Whether the first bytes are those of an archive or a packed file."""
    return head.startswith(_ARCHIVES) or head[257:262] == b"ustar"


def _image(head: bytes) -> Kind | None:
    if len(head) >= 4 and {int.from_bytes(head[:4], "little"), int.from_bytes(head[:4], "big")} & set(_NIFTI_SIZES):
        is_single = head[344:347] == b"n+1" or head[4:7] == b"n+2"
        if not is_single:
            raise _unknown("half of an Analyze or NIfTI pair")
        return ".nii"
    if head.startswith(b"NRRD000"):
        return ".nrrd"
    if head.startswith(b"\x00\x00\x00\x01") and len(head) >= 284:
        return ".mgh"
    return ".mha" if _META.match(head) else None


def _start_of_gzip(head: bytes) -> bytes:
    try:
        return zlib.decompressobj(16 + zlib.MAX_WBITS).decompress(head, HEAD_BYTES)
    except zlib.error:
        return b""


def _unknown(what: str) -> RefusalError:
    return RefusalError(f"an image is {what}. Expected {EXPECTED}.", code="unknown_format", status=415)
