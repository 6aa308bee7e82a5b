"""MetaImage: .mha in one file, .mhd with its voxels beside it; ITK's own format.

Read and written here and not by SimpleITK, because that returns packed voxels with a flipped bit without a word
(docs/adr/0004-nrrd-and-metaimage-without-simpleitk.md). The header's world is LPS.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sagittal.errors import DataError
from sagittal.plan.base import write_atomically
from sagittal.volumes.geometry import Affine, Geometry, affine_from_lps, affine_to_lps
from sagittal.volumes.header import Unplaced
from sagittal.volumes.refusals import no_scalar
from sagittal.volumes.stored import FileHeader, Stored
from sagittal.volumes.streams import damaged, in_native_order, packed_zlib
from sagittal.volumes.text_header import (
    Encoding,
    Layout,
    file_header,
    header_lines,
    numbers,
    read_layout,
    shape_3d,
    sizes_of,
    unsupported_type,
    voxel_file,
)

KIND = "MetaImage"
TYPES = {
    "MET_CHAR": "int8",
    "MET_UCHAR": "uint8",
    "MET_SHORT": "int16",
    "MET_USHORT": "uint16",
    "MET_INT": "int32",
    "MET_UINT": "uint32",
    # Four bytes by MetaIO's definition, on every machine.
    "MET_LONG": "int32",
    "MET_ULONG": "uint32",
    "MET_LONG_LONG": "int64",
    "MET_ULONG_LONG": "uint64",
    "MET_FLOAT": "float32",
    "MET_DOUBLE": "float64",
}
NAMES = {dtype: name for name, dtype in reversed(TYPES.items())}
DETACHED_SUFFIX = ".mhd"


def read_metaimage(path: Path) -> Stored:
    """Read a .mha file, or a .mhd file with the voxels beside it.

    Raises:
        DataError: the file is no MetaImage, truncated, damaged, 2D, 4D or of several values per voxel, or its grid is
            not usable.
    """
    layout = _layout(path)
    return layout.header.with_voxels(read_layout(layout))


def read_metaimage_header(path: Path) -> FileHeader:
    """Read the text before the voxels.

    Raises:
        DataError: as `read_metaimage`, save for what only the voxels tell.
    """
    return _layout(path).header


def metaimage_files(path: Path) -> tuple[Path, ...]:
    """Return the files of the scan: one, or header and voxels."""
    source = _layout(path).source
    return (path,) if source == path else (path, source)


def write_metaimage(path: Path, voxels: NDArray[Any], geometry: Geometry) -> None:
    """Write (D, H, W) voxels, packed by zlib; a file appears whole or not at all.

    The grid keeps double precision. A .mhd file gets its voxels in a .zraw beside it, which is written first.

    Raises:
        DataError: the format has no such voxel type.
        ResourceError: the disk is full or the folder can't be written.
    """
    body = in_native_order(voxels)
    if body.dtype.name not in NAMES:
        raise DataError(
            f"{path}: MetaImage can't hold {voxels.dtype} voxels. Expected an integer type, float32 or float64. "
            "Convert the array first."
        )
    content = packed_zlib(body)
    detached = path.name.lower().endswith(DETACHED_SUFFIX)
    source = path.with_suffix(".zraw") if detached else path
    axes, origin = affine_to_lps(geometry.affine)
    spacing = np.sqrt((axes**2).sum(axis=0))
    lines = {
        "ObjectType": "Image",
        "NDims": "3",
        "BinaryData": "True",
        "BinaryDataByteOrderMSB": str(sys.byteorder == "big"),
        "CompressedData": "True",
        "CompressedDataSize": str(len(content)),
        # MetaImage lists axis by axis.
        "TransformMatrix": _text((axes / spacing).T.ravel()),
        "Offset": _text(origin),
        "CenterOfRotation": "0 0 0",
        "ElementSpacing": _text(spacing),
        "DimSize": " ".join(str(size) for size in geometry.shape[::-1]),
        "ElementType": NAMES[body.dtype.name],
        "ElementDataFile": source.name if detached else "LOCAL",
    }
    head = "".join(f"{key} = {value}\n" for key, value in lines.items()).encode()
    if detached:
        write_atomically(source, content)
    write_atomically(path, head if detached else head + content)


def _layout(path: Path) -> Layout:
    lines, end = header_lines(path, "ElementDataFile", KIND)
    fields = {key.strip(): value.strip() for key, _, value in (line.partition("=") for line in lines)}
    if "NDims" not in fields or "ElementDataFile" not in fields:
        raise damaged(path, "it does not begin with a whole MetaImage header", KIND)
    sizes = sizes_of(path, fields, "DimSize", KIND)
    if fields["NDims"] != str(len(sizes)):
        raise damaged(path, f"NDims is {fields['NDims'][:20]}, but DimSize has {len(sizes)} numbers", KIND)
    name = fields.get("ElementType", "missing")
    shape = shape_3d(path, sizes)
    if name.endswith("_ARRAY") or fields.get("ElementNumberOfChannels", "1") != "1":
        channels = fields.get("ElementNumberOfChannels", "several")
        raise no_scalar(path, f"{channels} numbers each (RGB colours, complex numbers or a vector)")
    if name not in TYPES:
        raise unsupported_type(path, name, TYPES, KIND)
    if _is_true(fields, "BinaryData", default=False) is False:
        raise damaged(path, "its voxels are written as text: save them as binary", KIND)
    big = _is_true(fields, "BinaryDataByteOrderMSB", "ElementByteOrderMSB", default=False)
    dtype = np.dtype(TYPES[name]).newbyteorder(">" if big else "<")
    packed: Encoding = "zlib" if _is_true(fields, "CompressedData", default=False) else "raw"
    source = path if fields["ElementDataFile"] == "LOCAL" else voxel_file(path, fields["ElementDataFile"], KIND)
    affine, placed = _placement(path, fields, len(sizes))
    header = file_header(path, shape, affine, None if placed else Unplaced(), dtype)
    skipped = _skipped(path, fields)
    return Layout(KIND, header, source, end if source == path else skipped, packed, dtype)


def _placement(path: Path, fields: Mapping[str, str], dims: int) -> tuple[Affine, bool]:
    """Return the affine, and whether the file gives a direction at all."""
    matrix = next((name for name in ("TransformMatrix", "Orientation", "Rotation") if name in fields), None)
    start = next((name for name in ("Offset", "Position", "Origin") if name in fields), None)
    size = next((name for name in ("ElementSpacing", "ElementSize") if name in fields), None)
    direction = np.eye(dims)
    if matrix is not None:
        direction = np.array(numbers(path, fields, matrix, dims * dims, KIND)).reshape(dims, dims).T
    origin = np.zeros(dims) if start is None else np.array(numbers(path, fields, start, dims, KIND))
    spacing = np.ones(dims) if size is None else np.array(numbers(path, fields, size, dims, KIND))
    with np.errstate(all="ignore"):
        affine = affine_from_lps((direction * spacing)[:3, :3], origin[:3])
    return affine, matrix is not None and size is not None


def _skipped(path: Path, fields: Mapping[str, str]) -> int:
    words = fields.get("HeaderSize", "0")
    try:
        return int(words)
    except ValueError:
        raise damaged(path, f"HeaderSize is '{words[:20]}'", KIND) from None


def _is_true(fields: Mapping[str, str], *names: str, default: bool) -> bool:
    found = next((fields[name] for name in names if name in fields), None)
    return default if found is None else found.lower() in ("true", "1")


def _text(values: NDArray[np.float64]) -> str:
    # Seventeen digits give back every double.
    return " ".join(f"{value:.17g}" for value in values)
