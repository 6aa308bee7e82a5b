from __future__ import annotations

import sys

import numpy as np
import pytest

from sagittal.errors import DataError, ResourceError
from sagittal.evaluation import EvaluationSettings, cldice, evaluate_case
from sagittal.evaluation.skeleton import skeleton


def tube(start: int, stop: int, row: int = 4) -> np.ndarray:
    mask = np.zeros((9, 9, 20), bool)
    mask[3:6, row - 1 : row + 2, start:stop] = True
    return mask


class TestWithScikitImage:
    @pytest.fixture(autouse=True)
    def package(self) -> None:
        pytest.importorskip("skimage", reason="clDice needs the extra [metrics]")

    def test_a_tube_is_its_own_centreline(self) -> None:
        assert cldice(tube(0, 20), tube(0, 20)) == 1.0

    def test_a_thinner_tube_on_the_same_line_is_perfect_though_its_dice_is_not(self) -> None:
        thin = np.zeros((9, 9, 20), bool)
        thin[4, 4, 3:17] = True
        found = cldice(tube(2, 18), thin)
        assert found is not None
        assert found > 0.9

    def test_half_a_tube_finds_half_of_the_centreline(self) -> None:
        found = cldice(tube(0, 20), tube(0, 10))
        assert found == pytest.approx(2 / 3, abs=0.06)

    def test_tubes_apart_share_nothing(self) -> None:
        assert cldice(tube(0, 20, row=1), tube(0, 20, row=7)) == 0.0

    def test_a_block_that_is_thinned_away_is_its_own_skeleton(self) -> None:
        slabs = np.zeros((6, 7, 9), bool)
        slabs[1, 1:5, :6] = slabs[3, 1:5, :6] = slabs[2:4, 2:6, 6:8] = True
        for mask in (slabs, np.ones((2, 2, 2), bool), np.ones((2, 4, 6), bool)):
            assert skeleton(mask).any()
            assert cldice(mask, mask) == 1.0

    def test_place_in_the_image_does_not_matter(self) -> None:
        padding = ((0, 3), (5, 0), (2, 2))
        masks = tube(0, 20), tube(4, 19, row=5)
        assert cldice(*masks) == cldice(*(np.pad(mask, padding) for mask in masks))


@pytest.mark.parametrize(("filled", "expected"), [((True, False), 0.0), ((False, True), 0.0), ((False, False), None)])
def test_rules_for_empty_masks(filled: tuple[bool, bool], expected: float | None) -> None:
    masks = [np.full((3, 4, 5), fill) for fill in filled]
    assert cldice(*masks) == expected


def test_missing_package_is_told_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "skimage.morphology", None)
    with pytest.raises(ResourceError, match=r"clDice needs scikit-image.*pip install 'sagittal\[metrics\]'") as raised:
        cldice(tube(0, 20), tube(0, 20))
    assert raised.value.code == "missing_extra"


def test_package_is_not_needed_for_other_metrics(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "skimage", None)
    monkeypatch.setitem(sys.modules, "skimage.morphology", None)
    labels = tube(0, 20).astype(np.uint8)
    evaluate_case(labels, labels, (1.0, 1.0, 1.0), {"a": 1}, settings=EvaluationSettings(metrics=("dice", "nsd")))


def test_label_map_is_refused() -> None:
    labels = np.ones((2, 3, 4), np.uint8)
    with pytest.raises(DataError, match="boolean mask"):
        cldice(labels, labels)
