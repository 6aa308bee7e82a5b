from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageColor

from sagittal.plan import DatasetSpec, Label
from sagittal.report.colours import PREDICTION_COLOUR, class_colour
from sagittal.report.prediction import PANEL_PX, preview_png
from sagittal.volumes import Volume
from sagittal.volumes.header import Unplaced

AFFINE = np.diag([1.0, 2.0, 4.0, 1.0])[:, [2, 1, 0, 3]]


def spec_of(*names: str, channel: str = "T1") -> DatasetSpec:
    labels = tuple(Label(name=name, values=(value,)) for value, name in enumerate(names, start=1))
    return DatasetSpec(name="x", channel_names=(channel,), labels=labels, file_ending=".nii.gz")


def boxes(values: int = 2) -> np.ndarray[Any, Any]:
    labels = np.zeros((10, 20, 40), np.uint8)
    labels[6:9, 5:15, 10:30] = 1
    if values > 1:
        labels[1:3, 2:4, 2:6] = 2
    return labels


def picture(labels: Any, spec: DatasetSpec, volumes: dict[str, float], **more: Any) -> Image.Image:
    volume = Volume(labels[None], more.get("affine", AFFINE), more.get("header"))
    scan = Volume(np.full(labels.shape, 100, np.float32)[None], volume.affine) if more.get("scan", True) else None
    found = Image.open(io.BytesIO(preview_png("case_7", volume, scan, spec, volumes)))
    assert found.format == "PNG"
    return found


def has(image: Image.Image, colour: str) -> bool:
    return bool((np.asarray(image.convert("RGB")) == ImageColor.getrgb(colour)).all(axis=2).any())


def test_the_largest_structure_is_outlined_and_what_is_elsewhere_is_not() -> None:
    image = picture(boxes(), spec_of("liver", "cyst"), {"liver": 4.8, "cyst": 0.1})
    assert has(image, class_colour(0)) and not has(image, class_colour(1))
    # 40 mm by 40 mm each, in any plane: three panels, their margins, and text.
    assert image.width >= 3 * PANEL_PX and PANEL_PX < image.height < 2 * PANEL_PX


def test_planes_have_the_proportions_of_millimetres() -> None:
    labels = np.zeros((10, 20, 40), np.uint8)
    flat = picture(labels, spec_of("a"), {"a": 0.0}, affine=np.diag([1.0, 1.0, 1.0, 1.0])[:, [2, 1, 0, 3]])
    cubic = picture(labels, spec_of("a"), {"a": 0.0})
    assert flat.height < cubic.height


@pytest.mark.parametrize("header", [None, Unplaced()])
@pytest.mark.parametrize("scan", [True, False])
def test_one_class_has_the_predictions_colour_with_and_without_a_scan(header: Any, scan: bool) -> None:
    image = picture(boxes(1), spec_of("a"), {"a": 4.8}, header=header, scan=scan)
    assert has(image, PREDICTION_COLOUR)


def test_the_result_does_not_depend_on_the_order_of_axes() -> None:
    spec, volumes = spec_of("a", "b"), {"a": 4.8, "b": 0.1}
    first = picture(boxes(), spec, volumes)
    turned = Volume(boxes().transpose(2, 0, 1)[None, ::-1].copy(), _turned())
    scan = Volume(np.full(turned.array.shape, 100, np.float32), turned.affine)
    second = Image.open(io.BytesIO(preview_png("case_7", turned, scan, spec, volumes)))
    np.testing.assert_array_equal(np.asarray(first), np.asarray(second))


def _turned() -> np.ndarray[Any, Any]:
    affine = AFFINE[:, [2, 0, 1, 3]].copy()
    affine[:3, 3] += 39 * affine[:3, 0]
    affine[:3, 0] *= -1
    return affine


def test_many_classes_are_named_up_to_a_number_and_an_empty_map_is_told() -> None:
    names = [f"class_{number}" for number in range(60)]
    labels = np.zeros((10, 20, 40), np.uint8)
    labels[5, :, :] = np.arange(40)[None, :] + 1
    many = picture(labels, spec_of(*names), dict.fromkeys(names, 1.0))
    empty = picture(np.zeros_like(labels), spec_of(*names, channel="CT"), dict.fromkeys(names, 0.0))
    assert many.height > empty.height


def test_original_values_of_a_repaired_set_are_found() -> None:
    labels = boxes(1).astype(np.int16) * -4
    spec = spec_of("a").replace(label_map=((1, -4),))
    assert has(picture(labels, spec, {"a": 4.8}), PREDICTION_COLOUR)
