"""Our transforms against MONAI's, whose numbers benchmarks/oracles/monai_augmentation.py wrote."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch

from sagittal.data.cutting import cut_patch
from sagittal.data.elastic import Elastic
from sagittal.data.intensity import (
    IntensityDraw,
    add_noise,
    blur,
    change_contrast,
    change_gamma,
    change_intensity,
    gaussian_taps,
    lower_resolution,
)
from sagittal.data.spatial import SpatialDraw

GOLDEN = Path(__file__).parents[1] / "golden" / "monai_augmentation.npz"
SHAPE = (10, 12, 9)
ISOTROPIC = (1.0, 1.0, 1.0)
ROTATION_RAD = (0.3, -0.2, 0.5)
EXTENT = (1.25, 0.8, 1.1)
SIGMA_VOX = (0.5, 0.8, 1.0)


@pytest.fixture(scope="module")
def monai() -> Mapping[str, torch.Tensor]:
    with np.load(GOLDEN) as arrays:
        return {name: torch.from_numpy(arrays[name]) for name in arrays.files}


@pytest.mark.parametrize(
    ("name", "draw"),
    [
        ("rotated", SpatialDraw(rotation_rad=ROTATION_RAD)),
        ("scaled", SpatialDraw(extent_factor=EXTENT)),
        ("both", SpatialDraw(rotation_rad=ROTATION_RAD, extent_factor=EXTENT)),
    ],
)
def test_rotation_and_scale_are_monais_affine(monai: Mapping[str, torch.Tensor], name: str, draw: SpatialDraw) -> None:
    patch, target = cut_patch(monai["image"][None], monai["labels"], draw, SHAPE, ISOTROPIC)
    torch.testing.assert_close(patch[0], monai[name], atol=2e-5, rtol=0)
    # Places half-way between two voxels fall either way by rounding.
    assert (target == monai[f"{name}_labels"]).float().mean() > 0.995


@pytest.mark.parametrize("axes", [(0,), (1,), (2,), (0, 2)])
def test_mirroring_is_monais_flip(monai: Mapping[str, torch.Tensor], axes: tuple[int, ...]) -> None:
    mirrored = (0 in axes, 1 in axes, 2 in axes)
    patch, _ = cut_patch(monai["image"][None], monai["labels"], SpatialDraw(mirrored=mirrored), SHAPE, ISOTROPIC)
    assert torch.equal(patch[0], monai["flipped_" + "".join(map(str, axes))])


def test_a_field_of_displacements_bends_as_monais_warp(monai: Mapping[str, torch.Tensor]) -> None:
    draw = SpatialDraw(elastic=Elastic(sigma=0.2, reach_vox=(1.5, 2.0, 1.0), seed=3))
    patch, _ = cut_patch(monai["image"][None], monai["labels"], draw, SHAPE, ISOTROPIC)
    torch.testing.assert_close(patch[0], monai["bent"], atol=2e-5, rtol=0)


def test_blur_is_monais_sampled_gaussian_away_from_the_border(monai: Mapping[str, torch.Tensor]) -> None:
    # On purpose: ours sums to 1, theirs to a little less or more; ours goes on beyond the edge, theirs has 0 there; and
    # theirs cuts the Gaussian of 0.8 voxels after 2 steps, ours after 3.
    taps = [torch.from_numpy(gaussian_taps([sigma])).float() for sigma in SIGMA_VOX]
    ours = blur(monai["image"][None], taps)[0][2:-2, 3:-3, 3:-3]
    theirs = monai["blurred"][2:-2, 3:-3, 3:-3]
    lengths = [float(torch.linalg.vector_norm(of)) for of in (ours, theirs)]
    assert lengths[0] == pytest.approx(lengths[1], rel=0.02)
    torch.testing.assert_close(ours / lengths[0], theirs / lengths[1], atol=5e-3, rtol=0)


@pytest.mark.parametrize("factor", [0.75, 1.25])
def test_brightness_and_contrast_are_monais(monai: Mapping[str, torch.Tensor], factor: float) -> None:
    image = monai["image"][None]
    brighter = change_intensity(image, [IntensityDraw(brightness=factor)])
    torch.testing.assert_close(brighter[0], monai[f"brightness_{factor}"])
    contrast = change_contrast(image, torch.tensor([factor]))
    torch.testing.assert_close(contrast[0], monai[f"contrast_{factor}"], atol=1e-5, rtol=0)


@pytest.mark.parametrize("gamma", [0.7, 1.5])
def test_gamma_is_monais_with_statistics_kept(monai: Mapping[str, torch.Tensor], gamma: float) -> None:
    image = monai["image"][None]
    curved = change_gamma(image, torch.tensor([gamma]))
    torch.testing.assert_close(curved[0], monai[f"gamma_{gamma}"], atol=1e-4, rtol=0)
    inverted = change_intensity(image, [IntensityDraw(inverted_gamma=gamma)])
    torch.testing.assert_close(inverted[0], monai[f"inverted_gamma_{gamma}"], atol=1e-4, rtol=0)


@pytest.mark.parametrize(("zoom", "coarse"), [(0.5, (5, 6, 4)), (0.7, (7, 8, 6))])
def test_low_resolution_is_monais_with_exact_nearest_voxels(
    monai: Mapping[str, torch.Tensor], zoom: float, coarse: tuple[int, int, int]
) -> None:
    ours = lower_resolution(monai["image"][None], coarse)[0]
    torch.testing.assert_close(ours, monai[f"low_resolution_{zoom}"], atol=1e-5, rtol=0)


def test_noise_has_the_moments_of_monais(monai: Mapping[str, torch.Tensor]) -> None:
    noise = add_noise(torch.zeros(1, 60, 60, 60), torch.tensor([0.3]), [1]).double().numpy()
    scaled = (noise - noise.mean()) / noise.std()
    ours = [noise.mean(), noise.std(), (scaled**3).mean(), (scaled**4).mean()]
    # Four standard errors of 216 000 numbers, of both.
    assert np.abs(np.asarray(ours) - monai["noise"].numpy()) == pytest.approx([0] * 4, abs=0.06)
    assert ours[:2] == pytest.approx(monai["noise"].numpy()[:2], abs=4e-3)
