"""One class of one case as two masks, and what a metric of it is: the values that every metric is made of."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, TypeVar

import numpy as np
from jaxtyping import Bool

from sagittal.evaluation.overlap import OverlapCounts, count_overlap
from sagittal.evaluation.surface import SurfaceDistances, diagonal_mm, surface_distances_mm
from sagittal.evaluation.surfels import SurfelDistances, surfel_distances_mm
from sagittal.plan.base import Triple, TripleMm

Group = Literal["overlap", "volume", "surface", "shape", "lesions"]
Shared = TypeVar("Shared")


@dataclass(frozen=True)
class MaskPair:
    """One class of one case: both masks within their joint box, and what the metrics share, each computed once."""

    reference: Bool[np.ndarray, "D H W"]
    prediction: Bool[np.ndarray, "D H W"]
    spacing_mm: TripleMm
    image_shape: Triple
    """Shape of the whole image, which the masks may be cut out of."""
    name: str = ""
    """The class, for metrics whose parameters differ between classes."""
    ignored_vox: int = 0
    """Voxels of the whole image that the reference marks as ignored; they are in neither mask."""

    @cached_property
    def counts(self) -> OverlapCounts:
        """Voxels of either and of both."""
        return count_overlap(self.reference, self.prediction)

    @cached_property
    def distances(self) -> SurfaceDistances | None:
        """Directed surface distances; None where a mask is empty."""
        return surface_distances_mm(self.reference, self.prediction, self.spacing_mm)

    @cached_property
    def surfels(self) -> SurfelDistances | None:
        """Distances between surface elements, with their areas; None where a mask is empty."""
        return surfel_distances_mm(self.reference, self.prediction, self.spacing_mm)

    def once(self, compute: Callable[[MaskPair], Shared]) -> Shared:
        """Return what `compute` makes of this pair, computed once: for what several metrics of a protocol share."""
        if compute not in self._kept:
            self._kept[compute] = compute(self)
        found: Shared = self._kept[compute]
        return found

    @cached_property
    def _kept(self) -> dict[object, Any]:
        return {}

    @property
    def outcome(self) -> Literal["present", "missed", "false_alarm", "absent"]:
        """Whether both masks have the class, only the reference, only the prediction, or neither."""
        if self.counts.reference and self.counts.prediction:
            return "present"
        if self.counts.reference:
            return "missed"
        return "false_alarm" if self.counts.prediction else "absent"

    @property
    def voxel_ml(self) -> float:
        """Volume of one voxel in millilitres."""
        return float(np.prod(self.spacing_mm)) / 1000.0

    @property
    def counted_vox(self) -> int:
        """Voxels of the whole image that are not ignored."""
        return math.prod(self.image_shape) - self.ignored_vox

    @property
    def diagonal_mm(self) -> float:
        """Diagonal of the whole image in mm: what a distance counts that does not exist."""
        return diagonal_mm(self.image_shape, self.spacing_mm)


@dataclass(frozen=True)
class Metric:
    """A metric: how it is computed, and everything that a reader must know to compare it with another tool's."""

    title: str
    unit: str
    higher_is_better: bool | None
    """None for a signed error, which is the better the nearer to 0 it is."""
    digits: int
    compute: Callable[[MaskPair], float | None]
    definition: str
    empty_reference: str
    empty_prediction: str
    both_empty: str
    source: str
    group: Group = "overlap"
