"""NIfTI-1 and NIfTI-2: single files, plain or gzipped, and pairs of a header (.hdr) and its voxels (.img, .img.gz).

nibabel reads and checks the header. An Analyze 7.5 header looks like a NIfTI pair's but stores no orientation, so that
left and right can't be told: it is refused.
"""

from __future__ import annotations

import logging
import struct
from collections.abc import Sequence
from io import BufferedIOBase
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
from nibabel.spatialimages import HeaderDataError
from nibabel.volumeutils import native_code
from numpy.typing import NDArray

from sagittal.errors import DataError
from sagittal.plan.base import Triple, write_atomically
from sagittal.volumes.geometry import Affine, Geometry, is_usable, reverse_axes, spacing_of
from sagittal.volumes.header import NiftiHeader
from sagittal.volumes.refusals import no_scalar, not_3d, unusable_affine
from sagittal.volumes.stored import FileHeader, Stored
from sagittal.volumes.streams import (
    damaged,
    explained,
    in_native_order,
    is_packed,
    opened,
    packed_gzip,
    read_voxels,
    require_start,
)

KIND = "NIfTI"
MAX_DIM_NIFTI1 = 32767
MM_PER_UNIT = {0: 1.0, 1: 1000.0, 2: 1.0, 3: 0.001}
UNIT_MM = 2
PAIR_SUFFIX = ".hdr"
VOXEL_SUFFIXES = (".img", ".IMG", ".img.gz")

_log = logging.getLogger("sagittal.volumes")
_log.addHandler(logging.NullHandler())


def read_nifti(path: Path) -> Stored:
    """Read a .nii or .nii.gz file, or the pair that a .hdr belongs to.

    Raises:
        DataError: the file is no NIfTI, truncated, damaged, 2D, 4D, RGB or complex, or its grid is not usable.
    """
    with explained(path, KIND):
        header = _read_header(path)
        facts = _facts(header, path)
        dtype: np.dtype[Any] = header.get_data_dtype()
        source = _voxel_file(path)
        offset = _offset(header, path)
        require_start(source, offset, packed=is_packed(source), kind=KIND)
        with opened(source) as file:
            file.seek(offset)
            voxels = read_voxels(file, facts.geometry.shape, dtype, source, packed=is_packed(source), kind=KIND)
    return facts.with_voxels(voxels)


def read_nifti_header(path: Path) -> FileHeader:
    """Read what stands before the voxels.

    Raises:
        DataError: as `read_nifti`, save for what only the voxels tell.
    """
    with explained(path, KIND):
        return _facts(_read_header(path), path)


def nifti_files(path: Path) -> tuple[Path, ...]:
    """Return the files of the scan: one, or the two of a pair."""
    source = _voxel_file(path)
    return (path,) if source == path else (path, source)


def write_nifti(path: Path, voxels: NDArray[Any], geometry: Geometry) -> None:
    """Write (D, H, W) voxels as .nii, .nii.gz or a .hdr/.img pair; a file appears whole or not at all.

    A grid that was read from a NIfTI file and not changed since is written with that file's own numbers: version, both
    matrices, their codes and the units. A changed or new grid is written as sform and qform, which NIfTI-1 rounds to
    float32. Of a pair, the voxels are written first.

    Raises:
        DataError: NIfTI has no such voxel type.
        ResourceError: the disk is full or the folder can't be written.
    """
    body = in_native_order(voxels)
    in_pair = path.name.lower().endswith(PAIR_SUFFIX)
    header = _new_header(geometry, in_pair)
    try:
        header.set_data_dtype(body.dtype)
    except HeaderDataError:
        held = False
    else:
        held = body.dtype.kind in "iuf"
    if not held:
        raise DataError(
            f"{path}: NIfTI can't hold {voxels.dtype} voxels. Expected an integer type, float32 or float64. "
            "Convert the array first."
        )
    header["scl_slope"], header["scl_inter"] = 1.0, 0.0
    if in_pair:
        header["vox_offset"] = 0
        write_atomically(path.with_suffix(VOXEL_SUFFIXES[0]), body.tobytes())
        write_atomically(path, header.binaryblock + b"\0" * 4)
        return
    header["vox_offset"] = header.single_vox_offset
    head = header.binaryblock.ljust(header.single_vox_offset, b"\0")
    write_atomically(path, packed_gzip(head, body) if is_packed(path) else head + body.tobytes())


def split_nifti_channels(path: Path, targets: Sequence[Path]) -> None:
    """Write the channels of a 4D single file, x y z channel, to one 3D file each.

    Stored numbers, slope, intercept and grid stay as they are, bit for bit; header extensions are left out.

    Raises:
        DataError: the file is damaged, its numbers are no real numbers, or it has not one channel for each target.
        ResourceError: the disk is full or the folder can't be written.
    """
    with explained(path, KIND):
        header = _read_header(path)
        sizes = tuple(int(size) for size in header.get_data_shape())
        if len(sizes) != 4 or sizes[3] != len(targets) or min(sizes) < 1:
            raise DataError(
                f"{path}: {' x '.join(map(str, sizes))} voxels. Expected three axes of space, then {len(targets)} "
                "channels. Check that it is the file that its publisher distributes.",
                code="other_channels",
            )
        dtype: np.dtype[Any] = header.get_data_dtype()
        if dtype.kind not in "iuf":
            raise no_scalar(path, dtype)
        with opened(path) as file:
            file.seek(_offset(header, path))
            rows = (sizes[3] * sizes[2], sizes[1], sizes[0])
            voxels = read_voxels(file, rows, dtype, path, packed=is_packed(path), kind=KIND)
    head = header.as_byteswapped(native_code)
    head.set_data_shape(sizes[:3])
    head["vox_offset"] = head.single_vox_offset
    start = head.binaryblock.ljust(head.single_vox_offset, b"\0")
    for target, body in zip(targets, voxels.reshape(sizes[3], sizes[2], sizes[1], sizes[0]), strict=True):
        write_atomically(target, packed_gzip(start, body) if is_packed(target) else start + body.tobytes())


def _voxel_file(path: Path) -> Path:
    """Return where the voxels lie: in the file itself, or beside a pair's header."""
    if not path.name.lower().endswith(PAIR_SUFFIX):
        return path
    found = [path.with_suffix(suffix) for suffix in VOXEL_SUFFIXES if path.with_suffix(suffix).is_file()]
    if not found:
        raise DataError(
            f"{path}: the voxels are missing. Expected {path.with_suffix('.img').name} beside it. Copy both files.",
            code="unreadable",
        )
    return found[0]


def _read_header(path: Path) -> Any:
    with opened(path) as file:
        header = _parse_header(file, path)
    magic, in_pair = bytes(header["magic"])[:3], path.name.lower().endswith(PAIR_SUFFIX)
    if magic not in (b"n+1", b"n+2", b"ni1", b"ni2"):
        raise DataError(
            f"{path}: an Analyze 7.5 header, which stores no orientation: left and right can't be told. Expected "
            "NIfTI. Convert it with a tool that knows how it was made.",
            code="unreadable",
        )
    if magic.startswith(b"ni") != in_pair:
        cause = "one file, not the header of a pair: name it .nii" if in_pair else "half of an .hdr/.img pair"
        raise damaged(path, cause, KIND)
    header.check_fix(logger=_log)
    return header


def _parse_header(file: BufferedIOBase, path: Path) -> Any:
    start = file.read(4)
    if len(start) < 4:
        raise damaged(path, "the file is empty" if not start else "the file is truncated", KIND)
    sizes = {struct.unpack("<i", start)[0], struct.unpack(">i", start)[0]}
    kind: Any = nibabel.Nifti1Header if 348 in sizes else nibabel.Nifti2Header if 540 in sizes else None
    if kind is None:
        raise damaged(path, "it does not begin with a NIfTI header", KIND)
    block = start + file.read(kind.sizeof_hdr - 4)
    if len(block) < kind.sizeof_hdr:
        raise damaged(path, "the file ends inside its header: it is truncated", KIND)
    if path.name.lower().endswith(PAIR_SUFFIX):
        kind = nibabel.Nifti1Pair.header_class if kind is nibabel.Nifti1Header else nibabel.Nifti2Pair.header_class
    return kind(block, check=False)


def _facts(header: Any, path: Path) -> FileHeader:
    shape = _shape_3d(header, path)
    dtype: np.dtype[Any] = header.get_data_dtype()
    if dtype.kind not in "iuf":
        raise no_scalar(path, dtype)
    affine = _affine_mm(header)
    if not is_usable(affine):
        raise unusable_affine(path, affine)
    slope, intercept = header.get_slope_inter()
    geometry = Geometry(shape, affine, _stored_numbers(header))
    return FileHeader(path, geometry, dtype.newbyteorder("="), 1.0 if slope is None else slope, intercept or 0.0)


def _shape_3d(header: Any, path: Path) -> Triple:
    """Return D, H, W; trailing axes of length one are dropped."""
    sizes = tuple(int(size) for size in header.get_data_shape())
    if not sizes or any(size < 1 for size in sizes):
        written = " x ".join(str(size) for size in sizes) or "none"
        raise damaged(path, f"an axis without voxels, sizes {written}", KIND)
    if len(sizes) < 3 or any(size > 1 for size in sizes[3:]):
        raise not_3d(path, sizes)
    return sizes[2], sizes[1], sizes[0]


def _stored_numbers(header: Any) -> NiftiHeader:
    return NiftiHeader(
        version=1 if header.sizeof_hdr == 348 else 2,
        qform_code=int(header["qform_code"]),
        sform_code=int(header["sform_code"]),
        xyzt_units=int(header["xyzt_units"]),
        pixdim=tuple(float(value) for value in header["pixdim"]),
        quaternion=tuple(float(header[f"quatern_{letter}"]) for letter in "bcd"),
        qform_offset=tuple(float(header[f"qoffset_{letter}"]) for letter in "xyz"),
        sform_rows=tuple(float(value) for letter in "xyz" for value in header[f"srow_{letter}"]),
    )


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
        raise damaged(path, f"the voxels are said to begin at byte {offset:g}", KIND)
    return int(offset)


def _new_header(geometry: Geometry, in_pair: bool) -> Any:
    facts = geometry.header if isinstance(geometry.header, NiftiHeader) else None
    too_long = max(geometry.shape) > MAX_DIM_NIFTI1
    version = 2 if too_long else 1 if facts is None else facts.version
    single: Any = nibabel.Nifti1Image if version == 1 else nibabel.Nifti2Image
    pair: Any = nibabel.Nifti1Pair if version == 1 else nibabel.Nifti2Pair
    header = (pair if in_pair else single).header_class()
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
