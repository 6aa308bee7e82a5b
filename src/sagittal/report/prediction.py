"""One picture of a prediction: three planes through its largest structure, outlined, with a legend.

A look at it tells whether a result is worth opening. Planes are turned as radiologists see them and stretched to
millimetres; the scan is grey, outlines have the colours of the reports, and every colour is named.
"""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Bool, Float, Integer, Shaped
from PIL import Image, ImageDraw, ImageFont

from sagittal.plan.dataset import DatasetSpec, Label
from sagittal.report.colours import CLASS_COLOURS, PREDICTION_COLOUR, class_colour
from sagittal.report.cuts import largest_plane
from sagittal.report.pictures import (
    CT_SOFT_TISSUE,
    PLANES,
    UNKNOWN_SIDES,
    PlaneLayout,
    PlaneName,
    Window,
    intensity_window,
    on_screen,
    outline_path,
    round_length,
)
from sagittal.volumes import Volume
from sagittal.volumes.geometry import Reorientation, reorientation_to_ras

PANEL_PX = 400
"""Length of the longest side of any plane; all three have the same scale."""
_MARGIN_PX = 14
_TEXT_PX = 15
_LINE_PX = 20
_LINE_WIDTH = 2
_MOST_IN_LEGEND = 24
_PAPER, _INK, _FAINT, _EMPTY = "#101214", "#f2f2f2", "#a8adb3", "#2a2e33"
_POINT = re.compile(r"(-?\d+(?:\.\d+)?) (-?\d+(?:\.\d+)?)")


@dataclass(frozen=True, eq=False)
class _Panel:
    """One plane, turned for the screen."""

    layout: PlaneLayout
    index: int
    slices: int
    size_mm: tuple[float, float]
    grey: Float[np.ndarray, "rows columns"] | None
    masks: dict[int, Bool[np.ndarray, "rows columns"]]
    """By number of the label; those that the plane cuts."""

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns."""
        mask = next(iter(self.masks.values()), self.grey)
        assert mask is not None
        return mask.shape[0], mask.shape[1]


def preview_png(
    case: str, labels: Volume, scan: Volume | None, spec: DatasetSpec, volumes_ml: Mapping[str, float]
) -> bytes:
    """Return a picture of a label map as PNG.

    Args:
        case: its name, for the heading.
        labels: one channel, with the original values of `label_map`.
        scan: on the same grid; its first channel is shown. None: outlines lie over grey.
        spec: the classes or regions to outline.
        volumes_ml: of each of them, for the legend; the largest decides where the planes are.
    """
    order = reorientation_to_ras(labels.affine)
    turned = order.apply(labels.array[0])
    affine = order.affine(labels.affine, labels.geometry.shape)
    spacing = tuple(float(np.linalg.norm(affine[:3, axis])) for axis in range(3))
    largest = max(spec.labels, key=lambda label: volumes_ml.get(label.name, 0.0))
    centre = _planes_through(turned, _values_of(largest, spec))
    window = _window(scan, spec)
    panels = [_panel(layout, centre[layout.across], turned, scan, order, spec, spacing) for layout in _layouts(labels)]
    return _composed(case, panels, spec, volumes_ml, window)


def _layouts(labels: Volume) -> tuple[PlaneLayout, ...]:
    if labels.geometry.has_world:
        return PLANES
    names: tuple[PlaneName, ...] = ("across D", "across H", "across W")
    return tuple(replace(layout, name=name, sides=UNKNOWN_SIDES) for layout, name in zip(PLANES, names, strict=True))


def _values_of(label: Label, spec: DatasetSpec) -> list[int]:
    originals = dict(spec.label_map)
    return [originals.get(value, value) for value in label.values]


def _planes_through(labels: Integer[np.ndarray, "D H W"], values: Sequence[int]) -> tuple[int, int, int]:
    """Return along each axis the plane in which a structure is largest, the middle one where there is none."""
    counts = [np.zeros(length, np.int64) for length in labels.shape]
    for depth, plane in enumerate(labels):
        mask = np.isin(plane, values)
        counts[0][depth] = mask.sum()
        counts[1] += mask.sum(axis=1)
        counts[2] += mask.sum(axis=0)
    d, h, w = (largest_plane(count) for count in counts)
    return d, h, w


def _window(scan: Volume | None, spec: DatasetSpec) -> Window:
    if scan is None:
        return 0.0, 1.0
    if spec.channel_names[0].upper() == "CT":
        return CT_SOFT_TISSUE
    step = max(1, round((scan.array[0].size / 1e6) ** (1 / 3)))
    return intensity_window(scan.array[0, ::step, ::step, ::step].astype(np.float32))


def _panel(
    layout: PlaneLayout,
    index: int,
    labels: Integer[np.ndarray, "D H W"],
    scan: Volume | None,
    order: Reorientation,
    spec: DatasetSpec,
    spacing: Sequence[float],
) -> _Panel:
    def cut(array: Shaped[np.ndarray, "D H W"]) -> Shaped[np.ndarray, "rows columns"]:
        return on_screen(array.take(index, axis=layout.across))

    shown = cut(labels)
    masks = {number: np.isin(shown, _values_of(label, spec)) for number, label in enumerate(spec.labels)}
    return _Panel(
        layout=layout,
        index=index,
        slices=labels.shape[layout.across],
        size_mm=(spacing[layout.rows], spacing[layout.columns]),
        grey=None if scan is None else cut(order.apply(scan.array[0])).astype(np.float32),
        masks={number: mask for number, mask in masks.items() if mask.any()} or {-1: np.zeros(shown.shape, bool)},
    )


def _composed(
    case: str, panels: Sequence[_Panel], spec: DatasetSpec, volumes_ml: Mapping[str, float], window: Window
) -> bytes:
    longest = max(length * step for panel in panels for length, step in zip(panel.shape, panel.size_mm, strict=True))
    scale = PANEL_PX / longest
    pictures = [_drawn(panel, scale, window, len(spec.labels)) for panel in panels]
    legend = _legend(panels, spec, volumes_ml)
    title = f"{case}: prediction, for research use"
    font = ImageFont.load_default(_TEXT_PX)
    columns = 1 + (len(legend) > _MOST_IN_LEGEND // 2)
    rows = -(-len(legend) // columns)
    width = sum(picture.width for picture in pictures) + _MARGIN_PX * (len(pictures) + 1)
    width = max(width, 420 * columns, round(font.getlength(title)) + 2 * _MARGIN_PX)
    top = 2 * _LINE_PX + 2 * _MARGIN_PX
    below = top + max(picture.height for picture in pictures) + _MARGIN_PX
    sheet = Image.new("RGB", (width, below + _LINE_PX * rows + _MARGIN_PX), _PAPER)
    draw = ImageDraw.Draw(sheet)
    draw.text((_MARGIN_PX, _MARGIN_PX), title, fill=_INK, font=font)
    left = _MARGIN_PX
    for panel, picture in zip(panels, pictures, strict=True):
        heading = f"{panel.layout.name} {panel.index + 1} of {panel.slices}"
        draw.text((left, top - _LINE_PX - 2), heading, fill=_FAINT, font=font)
        sheet.paste(picture, (left, top))
        left += picture.width + _MARGIN_PX
    for place, (colour, text) in enumerate(legend):
        x = _MARGIN_PX + (place // rows) * (width // columns)
        y = below + (place % rows) * _LINE_PX
        if colour is not None:
            draw.rectangle((x, y + 4, x + 12, y + 16), fill=colour)
        draw.text((x + 20, y), text, fill=_INK, font=font)
    content = io.BytesIO()
    sheet.save(content, "PNG")
    return content.getvalue()


def _drawn(panel: _Panel, scale: float, window: Window, classes: int) -> Image.Image:
    """Return a plane with its outlines, the patient's sides and a scale bar."""
    height_mm, width_mm = (length * step for length, step in zip(panel.shape, panel.size_mm, strict=True))
    size = max(1, round(width_mm * scale)), max(1, round(height_mm * scale))
    if panel.grey is None:
        picture = Image.new("RGB", size, _EMPTY)
    else:
        low, high = window
        grey = np.nan_to_num((panel.grey - low) / (high - low), nan=0.0, posinf=1.0, neginf=0.0)
        levels = (np.clip(grey, 0.0, 1.0) * 255).round().astype(np.uint8)
        picture = Image.fromarray(levels).resize(size, Image.Resampling.BICUBIC).convert("RGB")
    draw = ImageDraw.Draw(picture)
    for number, mask in panel.masks.items():
        colour = PREDICTION_COLOUR if classes == 1 else class_colour(number)
        for ring in outline_path(mask, panel.size_mm).split("M")[1:]:
            points = [(float(x) * scale, float(y) * scale) for x, y in _POINT.findall(ring)]
            draw.line([*points, points[0]], fill=colour, width=_LINE_WIDTH, joint="curve")
    if classes > len(CLASS_COLOURS):
        for number, mask in panel.masks.items():
            if mask.any():
                row, column = _inside(mask)
                place = column * panel.size_mm[1] * scale, row * panel.size_mm[0] * scale
                _write(draw, place, str(number + 1), "mm")
    _mark(draw, picture.size, panel, scale)
    return picture


def _mark(draw: ImageDraw.ImageDraw, size: tuple[int, int], panel: _Panel, scale: float) -> None:
    width, height = size
    sides = panel.layout.sides
    _write(draw, (4, height // 2), sides["left"], "lm")
    _write(draw, (width - 4, height // 2), sides["right"], "rm")
    _write(draw, (width // 2, 3), sides["top"], "ma")
    _write(draw, (width // 2, height - 3), sides["bottom"], "md")
    length_mm = round_length(width / scale / 4)
    bar = [(6, height - 6), (6 + length_mm * scale, height - 6)]
    draw.line(bar, fill=_PAPER, width=4)
    draw.line(bar, fill=_INK, width=2)
    _write(draw, (6, height - 9), f"{length_mm:g} mm", "ld")


def _write(draw: ImageDraw.ImageDraw, place: tuple[float | int, float | int], text: str, anchor: str) -> None:
    """Write with a dark rim, which can be read on bone as well as on air."""
    font = ImageFont.load_default(_TEXT_PX)
    draw.text(place, text, fill=_INK, font=font, anchor=anchor, stroke_width=2, stroke_fill=_PAPER)


def _inside(mask: Bool[np.ndarray, "rows columns"]) -> tuple[float, float]:
    """Return the row and column of the voxel of a structure that is closest to its centre."""
    voxels = np.argwhere(mask)
    row, column = voxels[np.square(voxels - voxels.mean(axis=0)).sum(axis=1).argmin()]
    return float(row) + 0.5, float(column) + 0.5


def _legend(
    panels: Sequence[_Panel], spec: DatasetSpec, volumes_ml: Mapping[str, float]
) -> list[tuple[str | None, str]]:
    """Return a colour and a text for each class, the largest first; those that no plane cuts without a colour."""
    shown = {number for panel in panels for number in panel.masks}
    found = [number for number, label in enumerate(spec.labels) if volumes_ml.get(label.name, 0.0) > 0]
    found.sort(key=lambda number: (number not in shown, -volumes_ml[spec.labels[number].name]))
    rows: list[tuple[str | None, str]] = []
    for number in found[:_MOST_IN_LEGEND]:
        name = spec.labels[number].name
        colour = PREDICTION_COLOUR if len(spec.labels) == 1 else class_colour(number)
        where = "" if number in shown else ", not in these planes"
        # Colours come again after the eighth class; its number tells them apart.
        numbered = f"{number + 1} {name}" if len(spec.labels) > len(CLASS_COLOURS) else name
        rows.append((colour if number in shown else None, f"{numbered}, {volumes_ml[name]:.4g} mL{where}"))
    if len(found) > _MOST_IN_LEGEND:
        rows.append((None, f"and {len(found) - _MOST_IN_LEGEND} more"))
    return rows or [(None, "no voxel of any class was found")]
