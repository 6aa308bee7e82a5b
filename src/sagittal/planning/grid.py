"""The grid that cases are brought to, and what they measure there; for 3d-low a coarser one (nnU-Net's rule)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import ceil, log, prod

from sagittal.errors import PlanError
from sagittal.plan import Fingerprint
from sagittal.plan.base import Triple, TripleMm
from sagittal.planning.spacing import in_network_order, median_shape, transposition

COVERAGE = 0.25
"""A coarser configuration is made where the patch covers a smaller share of the median case than this."""
COARSENING = 1.03
"""By how much the spacing grows at a time until the patch covers that share."""
FINER_VOXELS = 128**3
"""A finer grid is not made where the median case has more voxels on it than this (the patch of SegFormer3D's paper)."""
SAVING = 2.0
"""A coarser configuration is not made where it saves less than this factor in voxels."""


@dataclass(frozen=True)
class Grid:
    """A target spacing, and the median case on it."""

    spacing_mm: TripleMm
    """Along D, H, W of the oriented scan."""
    transpose: Triple
    """Which of these axes are the network's first, second and third."""
    keeps_slices: bool
    """Whether cases keep their own spacing along the network's first axis."""
    median_shape: Triple
    """Along the network's axes."""
    num_cases: int

    @property
    def network_spacing_mm(self) -> TripleMm:
        """The target spacing along the network's axes."""
        first, second, third = self.transpose
        return self.spacing_mm[first], self.spacing_mm[second], self.spacing_mm[third]

    @property
    def dataset_voxels(self) -> float:
        """About how many voxels all cases have on this grid."""
        return float(prod(self.median_shape)) * self.num_cases

    def coverage(self, patch_size: Triple) -> float:
        """Return how many times the median case's voxels a patch has."""
        return prod(patch_size) / prod(self.median_shape)


def grid_of(
    fingerprint: Fingerprint, spacing_mm: TripleMm, *, transpose: Triple | None = None, keeps_slices: bool = False
) -> Grid:
    """Return the grid of a target spacing along D, H, W; the network's axes are in nnU-Net's order unless given."""
    axes = transposition(spacing_mm)[0] if transpose is None else transpose
    target = spacing_mm[axes[0]], spacing_mm[axes[1]], spacing_mm[axes[2]]
    shape = median_shape(in_network_order(fingerprint, axes), target, keeps_slices=keeps_slices)
    return Grid(spacing_mm, axes, keeps_slices, shape, fingerprint.num_cases)


def low_resolution(
    full: Grid, patch_size: Triple, fingerprint: Fingerprint, patch_on: Callable[[Grid], Triple]
) -> tuple[Grid, str]:
    """Return the grid of the configuration 3d-low, and why its spacing is what it is.

    Args:
        full: the grid of the configuration 3d.
        patch_size: the patch there.
        fingerprint: what `full` was made from.
        patch_on: finds the patch on a coarser grid.

    Raises:
        PlanError: the patch covers enough of the median case already, or too little would be saved.
    """
    shown, covers = _shown(full.median_shape), full.coverage(patch_size)
    if covers >= COVERAGE:
        raise PlanError(
            f"--config 3d-low: the 3d patch of {_shown(patch_size)} voxels covers {covers:.0%} of the median case "
            f"({shown}); a coarser configuration is for less than {COVERAGE:.0%}. Plan with --config 3d.",
            code="no_3d_low",
        )
    spacing, grid, patch = full.spacing_mm, full, patch_size
    while True:
        voxels = prod(full.median_shape) * prod(full.spacing_mm) / prod(spacing)
        missing = COVERAGE * voxels / prod(patch)
        if missing <= 1:
            break
        # As many steps as the patch of now makes necessary: on a coarser grid it is hardly ever larger.
        for _ in range(max(1, ceil(log(missing) / (3 * log(COARSENING)) - 1e-9))):
            spacing = _coarser(spacing)
        grid = grid_of(fingerprint, spacing, transpose=full.transpose)
        patch = patch_on(grid)
    saved = prod(full.median_shape) / voxels
    told = "x".join(f"{edge:.3g}" for edge in spacing)
    if saved < SAVING:
        raise PlanError(
            f"--config 3d-low: the 3d patch of {_shown(patch_size)} voxels covers {covers:.1%} of the median case "
            f"({shown}), and at {told} mm a patch would cover {COVERAGE:.0%}; but that saves only a factor of "
            f"{saved:.2f} in voxels, less than {SAVING:g}. Plan with --config 3d.",
            code="no_3d_low",
        )
    return grid, (
        f"3d-low, nnU-Net's rule: {COARSENING:g} times the spacing of 3d again and again, fine axes first, until the "
        f"patch covers {COVERAGE:.0%} of the median case; there its {_shown(patch_size)} voxels cover {covers:.1%}, "
        f"here the median case has {saved:.3g} times fewer voxels"
    )


def finer_resolution(
    full: Grid, stride_vox: int, fingerprint: Fingerprint, patch_on: Callable[[Grid], Triple]
) -> tuple[Grid, str] | None:
    """Return a grid of half the spacing for a network that decides on cells of several voxels, and why; else None.

    Structures that are a few voxels thick fall between its cells, and a finer grid makes its cells smaller. It is
    taken only where it costs little: the whole median case must fit into a patch on it, of at most `FINER_VOXELS`.

    Args:
        full: the grid as it follows from the cases' spacings.
        stride_vox: edge of the network's cells.
        fingerprint: what `full` was made from.
        patch_on: finds the patch on a finer grid.
    """
    if stride_vox == 1 or full.keeps_slices:
        return None
    d, h, w = full.spacing_mm
    grid = grid_of(fingerprint, (d / 2, h / 2, w / 2), transpose=full.transpose)
    if prod(grid.median_shape) > FINER_VOXELS or grid.coverage(patch_on(grid)) < 1:
        return None
    return grid, (
        f"half of what follows: the network decides on cells of {stride_vox}^3 voxels, and on this grid, where the "
        f"median case has {_shown(grid.median_shape)} voxels, a patch still holds all of it"
    )


def _coarser(spacing_mm: TripleMm) -> TripleMm:
    """Return a spacing a step coarser: along the axes finer than half the coarsest, where there are any, else all."""
    coarsest = max(spacing_mm)
    fine = [coarsest / edge > 2 for edge in spacing_mm]
    d, h, w = (
        edge * COARSENING if is_fine or not any(fine) else edge for edge, is_fine in zip(spacing_mm, fine, strict=True)
    )
    return d, h, w


def _shown(size: Triple) -> str:
    return "x".join(map(str, size))
