"""FreeSurfer's MGH and MGZ files: always big-endian, placed by their centre in float32."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nibabel
import numpy as np
from nibabel.freesurfer.mghformat import MGHError
from nibabel.spatialimages import HeaderDataError
from numpy.typing import NDArray

from sagittal.errors import DataError
from sagittal.plan.base import write_atomically
from sagittal.volumes.geometry import Geometry, is_usable, reverse_axes
from sagittal.volumes.header import Unplaced
from sagittal.volumes.refusals import not_3d, unusable_affine
from sagittal.volumes.stored import FileHeader, Stored
from sagittal.volumes.streams import damaged, explained, in_native_order, is_packed, opened, packed_gzip, read_voxels

_Image: Any = nibabel.MGHImage
KIND = "MGH"
HEADER_BYTES = 90
"""What the fields take; the voxels begin later."""
PLACED_AT = 28
VOXELS_AT = 284


def read_mgh(path: Path) -> Stored:
    """Read a .mgh or .mgz file.

    Raises:
        DataError: the file is no MGH, truncated, damaged or 4D, or its grid is not usable.
    """
    with explained(path, KIND), opened(path) as file:
        facts = _facts(file.read(VOXELS_AT), path)
        stored_as = facts.dtype.newbyteorder(">")
        voxels = read_voxels(file, facts.geometry.shape, stored_as, path, packed=is_packed(path), kind=KIND)
    return facts.with_voxels(voxels)


def read_mgh_header(path: Path) -> FileHeader:
    """Read what stands before the voxels.

    Raises:
        DataError: as `read_mgh`, save for what only the voxels tell.
    """
    with explained(path, KIND), opened(path) as file:
        return _facts(file.read(VOXELS_AT), path)


def write_mgh(path: Path, voxels: NDArray[Any], geometry: Geometry) -> None:
    """Write (D, H, W) voxels as .mgh or .mgz; the file appears whole or not at all.

    The grid is rounded to float32: voxels move by less than 1e-3 mm within a metre of the scanner's centre.

    Raises:
        DataError: MGH has no such voxel type.
        ResourceError: the disk is full or the folder can't be written.
    """
    body = in_native_order(voxels)
    try:
        image = _Image(body.transpose(), reverse_axes(geometry.affine))
        head = image.header
        head.set_data_dtype(body.dtype)
    except (MGHError, HeaderDataError):
        raise DataError(
            f"{path}: MGH can't hold {voxels.dtype} voxels. Expected uint8, int16, uint16, int32 or float32. "
            "Convert the array first, or choose another format."
        ) from None
    block = head.binaryblock[:HEADER_BYTES].ljust(VOXELS_AT, b"\0")
    body = body.astype(body.dtype.newbyteorder(">"))
    write_atomically(path, packed_gzip(block, body) if is_packed(path) else block + body.tobytes())


def _facts(block: bytes, path: Path) -> FileHeader:
    if len(block) < VOXELS_AT:
        raise damaged(path, "the file ends inside its header: it is truncated" if block else "the file is empty", KIND)
    if int.from_bytes(block[:4], "big") != 1:
        raise damaged(path, "it does not begin with an MGH header of version 1", KIND)
    header = _Image.header_class(block[:HEADER_BYTES], check=False)
    sizes = tuple(int(size) for size in header["dims"])
    if any(size < 1 for size in sizes):
        raise damaged(path, f"an axis without voxels, sizes {' x '.join(map(str, sizes))}", KIND)
    if sizes[3] > 1:
        raise not_3d(path, sizes)
    try:
        dtype = np.dtype(header.get_data_dtype())
    except KeyError:
        raise damaged(path, f"voxels of the unknown type {int(header['type'])}", KIND) from None
    with np.errstate(all="ignore"):
        affine = reverse_axes(np.asarray(header.get_affine(), dtype=np.float64))
    if not is_usable(affine):
        raise unusable_affine(path, affine)
    # Read from the file: nibabel has filled in FreeSurfer's default axes where the file says that it has none.
    placed = any(block[PLACED_AT : PLACED_AT + 2])
    geometry = Geometry((sizes[2], sizes[1], sizes[0]), affine, None if placed else Unplaced())
    return FileHeader(path, geometry, dtype.newbyteorder("="))
