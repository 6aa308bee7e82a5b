from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sagittal.testing.strategies import label_maps, volumes
from sagittal.volumes.crop import Box, bounding_box, crop, nonzero_box, pad, uncrop
from sagittal.volumes.volume import Volume

quick = settings(max_examples=40, deadline=None, derandomize=True)


@quick
@given(volumes(channels=2), st.data())
def test_crop_keeps_every_voxel_where_it_is(volume, data):
    shape = volume.geometry.shape
    start = tuple(data.draw(st.integers(0, size - 1)) for size in shape)
    stop = tuple(data.draw(st.integers(first + 1, size)) for first, size in zip(start, shape, strict=True))
    box = Box(start, stop)
    cut = crop(volume, box)
    assert cut.array.shape == (2, *box.shape)
    inside = tuple(data.draw(st.integers(0, size - 1)) for size in box.shape)
    outside = tuple(a + b for a, b in zip(inside, start, strict=True))
    assert np.array_equal(cut.array[:, *inside], volume.array[:, *outside])
    assert np.allclose(cut.affine @ [*inside, 1], volume.affine @ [*outside, 1])
    back = uncrop(cut.array, box, shape, value=-7)
    assert np.array_equal(back[:, *box.slices], cut.array)
    assert (back == -7).sum() == back.size - cut.array.size


@quick
@given(volumes(), st.tuples(*[st.integers(0, 3)] * 3), st.tuples(*[st.integers(0, 3)] * 3))
def test_pad_keeps_every_voxel_where_it_is_and_crop_undoes_it(volume, before, after):
    padded = pad(volume, before, after, value=-1.0)
    assert np.allclose(padded.affine @ [*before, 1], volume.affine @ [0, 0, 0, 1])
    stop = tuple(a + b for a, b in zip(before, volume.geometry.shape, strict=True))
    back = crop(padded, Box(before, stop))
    assert np.array_equal(back.array, volume.array)
    assert np.allclose(back.affine, volume.affine)
    assert padded.array.sum(dtype=np.float64) == pytest.approx(
        volume.array.sum(dtype=np.float64) - (padded.array.size - volume.array.size)
    )


@quick
@given(label_maps())
def test_bounding_box_equals_the_slow_way(labels):
    mask = labels.array[0] == 1
    found = np.argwhere(mask)
    if found.size == 0:
        assert bounding_box(mask) is None
    else:
        assert bounding_box(mask) == Box(tuple(found.min(0).tolist()), tuple((found.max(0) + 1).tolist()))


def test_nonzero_box_joins_the_channels():
    array = np.zeros((3, 5, 6, 7), dtype=np.float32)
    array[0, 1, 2, 3] = -1.0
    array[2, 3, 1, 6] = np.nan
    assert nonzero_box(array) == Box((1, 1, 3), (4, 3, 7))


def test_nonzero_box_of_an_empty_image_is_the_whole():
    assert nonzero_box(np.zeros((2, 3, 4, 5), dtype=np.float32)) == Box.whole((3, 4, 5))


def test_bounding_box_of_nothing_is_none():
    assert bounding_box(np.zeros((3, 4, 5), dtype=bool)) is None


def test_union():
    assert Box((1, 2, 3), (4, 5, 6)).union(Box((0, 3, 3), (2, 4, 9))) == Box((0, 2, 3), (4, 5, 9))


def test_boxes_and_paddings_that_make_no_sense_are_bugs():
    volume = Volume(np.zeros((1, 2, 3, 4), dtype=np.float32), np.eye(4))
    with pytest.raises(AssertionError, match="not a box within"):
        crop(volume, Box((0, 0, 0), (2, 3, 5)))
    with pytest.raises(AssertionError, match="not a box within"):
        crop(volume, Box((1, 0, 0), (1, 3, 4)))
    with pytest.raises(AssertionError, match="negative"):
        pad(volume, (0, 0, -1), (0, 0, 0))
    with pytest.raises(AssertionError, match="are not the voxels of"):
        uncrop(volume.array, Box((0, 0, 0), (2, 3, 3)), (5, 5, 5))
