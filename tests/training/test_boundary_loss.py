"""The distances of the boundary loss against SciPy's."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.ndimage import distance_transform_edt

from sagittal.training.boundary_loss import signed_distance_mm


@pytest.mark.parametrize("reach_mm", [4.0, 1000.0])
@pytest.mark.parametrize("spacing_mm", [(1.0, 1.0, 1.0), (5.0, 0.78, 0.78), (0.5, 2.0, 1.25)])
def test_distances_are_the_exact_ones_within_reach(reach_mm: float, spacing_mm: tuple[float, float, float]) -> None:
    rng = np.random.default_rng(0)
    onehot = rng.random((2, 2, 7, 12, 9)) < 0.03
    onehot[0, 0, 2:5, 3:9, 2:7] = True
    result = signed_distance_mm(torch.from_numpy(onehot), None, spacing_mm, reach_mm, torch.float64)
    for n, k in np.ndindex(2, 2):
        mask = onehot[n, k]
        away, within = (distance_transform_edt(side, sampling=spacing_mm) for side in (~mask, mask))
        expected = np.minimum(away, reach_mm) - np.minimum(within, reach_mm)
        np.testing.assert_allclose(result[n, k].numpy(), expected, rtol=1e-12)


def test_float32_differs_by_rounding_only() -> None:
    onehot = torch.rand(1, 1, 8, 9, 10, generator=torch.Generator().manual_seed(0)) < 0.02
    narrow, wide = (
        signed_distance_mm(onehot, None, (3.0, 0.7, 0.7), 10.0, dtype) for dtype in (torch.float32, torch.float64)
    )
    torch.testing.assert_close(narrow.double(), wide, rtol=1e-6, atol=0)


@pytest.mark.parametrize(("everywhere", "sign"), [(False, 1), (True, -1)])
def test_without_a_surface_every_voxel_is_out_of_reach(everywhere: bool, sign: int) -> None:
    onehot = torch.full((1, 1, 2, 3, 4), everywhere)
    result = signed_distance_mm(onehot, None, (1.0, 1.0, 1.0), 6.0, torch.float32)
    assert torch.equal(result, torch.full_like(result, 6.0 * sign))


def test_ignored_voxels_are_on_no_side() -> None:
    inside = torch.tensor([True, True, False, False, False]).view(1, 1, 1, 1, 5)
    valid = torch.tensor([True, True, False, False, True]).view(1, 1, 1, 1, 5)
    result = signed_distance_mm(inside, valid, (1.0, 1.0, 1.0), 9.0, torch.float32)
    assert result.flatten()[[0, 1, 4]].tolist() == [-4, -3, 3]
