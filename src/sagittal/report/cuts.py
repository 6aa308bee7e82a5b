"""Planes cut out of a case while it is validated: small enough to keep, drawn when the page is written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Bool, Float, Shaped

from sagittal.plan.base import TripleMm
from sagittal.report.colours import PREDICTION_COLOUR, class_colour
from sagittal.report.pictures import (
    PLANES,
    UNKNOWN_SIDES,
    CaseView,
    Outline,
    Plane,
    PlaneLayout,
    PlaneName,
    alt_text,
    encode,
    intensity_window,
    on_screen,
    outline_path,
    round_length,
)

MARGIN_MM = 20.0
"""Least room around the structures of a picture."""
_ACROSS: tuple[PlaneName, ...] = ("across D", "across H", "across W")


@dataclass(frozen=True, eq=False)
class Cut:
    """One plane of a case, in the network's order of axes.

    Attributes:
        axis: which of D, H, W it cuts.
        index: where on it.
        slices: how many there are.
        image: one channel; rows and columns are the other two axes, in order.
        reference: a mask for each label, in the order of the declaration.
        prediction: the same of the prediction.
    """

    axis: int
    index: int
    slices: int
    image: Float[np.ndarray, "rows columns"]
    reference: Bool[np.ndarray, "labels rows columns"]
    prediction: Bool[np.ndarray, "labels rows columns"]


@dataclass(frozen=True, eq=False)
class CutCase:
    """A case, its Dice by label, and the plane across each axis in which most voxels are wrong."""

    case: str
    dice: Mapping[str, float | None]
    cuts: tuple[Cut, ...]


def draw_cuts(case: CutCase, names: Sequence[str], spacing_mm: TripleMm, *, sides_known: bool) -> CaseView:
    """Return the pictures of a case.

    Args:
        case: what to draw.
        names: of the labels, in the order of the masks.
        spacing_mm: voxel size along D, H, W of the network's grid.
        sides_known: whether D, H, W run to the head, the front and the right; if not, nothing is said of sides.
    """
    window = intensity_window(np.concatenate([cut.image.reshape(-1) for cut in case.cuts]))
    planes = [_plane(case.case, cut, names, spacing_mm, window, sides_known) for cut in case.cuts]
    return CaseView(case.case, tuple(planes))


def _plane(
    case: str, cut: Cut, names: Sequence[str], spacing_mm: TripleMm, window: tuple[float, float], sides_known: bool
) -> Plane:
    layout = PLANES[cut.axis]
    if not sides_known:
        layout = replace(layout, name=_ACROSS[cut.axis], sides=UNKNOWN_SIDES)
    size = spacing_mm[layout.rows], spacing_mm[layout.columns]
    shown = _field(np.asarray(np.concatenate([cut.reference, cut.prediction]).any(axis=0)), size)
    outlines = _outlines(cut, names, shown, layout, size)
    image = on_screen(cut.image[shown])
    height_mm, width_mm = (length * step for length, step in zip(image.shape, size, strict=True))
    return Plane(
        layout=layout,
        index=cut.index,
        slices=cut.slices,
        width_mm=width_mm,
        height_mm=height_mm,
        image=encode(image, size, window),
        outlines=outlines,
        scale_bar_mm=round_length(width_mm / 4),
        alt=alt_text(case, layout, cut.index, cut.slices, outlines),
    )


def _outlines(
    cut: Cut, names: Sequence[str], shown: tuple[slice, slice], layout: PlaneLayout, size_mm: tuple[float, float]
) -> tuple[Outline, ...]:
    found = []
    for number, name in enumerate(names):
        path = outline_path(on_screen(cut.reference[number][shown]), size_mm)
        if path:
            found.append(Outline(name, "reference", class_colour(number), path))
    for number, name in enumerate(names):
        path = outline_path(on_screen(cut.prediction[number][shown]), size_mm)
        if path:
            colour = PREDICTION_COLOUR if len(names) == 1 else class_colour(number)
            found.append(Outline(name, "prediction", colour, path))
    return tuple(found)


def _field(mask: Bool[np.ndarray, "rows columns"], size_mm: Sequence[float]) -> tuple[slice, slice]:
    """Return the structures' box with room around it, the whole plane where there are none."""
    bounds = []
    for axis in (0, 1):
        places = np.flatnonzero(mask.any(axis=1 - axis))
        if not places.size:
            return slice(None), slice(None)
        first, last = int(places[0]), int(places[-1]) + 1
        margin = int(np.ceil(max(MARGIN_MM / size_mm[axis], 0.3 * (last - first))))
        bounds.append(slice(max(0, first - margin), min(mask.shape[axis], last + margin)))
    return bounds[0], bounds[1]


def largest_plane(counts: Shaped[np.ndarray, " slices"]) -> int:
    """Return the plane with the largest count: the middle one of several."""
    largest = np.flatnonzero(counts == counts.max())
    return int(largest[len(largest) // 2])
