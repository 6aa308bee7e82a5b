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
from sagittal.report.pictures import (
    CT_SOFT_TISSUE,
    CaseView,
    Plane,
    error_areas,
    error_text,
    outline_path,
    view_case,
    wrong_shares,
)
from sagittal.volumes import Volume

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


class TestErrorMaps:
    classes = ClassSet.of_mapping({"a": 1, "b": 2, "ignore": 9})
    reference = np.array([[0, 1, 1, 1, 0, 9]], np.uint8)
    prediction = np.array([[1, 1, 2, 0, 0, 1]], np.uint8)

    def test_every_pixel_is_of_one_kind(self) -> None:
        areas = {area.kind: area for area in error_areas(self.reference, self.prediction, (3.0, 2.0), self.classes)}
        assert list(areas) == ["agreement", "missed", "extra", "confused"]
        assert {kind: box(area.path)[0] for kind, area in areas.items()} == {
            "agreement": 1.0 * 2 - 0.0,
            "missed": 3.0 * 2,
            "extra": 0.0,
            "confused": 2.0 * 2,
        }
        assert {area.area_mm2 for area in areas.values()} == {6.0}

    def test_ignored_and_perfect_pixels_make_no_error(self) -> None:
        ignored = np.full((2, 3), 9, np.uint8)
        assert error_areas(ignored, np.ones((2, 3), np.uint8), (1.0, 1.0), self.classes) == ()
        (only,) = error_areas(np.ones((2, 3), np.uint8), np.ones((2, 3), np.uint8), (1.0, 1.0), self.classes)
        assert only.kind == "agreement"

    def test_of_regions_agreement_is_to_be_in_the_same_ones(self) -> None:
        regions = ClassSet.of_mapping({"whole": [1, 2], "core": [2]})
        reference, prediction = np.array([[2, 1, 2]], np.uint8), np.array([[2, 2, 0]], np.uint8)
        kinds = [area.kind for area in error_areas(reference, prediction, (1.0, 1.0), regions)]
        assert kinds == ["agreement", "missed", "confused"]

    def test_map_is_shown_where_most_is_wrong_and_small_classes_count_as_much(self) -> None:
        reference, prediction = np.zeros(SHAPE, np.uint8), np.zeros(SHAPE, np.uint8)
        reference[1:4] = prediction[1:4] = 1
        prediction[1, :3] = 0  # much of a large organ's rim ...
        reference[8, 4:6, 20:22] = 2  # ... weighs less than all of a small one
        found = view(reference, prediction, classes=ClassSet.of_mapping({"organ": 1, "lesion": 2}))
        assert [item.index for item in found.planes] == [2, 5, 21]
        assert [item.index for item in found.error_planes] == [8, 4, 20]
        (missed,) = found.error_planes[0].errors
        assert missed.kind == "missed"
        assert box(missed.path) == pytest.approx([8 * 0.5, 14.0, 10 * 0.5, 16.0])
        assert found.error_planes[0].outlines == ()

    def test_perfect_cases_show_the_same_planes_twice(self) -> None:
        found = view(everywhere())
        assert [item.index for item in found.error_planes] == [item.index for item in found.planes]

    def test_shares_add_up_to_one_for_a_class_that_is_all_wrong(self) -> None:
        labels = np.zeros(SHAPE, np.uint8)
        labels[2:5, 3:9, 4:6] = 1
        for share in wrong_shares(labels, np.zeros(SHAPE, np.uint8), ONE):
            assert share.sum() == pytest.approx(1.0)

    def test_error_maps_are_left_out_where_nobody_wants_them(self) -> None:
        assert view(everywhere(), errors=False).error_planes == ()

    def test_words_tell_areas(self) -> None:
        layout = view(everywhere()).planes[0].layout
        areas = error_areas(self.reference, self.prediction, (3.0, 200.0), self.classes)
        assert error_text("x", layout, 6, 10, areas) == (
            "x, error map of the axial plane 7 of 10: 25 % of the area agrees; 600 mm² missed, 600 mm² marked in "
            "excess, 600 mm² given to another class."
        )
        assert "neither the reference nor the prediction" in error_text("x", layout, 6, 10, ())


class TestPhantom:
    """One patient with a landmark off every middle, stored in any order of axes, shown where it is in the body."""

    SPACING = (2.5, 0.7, 1.3)
    SHAPE = (13, 36, 22)
    LESION = ((8, 11), (24, 32), (3, 7))

    def patient(self) -> tuple[np.ndarray, np.ndarray]:
        """Body with a lesion near the left, the front and the head: labels and a scan, in RAS order."""
        labels = np.zeros(self.SHAPE, np.uint8)
        labels[1:12, 2:34, 2:20] = 1
        labels[8:11, 24:32, 3:7] = 2
        return labels, 40.0 * labels.astype(np.float32)

    @pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1), (1, 2, 0), (2, 1, 0)])
    @pytest.mark.parametrize("flips", [(), (0,), (1, 2), (0, 1, 2)])
    def test_landmark_is_left_in_front_and_above(self, order: tuple[int, ...], flips: tuple[int, ...]) -> None:
        affine = np.zeros((4, 4))
        affine[3, 3] = 1.0
        for axis, world in enumerate((2, 1, 0)):
            affine[world, axis] = self.SPACING[axis]
        turned = []
        for array in self.patient():
            stored = np.ascontiguousarray(np.flip(array.transpose(order), flips))
            moved = affine[:, [*order, 3]].copy()
            for axis in flips:
                moved[:3, 3] += moved[:3, axis] * (stored.shape[axis] - 1)
                moved[:, axis] *= -1
            turned.append(Volume(stored[None], moved).reoriented())
        labels, scan = turned
        assert labels.spacing_mm == pytest.approx(self.SPACING)
        classes = ClassSet.of_mapping({"lesion": 2})
        found = view_case(
            "p", labels.array[0], labels.array[0], labels.spacing_mm, classes, image=scan.array[0], window=(0.0, 100.0)
        )
        assert [item.index for item in found.planes] == [9, 28, 5]
        for name, axes in {"axial": (1, 2), "coronal": (0, 2), "sagittal": (0, 1)}.items():
            item = plane(found, name)
            left, top, right, bottom = box(item.outlines[0].path)
            rows, columns = self.LESION[axes[0]], self.LESION[axes[1]]
            height, width = self.SPACING[axes[0]], self.SPACING[axes[1]]
            # The field of view reaches the scan's borders here, so that distances count from its far sides.
            assert (item.width_mm, item.height_mm) == pytest.approx(
                (self.SHAPE[axes[1]] * width, self.SHAPE[axes[0]] * height)
            )
            assert (left, right) == pytest.approx(
                ((self.SHAPE[axes[1]] - columns[1]) * width, (self.SHAPE[axes[1]] - columns[0]) * width), abs=0.01
            )
            assert (top, bottom) == pytest.approx(
                ((self.SHAPE[axes[0]] - rows[1]) * height, (self.SHAPE[axes[0]] - rows[0]) * height), abs=0.01
            )
            picture = pixels(item.image)
            scale_y, scale_x = picture.shape[0] / item.height_mm, picture.shape[1] / item.width_mm
            assert scale_x == pytest.approx(scale_y, rel=0.02)
            # The bright lesion of the scan begins and ends where its outline does: half-way between both intensities.
            bright = np.argwhere(picture > 153)
            assert bright.min(axis=0) == pytest.approx([top * scale_y, left * scale_x], abs=3)
            assert bright.max(axis=0) + 1 == pytest.approx([bottom * scale_y, right * scale_x], abs=3)
