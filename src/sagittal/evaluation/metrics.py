"""The metrics that every evaluation computes, each with its definition and its rules in words.

One literal table: the numbers, the columns of the CSV and the text in the report all come from it, so that a metric
can't be shown without its definition. A new metric is a function on `MaskPair` and an entry here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from jaxtyping import Bool

from sagittal.evaluation.overlap import OverlapCounts, count_overlap
from sagittal.evaluation.surface import SurfaceDistances, diagonal_mm, surface_distances_mm
from sagittal.plan.base import Triple, TripleMm


@dataclass(frozen=True)
class MaskPair:
    """One class of one case: both masks within their joint box, and what the metrics share, each computed once."""

    reference: Bool[np.ndarray, "D H W"]
    prediction: Bool[np.ndarray, "D H W"]
    spacing_mm: TripleMm
    image_shape: Triple
    """Shape of the whole image, which the masks may be cut out of."""

    @cached_property
    def counts(self) -> OverlapCounts:
        """Voxels of either and of both."""
        return count_overlap(self.reference, self.prediction)

    @cached_property
    def distances(self) -> SurfaceDistances | None:
        """Directed surface distances; None where a mask is empty."""
        return surface_distances_mm(self.reference, self.prediction, self.spacing_mm)

    @property
    def voxel_ml(self) -> float:
        """Volume of one voxel in millilitres."""
        return float(np.prod(self.spacing_mm)) / 1000.0


@dataclass(frozen=True)
class Metric:
    """A metric: how it is computed, and everything that a reader must know to compare it with another tool's."""

    title: str
    unit: str
    higher_is_better: bool
    digits: int
    compute: Callable[[MaskPair], float | None]
    definition: str
    empty_reference: str
    empty_prediction: str
    both_empty: str
    source: str


def _dice(pair: MaskPair) -> float | None:
    return pair.counts.dice


def _hd95_mm(pair: MaskPair) -> float | None:
    if pair.distances is not None:
        return pair.distances.hd95_mm
    return diagonal_mm(pair.image_shape, pair.spacing_mm) if any(pair.counts) else None


METRICS: dict[str, Metric] = {
    "dice": Metric(
        title="Dice",
        unit="",
        higher_is_better=True,
        digits=3,
        compute=_dice,
        definition="Twice the voxels that both masks share, divided by the sum of the voxels of each: "
        "2 |R ∩ P| / (|R| + |P|). 1 is perfect, 0 is no overlap.",
        empty_reference="0: a false alarm counts in full.",
        empty_prediction="0: a miss counts in full and is never dropped from a mean.",
        both_empty="Undefined: shown as a dash, counted apart, left out of the mean.",
        source="L. R. Dice, Ecology 26 (1945).",
    ),
    "hd95_mm": Metric(
        title="HD95",
        unit="mm",
        higher_is_better=False,
        digits=2,
        compute=_hd95_mm,
        definition="From every surface voxel of one mask the distance to the nearest surface voxel of the other, "
        "between voxel centres in mm; the 95th percentile (linear interpolation) in either direction; the larger of "
        "the two. A surface voxel has one of its six neighbours outside of the mask or beyond the image. 0 is perfect.",
        empty_reference="The diagonal of the image in mm, the worst that it allows.",
        empty_prediction="The diagonal of the image in mm: a miss can never improve a mean.",
        both_empty="Undefined: shown as a dash, counted apart, left out of the mean.",
        source="As MONAI's compute_hausdorff_distance(percentile=95) and Metrics Reloaded (Maier-Hein et al., Nature "
        "Methods 21, 2024). medpy pools both directions before it takes the percentile: its values differ.",
    ),
}
"""Every metric by its key, which is also its column in metrics.csv and its name in metrics.json."""

AGGREGATION_RULES: tuple[tuple[str, str], ...] = (
    (
        "Mean of a class",
        "The mean over all cases in which the metric is defined; n is their number. Misses and false alarms are in it "
        "with the values above.",
    ),
    (
        "Mean foreground",
        "The mean over classes of the mean of each class, so that a rare class weighs as much as a common one. A class "
        "that is defined in no case is left out. Background is never a class.",
    ),
    (
        "Best, median, worst",
        "Cases in the order of their mean Dice over the classes that are defined in them.",
    ),
    (
        "Ignored voxels",
        "Voxels that the reference marks as ignore are taken out of the reference and of the prediction before "
        "anything is counted or measured.",
    ),
    ("Volume", "Number of voxels times the volume of a voxel, in millilitres."),
)
"""How numbers become means: what a reader has to know beside the metrics themselves."""
