from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import ndimage

from sagittal.data.elastic import Elastic, displacements, field

PATCH = (24, 31, 18)
REACH = (2.0, 3.0, 0.5)


def moved(elastic: Elastic, patch: tuple[int, int, int] = PATCH) -> torch.Tensor:
    made = field(elastic, patch)
    d, h, w = (torch.from_numpy(weights).float()[None] for weights in made.weights)
    return displacements(torch.from_numpy(made.knots).float()[None], (d, h, w), torch.tensor([elastic.reach_vox]))[0]


@pytest.mark.parametrize("sigma", [0.07, 0.1, 0.2, 0.5])
def test_a_field_reaches_as_far_as_drawn_and_no_further(sigma: float) -> None:
    for seed in range(5):
        reached = moved(Elastic(sigma, REACH, seed)).abs().amax((1, 2, 3)).numpy()
        assert (reached <= np.asarray(REACH, np.float32)).all()
        assert (reached >= 0.75 * np.asarray(REACH)).all()


def test_the_same_seed_gives_the_same_field_and_others_differ() -> None:
    first, again, other = (moved(Elastic(0.15, REACH, seed)) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.allclose(first, other)


def test_the_spline_is_scipys_and_sums_to_one() -> None:
    made = field(Elastic(0.2, REACH, 3), (9, 40, 6))
    for weights, size in zip(made.weights, (9, 40, 6), strict=True):
        assert np.allclose(weights.sum(axis=1), 1)
        places = (np.arange(size) + 0.5) / size / (np.sqrt(3) * 0.2) + 1
        knots = made.knots[0, 0, 0]
        expected = ndimage.map_coordinates(knots, [places], order=3, prefilter=False)
        assert np.allclose(weights @ knots, expected)


def test_sigma_is_that_of_a_gaussian_blur() -> None:
    # The autocorrelation of noise that was blurred with sigma falls to exp(-1/4) at a distance of sigma.
    size, sigma = 400, 0.05
    products, squares = [], []
    for seed in range(30):
        line = moved(Elastic(sigma, (1.0, 1.0, 1.0), seed), (1, 1, size))[2, 0, 0].double().numpy()
        shift = round(sigma * size)
        products.append((line[:-shift] * line[shift:]).mean())
        squares.append((line**2).mean())
    assert np.mean(products) / np.mean(squares) == pytest.approx(np.exp(-0.25), abs=0.08)


@pytest.mark.parametrize("threads", [2, 3])
def test_the_bits_do_not_depend_on_the_number_of_threads(threads: int) -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = moved(Elastic(0.1, REACH, 5), (37, 61, 53))
        torch.set_num_threads(threads)
        shared = moved(Elastic(0.1, REACH, 5), (37, 61, 53))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(alone, shared)
