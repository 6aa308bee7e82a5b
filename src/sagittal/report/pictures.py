"""A case to look at: three orthogonal planes with reference and prediction outlined, and where the two disagree.

Arrays come in RAS order (D to the head, H to the front, W to the right), so a plane is turned for the screen in one
place: `on_screen`. The scan is a small JPEG; outlines and areas are vector paths in millimetres over it, sharp at any
zoom.
"""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from contourpy import contour_generator
from jaxtyping import Bool, Float, Integer, Shaped
from PIL import Image

from sagittal.evaluation import ClassSet
from sagittal.evaluation.masks import check_spacing
from sagittal.plan.base import Triple, TripleMm
from sagittal.report.colours import PREDICTION_COLOUR, class_colour
from sagittal.volumes.crop import Box, bounding_box

PlaneName = Literal["axial", "coronal", "sagittal", "across D", "across H", "across W"]
"""The last three where nothing is known of the patient's sides."""
Side = Literal["left", "right", "top", "bottom"]
ErrorKind = Literal["agreement", "missed", "extra", "confused"]
"""A pixel of an error map: both have the same class, only the reference has one, only the prediction, two differ."""
Window = tuple[float, float]
"""Intensities shown as black and as white."""

CT_SOFT_TISSUE: Window = (-160.0, 240.0)
"""The usual abdominal window in HU: percentiles of a CT are ruled by air and bone."""

LONG_SIDE_PX = 440
MAX_JPEG_BYTES = 44_000
"""Base64 adds a third: a picture stays below 60 kB in the page."""


@dataclass(frozen=True)
class PlaneLayout:
    """Which axes of a RAS volume a plane shows, and which sides of the patient lie at the edges of the picture."""

    name: PlaneName
    across: int
    """Axis that the plane cuts."""
    rows: int
    columns: int
    sides: dict[Side, str]


# Radiological convention: the reader faces the patient, or looks from the feet, so the patient's right is on the left.
PLANES = (
    PlaneLayout("axial", across=0, rows=1, columns=2, sides={"left": "R", "right": "L", "top": "A", "bottom": "P"}),
    PlaneLayout("coronal", across=1, rows=0, columns=2, sides={"left": "R", "right": "L", "top": "S", "bottom": "I"}),
    PlaneLayout("sagittal", across=2, rows=0, columns=1, sides={"left": "A", "right": "P", "top": "S", "bottom": "I"}),
)


UNKNOWN_SIDES: dict[Side, str] = {"left": "?", "right": "?", "top": "?", "bottom": "?"}
"""Marks of a plane of which nothing is known."""


@dataclass(frozen=True)
class Outline:
    """The border of one class in a plane, as the path of an SVG in mm from the picture's top left corner."""

    class_name: str
    role: Literal["reference", "prediction"]
    colour: str
    path: str


@dataclass(frozen=True)
class ErrorArea:
    """Everything of one kind in a plane's error map, as the path of an SVG like that of an outline."""

    kind: ErrorKind
    path: str
    area_mm2: float


@dataclass(frozen=True)
class Plane:
    """One picture: its size in mm, the scan under it (None: plain grey), the outlines, and where one is."""

    layout: PlaneLayout
    index: int
    """Position along the axis that is cut, in the volume in RAS order."""
    slices: int
    width_mm: float
    height_mm: float
    image: str | None
    """Data URI."""
    outlines: tuple[Outline, ...]
    scale_bar_mm: float
    alt: str
    errors: tuple[ErrorArea, ...] = ()
    """Where reference and prediction agree and differ, in the planes of `CaseView.error_planes`."""


@dataclass(frozen=True)
class CaseView:
    """Three planes of one case, and three error maps where they were asked for."""

    case: str
    planes: tuple[Plane, ...]
    error_planes: tuple[Plane, ...] = ()
    """The planes in which most is wrong, with `Plane.errors` in place of outlines."""


def view_case(
    case: str,
    reference: Integer[np.ndarray, "D H W"],
    prediction: Integer[np.ndarray, "D H W"],
    spacing_mm: Sequence[float],
    classes: ClassSet,
    *,
    image: Float[np.ndarray, "D H W"] | None = None,
    window: Window | None = None,
    errors: bool = True,
) -> CaseView:
    """Draw the axial, coronal and sagittal plane in which the reference (or, without one, the prediction) is largest.

    Args:
        case: name for the alt texts.
        reference: label map in RAS order: D to the head, H to the front, W to the right.
        prediction: label map on the same grid.
        spacing_mm: voxel sizes in D, H, W order; pictures show millimetres in equal lengths along both of their sides.
        classes: what to outline.
        image: one channel of the scan on the same grid; without it outlines lie over grey.
        window: intensities for black and white; the 1st and 99th percentile of what is shown where not given.
        errors: whether to draw error maps too, in the planes in which most is wrong.
    """
    spacing = check_spacing(spacing_mm)
    values = sorted(classes.foreground_values)
    in_reference, in_prediction = np.isin(reference, values), np.isin(prediction, values)
    shown = in_reference if in_reference.any() else in_prediction
    field = _field_of_view(in_reference | in_prediction, spacing)
    limits = None if image is None else window or intensity_window(image[field.slices])
    scene = _Scene(case, reference, prediction, spacing, classes, field, image, limits)
    planes = tuple(_draw_outlines(scene, layout, _largest_section(shown, layout.across)) for layout in PLANES)
    if not errors:
        return CaseView(case, planes)
    wrong = wrong_shares(reference, prediction, classes)
    places = [(layout, int(np.argmax(wrong[layout.across]))) for layout in PLANES]
    if not any(share.any() for share in wrong):
        places = [(plane.layout, plane.index) for plane in planes]
    return CaseView(case, planes, tuple(_draw_errors(scene, layout, index) for layout, index in places))


@dataclass(frozen=True, eq=False)
class _Scene:
    """What all planes of a case share."""

    case: str
    reference: Integer[np.ndarray, "D H W"]
    prediction: Integer[np.ndarray, "D H W"]
    spacing_mm: TripleMm
    classes: ClassSet
    field: Box
    image: Float[np.ndarray, "D H W"] | None
    window: Window | None

    def cuts(self, layout: PlaneLayout, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the plane of both label maps, turned for the screen."""
        return _cut(self.reference, layout, index, self.field), _cut(self.prediction, layout, index, self.field)

    def plane(self, layout: PlaneLayout, index: int) -> Plane:
        """Return the bare plane: the scan without anything over it."""
        rows, columns = (self.field.shape[axis] for axis in (layout.rows, layout.columns))
        size = self.spacing_mm[layout.rows], self.spacing_mm[layout.columns]
        scan = None
        if self.image is not None and self.window is not None:
            scan = encode(_cut(self.image, layout, index, self.field), size, self.window)
        return Plane(
            layout=layout,
            index=index,
            slices=self.reference.shape[layout.across],
            width_mm=columns * size[1],
            height_mm=rows * size[0],
            image=scan,
            outlines=(),
            scale_bar_mm=round_length(columns * size[1] / 4),
            alt="",
        )


def _draw_outlines(scene: _Scene, layout: PlaneLayout, index: int) -> Plane:
    size = scene.spacing_mm[layout.rows], scene.spacing_mm[layout.columns]
    plane, outlines = scene.plane(layout, index), _outlines(*scene.cuts(layout, index), size, scene.classes)
    return replace(plane, outlines=outlines, alt=alt_text(scene.case, layout, index, plane.slices, outlines))


def _draw_errors(scene: _Scene, layout: PlaneLayout, index: int) -> Plane:
    size = scene.spacing_mm[layout.rows], scene.spacing_mm[layout.columns]
    plane, errors = scene.plane(layout, index), error_areas(*scene.cuts(layout, index), size, scene.classes)
    return replace(plane, errors=errors, alt=error_text(scene.case, layout, index, plane.slices, errors))


def wrong_shares(
    reference: Integer[np.ndarray, "D H W"], prediction: Integer[np.ndarray, "D H W"], classes: ClassSet
) -> tuple[Float[np.ndarray, " slices"], ...]:
    """Return for every slice along D, H and W how much of the case's error it holds.

    Of each class the wrong voxels in a slice are counted as a share of all voxels that either mask has of it, and the
    shares are added: a small lesion that was missed weighs more than the rim of a large organ.
    """
    kept = True if classes.ignore_value is None else reference != classes.ignore_value
    totals = tuple(np.zeros(length) for length in reference.shape)
    for label in classes.labels:
        mine, its = np.isin(reference, label.values) & kept, np.isin(prediction, label.values) & kept
        wrong, size = mine ^ its, np.count_nonzero(mine | its)
        for axis, total in enumerate(totals):
            if size:
                total += wrong.sum(axis=tuple(other for other in range(3) if other != axis)) / size
    return totals


def _cut(
    array: Shaped[np.ndarray, "D H W"], layout: PlaneLayout, index: int, field: Box
) -> Shaped[np.ndarray, "rows columns"]:
    chosen: list[slice | int] = list(field.slices)
    chosen[layout.across] = index
    return on_screen(array[tuple(chosen)])


def on_screen(plane: Shaped[np.ndarray, "rows columns"]) -> Shaped[np.ndarray, "rows columns"]:
    """Return a plane of a volume in RAS order turned for the screen."""
    # Screens count down and to the right. Head and front belong to the top, so rows run backwards in every plane; the
    # patient's right (axial, coronal) and front (sagittal) belong to the left, so columns do too.
    return plane[::-1, ::-1]


def _largest_section(mask: Bool[np.ndarray, "D H W"], axis: int) -> int:
    areas = mask.sum(axis=tuple(other for other in range(3) if other != axis))
    if not areas.any():
        return int(mask.shape[axis] // 2)
    # The middle of all largest sections: a box-shaped structure is cut through its centre, not at its face.
    largest = np.flatnonzero(areas == areas.max())
    return int(largest[len(largest) // 2])


def _field_of_view(mask: Bool[np.ndarray, "D H W"], spacing_mm: TripleMm) -> Box:
    """Return the structures' box with room around it: a lesion in a whole head would be a dot."""
    box = bounding_box(mask)
    if box is None:
        return Box.whole((mask.shape[0], mask.shape[1], mask.shape[2]))
    extent_mm = max(length * step for length, step in zip(box.shape, spacing_mm, strict=True))
    margin_mm = max(20.0, 0.3 * extent_mm)
    start, stop = [], []
    for axis in range(3):
        margin = math.ceil(margin_mm / spacing_mm[axis])
        start.append(max(0, box.start[axis] - margin))
        stop.append(min(mask.shape[axis], box.stop[axis] + margin))
    return Box(_triple(start), _triple(stop))


def _triple(values: Sequence[int]) -> Triple:
    return values[0], values[1], values[2]


def intensity_window(image: Float[np.ndarray, ...]) -> Window:
    """Return the 1st and 99th percentile of the finite values."""
    finite = image[np.isfinite(image)]
    if not finite.size:
        return 0.0, 1.0
    low, high = (float(value) for value in np.percentile(finite, (1.0, 99.0)))
    return (low, high) if high > low else (low, low + 1.0)


def encode(plane: Float[np.ndarray, "rows columns"], size_mm: tuple[float, float], window: Window) -> str:
    """Return a plane, turned for the screen, as the data URI of a JPEG whose sides are in proportion to millimetres."""
    low, high = window
    grey = np.nan_to_num((plane.astype(np.float64) - low) / (high - low), nan=0.0, posinf=1.0, neginf=0.0)
    picture = Image.fromarray((np.clip(grey, 0.0, 1.0) * 255).round().astype(np.uint8))
    height_mm, width_mm = (length * step for length, step in zip(plane.shape, size_mm, strict=True))
    scale = LONG_SIDE_PX / max(height_mm, width_mm)
    shape = max(1, round(width_mm * scale)), max(1, round(height_mm * scale))
    picture = picture.resize(shape, Image.Resampling.BICUBIC)
    for quality in (85, 70, 50, 30):
        content = io.BytesIO()
        picture.save(content, "JPEG", quality=quality, optimize=True)
        if content.tell() <= MAX_JPEG_BYTES:
            break
    return "data:image/jpeg;base64," + base64.b64encode(content.getvalue()).decode()


def _outlines(
    reference: Integer[np.ndarray, "rows columns"],
    prediction: Integer[np.ndarray, "rows columns"],
    size_mm: tuple[float, float],
    classes: ClassSet,
) -> tuple[Outline, ...]:
    kept = np.ones(reference.shape, bool) if classes.ignore_value is None else reference != classes.ignore_value
    found = []
    # References first: dashes of the prediction lie over them, so that both can be seen where they agree.
    roles: tuple[tuple[Literal["reference", "prediction"], np.ndarray], ...] = (
        ("reference", reference),
        ("prediction", prediction),
    )
    for role, labels in roles:
        for number, label in enumerate(classes.labels):
            path = outline_path(np.isin(labels, label.values) & kept, size_mm)
            only = len(classes.labels) == 1 and role == "prediction"
            if path:
                found.append(Outline(label.name, role, PREDICTION_COLOUR if only else class_colour(number), path))
    return tuple(found)


def error_areas(
    reference: Integer[np.ndarray, "rows columns"],
    prediction: Integer[np.ndarray, "rows columns"],
    size_mm: tuple[float, float],
    classes: ClassSet,
) -> tuple[ErrorArea, ...]:
    """Return where two planes of label maps agree and how they differ, all classes together; empty kinds are left out.

    A pixel is missed where only the reference has a class, extra where only the prediction has one, and confused where
    both have one but not the same (of regions: not the same ones). Ignored pixels are of no kind.

    Args:
        reference: label values, turned for the screen.
        prediction: the same of the prediction.
        size_mm: height and width of a pixel.
        classes: what counts as foreground.
    """
    kept = np.ones(reference.shape, bool) if classes.ignore_value is None else reference != classes.ignore_value
    in_reference, in_prediction, differs = (np.zeros(reference.shape, bool) for _ in range(3))
    for label in classes.labels:
        mine, its = np.isin(reference, label.values) & kept, np.isin(prediction, label.values) & kept
        in_reference, in_prediction, differs = in_reference | mine, in_prediction | its, differs | (mine != its)
    masks: dict[ErrorKind, np.ndarray] = {
        "agreement": in_reference & in_prediction & ~differs,
        "missed": in_reference & ~in_prediction,
        "extra": in_prediction & ~in_reference,
        "confused": in_reference & in_prediction & differs,
    }
    pixel_mm2 = size_mm[0] * size_mm[1]
    return tuple(
        ErrorArea(kind, outline_path(mask, size_mm), float(mask.sum()) * pixel_mm2)
        for kind, mask in masks.items()
        if mask.any()
    )


def outline_path(mask: Bool[np.ndarray, "rows columns"], size_mm: tuple[float, float]) -> str:
    """Return the border of a mask as an SVG path in mm (x to the right, y down), empty where the mask is.

    The border runs half-way between the centres of voxels inside and outside. Corners are cut, as in any contour at
    one half; no voxel's centre ever changes sides.
    """
    if not mask.any():
        return ""
    # One voxel of nothing around it closes the border of what touches the picture's edge.
    lines = contour_generator(z=np.pad(mask, 1).astype(np.float64)).lines(0.5)
    parts = []
    for line in lines:
        points = [f"{(x - 0.5) * size_mm[1]:.2f} {(y - 0.5) * size_mm[0]:.2f}" for x, y in np.asarray(line)[:-1]]
        parts.append("M" + "L".join(points) + "Z")
    return "".join(parts)


def round_length(length: float) -> float:
    """Return the largest of 1, 2 and 5 times a power of ten that is not longer than `length`."""
    power = 10.0 ** math.floor(math.log10(length))
    return max(step * power for step in (1.0, 2.0, 5.0) if step * power <= length)


def alt_text(case: str, layout: PlaneLayout, index: int, slices: int, outlines: Sequence[Outline]) -> str:
    """Return in words what a picture shows, for those who can't see it."""
    drawn = {role: [line.class_name for line in outlines if line.role == role] for role in ("reference", "prediction")}
    told = "; ".join(f"{role}: {', '.join(names) if names else 'nothing here'}" for role, names in drawn.items())
    left, right = layout.sides["left"], layout.sides["right"]
    sides = "sides not known" if layout.sides == UNKNOWN_SIDES else f"{left} on the left and {right} on the right"
    return f"{case}, {layout.name} plane {index + 1} of {slices}, {sides}. {told}."


def error_text(case: str, layout: PlaneLayout, index: int, slices: int, errors: Sequence[ErrorArea]) -> str:
    """Return an error map in words: which share of what either mask has agrees, and how much of what is wrong."""
    where = f"{case}, error map of the {layout.name} plane {index + 1} of {slices}"
    if not errors:
        return f"{where}: neither the reference nor the prediction has anything here."
    areas = {area.kind: area.area_mm2 for area in errors}
    share = 100.0 * areas.get("agreement", 0.0) / sum(areas.values())
    wrong: tuple[tuple[ErrorKind, str], ...] = (
        ("missed", "missed"),
        ("extra", "marked in excess"),
        ("confused", "given to another class"),
    )
    told = [f"{_area(areas[kind])} {words}" for kind, words in wrong if kind in areas]
    return f"{where}: {share:.0f} % of the area agrees; {', '.join(told) if told else 'nothing is wrong'}."


def _area(mm2: float) -> str:
    return f"{mm2:.2g} mm²" if mm2 < 10 else f"{mm2:.0f} mm²" if mm2 < 1000 else f"{mm2 / 100:.0f} cm²"
