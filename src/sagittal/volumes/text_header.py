"""What NRRD and MetaImage share: a header of text lines, voxels behind it or in a file beside it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from sagittal.errors import DataError
from sagittal.plan.base import Triple
from sagittal.volumes.geometry import Affine, Geometry, is_usable
from sagittal.volumes.header import GridHeader
from sagittal.volumes.refusals import no_scalar, not_3d, unusable_affine
from sagittal.volumes.stored import FileHeader
from sagittal.volumes.streams import ZlibReader, damaged, explained, read_voxels, require_start, unpacked_gzip

MAX_HEADER_BYTES = 1 << 20
MAX_DIGITS = 18
"""Of a size or a place in a file; Python refuses to convert thousands of them."""
Encoding = Literal["raw", "gzip", "zlib"]


@dataclass(frozen=True, eq=False)
class Layout:
    """How a header says that the voxels are stored.

    Attributes:
        kind: the format's name, for messages.
        header: the grid and the type.
        source: the file that holds the voxels; the header's own, or one beside it.
        offset: byte at which they begin, -1 where they are the file's last bytes.
        encoding: how they are packed.
        dtype: their type in the file's byte order.
    """

    kind: str
    header: FileHeader
    source: Path
    offset: int
    encoding: Encoding
    dtype: np.dtype[Any]


def read_layout(layout: Layout) -> NDArray[Any]:
    """Return the (D, H, W) voxels.

    Raises:
        DataError: they are truncated or damaged.
    """
    shape, kind, source = layout.header.geometry.shape, layout.kind, layout.source
    packed, offset = layout.encoding != "raw", layout.offset
    require_start(source, max(offset, 0), packed=False, kind=kind)
    with explained(source, kind), source.open("rb") as file:
        if offset < 0:
            offset = max(0, source.stat().st_size - math.prod(shape) * layout.dtype.itemsize)
        file.seek(offset)
        if layout.encoding == "zlib":
            return read_voxels(ZlibReader(file), shape, layout.dtype, source, packed=packed, kind=kind)
        if layout.encoding == "gzip":
            with unpacked_gzip(file) as unpacked:
                return read_voxels(unpacked, shape, layout.dtype, source, packed=packed, kind=kind)
        return read_voxels(file, shape, layout.dtype, source, packed=packed, kind=kind)


def header_lines(path: Path, last: Literal["blank line", "ElementDataFile"], kind: str) -> tuple[list[str], int]:
    """Return the lines of the header, its last one included, and the byte at which it ends."""
    lines: list[str] = []
    with path.open("rb") as file:
        while file.tell() < MAX_HEADER_BYTES:
            # A line of voxels may have no end.
            line = file.readline(MAX_HEADER_BYTES)
            text = line.decode("utf-8", errors="replace").strip()
            if not line:
                # A detached header may end without the blank line.
                return lines, file.tell()
            lines.append(text)
            if (not text) if last == "blank line" else text.startswith("ElementDataFile"):
                return lines, file.tell()
    raise damaged(path, "its header does not end", kind)


def numbers(path: Path, fields: Mapping[str, str], name: str, count: int, kind: str) -> tuple[float, ...]:
    """Return the `count` numbers of a field.

    Raises:
        DataError: there are more or fewer, or they are no numbers.
    """
    try:
        values = tuple(float(word) for word in fields[name].split())
    except ValueError:
        values = ()
    if len(values) != count:
        raise damaged(path, f"{name} is '{fields[name][:60]}', expected {count} numbers", kind)
    return values


def is_whole_number(word: str) -> bool:
    """Whether a word is digits alone, and no more of them than a file can need."""
    return word.isascii() and word.isdigit() and len(word) <= MAX_DIGITS


def sizes_of(path: Path, fields: Mapping[str, str], name: str, kind: str) -> tuple[int, ...]:
    """Return the number of voxels along each axis, fastest first, each at least 1.

    Raises:
        DataError: the field is missing or makes no sense.
    """
    words = fields.get(name, "").split()
    if not words or not all(is_whole_number(word) and int(word) > 0 for word in words):
        raise damaged(path, f"{name} is '{fields.get(name, 'missing')[:60]}'", kind)
    return tuple(int(word) for word in words)


def shape_3d(path: Path, sizes: Sequence[int]) -> Triple:
    """Return D, H, W of an image whose axes are listed fastest first; trailing axes of one voxel are dropped."""
    if len(sizes) < 3 or any(size > 1 for size in sizes[3:]):
        raise not_3d(path, sizes)
    return sizes[2], sizes[1], sizes[0]


def file_header(
    path: Path, shape: Triple, affine: Affine, placed: GridHeader | None, dtype: np.dtype[Any]
) -> FileHeader:
    """Return the header after a look at the affine."""
    if not is_usable(affine):
        raise unusable_affine(path, affine)
    return FileHeader(path, Geometry(shape, affine, placed), dtype.newbyteorder("="))


def voxel_file(path: Path, name: str, kind: str) -> Path:
    """Return the file beside the header that its text names.

    Raises:
        DataError: the name is a pattern or a list of files, leads out of the header's folder, or the file is missing.
    """
    if name.upper().startswith("LIST") or "%" in name:
        raise DataError(
            f"{path}: its voxels are spread over several files ('{name}'). Expected one. Save the scan as one file.",
            code="unreadable",
        )
    if not name or "\0" in name:
        raise damaged(path, "it does not name the file of its voxels", kind)
    source = path.parent / name
    # A header from elsewhere must not make any file of this machine an image.
    if not source.resolve().is_relative_to(path.parent.resolve()):
        raise DataError(
            f"{path}: its voxels are said to lie in '{name}'. Expected a file in the header's folder. Move it there "
            "and correct the header.",
            code="unreadable",
        )
    if not source.is_file():
        raise DataError(
            f"{path}: the voxels are missing. Expected {name} beside it. Copy both files, or save the scan as one.",
            code="unreadable",
        )
    return source


def unsupported_type(path: Path, name: str, known: Mapping[str, str], kind: str) -> DataError:
    """Return the error for a voxel type that is not in `known`, which maps names to types."""
    if "complex" in name.lower():
        return no_scalar(path, "complex numbers")
    listed = ", ".join(dict.fromkeys(known.values()))
    return damaged(path, f"voxels of type '{name[:40]}', known are {listed}", kind)
