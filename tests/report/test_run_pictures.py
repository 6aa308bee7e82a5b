"""The pictures in the page of a real run, by their pixels: sides, aspect, outlines on their own slice."""

from __future__ import annotations

import base64
import io
import json
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

from sagittal.report.evaluation import evaluate
from sagittal.volumes import Volume, read_labels, read_volume

PLANE = re.compile(
    r'<svg viewBox="0 0 ([\d.]+) ([\d.]+)" role="img"[^>]*>\s*<image[^>]*href="data:image/jpeg;base64,([^"]+)"'
    r'(.*?)</svg>\s*<span class="mark name"[^>]*>(axial|coronal|sagittal) (\d+)/(\d+)</span>',
    re.DOTALL,
)
OUTLINE = re.compile(r'<path class="line reference[^"]*"[^>]* d="([^"]+)"><title>([^<,]+)')
NAMES = ("axial", "coronal", "sagittal")


@dataclass(frozen=True)
class Shown:
    """A plane as it stands in the page: its size in mm, its grey values, its slice, and outlines as masks of pixels."""

    size_mm: tuple[float, float]
    grey: np.ndarray
    index: int
    slices: int
    inside: dict[str, np.ndarray]

    def centre(self, name: str) -> tuple[float, float]:
        """Where a class lies, across and down, as shares of the picture."""
        rows, columns = np.nonzero(self.inside[name])
        return columns.mean() / self.grey.shape[1], rows.mean() / self.grey.shape[0]


def shown(page: Path) -> dict[str, Shown]:
    """The planes with outlines of the only case of a report."""
    found = {}
    for width, height, jpeg, paths, name, index, slices in PLANE.findall(page.read_text(encoding="utf-8")):
        if name in found:
            continue  # The error maps come second.
        size = float(width), float(height)
        with Image.open(io.BytesIO(base64.b64decode(jpeg))) as picture:
            grey = np.asarray(picture.convert("L"), np.float64)
        inside = {label: drawn(path, size, grey.shape) for path, label in OUTLINE.findall(paths)}
        found[name] = Shown(size, grey, int(index) - 1, int(slices), inside)
    return found


def drawn(path: str, size_mm: tuple[float, float], shape: tuple[int, ...]) -> np.ndarray:
    """Fill the rings of an SVG path in mm; a ring within another is a hole."""
    scale = shape[1] / size_mm[0], shape[0] / size_mm[1]
    filled = np.zeros(shape, bool)
    for ring in re.findall(r"M([^MZ]*)", path):
        numbers = [float(number) for number in re.findall(r"-?\d+(?:\.\d+)?", ring)]
        points = [(x * scale[0], y * scale[1]) for x, y in zip(numbers[::2], numbers[1::2], strict=True)]
        picture = Image.new("1", (shape[1], shape[0]))
        ImageDraw.Draw(picture).polygon(points, fill=1)
        filled ^= np.asarray(picture, bool)
    return filled


def run_of(folder: Path, labels: Volume, scan: Volume, names: dict[str, int]) -> dict[str, Shown]:
    """Evaluate one case, its prediction being right, and return what the page shows."""
    for part in ("labelsTr", "predicted"):
        labels.write(folder / part / "case.nii.gz")
    scan.write(folder / "imagesTr" / "case_0000.nii.gz")
    declared = {"channel_names": {"0": "MR"}, "labels": {"background": 0, **names}}
    (folder / "dataset.json").write_text(json.dumps(declared))
    evaluate(folder / "predicted", folder, folder / "out", workers=1)
    found = shown(folder / "out" / "report.html")
    assert set(found) == set(NAMES)
    return found


def oblique(degrees: tuple[float, float], spacing: tuple[float, float, float], order: tuple[int, ...]) -> np.ndarray:
    """An affine whose index axes point towards -z, x and -y in the order given, turned about x and z."""
    about_x, about_z = np.radians(degrees)
    turn_x = [[1, 0, 0], [0, np.cos(about_x), -np.sin(about_x)], [0, np.sin(about_x), np.cos(about_x)]]
    turn_z = [[np.cos(about_z), -np.sin(about_z), 0], [np.sin(about_z), np.cos(about_z), 0], [0, 0, 1]]
    axes = np.array([[0, 0, -1], [1, 0, 0], [0, -1, 0]], np.float64)[list(order)]
    affine = np.eye(4)
    affine[:3, :3] = np.array(turn_z) @ np.array(turn_x) @ (axes * np.array(spacing)[list(order), None]).T
    return affine


@pytest.mark.parametrize("order", [(0, 1, 2), (1, 2, 0), (2, 0, 1)])
def test_an_oblique_anisotropic_scan_is_shown_upright_and_its_outlines_lie_on_it(
    tmp_path: Path, order: tuple[int, int, int]
) -> None:
    spacing = (4.0, 0.9, 1.6)
    affine = oblique((14.0, -11.0), spacing, order)
    shape = tuple((14, 52, 36)[axis] for axis in order)
    grid = np.stack(np.meshgrid(*(np.arange(length) for length in shape), indexing="ij"), -1)
    world = grid @ affine[:3, :3].T
    offsets = (world - world.reshape(-1, 3).mean(0)) @ np.linalg.inv(_turned(affine, order)).T
    x, y, z = np.moveaxis(offsets, -1, 0)
    labels = np.zeros(shape, np.uint8)
    labels[(np.abs(x) < 11) & (np.abs(y) < 13) & (np.abs(z) < 13)] = 1
    # On the patient's right, in front and above, each beside the body and through its middle.
    labels[(x >= 11) & (x < 17) & (np.abs(y) < 8) & (np.abs(z) < 9)] = 2
    labels[(y >= 13) & (y < 20) & (np.abs(x) < 8) & (np.abs(z) < 9)] = 3
    labels[(z >= 13) & (z < 22) & (np.abs(x) < 8) & (np.abs(y) < 8)] = 4
    names = {"body": 1, "right": 2, "front": 3, "head": 4}
    light = np.array([0, 255, 170, 110, 60], np.float32)[labels]
    planes = run_of(tmp_path, Volume(labels[None], affine), Volume(light[None], affine), names)
    for name, plane in planes.items():
        assert plane.grey.shape[1] / plane.grey.shape[0] == pytest.approx(plane.size_mm[0] / plane.size_mm[1], rel=0.02)
        for label, value in {"body": 255, "right": 170, "front": 110, "head": 60}.items():
            if label in plane.inside:
                assert np.median(plane.grey[plane.inside[label]]) == pytest.approx(value, abs=9), (name, label)
        assert np.median(plane.grey[~np.any(list(plane.inside.values()), axis=0)]) < 9
        body = plane.centre("body")
        if name != "sagittal":
            assert plane.centre("right")[0] < body[0] - 0.1
        else:
            assert plane.centre("front")[0] < body[0] - 0.1
        if name != "axial":
            assert plane.centre("head")[1] < body[1] - 0.1
        else:
            assert plane.centre("front")[1] < body[1] - 0.1
    # The planes are 4, 0.9 and 1.6 mm apart, from foot to head, left to right and back to front.
    assert [planes[name].slices for name in NAMES] == [14, 36, 52]


def _turned(affine: np.ndarray, order: tuple[int, int, int]) -> np.ndarray:
    """The rotation alone: what takes world offsets back to the patient's axes as they were before the turn."""
    upright = np.array([[0, 0, -1], [1, 0, 0], [0, -1, 0]], np.float64)[list(order)]
    steps = affine[:3, :3] / np.linalg.norm(affine[:3, :3], axis=0)
    return steps @ upright


def test_the_planes_of_a_real_scan_are_its_own_slices_turned_for_the_reader(shared_data: Path, tmp_path: Path) -> None:
    source = shared_data / "hippocampus"
    path = sorted((source / "labelsTr").iterdir())[0]
    labels, grid = read_labels(path)
    scan = source / "imagesTr" / path.name.replace(".nii.gz", "_0000.nii.gz")
    planes = run_of(
        tmp_path, Volume.on(grid, labels.astype(np.uint8)), read_volume(scan), {"Anterior": 1, "Posterior": 2}
    )
    upright = Volume.on(grid, labels).reoriented().array[0]
    light = read_volume(scan).reoriented().array[0]
    for axis, name in enumerate(NAMES):
        plane = planes[name]
        alike = [_likeness(np.take(light, place, axis)[::-1, ::-1], plane) for place in range(light.shape[axis])]
        assert int(np.argmax(alike)) == plane.index and max(alike) > 0.98
        mirrored = [_likeness(np.take(light, plane.index, axis)[turn], plane) for turn in _OTHER_TURNS]
        assert max(mirrored) < 0.9 * max(alike)
        for label, value in (("Anterior", 1), ("Posterior", 2)):
            section = np.take(upright, plane.index, axis)[::-1, ::-1] == value
            assert section.any() == (label in plane.inside)
            if label in plane.inside:
                # Corners are cut, so that an outline holds a little less than its voxels.
                mm2 = plane.inside[label].mean() * plane.size_mm[0] * plane.size_mm[1]
                assert mm2 == pytest.approx(section.sum(), rel=0.12)


_OTHER_TURNS = (np.s_[::-1, :], np.s_[:, ::-1], np.s_[:, :])


def _likeness(section: np.ndarray, plane: Shown) -> float:
    """The highest correlation of a plane with a part of a section as large as it, in whole voxels of 1 mm."""
    columns, rows = round(plane.size_mm[0]), round(plane.size_mm[1])
    picture = Image.fromarray(plane.grey.astype(np.uint8)).resize((columns, rows), Image.Resampling.BOX)
    seen = np.asarray(picture, np.float64).ravel()
    places = np.ndindex(section.shape[0] - rows + 1, section.shape[1] - columns + 1)
    parts = (section[top : top + rows, left : left + columns].ravel() for top, left in places)
    low, high = np.percentile(section, (1, 99))
    return max(float(np.corrcoef(seen, np.clip(part, low, high))[0, 1]) for part in parts)
