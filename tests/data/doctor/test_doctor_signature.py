from __future__ import annotations

from itertools import permutations, product

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from sagittal.data.doctor.signature import signature
from sagittal.volumes.geometry import Reorientation

ALL = [Reorientation(order, flips) for order in permutations(range(3)) for flips in product((False, True), repeat=3)]
STAY = Reorientation((0, 1, 2), (False, False, False))


def an_image(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(5, 6, 7)).astype(np.float32)


@settings(deadline=None, derandomize=True, max_examples=20)
@given(st.integers(0, 1000), st.sampled_from(ALL))
def test_every_turned_copy_has_the_same_hash_in_any_order(seed, turn):
    image = an_image(seed)
    turned = np.ascontiguousarray(turn.apply(image))
    one, other = signature(image, STAY), signature(turned, STAY)
    assert one.any_order == other.any_order
    assert (one.in_ras == other.in_ras) == turn.is_identity
    # Told how to turn it back, both agree in RAS order too.
    assert signature(turned, turn.inverse()).in_ras == one.in_ras


def test_one_changed_voxel_or_two_exchanged_ones_change_it():
    image = an_image(0)
    changed, exchanged = image.copy(), image.copy()
    changed[2, 3, 4] += np.float32(1e-6)
    exchanged[0, 0, 0], exchanged[3, 4, 5] = image[3, 4, 5], image[0, 0, 0]
    assert len({signature(one, STAY).any_order for one in (image, changed, exchanged)}) == 3


def test_masks_with_as_many_voxels_are_told_apart():
    one, other = np.zeros((2, 5, 6, 7), np.float32)
    one[1:3, 1:3, 1:3] = 1
    other[1:3, 1:5, 1] = 1
    assert signature(one, STAY).any_order != signature(other, STAY).any_order


def test_minus_zero_is_zero_and_nan_has_a_hash():
    image = np.zeros((3, 4, 5), np.float32)
    assert signature(-image, STAY) == signature(image, STAY)
    image[1, 1, 1] = np.nan
    assert signature(image, STAY) == signature(image.copy(), STAY)


def test_another_shape_of_the_same_voxels_is_another_image():
    image = an_image(1)
    assert signature(image, STAY).any_order != signature(image.reshape(5, 7, 6), STAY).any_order
