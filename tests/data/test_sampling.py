from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from cached_cases import blocks, make_plan, write_cache
from hypothesis import given, settings
from hypothesis import strategies as st

from sagittal.data.cache import Cache
from sagittal.data.sampling import draw_patches, is_forced, place_anywhere, place_around

SHAPES = [(20, 31, 25), (9, 40, 18), (22, 24, 30)]


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Cache:
    cases = {f"case_{index}": blocks(shape, index) for index, shape in enumerate(SHAPES)}
    cases["empty"] = blocks((20, 20, 20), 9, indices=())
    return write_cache(tmp_path_factory.mktemp("cache") / "cases", cases)


def test_patches_depend_on_seed_and_step_alone(cache: Cache) -> None:
    plan = make_plan((12, 16, 14), batch_size=4)
    assert draw_patches(cache, [0, 1, 2], plan, 7) == draw_patches(cache, [0, 1, 2], plan, 7)
    assert draw_patches(cache, [0, 1, 2], plan, 7) != draw_patches(cache, [0, 1, 2], plan, 8)
    other = make_plan((12, 16, 14), batch_size=4, seed=1)
    assert draw_patches(cache, [0, 1, 2], plan, 7) != draw_patches(cache, [0, 1, 2], other, 7)
    negative = make_plan((12, 16, 14), seed=-1)
    assert len(draw_patches(cache, [0], negative, 0)) == 2
    seeds = [draw.seed for step in range(50) for draw in draw_patches(cache, [0, 1, 2], plan, step)]
    assert len(set(seeds)) == len(seeds)


def test_cases_are_drawn_evenly_and_only_among_those_given(cache: Cache) -> None:
    plan = make_plan((8, 8, 8), batch_size=4)
    drawn = Counter(draw.case for step in range(300) for draw in draw_patches(cache, [0, 2], plan, step))
    assert set(drawn) == {0, 2}
    assert drawn[0] / 1200 == pytest.approx(0.5, abs=0.05)


@pytest.mark.parametrize(("batch", "forced"), [(2, 1), (3, 1), (4, 1), (5, 2), (7, 2), (12, 4)])
def test_the_last_samples_of_a_batch_are_forced_as_nnunet_does(batch: int, forced: int) -> None:
    assert [is_forced(sample, batch, 0.33, 0.0) for sample in range(batch)] == [False] * (batch - forced) + (
        [True] * forced
    )


def test_a_batch_of_one_is_forced_by_chance(cache: Cache) -> None:
    plan = make_plan((8, 8, 8), batch_size=1, share=0.4)
    forced = [draw_patches(cache, [0, 1], plan, step)[0].forced_index is not None for step in range(600)]
    assert np.mean(forced) == pytest.approx(0.4, abs=0.06)


def test_a_forced_patch_holds_its_class_and_classes_are_drawn_evenly(cache: Cache) -> None:
    plan = make_plan((6, 8, 8), batch_size=4, share=1.0)
    found: Counter[int] = Counter()
    for step in range(150):
        for draw in draw_patches(cache, [0, 1, 2], plan, step):
            assert draw.forced_index is not None
            window = tuple(slice(start, start + size) for start, size in zip(draw.start, (6, 8, 8), strict=True))
            assert (cache.labels(draw.case)[window] == draw.forced_index).any()
            found[draw.forced_index] += 1
    assert found[1] / 600 == pytest.approx(0.5, abs=0.07)


def test_a_case_without_foreground_is_placed_anywhere(cache: Cache) -> None:
    plan = make_plan((6, 8, 8), share=1.0)
    assert {draw.forced_index for step in range(10) for draw in draw_patches(cache, [3], plan, step)} == {None}


def test_no_share_forces_nothing(cache: Cache) -> None:
    plan = make_plan((6, 8, 8), share=0.0)
    assert {draw.forced_index for step in range(10) for draw in draw_patches(cache, [0], plan, step)} == {None}


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.integers(0, 2**31), st.integers(1, 20), st.integers(1, 30), st.data())
def test_a_voxel_stays_inside_and_off_the_centre_by_a_quarter_at_most(
    seed: int, size: int, extent: int, data: st.DataObject
) -> None:
    voxel = data.draw(st.integers(0, extent - 1))
    start = place_around(np.random.default_rng(seed), voxel, size, extent)
    assert start <= voxel < start + size
    if extent >= size:
        assert 0 <= start <= extent - size
        if start not in (0, extent - size):
            assert abs(voxel - start - size // 2) <= size // 4
    else:
        assert start <= 0
        assert start + size >= extent


def test_the_forced_voxel_moves_off_the_centre() -> None:
    rng = np.random.default_rng(0)
    offsets = [50 - place_around(rng, 50, 16, 100) - 8 for _ in range(500)]
    assert set(offsets) == set(range(-4, 5))


def test_a_long_axis_is_covered_end_to_end_and_a_short_one_held_whole() -> None:
    rng = np.random.default_rng(0)
    assert {place_anywhere(rng, 5, 9) for _ in range(300)} == {0, 1, 2, 3, 4}
    starts = {place_anywhere(rng, 20, 9) for _ in range(300)}
    assert starts == {-7, -6, -5, -4, -3}
    assert {place_anywhere(rng, 7, 7) for _ in range(5)} == {0}
