"""NIfTI-1 and NIfTI-2 in single files, plain or gzipped.

nibabel reads and checks the header; isal unpacks and packs, three to five times faster than the standard library.
Voxels go straight from the file into one array, without a copy per step.
"""

from __future__ import annotations

import logging
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from io import BufferedIOBase
from pathlib import Path
from typing import Any, cast

import nibabel
import numpy as np
from isal import igzip, isal_zlib
from nibabel.spatialimages import HeaderDataError
from numpy.typing import NDArray

from sagittal.errors import DataError
from sagittal.plan.base import Triple, write_atomically
from sagittal.volumes.geometry import Affine, Geometry, is_usable, reverse_axes, spacing_of
from sagittal.volumes.header import NiftiHeader
from sagittal.volumes.stored import Stored

GZIP_LEVEL = 1
MAX_DIM_NIFTI1 = 32767
# DEFLATE packs at most 1032 to 1: a header that promises more is damaged, and its array must not be allocated.
MAX_RATIO = 1100
MM_PER_UNIT = {0: 1.0, 1: 1000.0, 2: 1.0, 3: 0.001}
UNIT_MM = 2

_log = logging.getLogger("sagittal.volumes")
_log.addHandler(logging.NullHandler())


def read_nifti(path: Path) -> Stored:
    """Read a .nii or .nii.gz file.

    Raises:
        DataError: the file is no NIfTI, truncated, damaged, 2D, 4D, RGB or complex, or its grid is not usable.
    """
    with _explained(path), _opened(path) as file:
        header = _read_header(file, path)
        shape = _shape_3d(header, path)
        dtype = _scalar_type(header, path)
        affine, facts = _placement(header, shape, path)
        slope, intercept = header.get_slope_inter()
        voxels = _read_voxels(file, _offset(header, path), shape, dtype, path)
    return Stored(path, voxels, affine, 1.0 if slope is None else slope, intercept or 0.0, facts)


def write_nifti(path: Path, voxels: NDArray[Any], geometry: Geometry) -> None:
    """Write (D, H, W) voxels as .nii or .nii.gz; the file appears whole or not at all.

    A grid that was read from a NIfTI file and not changed since is written with that file's own numbers: version, both
    matrices, their codes and the units. A changed or new grid is written as sform and qform, which NIfTI-1 rounds to
    float32.

    Raises:
        DataError: NIfTI has no such voxel type.
        ResourceError: the disk is full or the folder can't be written.
    """
    if voxels.dtype == np.bool_:
        voxels = voxels.view(np.uint8)
    header = _new_header(geometry)
    try:
        header.set_data_dtype(voxels.dtype.newbyteorder("="))
    except HeaderDataError:
        raise DataError(
            f"{path}: NIfTI can't hold {voxels.dtype} voxels. Expected an integer type, float32 or float64. "
            "Convert the array first."
        ) from None
    header["scl_slope"], header["scl_inter"] = 1.0, 0.0
    header["vox_offset"] = header.single_vox_offset
    head = header.binaryblock.ljust(header.single_vox_offset, b"\0")
    body = np.ascontiguousarray(voxels, dtype=voxels.dtype.newbyteorder("="))
    if path.name.lower().endswith(".gz"):
        packer = isal_zlib.compressobj(GZIP_LEVEL, isal_zlib.DEFLATED, 16 + isal_zlib.MAX_WBITS)
        parts = [packer.compress(head), *(packer.compress(plane.data) for plane in body), packer.flush()]
        write_atomically(path, b"".join(parts))
    else:
        write_atomically(path, head + body.tobytes())


@contextmanager
def _opened(path: Path) -> Iterator[BufferedIOBase]:
    with path.open("rb") as raw:
        if path.name.lower().endswith(".gz"):
            with igzip.IGzipFile(fileobj=raw, mode="rb") as unpacked:  # type: ignore[no-untyped-call]
                yield cast(BufferedIOBase, unpacked)
        else:
            yield raw


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    """Turn what isal and nibabel raise on a damaged file into an error that names the file."""
    try:
        yield
    except igzip.BadGzipFile as error:
        raise DataError(_damaged(path, f"not a whole gzip file: {error}"), code="unreadable") from None
    except EOFError:
        raise DataError(
            _damaged(path, "the gzip stream ends too early: the file is truncated"), code="unreadable"
        ) from None
    except isal_zlib.error as error:  # type: ignore[misc]
        raise DataError(_damaged(path, f"the gzip stream is damaged: {error}"), code="unreadable") from None
    except HeaderDataError as error:
        raise DataError(_damaged(path, f"the NIfTI header makes no sense: {error}"), code="unreadable") from None


def _damaged(path: Path, cause: str) -> str:
    return f"{path}: can't be read ({cause}). Expected a whole NIfTI file. Copy or export it again."


def _read_header(file: BufferedIOBase, path: Path) -> Any:
    start = file.read(4)
    if len(start) < 4:
        raise DataError(
            _damaged(path, "the file is empty" if not start else "the file is truncated"), code="unreadable"
        )
    sizes = {struct.unpack("<i", start)[0], struct.unpack(">i", start)[0]}
    kind: Any = nibabel.Nifti1Header if 348 in sizes else nibabel.Nifti2Header if 540 in sizes else None
    if kind is None:
        raise DataError(_damaged(path, "it does not begin with a NIfTI header"), code="unreadable")
    block = start + file.read(kind.sizeof_hdr - 4)
    if len(block) < kind.sizeof_hdr:
        raise DataError(_damaged(path, "the file ends inside its header: it is truncated"), code="unreadable")
    header = kind(block, check=False)
    magic = bytes(header["magic"])[:3]
    if magic not in (b"n+1", b"n+2"):
        pair = "half of an .hdr/.img pair" if magic in (b"ni1", b"ni2") else "an Analyze header, not NIfTI"
        raise DataError(_damaged(path, pair), code="unreadable")
    header.check_fix(logger=_log)
    return header


def _shape_3d(header: Any, path: Path) -> Triple:
    """Return D, H, W; trailing axes of length one are dropped."""
    sizes = tuple(int(size) for size in header.get_data_shape())
    written = " x ".join(str(size) for size in sizes) or "none"
    if any(size < 1 for size in sizes):
        raise DataError(_damaged(path, f"an axis without voxels, sizes {written}"), code="unreadable")
    if len(sizes) < 3:
        raise DataError(
            f"{path}: a {len(sizes)}D image of {written} voxels. Expected a 3D volume. Stack the slices into one file.",
            code="not_3d",
        )
    if any(size > 1 for size in sizes[3:]):
        raise DataError(
            f"{path}: a {len(sizes)}D image of {written} voxels (a time series, or channels in one file). "
            "Expected a 3D volume. Save each time point or channel as a file of its own.",
            code="not_3d",
        )
    return sizes[2], sizes[1], sizes[0]


def _scalar_type(header: Any, path: Path) -> np.dtype[Any]:
    dtype: np.dtype[Any] = header.get_data_dtype()
    if dtype.kind in "iuf":
        return dtype
    kind = "RGB colours" if dtype.names is not None else "complex numbers" if dtype.kind == "c" else f"type {dtype}"
    raise DataError(
        f"{path}: voxels are {kind}. Expected one real number per voxel. Save one component, or the magnitude.",
        code="not_3d",
    )


def _placement(header: Any, shape: Triple, path: Path) -> tuple[Affine, NiftiHeader]:
    facts = NiftiHeader(
        version=1 if header.sizeof_hdr == 348 else 2,
        qform_code=int(header["qform_code"]),
        sform_code=int(header["sform_code"]),
        xyzt_units=int(header["xyzt_units"]),
        pixdim=tuple(float(value) for value in header["pixdim"]),
        quaternion=tuple(float(header[f"quatern_{letter}"]) for letter in "bcd"),
        qform_offset=tuple(float(header[f"qoffset_{letter}"]) for letter in "xyz"),
        sform_rows=tuple(float(value) for letter in "xyz" for value in header[f"srow_{letter}"]),
    )
    affine = _affine_mm(header)
    if not is_usable(affine):
        raise DataError(
            f"{path}: the header's affine is not usable ({affine[:3].tolist()}). Expected finite numbers and three "
            "independent axes. Export the scan again, or set its sform.",
            code="unreadable",
        )
    return affine, facts


def _affine_mm(header: Any) -> Affine:
    """Return the header's best affine (sform, else qform, else a guess from pixdim) over (d, h, w), in mm."""
    affine = reverse_axes(header.get_best_affine())
    scale = MM_PER_UNIT.get(int(header["xyzt_units"]) % 8, 1.0)
    if scale != 1.0:
        affine[:3] *= scale
    return affine


def _offset(header: Any, path: Path) -> int:
    offset = float(header["vox_offset"])
    if not 0 <= offset < 2**62:
        raise DataError(_damaged(path, f"the voxels are said to begin at byte {offset:g}"), code="unreadable")
    return int(offset)


def _read_voxels(file: BufferedIOBase, offset: int, shape: Triple, dtype: np.dtype[Any], path: Path) -> NDArray[Any]:
    count = shape[0] * shape[1] * shape[2]
    size = count * dtype.itemsize
    on_disk = path.stat().st_size
    if size > on_disk * (MAX_RATIO if path.name.lower().endswith(".gz") else 1):
        cause = f"the header promises {size} bytes of voxels, the file has {on_disk} bytes: it is truncated"
        raise DataError(_damaged(path, cause), code="unreadable")
    file.seek(offset)
    voxels = np.empty(count, dtype=dtype)
    target = voxels.view(np.uint8).data
    filled = 0
    while filled < size:
        # isal's reader takes lengths of 32 bits.
        got = file.readinto(target[filled : filled + (1 << 30)])
        if not got:
            cause = f"{size} bytes of voxels expected, {filled} found: it is truncated"
            raise DataError(_damaged(path, cause), code="unreadable")
        filled += got
    # The checksum stands at the end: without reading on, a flipped byte would pass.
    while file.read(1 << 20):
        pass
    return voxels.astype(dtype.newbyteorder("="), copy=False).reshape(shape)


def _new_header(geometry: Geometry) -> Any:
    facts = geometry.header
    too_long = max(geometry.shape) > MAX_DIM_NIFTI1
    version = 2 if too_long else 1 if facts is None else facts.version
    kind: Any = nibabel.Nifti1Header if version == 1 else nibabel.Nifti2Header
    header = kind()
    header.set_data_shape(geometry.shape[::-1])
    if facts is not None:
        _restore(header, facts)
        if np.array_equal(_affine_mm(header), geometry.affine):
            return header
    _place(header, geometry.affine, facts)
    return header


def _restore(header: Any, facts: NiftiHeader) -> None:
    header["qform_code"] = facts.qform_code
    header["sform_code"] = facts.sform_code
    header["xyzt_units"] = facts.xyzt_units
    header["pixdim"] = facts.pixdim
    for letter, value in zip("bcd", facts.quaternion, strict=True):
        header[f"quatern_{letter}"] = value
    for letter, value in zip("xyz", facts.qform_offset, strict=True):
        header[f"qoffset_{letter}"] = value
    for letter, start in zip("xyz", (0, 4, 8), strict=True):
        header[f"srow_{letter}"] = facts.sform_rows[start : start + 4]


def _place(header: Any, affine: Affine, facts: NiftiHeader | None) -> None:
    # Both matrices are written, so that a tool that prefers either one sees the same grid. Where the source had none,
    # code 2 says that the position is agreed upon, not the scanner's.
    qform_code = facts.qform_code if facts is not None else 1
    sform_code = facts.sform_code if facts is not None else 1
    known = max(qform_code, sform_code) or 2
    header["pixdim"][1:4] = spacing_of(affine)[::-1]
    header.set_qform(reverse_axes(affine), code=qform_code or known, strip_shears=True)
    header.set_sform(reverse_axes(affine), code=sform_code or known)
    time_units = facts.xyzt_units // 8 * 8 if facts is not None else 0
    header["xyzt_units"] = UNIT_MM + time_units
