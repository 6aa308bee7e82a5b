from __future__ import annotations

import numpy as np
import pytest

from sagittal.data.draws import balanced_ratio, happens, new_seed, seeded, uniform


@pytest.mark.parametrize("probability", [0.1, 0.33, 0.8])
def test_something_happens_as_often_as_its_probability_says(probability: float) -> None:
    generator = seeded(1)
    share = np.mean([happens(generator, probability) for _ in range(4000)])
    assert share == pytest.approx(probability, abs=0.03)


def test_probability_zero_and_one_are_certain() -> None:
    generator = seeded(2)
    assert not any(happens(generator, 0.0) for _ in range(1000))
    assert all(happens(generator, 1.0) for _ in range(1000))


def test_uniform_fills_its_range_and_stays_inside() -> None:
    generator = seeded(3)
    values = np.array([uniform(generator, -2.0, 6.0) for _ in range(2000)])
    assert values.min() >= -2.0
    assert values.max() <= 6.0
    assert np.histogram(values, bins=4, range=(-2.0, 6.0))[0] == pytest.approx([500] * 4, abs=80)


def test_a_ratio_is_below_and_above_one_equally_often() -> None:
    generator = seeded(4)
    values = np.array([balanced_ratio(generator, 0.7, 1.5) for _ in range(2000)])
    assert (values.min() >= 0.7, values.max() <= 1.5) == (True, True)
    assert np.mean(values < 1.0) == pytest.approx(0.5, abs=0.04)


def test_a_range_on_one_side_of_one_is_uniform() -> None:
    generator = seeded(5)
    values = np.array([balanced_ratio(generator, 1.5, 2.5) for _ in range(1000)])
    assert (values.min() >= 1.5, values.max() <= 2.5) == (True, True)
    assert values.mean() == pytest.approx(2.0, abs=0.05)


def test_the_same_seed_gives_the_same_numbers_and_new_seeds_differ() -> None:
    assert uniform(seeded(6), 0.0, 1.0) == uniform(seeded(6), 0.0, 1.0)
    generator = seeded(7)
    assert len({new_seed(generator) for _ in range(50)}) == 50
