"""Parallel slices in space: are they evenly spaced and straight above each other? If not, by how much, and resampling.

Everything is in mm, in whichever frame the positions are given. A stack that is even needs no resampling.

    row     unit vector along which a slice's column index w grows
    column  unit vector along which its row index h grows
    normal  row x column: the slices are sorted along it
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from jaxtyping import Float32, Float64
from numpy.typing import NDArray

STEP_TOLERANCE = 0.02
"""Of the distance of two slices: how far one may lie from where even steps would put it."""
STEP_TOLERANCE_MM = 0.01
"""The same for fine steps: files often hold two decimals."""
TILT_TOLERANCE = 1e-3
"""Sideways drift per distance (0.06 degrees) below which a stack counts as straight."""
SIDEWAYS_TOLERANCE_VOX = 0.05
"""In voxels in the plane; less counts as straight, however short the stack."""
MAX_GROWTH = 8
"""Resampling may make this many times the voxels."""


@dataclass(frozen=True)
class Fault:
    """Why a stack is no grid: a short code and the numbers."""

    code: str
    message: str


@dataclass(frozen=True, eq=False)
class SliceStack:
    """Slices of one size and orientation, sorted along their normal.

    Attributes:
        positions_mm: (N, 3), centre of each slice's first voxel.
        row: (3,), unit vector.
        column: (3,), unit vector at right angles to `row`.
        spacing_mm: distance of voxels along H and W.
        shape: voxels along H and W.
    """

    positions_mm: NDArray[np.float64]
    row: NDArray[np.float64]
    column: NDArray[np.float64]
    spacing_mm: tuple[float, float]
    shape: tuple[int, int]

    @cached_property
    def normal(self) -> NDArray[np.float64]:
        """Unit vector along which the slices are sorted."""
        return normal_of(self.row, self.column)

    @cached_property
    def heights_mm(self) -> NDArray[np.float64]:
        """(N,), place of each slice along the normal, the first at 0."""
        return np.asarray((self.positions_mm - self.positions_mm[0]) @ self.normal)

    @cached_property
    def sideways_vox(self) -> Float64[np.ndarray, "N 2"]:
        """How far each slice lies beside the first one, in voxels along H and W."""
        moved = self.positions_mm - self.positions_mm[0]
        return np.stack([moved @ self.column / self.spacing_mm[0], moved @ self.row / self.spacing_mm[1]], axis=1)

    @property
    def axes(self) -> Float64[np.ndarray, "3 3"]:
        """The step from voxel to voxel, one column per w, h and slice: right where there is no fault."""
        step = (self.positions_mm[-1] - self.positions_mm[0]) / (len(self.positions_mm) - 1)
        return np.stack([self.row * self.spacing_mm[1], self.column * self.spacing_mm[0], step], axis=1)


def normal_of(row: NDArray[np.float64], column: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the unit vector at right angles to both."""
    normal = np.cross(row, column)
    return np.asarray(normal / np.linalg.norm(normal))


def repeated(stack: SliceStack) -> Fault | None:
    """Return how many slices share a place with another one, or None."""
    steps = np.diff(stack.heights_mm)
    same = steps < min(STEP_TOLERANCE_MM, STEP_TOLERANCE * float(np.median(steps)) or STEP_TOLERANCE_MM)
    if not same.any():
        return None
    places = len(steps) + 1 - int(same.sum())
    largest = max(Counter(np.cumsum(np.concatenate([[0], ~same])).tolist()).values())
    message = f"{len(steps) + 1} slices at {places} places, up to {largest} at the same one"
    return Fault("duplicate_slices", message)


def faults(stack: SliceStack) -> tuple[Fault, ...]:
    """Return what makes distinct slices no regular grid: uneven steps, sideways drift; empty where they are one."""
    found = [fault for fault in (_uneven(stack), _sideways(stack)) if fault is not None]
    return tuple(found)


def _uneven(stack: SliceStack) -> Fault | None:
    heights = stack.heights_mm
    steps = np.diff(heights)
    usual = _usual(steps)
    tolerance = max(STEP_TOLERANCE * usual, STEP_TOLERANCE_MM)
    even = np.linspace(0.0, heights[-1], len(heights))
    odd = np.flatnonzero(np.abs(steps - usual) > tolerance)
    if np.abs(heights - even).max() <= tolerance and odd.size == 0:
        return None
    common = f"{len(heights)} slices, mostly {usual:.4g} mm apart"
    if odd.size == 0:
        apart = float(np.abs(heights - even).max())
        return Fault("slice_spacing", f"{common}, but up to {apart:.3g} mm from even steps")
    listed = ", ".join(
        f"{steps[index]:.4g} mm between slices {index + 1} and {index + 2}" for index in odd[:3].tolist()
    )
    more = f" and {odd.size - 3} more" if odd.size > 3 else ""
    missing = np.rint(steps[odd] / usual) - 1.0
    few = 2 * odd.size < steps.size
    if few and (missing >= 1).all() and (np.abs(steps[odd] - (missing + 1) * usual) <= tolerance * (missing + 1)).all():
        return Fault("slice_gap", f"{common}, but {listed}{more}: {int(missing.sum())} missing")
    return Fault("slice_spacing", f"{common}, but {listed}{more}: mixed spacings")


def _usual(steps: NDArray[np.float64]) -> float:
    """Return the step that most others are like; of several such the smallest."""
    ordered = np.sort(steps)
    near = np.maximum(STEP_TOLERANCE * ordered, STEP_TOLERANCE_MM)
    first, last = np.searchsorted(ordered, ordered - near), np.searchsorted(ordered, ordered + near, side="right")
    most = int(np.argmax(last - first))
    return float(np.median(ordered[first[most] : last[most]]))


def _sideways(stack: SliceStack) -> Fault | None:
    drift_mm = stack.sideways_vox * np.array(stack.spacing_mm)
    distance = np.linalg.norm(drift_mm, axis=1)
    if np.abs(stack.sideways_vox).max() <= SIDEWAYS_TOLERANCE_VOX:
        return None
    if (distance <= TILT_TOLERANCE * stack.heights_mm).all():
        return None
    angle = float(np.degrees(np.arctan2(distance[-1], stack.heights_mm[-1])))
    message = f"slices drift sideways by {distance.max():.4g} mm, a gantry tilt of {angle:.3g} degrees"
    return Fault("gantry_tilt", message)


def resampled_shape(stack: SliceStack) -> tuple[int, int, int]:
    """Return D, H, W of `resample`'s grid: even steps as fine as the finest, a frame that holds every slice."""
    steps = np.diff(stack.heights_mm)
    depth = round(float(stack.heights_mm[-1] / steps.min())) + 1
    lowest, highest = _frame(stack)
    height, width = stack.shape[0] + highest[0] - lowest[0], stack.shape[1] + highest[1] - lowest[1]
    return depth, height, width


def resampled_grid(stack: SliceStack) -> tuple[Float64[np.ndarray, "3 3"], NDArray[np.float64]]:
    """Return axes (columns w, h, slice) and origin of `resample`'s grid, whose axes are at right angles."""
    depth, _, _ = resampled_shape(stack)
    step = stack.heights_mm[-1] / (depth - 1)
    (low_h, low_w), _ = _frame(stack)
    rows, columns = stack.column * stack.spacing_mm[0], stack.row * stack.spacing_mm[1]
    origin = stack.positions_mm[0] + low_h * rows + low_w * columns
    return np.stack([columns, rows, stack.normal * step], axis=1), origin


def resample(stack: SliceStack, voxels: Float32[np.ndarray, "N H W"]) -> Float32[np.ndarray, "D H2 W2"]:
    """Return the slices on the even grid of `resampled_grid`, by linear interpolation in the plane and between slices.

    A slice that lies on the grid comes out unchanged. Voxels that no slice covers get the lowest value.
    """
    depth, height, width = resampled_shape(stack)
    fill = float(voxels.min())
    lowest, _ = _frame(stack)
    shifts = stack.sideways_vox - np.array(lowest) if _drifts(stack) else np.zeros((len(voxels), 2))
    heights = stack.heights_mm
    result = np.empty((depth, height, width), dtype=np.float32)
    placed: dict[int, NDArray[np.float32]] = {}
    for index, place in enumerate(np.linspace(0.0, heights[-1], depth)):
        upper = min(max(int(np.searchsorted(heights, place)), 1), len(heights) - 1)
        lower = upper - 1
        placed = {
            near: placed[near] if near in placed else _placed(voxels[near], shifts[near], (height, width), fill)
            for near in (lower, upper)
        }
        share = np.clip((place - heights[lower]) / (heights[upper] - heights[lower]), 0.0, 1.0)
        # Rounding of positions must not blur slices that lie on the grid.
        share = np.rint(share) if abs(share - np.rint(share)) < STEP_TOLERANCE else share
        result[index] = placed[lower] * np.float32(1.0 - share) + placed[upper] * np.float32(share)
    return result


def _drifts(stack: SliceStack) -> bool:
    return _sideways(stack) is not None


def _frame(stack: SliceStack) -> tuple[tuple[int, int], tuple[int, int]]:
    """Return the lowest and highest sideways place along H and W, in whole voxels."""
    if not _drifts(stack):
        return (0, 0), (0, 0)
    lowest, highest = np.floor(stack.sideways_vox.min(axis=0)), np.ceil(stack.sideways_vox.max(axis=0))
    return (int(lowest[0]), int(lowest[1])), (int(highest[0]), int(highest[1]))


def _placed(
    plane: NDArray[np.float32], shift: NDArray[np.float64], shape: Sequence[int], fill: float
) -> NDArray[np.float32]:
    """Return `plane` moved by `shift` voxels into a frame of `shape`."""
    whole = np.floor(shift).astype(int)
    result = np.zeros((shape[0] + 1, shape[1] + 1), dtype=np.float32)
    part_h, part_w = shift - whole
    # What is above `fill` is spread over the neighbours, so that uncovered voxels stay at `fill`.
    above = plane - np.float32(fill)
    for step_h, weight_h in ((0, 1.0 - part_h), (1, part_h)):
        for step_w, weight_w in ((0, 1.0 - part_w), (1, part_w)):
            top, left = whole[0] + step_h, whole[1] + step_w
            target = result[top : top + plane.shape[0], left : left + plane.shape[1]]
            target += above * np.float32(weight_h * weight_w)
    return result[: shape[0], : shape[1]] + np.float32(fill)
