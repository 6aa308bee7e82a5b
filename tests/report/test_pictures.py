from __future__ import annotations

import base64
import io
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis.extra import numpy as hnp
from PIL import Image

from sagittal.evaluation import ClassSet
from sagittal.report.colours import PREDICTION_COLOUR, class_colour
from sagittal.report.pictures import CT_SOFT_TISSUE, CaseView, Plane, outline_path, view_case

SHAPE = (10, 20, 30)
SPACING = (4.0, 1.0, 0.5)
ONE = ClassSet.of_mapping({"organ": 1})


def view(labels: np.ndarray, prediction: np.ndarray | None = None, **options: object) -> CaseView:
    classes = options.pop("classes", ONE)
    predicted = labels if prediction is None else prediction
    return view_case("case_1", labels, predicted, SPACING, classes, **options)  # type: ignore[arg-type]


def plane(found: CaseView, name: str) -> Plane:
    return next(item for item in found.planes if item.layout.name == name)


def pixels(uri: str | None) -> np.ndarray:
    assert uri is not None
    kind, content = uri.split(",", 1)
    assert kind == "data:image/jpeg;base64"
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(content)))).astype(float)


def points(path: str) -> np.ndarray:
    return np.array([[float(n) for n in pair.split()] for pair in re.findall(r"[-\d.]+ [-\d.]+", path)])


def box(path: str) -> list[float]:
    """Left, top, right and bottom in mm."""
    found = points(path)
    return [*found.min(axis=0).tolist(), *found.max(axis=0).tolist()]


def everywhere() -> np.ndarray:
    return np.ones(SHAPE, np.uint8)


class TestOrientation:
    """A bright half of the patient must appear where a radiologist looks for it."""

    # axis and half of the RAS volume that is bright -> plane, and the half of the picture that must be bright
    @pytest.mark.parametrize(
        ("axis", "high", "name", "side"),
        [
            (2, False, "axial", "right"),  # the patient's left
            (2, True, "axial", "left"),
            (1, True, "axial", "top"),  # front
            (2, False, "coronal", "right"),
            (0, True, "coronal", "top"),  # head
            (0, False, "coronal", "bottom"),
            (0, True, "sagittal", "top"),
            (1, True, "sagittal", "left"),  # the nose
            (1, False, "sagittal", "right"),
        ],
    )
    def test_halves(self, axis: int, high: bool, name: str, side: str) -> None:
        image = np.zeros(SHAPE, np.float32)
        half = [slice(None)] * 3
        half[axis] = slice(SHAPE[axis] // 2, None) if high else slice(None, SHAPE[axis] // 2)
        image[tuple(half)] = 100.0
        picture = pixels(plane(view(everywhere(), image=image), name).image)
        rows, columns = picture.shape
        means = {
            "top": picture[: rows // 3].mean(),
            "bottom": picture[-rows // 3 :].mean(),
            "left": picture[:, : columns // 3].mean(),
            "right": picture[:, -columns // 3 :].mean(),
        }
        assert means[side] > 230
        opposite = {"top": "bottom", "bottom": "top", "left": "right", "right": "left"}[side]
        assert means[opposite] < 25

    def test_letters_at_the_edges(self) -> None:
        sides = {item.layout.name: item.layout.sides for item in view(everywhere()).planes}
        assert sides["axial"] == {"left": "R", "right": "L", "top": "A", "bottom": "P"}
        assert sides["coronal"] == {"left": "R", "right": "L", "top": "S", "bottom": "I"}
        assert sides["sagittal"] == {"left": "A", "right": "P", "top": "S", "bottom": "I"}


class TestOutlines:
    labels = np.zeros(SHAPE, np.uint8)
    labels[6:8, 12:17, 3:9] = 1

    def test_outline_is_where_the_structure_is_in_mm_after_the_turn(self) -> None:
        (reference, _) = plane(view(self.labels), "axial").outlines
        # Columns run from w = 29 at the left edge to w = 0: voxels 3..8 begin (30 - 9) voxels of 0.5 mm from the left.
        assert box(reference.path) == pytest.approx([21 * 0.5, 3 * 1.0, 27 * 0.5, 8 * 1.0])

    @pytest.mark.parametrize(("name", "index"), [("axial", 7), ("coronal", 14), ("sagittal", 6)])
    def test_plane_runs_through_the_middle_of_the_structure(self, name: str, index: int) -> None:
        found = plane(view(self.labels), name)
        assert found.index == index
        assert len(found.outlines) == 2

    def test_plane_is_the_one_where_the_reference_is_largest_not_the_prediction(self) -> None:
        labels, prediction = np.zeros(SHAPE, np.uint8), np.zeros(SHAPE, np.uint8)
        labels[2, 5:7, 5:7] = labels[3, 5:9, 5:9] = 1
        prediction[8, :, :] = 1
        found = plane(view(labels, prediction), "axial")
        assert found.index == 3
        assert [line.role for line in found.outlines] == ["reference"]
        assert "prediction: nothing here" in found.alt

    def test_without_a_reference_the_prediction_is_shown(self) -> None:
        prediction = np.zeros(SHAPE, np.uint8)
        prediction[8, 2:4, 2:4] = 1
        assert plane(view(np.zeros(SHAPE, np.uint8), prediction), "axial").index == 8

    def test_two_empty_maps_show_the_middle(self) -> None:
        found = view(np.zeros(SHAPE, np.uint8))
        assert [item.index for item in found.planes] == [5, 10, 15]
        assert not any(item.outlines for item in found.planes)

    def test_one_class_has_a_colour_per_role_and_several_have_one_each(self) -> None:
        labels = self.labels.copy()
        labels[6:8, 12:17, 20:25] = 2
        (single,) = {line.colour for line in plane(view(labels), "axial").outlines if line.role == "prediction"}
        assert single == PREDICTION_COLOUR
        both = plane(view(labels, classes=ClassSet.of_mapping({"a": 1, "b": 2})), "axial").outlines
        assert {(line.class_name, line.colour) for line in both} == {("a", class_colour(0)), ("b", class_colour(1))}

    def test_ignored_voxels_are_not_outlined(self) -> None:
        labels = self.labels.copy()
        labels[:, 14:] = 5
        prediction = np.where(labels == 5, 1, labels).astype(np.uint8)
        classes = ClassSet.of_mapping({"organ": 1, "ignore": 5})
        reference, predicted = plane(view(labels, prediction, classes=classes), "axial").outlines
        assert box(predicted.path) == box(reference.path)

    @settings(max_examples=40, deadline=None, derandomize=True)
    @given(hnp.arrays(np.bool_, (4, 6)))
    def test_a_voxel_is_inside_its_outline_and_only_then(self, mask: np.ndarray) -> None:
        path = outline_path(mask, (2.0, 0.5))
        rings = [points(part) for part in path.split("M") if part]
        for row in range(4):
            for column in range(6):
                centre = (column + 0.5) * 0.5, (row + 0.5) * 2.0
                crossings = sum(_crossings(ring, centre) for ring in rings)
                assert crossings % 2 == mask[row, column]


def _crossings(ring: np.ndarray, centre: tuple[float, float]) -> int:
    # A ray just beside the centre never runs through a corner of the outline.
    x, y = centre[0], centre[1] + 0.013
    count = 0
    for (x0, y0), (x1, y1) in zip(ring, np.roll(ring, -1, axis=0), strict=True):
        if (y0 > y) != (y1 > y) and x < x0 + (y - y0) / (y1 - y0) * (x1 - x0):
            count += 1
    return count


class TestShape:
    def test_millimetres_are_equal_along_both_sides(self) -> None:
        image = np.random.default_rng(0).random(SHAPE).astype(np.float32)
        found = view(everywhere(), image=image)
        sizes = {item.layout.name: (item.width_mm, item.height_mm) for item in found.planes}
        assert sizes == {"axial": (15.0, 20.0), "coronal": (15.0, 40.0), "sagittal": (20.0, 40.0)}
        for item in found.planes:
            rows, columns = pixels(item.image).shape
            assert columns / rows == pytest.approx(item.width_mm / item.height_mm, rel=0.01)

    def test_picture_shows_the_surroundings_of_a_small_structure_not_the_whole_scan(self) -> None:
        labels = np.zeros((40, 300, 300), np.uint8)
        labels[20:22, 100:110, 200:210] = 1
        found = plane(view_case("x", labels, labels, (2.0, 1.0, 1.0), ONE), "axial")
        assert (found.width_mm, found.height_mm) == (50.0, 50.0)
        assert box(found.outlines[0].path) == pytest.approx([20.0, 20.0, 30.0, 30.0])

    def test_pictures_stay_small(self) -> None:
        image = np.random.default_rng(0).normal(size=(30, 400, 400)).astype(np.float32)
        labels = np.ones(image.shape, np.uint8)
        for item in view_case("x", labels, labels, (5.0, 1.0, 1.0), ONE, image=image).planes:
            assert item.image is not None
            assert len(item.image) < 60_000

    def test_scale_bar_is_round_and_fits(self) -> None:
        for item in view(everywhere()).planes:
            assert item.scale_bar_mm in (1.0, 2.0, 5.0, 10.0)
            assert item.width_mm / 12 < item.scale_bar_mm <= item.width_mm / 4

    def test_alt_text_tells_case_plane_sides_and_classes(self) -> None:
        alt = plane(view(everywhere()), "coronal").alt
        assert alt == (
            "case_1, coronal plane 11 of 20, R on the left and L on the right. reference: organ; prediction: organ."
        )


class TestWindow:
    def test_window_maps_its_ends_to_black_and_white(self) -> None:
        image = np.full(SHAPE, -1000.0, np.float32)
        image[:, :, 15:] = 2000.0
        image[:, :10] = 40.0
        picture = pixels(plane(view(everywhere(), image=image, window=CT_SOFT_TISSUE), "axial").image)
        rows, columns = picture.shape
        assert picture[: rows // 4, -columns // 4 :].mean() < 5
        assert picture[: rows // 4, : columns // 4].mean() > 250
        assert picture[-rows // 4 :].mean() == pytest.approx(127.5, abs=3)

    @pytest.mark.parametrize("value", [0.0, 7.0, np.nan])
    def test_constant_and_missing_values_are_drawn(self, value: float) -> None:
        picture = pixels(plane(view(everywhere(), image=np.full(SHAPE, value, np.float32)), "axial").image)
        assert picture.max() < 10
