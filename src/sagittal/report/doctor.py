"""The page of a data set's check: one HTML file with a picture per finding, without script, network or other files."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import numpy as np
from jaxtyping import Bool, Float
from jinja2 import Environment, PackageLoader, StrictUndefined

from sagittal.evaluation import ClassSet
from sagittal.plan.base import TripleMm, write_atomically
from sagittal.plan.dataset import Label
from sagittal.report.pictures import UNKNOWN_SIDES, CaseView, Plane, Window, view_case

Level = Literal["error", "warning", "fact"]

TITLES: Mapping[str, str] = {
    "absent_label": "Labels that no case has",
    "case_count": "Number of cases",
    "constant_image": "Constant or empty images",
    "duplicate": "The same image twice",
    "empty_label": "Empty label maps",
    "float_label": "Label maps stored as floating point",
    "header_noise": "Headers that differ in their last digits",
    "intensity_scale": "Intensity scales",
    "label_value": "Label values out of range",
    "leak": "On both sides of a split",
    "missing_channel": "Missing channels",
    "missing_label": "Missing label maps",
    "no_foreground": "Nothing labelled",
    "no_world": "Orientation not stated",
    "non_finite": "Voxels that are not numbers",
    "non_integer_label": "Label values that are not whole numbers",
    "not_3d": "No 3D volume of one number per voxel",
    "orientation": "Axis orders",
    "other_grid": "Images and labels on different grids",
    "patients_file": "patients.csv",
    "regions_order": "Regions that can't be written",
    "sheared": "Sheared grids",
    "splits_file": "splits_final.json",
    "suspected_flip": "Left and right",
    "tiny_structure": "Structures smaller than the planned voxels",
    "undeclared_channel": "Undeclared channels",
    "undeclared_label": "Undeclared label values",
    "unknown_format": "Unknown formats",
    "unreadable": "Files that can't be read",
    "unused_file": "Unused files",
}
"""Headings by code; a code without one is shown as it is."""


@dataclass(frozen=True)
class Picture:
    """Three planes of a case and what they show."""

    caption: str
    view: CaseView

    @property
    def legend(self) -> Mapping[str, str]:
        """Colours by the names of what is outlined."""
        return {outline.class_name: outline.colour for plane in self.view.planes for outline in plane.outlines}


@dataclass(frozen=True)
class Told:
    """One finding of the page."""

    level: Level
    code: str
    case: str
    message: str
    fix: str = ""
    pictures: tuple[Picture, ...] = ()
    without_picture: str = ""
    """Why there is none."""


@dataclass(frozen=True)
class DoctorPage:
    """What the page tells.

    Attributes:
        title: name of the data set.
        told: the findings, in order.
        facts: further lines under the facts, by what they are.
    """

    title: str
    told: Sequence[Told]
    facts: Mapping[str, str] = field(default_factory=dict)

    def number(self, level: Level) -> int:
        """Return how many findings there are of a level."""
        return sum(one.level == level for one in self.told)

    def groups(self, level: Level) -> dict[str, list[Told]]:
        """Return the findings of a level by their heading, in order of first appearance."""
        found: dict[str, list[Told]] = {}
        for one in self.told:
            if one.level == level:
                found.setdefault(TITLES.get(one.code, one.code), []).append(one)
        return found


def draw_marks(
    case: str,
    marks: Mapping[str, Bool[np.ndarray, "D H W"]],
    image: Float[np.ndarray, "D H W"] | None,
    shape: tuple[int, int, int],
    spacing_mm: TripleMm,
    *,
    window: Window | None = None,
    sides_known: bool = True,
) -> CaseView:
    """Draw three planes of a scan with the borders of masks, each plane where the masks are largest.

    Args:
        case: name for the alt texts.
        marks: what to outline, by name; later ones lie over earlier ones. In RAS order, as everything here.
        image: one channel of the scan; without it the outlines lie over grey.
        shape: D, H, W of all of them.
        spacing_mm: voxel size along D, H, W.
        window: intensities for black and white; see `view_case`.
        sides_known: whether left and right are known; if not, question marks stand in their place.
    """
    numbers = np.zeros(shape, np.uint16)
    for number, mask in enumerate(marks.values(), start=1):
        numbers[mask] = number
    classes = ClassSet(labels=tuple(Label(name=name, values=(number,)) for number, name in enumerate(marks, start=1)))
    nothing = np.zeros_like(numbers)
    view = view_case(case, numbers, nothing, spacing_mm, classes, image=image, window=window, errors=False)
    planes = [_described(plane, case, sides_known) for plane in view.planes]
    return CaseView(case, tuple(planes))


def _described(plane: Plane, case: str, sides_known: bool) -> Plane:
    layout = plane.layout if sides_known else replace(plane.layout, sides=UNKNOWN_SIDES)
    drawn = list(dict.fromkeys(outline.class_name for outline in plane.outlines))
    sides = f"{layout.sides['left']} on the left and {layout.sides['right']} on the right" if sides_known else ""
    where = f"{case}, {layout.name} plane {plane.index + 1} of {plane.slices}, {sides or 'sides not known'}."
    return replace(plane, layout=layout, alt=f"{where} Outlined: {', '.join(drawn) or 'nothing here'}.")


def write_doctor_page(path: str | os.PathLike[str], page: DoctorPage) -> Path:
    """Write the page, whole or not at all, and return its path.

    Raises:
        ResourceError: the file can't be written.
    """
    return write_atomically(path, render_doctor_page(page).encode())


def render_doctor_page(page: DoctorPage) -> str:
    """Return the page's HTML."""
    environment = Environment(
        loader=PackageLoader("sagittal.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("doctor.html.j2").render(page=page, verdict=_verdict(page))


def _verdict(page: DoctorPage) -> str:
    errors, warnings = page.number("error"), page.number("warning")
    counted = [f"{errors} error{'s' * (errors != 1)}", f"{warnings} warning{'s' * (warnings != 1)}"]
    if errors:
        return f"Not usable: training refuses this data set until its errors are mended. {' and '.join(counted)}."
    if warnings:
        return f"Usable. {counted[1]} that a person should look at."
    return "Usable, and nothing to look at."
