"""Three planes of a predicted case, cut where what is suspicious is largest."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from sagittal.errors import SagittalError
from sagittal.evaluation import ClassSet
from sagittal.report.layout import find_image
from sagittal.report.pictures import CT_SOFT_TISSUE, PLANES, UNKNOWN_SIDES, Plane, PlaneName, view_case
from sagittal.volumes import Volume, read_labels, read_volume
from sagittal.volumes.volume import require_same_grid

_ACROSS: tuple[PlaneName, ...] = ("across D", "across H", "across W")


@dataclass(frozen=True)
class Shown:
    """The pictures of a case, or why there are none."""

    planes: tuple[Plane, ...]
    note: str = ""

    @property
    def legend(self) -> Mapping[str, str]:
        """Colours by the names of what is outlined."""
        return {outline.class_name: outline.colour for plane in self.planes for outline in plane.outlines}

    @property
    def size_bytes(self) -> int:
        """About what it takes in the page."""
        paths = sum(2 * len(outline.path) for plane in self.planes for outline in plane.outlines)
        return paths + sum(len(plane.image or "") for plane in self.planes)


def draw_case(
    case: str, path: Path, classes: ClassSet, scans: Path | None, *, focus: str | None = None, is_ct: bool = False
) -> Shown:
    """Draw a case on its scan where there is one.

    Args:
        case: its name.
        path: label map.
        classes: what to outline.
        scans: folder of the scans; None: outlines lie over grey.
        focus: the class through which the planes run where they cut most of it; all of them where it is None or absent.
        is_ct: show the window of soft tissue.
    """
    try:
        stored, grid = read_labels(path)
        scan, note = None, ""
        found = None if scans is None else find_image(case, path, scans)
        if found is not None:
            try:
                scan = read_volume(found)
                require_same_grid(grid, scan.geometry, "label map and scan")
            except SagittalError as error:
                scan, note = None, f"Shown without its scan: {error.message}"
        elif scans is not None:
            note = f"Shown without its scan: no file {case}_0000 or {case} in the folder of the scans."
        labels = Volume.on(grid, classes.in_own_values(stored)).reoriented()
    except SagittalError as error:
        return Shown((), f"No picture: {error.message}")
    values = next((label.values for label in classes.labels if label.name == focus), ())
    array = labels.array[0]
    # A "reference" only says where to cut: its outlines are taken away again.
    about = np.where(np.isin(array, values), array, 0) if values else np.zeros_like(array)
    image = None if scan is None else scan.reoriented().array[0]
    window = CT_SOFT_TISSUE if is_ct else None
    view = view_case(case, about, array, labels.spacing_mm, classes, image=image, window=window)
    return Shown(tuple(_own(plane, case, grid.has_world) for plane in view.planes), note)


def _own(plane: Plane, case: str, sides_known: bool) -> Plane:
    """Return the plane with the prediction's outlines alone, drawn solid, and told as what they are."""
    layout = plane.layout
    if not sides_known:
        layout = replace(layout, name=_ACROSS[PLANES.index(plane.layout)], sides=UNKNOWN_SIDES)
    outlines = tuple(replace(line, role="reference") for line in plane.outlines if line.role == "prediction")
    drawn = list(dict.fromkeys(line.class_name for line in outlines))
    sides = (
        f"{layout.sides['left']} on the left and {layout.sides['right']} on the right"
        if sides_known
        else "sides not known"
    )
    alt = (
        f"{case}, {layout.name} plane {plane.index + 1} of {plane.slices}, {sides}. "
        f"Outlined: {', '.join(drawn) or 'nothing here'}."
    )
    return replace(plane, layout=layout, outlines=outlines, alt=alt)
