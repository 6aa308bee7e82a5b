"""What a file's header says about where its voxels lie: NIfTI's numbers one by one, or that it says nothing.

An affine alone is not enough to write a scan's grid back as it was: NIfTI stores two matrices (qform and sform) with a
code each, in float32 or float64, and other tools read whichever they prefer. These numbers are kept as they stand in
the file. Nothing else of a header is kept: its text fields may name the patient.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class NiftiHeader:
    """The fields of a NIfTI-1 or NIfTI-2 header that place the voxels in the world, exactly as stored.

    Attributes:
        version: 1 or 2.
        qform_code: meaning of the quaternion matrix; 0 means that there is none.
        sform_code: meaning of the row matrix; 0 means that there is none.
        xyzt_units: NIfTI's packed code for the units of space and time.
        pixdim: all eight values, the first is the handedness of the qform.
        quaternion: b, c, d of the qform.
        qform_offset: x, y, z of the qform, in the unit of space.
        sform_rows: the twelve numbers of the sform, row by row, in the unit of space.
    """

    version: Literal[1, 2]
    qform_code: int
    sform_code: int
    xyzt_units: int
    pixdim: tuple[float, ...]
    quaternion: tuple[float, ...]
    qform_offset: tuple[float, ...]
    sform_rows: tuple[float, ...]

    @property
    def has_world(self) -> bool:
        """Whether the file says where its voxels lie; if not, the position is a guess from the voxel sizes."""
        return self.qform_code > 0 or self.sform_code > 0


@dataclass(frozen=True)
class Unplaced:
    """A file of another format that says nothing about where its voxels lie, or says it of no patient."""

    @property
    def has_world(self) -> bool:
        """False: position and orientation are a guess."""
        return False


GridHeader = NiftiHeader | Unplaced
