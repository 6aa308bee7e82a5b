"""NRRD: .nrrd in one file, .nhdr with its voxels beside it; 3D Slicer's own format.

Read and written here and not by SimpleITK, for the reason in docs/adr/0004-nrrd-and-metaimage-without-simpleitk.md.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from sagittal.errors import DataError
from sagittal.plan.base import write_atomically
from sagittal.volumes.geometry import Geometry, affine_from_lps, affine_to_lps
from sagittal.volumes.header import Unplaced
from sagittal.volumes.refusals import no_scalar, not_3d
from sagittal.volumes.stored import FileHeader, Stored
from sagittal.volumes.streams import damaged, in_native_order, packed_gzip
from sagittal.volumes.text_header import (
    Encoding,
    Layout,
    file_header,
    header_lines,
    is_whole_number,
    numbers,
    read_layout,
    shape_3d,
    sizes_of,
    unsupported_type,
    voxel_file,
)

KIND = "NRRD"
TYPES = {
    **dict.fromkeys(("signed char", "int8", "int8_t"), "int8"),
    **dict.fromkeys(("uchar", "unsigned char", "uint8", "uint8_t"), "uint8"),
    **dict.fromkeys(("short", "short int", "signed short", "signed short int", "int16", "int16_t"), "int16"),
    **dict.fromkeys(("ushort", "unsigned short", "unsigned short int", "uint16", "uint16_t"), "uint16"),
    **dict.fromkeys(("int", "signed int", "int32", "int32_t"), "int32"),
    **dict.fromkeys(("uint", "unsigned int", "uint32", "uint32_t"), "uint32"),
    **dict.fromkeys(
        ("longlong", "long long", "long long int", "signed long long", "signed long long int", "int64", "int64_t"),
        "int64",
    ),
    **dict.fromkeys(("ulonglong", "unsigned long long", "unsigned long long int", "uint64", "uint64_t"), "uint64"),
    "float": "float32",
    "double": "float64",
}
NAMES = {dtype: next(name for name, held in TYPES.items() if held == dtype) for dtype in TYPES.values()}
ENCODINGS: dict[str, Encoding] = {"raw": "raw", "gzip": "gzip", "gz": "gzip"}
SPACES = {
    "left-posterior-superior": (1.0, 1.0, 1.0),
    "lps": (1.0, 1.0, 1.0),
    "right-anterior-superior": (-1.0, -1.0, 1.0),
    "ras": (-1.0, -1.0, 1.0),
    "left-anterior-superior": (1.0, -1.0, 1.0),
    "las": (1.0, -1.0, 1.0),
}
"""What turns the coordinates of each space into LPS."""
DETACHED_SUFFIX = ".nhdr"
_VECTOR = re.compile(r"none|\([^()]*\)")


def read_nrrd(path: Path) -> Stored:
    """Read a .nrrd file, or a .nhdr file with the voxels beside it.

    Raises:
        DataError: the file is no NRRD, truncated, damaged, 2D, 4D or of several values per voxel, its encoding is
            neither raw nor gzip, or its grid is not usable.
    """
    layout = _layout(path)
    return layout.header.with_voxels(read_layout(layout))


def read_nrrd_header(path: Path) -> FileHeader:
    """Read the text before the voxels.

    Raises:
        DataError: as `read_nrrd`, save for what only the voxels tell.
    """
    return _layout(path).header


def nrrd_files(path: Path) -> tuple[Path, ...]:
    """Return the files of the scan: one, or header and voxels."""
    source = _layout(path).source
    return (path,) if source == path else (path, source)


def write_nrrd(path: Path, voxels: NDArray[Any], geometry: Geometry) -> None:
    """Write (D, H, W) voxels, gzipped; a file appears whole or not at all.

    The grid keeps double precision. A .nhdr file gets its voxels in a .raw.gz beside it, which is written first.

    Raises:
        DataError: the format has no such voxel type.
        ResourceError: the disk is full or the folder can't be written.
    """
    body = in_native_order(voxels)
    if body.dtype.name not in NAMES:
        raise DataError(
            f"{path}: NRRD can't hold {voxels.dtype} voxels. Expected an integer type, float32 or float64. "
            "Convert the array first."
        )
    detached = path.name.lower().endswith(DETACHED_SUFFIX)
    source = path.with_suffix(".raw.gz") if detached else path
    axes, origin = affine_to_lps(geometry.affine)
    lines = [
        "NRRD0004",
        f"type: {NAMES[body.dtype.name]}",
        "dimension: 3",
        "space: left-posterior-superior",
        f"sizes: {' '.join(str(size) for size in geometry.shape[::-1])}",
        f"space directions: {' '.join(_vector(axis) for axis in axes.T)}",
        "kinds: domain domain domain",
        f"endian: {sys.byteorder}",
        "encoding: gzip",
        f"space origin: {_vector(origin)}",
        *([f"data file: {source.name}"] if detached else []),
    ]
    head = ("\n".join(lines) + "\n\n").encode()
    content = packed_gzip(b"", body)
    if detached:
        write_atomically(source, content)
    write_atomically(path, head if detached else head + content)


def _layout(path: Path) -> Layout:
    lines, end = header_lines(path, "blank line", KIND)
    if not lines or not lines[0].startswith("NRRD000"):
        raise damaged(path, "it does not begin with a NRRD header", KIND)
    fields = _fields(lines[1:])
    sizes = sizes_of(path, fields, "sizes", KIND)
    if fields.get("dimension") != str(len(sizes)):
        raise damaged(path, f"dimension is {fields.get('dimension', 'missing')[:20]}, sizes are {len(sizes)}", KIND)
    name = fields.get("type", "missing").lower()
    kinds = fields.get("kinds", "").split()
    several = [kind for kind, size in zip(kinds, sizes, strict=False) if kind not in ("domain", "space") and size > 1]
    if several and several[0] not in ("time", "list", "none", "???"):
        raise no_scalar(path, "complex numbers" if several[0] == "complex" else f"several numbers each ({several[0]})")
    if len(sizes) < 3 or sum(size > 1 for size in sizes) > 3:
        raise not_3d(path, sizes)
    _require_mm(path, fields)
    # Axes of one voxel that are no axes of space may stand anywhere.
    vectors, origin, to_lps = _space(path, fields, len(sizes))
    kept = [axis for axis, vector in enumerate(vectors) if vector is not None or sizes[axis] > 1]
    if len(kept) != 3 or any(vectors[axis] is None for axis in kept):
        raise not_3d(path, sizes)
    shape = shape_3d(path, [sizes[axis] for axis in kept])
    if name not in TYPES:
        raise unsupported_type(path, name, TYPES, KIND)
    encoding = fields.get("encoding", "missing").lower()
    if encoding not in ENCODINGS:
        raise damaged(path, f"encoding '{encoding[:20]}', known are raw and gzip", KIND)
    if fields.get("line skip", "0") != "0":
        raise damaged(path, "it skips lines of a foreign header: save it as one .nrrd file", KIND)
    dtype = np.dtype(TYPES[name]).newbyteorder(_byte_order(path, fields, TYPES[name]))
    axes = np.stack([np.asarray(vectors[axis]) for axis in kept], axis=1)
    affine = affine_from_lps(axes * np.array(to_lps or (1.0, 1.0, 1.0))[:, None], origin * np.array(to_lps or 1.0))
    header = file_header(path, shape, affine, None if to_lps else Unplaced(), dtype)
    beside = fields.get("data file", fields.get("datafile"))
    source = path if beside is None else voxel_file(path, beside, KIND)
    skipped = _skipped(path, fields, ENCODINGS[encoding])
    return Layout(KIND, header, source, skipped if beside else end + max(0, skipped), ENCODINGS[encoding], dtype)


def _fields(lines: list[str]) -> dict[str, str]:
    fields = {}
    for line in lines:
        key, colon, value = line.partition(":")
        # `key:=value` is a note of some program, `#` a comment.
        if colon and not key.startswith("#") and not value.startswith("="):
            fields[key.strip().lower()] = value.strip()
    return fields


def _space(
    path: Path, fields: Mapping[str, str], dims: int
) -> tuple[list[tuple[float, ...] | None], NDArray[np.float64], tuple[float, float, float] | None]:
    """Return the step along each axis (None: no axis of space), the origin, and what turns both into LPS.

    The last is None where the file names no anatomical space: the directions are then a guess.
    """
    to_lps = SPACES.get(fields.get("space", "").lower())
    if "space directions" not in fields:
        return _spacings(path, fields, dims), np.zeros(3), None
    found = _VECTOR.findall(fields["space directions"].lower())
    vectors = [None if text == "none" else _three(path, text, "space directions") for text in found]
    if len(vectors) != dims:
        raise damaged(path, f"space directions has {len(vectors)} vectors for {dims} axes", KIND)
    origin = np.array(_three(path, fields.get("space origin", "(0,0,0)"), "space origin"))
    return vectors, origin, to_lps


def _spacings(path: Path, fields: Mapping[str, str], dims: int) -> list[tuple[float, ...] | None]:
    steps = numbers(path, fields, "spacings", dims, KIND) if "spacings" in fields else (1.0,) * dims
    units = np.eye(3)
    return [tuple(units[axis] * step) if axis < 3 else None for axis, step in enumerate(steps)]


def _three(path: Path, text: str, name: str) -> tuple[float, ...]:
    words = text.strip().strip("()").replace(",", " ")
    return numbers(path, {name: words}, name, 3, KIND)


def _require_mm(path: Path, fields: Mapping[str, str]) -> None:
    units = set(re.findall(r'"([^"]*)"', fields.get("space units", ""))) - {"", "mm", "???"}
    if units:
        raise damaged(path, f"space units are {', '.join(sorted(units))}, expected mm", KIND)


def _byte_order(path: Path, fields: Mapping[str, str], dtype: str) -> Literal["<", ">"]:
    endian = fields.get("endian", "little" if np.dtype(dtype).itemsize == 1 else "missing").lower()
    if endian not in ("little", "big"):
        raise damaged(path, f"endian is {endian[:20]}", KIND)
    return "<" if endian == "little" else ">"


def _skipped(path: Path, fields: Mapping[str, str], encoding: Encoding) -> int:
    words = fields.get("byte skip", fields.get("byteskip", "0"))
    if words == "0" or (words == "-1" and encoding == "raw"):
        return int(words)
    if is_whole_number(words) and encoding == "raw":
        return int(words)
    raise damaged(path, f"byte skip is {words[:20]} with {encoding} voxels", KIND)


def _vector(values: NDArray[np.float64]) -> str:
    # Seventeen digits give back every double.
    return "(" + ",".join(f"{value:.17g}" for value in values) + ")"
