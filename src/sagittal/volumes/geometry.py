"""Where voxels lie in the world: the only file that knows anatomical directions and the order of file axes.

    d, h, w   index axes, slow to fast, of an array in memory
    x, y, z   world in mm, RAS+: x to the patient's right, y to the front, z to the head
    affine    float64 (4, 4), (d, h, w, 1) -> (x, y, z, 1)

NIfTI, MGH, nibabel and ITK index voxels as (i, j, k) = (w, h, d): their affine is ours with its first three columns
reversed, and their array is ours transposed. ITK's and DICOM's world is LPS: x and y run the other way.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

import nibabel.orientations
import numpy as np
from jaxtyping import Float64, Shaped
from numpy.typing import NDArray

from sagittal.plan.base import Triple, TripleMm
from sagittal.volumes.header import GridHeader

Affine = Float64[np.ndarray, "4 4"]

SPACING_TOLERANCE = 1e-3
"""Relative. Voxel sizes are often rounded to three or four digits by one of two tools."""
ORIGIN_TOLERANCE_VOX = 1e-2
"""In voxels of the finest axis: no label moves by this."""
DIRECTION_TOLERANCE_DEG = 0.1
"""A qform near a half turn keeps its angle to 0.04 degrees only: the quaternion's first part is not stored."""
MAX_MM = 1e9
"""No scan is a thousand kilometres away, nor a voxel a femtometre wide: such numbers are damage."""
SHEAR_TOLERANCE = 1e-3
"""Cosine between two axes above which a grid counts as sheared."""


def reverse_axes(affine: NDArray[np.float64]) -> Affine:
    """Turn an affine over (i, j, k) into one over (d, h, w), or back: the columns of the axes are reversed."""
    return np.ascontiguousarray(np.asarray(affine, dtype=np.float64)[:, [2, 1, 0, 3]])


def lps_to_ras(points: NDArray[np.float64]) -> NDArray[np.float64]:
    """Turn points or directions from LPS into RAS, or back; x, y, z are the first axis of `points`."""
    signs = np.array([-1.0, -1.0, 1.0]).reshape(3, *[1] * (points.ndim - 1))
    return np.asarray(points * signs)


def affine_from_lps(axes: NDArray[np.float64], origin: NDArray[np.float64]) -> Affine:
    """Return the affine of a grid in LPS, as DICOM and ITK have it.

    Args:
        axes: (3, 3), one column per index axis i, j, k: the step in mm from a voxel to the next.
        origin: centre of the first voxel in mm.
    """
    affine = np.eye(4)
    affine[:3, :3], affine[:3, 3] = lps_to_ras(axes), lps_to_ras(origin)
    return reverse_axes(affine)


def affine_to_lps(affine: Affine) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the axes, one column per i, j, k, and the origin in LPS: `affine_from_lps` undone."""
    file_affine = reverse_axes(affine)
    return lps_to_ras(file_affine[:3, :3]), lps_to_ras(file_affine[:3, 3])


def spacing_of(affine: Affine) -> TripleMm:
    """Return the voxel size in mm along D, H, W: the lengths of the affine's columns."""
    lengths = np.sqrt((affine[:3, :3] ** 2).sum(axis=0))
    return float(lengths[0]), float(lengths[1]), float(lengths[2])


def direction_of(affine: Affine) -> Float64[np.ndarray, "3 3"]:
    """Return the unit vectors in the world, one column per array axis D, H, W."""
    return np.asarray(affine[:3, :3] / np.array(spacing_of(affine)))


def is_sheared(affine: Affine) -> bool:
    """Whether the grid's axes are not at right angles."""
    direction = direction_of(affine)
    return bool(np.abs(direction.T @ direction - np.eye(3)).max() > SHEAR_TOLERANCE)


def is_usable(affine: NDArray[Any]) -> bool:
    """Whether the affine is a finite (4, 4) matrix that gives every voxel a place of its own."""
    if affine.shape != (4, 4) or not np.isfinite(affine).all() or not np.array_equal(affine[3], (0.0, 0.0, 0.0, 1.0)):
        return False
    if np.abs(affine).max() > MAX_MM:
        return False
    lengths = np.sqrt((affine[:3, :3] ** 2).sum(axis=0))
    return bool(lengths.min() > 1.0 / MAX_MM and abs(np.linalg.det(affine[:3, :3] / lengths)) > 1e-6)


def shifted(affine: Affine, start: Iterable[int]) -> Affine:
    """Return the affine of the grid whose voxel (0, 0, 0) is this grid's voxel `start`, which may be negative."""
    moved = affine.copy()
    moved[:3, 3] = affine[:3, :3] @ np.fromiter(start, dtype=np.float64) + affine[:3, 3]
    return moved


@dataclass(frozen=True, eq=False)
class Geometry:
    """The grid of a volume: how many voxels and where they lie.

    Attributes:
        shape: voxels along D, H, W.
        affine: float64 (4, 4), (d, h, w, 1) -> (x, y, z, 1) in mm, RAS+.
        header: how a NIfTI file stored the grid, or that a file says nothing of it; None for all other grids.
    """

    shape: Triple
    affine: Affine
    header: GridHeader | None = None

    @property
    def spacing_mm(self) -> TripleMm:
        """Voxel size along D, H, W."""
        return spacing_of(self.affine)

    @property
    def has_world(self) -> bool:
        """False where the file says nothing of position and orientation (a NIfTI without qform and sform)."""
        return self.header is None or self.header.has_world


@dataclass(frozen=True)
class Reorientation:
    """A change of axis order: target axis t is source axis `permutation[t]`, reversed where `flips[t]`."""

    permutation: Triple
    flips: tuple[bool, bool, bool]

    @property
    def is_identity(self) -> bool:
        """Whether nothing changes."""
        return self.permutation == (0, 1, 2) and not any(self.flips)

    def apply(self, array: Shaped[np.ndarray, "*channels D H W"]) -> Shaped[np.ndarray, "*channels d h w"]:
        """Return a view of `array` with its last three axes in the target order."""
        lead = array.ndim - 3
        turned = array.transpose(*range(lead), *(lead + axis for axis in self.permutation))
        d, h, w = (slice(None, None, -1 if flip else 1) for flip in self.flips)
        return turned[..., d, h, w]

    def shape(self, shape: Triple) -> Triple:
        """Return the target's D, H, W of a source of D, H, W."""
        a, b, c = self.permutation
        return shape[a], shape[b], shape[c]

    def affine(self, affine: Affine, shape: Triple) -> Affine:
        """Return the target's affine for a source grid: every voxel keeps its place in the world."""
        matrix = np.zeros((4, 4))
        matrix[3, 3] = 1.0
        for target, (source, flip) in enumerate(zip(self.permutation, self.flips, strict=True)):
            matrix[source, target] = -1.0 if flip else 1.0
            matrix[source, 3] = shape[source] - 1 if flip else 0.0
        return np.asarray(affine @ matrix)

    def inverse(self) -> Reorientation:
        """Return the change that undoes this one."""
        back = [0, 0, 0]
        flips = [False, False, False]
        for target, source in enumerate(self.permutation):
            back[source] = target
            flips[source] = self.flips[target]
        return Reorientation((back[0], back[1], back[2]), (flips[0], flips[1], flips[2]))


def reorientation_to_ras(affine: Affine) -> Reorientation:
    """Return the change of axis order after which D, H, W point to the head, the front and the right.

    Oblique grids go to the closest such order and are not resampled. The result transposed is nibabel's closest
    canonical array.
    """
    orientation = nibabel.orientations.io_orientation(reverse_axes(affine))  # type: ignore[no-untyped-call]
    permutation = [0, 0, 0]
    flips = [False, False, False]
    for file_axis, (world_axis, sign) in enumerate(orientation):
        target = 2 - int(world_axis)
        permutation[target] = 2 - file_axis
        flips[target] = bool(sign < 0)
    return Reorientation((permutation[0], permutation[1], permutation[2]), (flips[0], flips[1], flips[2]))


def axis_codes(affine: Affine) -> str:
    """Return where D, H, W point, one letter each of R L A P S I: 'SAR' is RAS order."""
    reorientation = reorientation_to_ras(affine)
    letters = ["", "", ""]
    for target, pair in enumerate(("SI", "AP", "RL")):
        letters[reorientation.permutation[target]] = pair[reorientation.flips[target]]
    return "".join(letters)


@dataclass(frozen=True)
class Difference:
    """One way in which two grids differ, with the numbers."""

    kind: Literal["shape", "spacing", "origin", "direction"]
    message: str = field(compare=False)


def differences(first: Geometry, second: Geometry) -> tuple[Difference, ...]:
    """Return how two grids differ beyond the tolerances of this file; empty where they are the same grid.

    Noise in the last digits of a header is forgiven. The messages give both values, how far they are apart and the
    tolerance.
    """
    found = []
    if first.shape != second.shape:
        found.append(Difference("shape", f"shape (D, H, W) {first.shape} against {second.shape}"))
    spacing, other = np.array(first.spacing_mm), np.array(second.spacing_mm)
    apart = float((np.abs(spacing - other) / np.minimum(spacing, other)).max())
    if apart > SPACING_TOLERANCE:
        numbers = f"{_triple(spacing)} against {_triple(other)}, {100 * apart:.2g} % apart"
        found.append(Difference("spacing", f"spacing_mm {numbers}, tolerance {100 * SPACING_TOLERANCE:g} %"))
    distance_mm = float(np.linalg.norm(first.affine[:3, 3] - second.affine[:3, 3]))
    finest_mm = float(min(spacing.min(), other.min()))
    if distance_mm > ORIGIN_TOLERANCE_VOX * finest_mm:
        numbers = f"{_triple(first.affine[:3, 3])} against {_triple(second.affine[:3, 3])}, {distance_mm:.3g} mm apart"
        tolerance = f"tolerance {ORIGIN_TOLERANCE_VOX * finest_mm:.2g} mm"
        found.append(Difference("origin", f"origin (x, y, z) {numbers}, {tolerance}"))
    angle_deg = _largest_angle_deg(direction_of(first.affine), direction_of(second.affine))
    if angle_deg > DIRECTION_TOLERANCE_DEG:
        codes = f"axes (D, H, W) {axis_codes(first.affine)} against {axis_codes(second.affine)}"
        message = f"direction: {codes}, {angle_deg:.3g} degrees apart, tolerance {DIRECTION_TOLERANCE_DEG:g}"
        found.append(Difference("direction", message))
    return tuple(found)


def describe(found: Iterable[Difference]) -> str:
    """Return the differences as one phrase for an error message."""
    return "; ".join(difference.message for difference in found)


def _largest_angle_deg(first: NDArray[np.float64], second: NDArray[np.float64]) -> float:
    # The chord keeps small angles that the cosine rounds away.
    chords = np.linalg.norm(first - second, axis=0)
    return float(np.degrees(2.0 * np.arcsin(np.clip(chords / 2.0, 0.0, 1.0))).max())


def _triple(values: NDArray[np.float64]) -> str:
    return "(" + ", ".join(f"{value:.6g}" for value in values) + ")"
