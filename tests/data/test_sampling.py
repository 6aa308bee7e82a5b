from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from cached_cases import blocks, make_plan, write_cache
from hypothesis import given, settings
from hypothesis import strategies as st

from sagittal.data.augmentation import augment, spatial_draw
from sagittal.data.cache import Cache, foreground_locations, locations_path
from sagittal.data.case_weights import CaseWeights
from sagittal.data.sampling import (
    case_pool,
    draw_patches,
    is_forced,
    kept_in_view,
    place_anywhere,
    place_around,
    samples_of,
)
from sagittal.data.spatial import SpatialDraw, box_size, source_matrix
from sagittal.errors import DataError, PlanError, ResourceError
from sagittal.plan import Plan
from sagittal.plan.augmentation import Augmentation

SHAPES = [(20, 31, 25), (9, 40, 18), (22, 24, 30)]


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Cache:
    cases = {f"case_{index}": blocks(shape, index) for index, shape in enumerate(SHAPES)}
    cases["empty"] = blocks((20, 20, 20), 9, indices=())
    return write_cache(tmp_path_factory.mktemp("cache") / "cases", cases)


def test_patches_depend_on_seed_and_step_alone(cache: Cache) -> None:
    plan = make_plan((12, 16, 14), batch_size=4)
    assert draw_patches(case_pool(cache, [0, 1, 2], plan), plan, 7) == draw_patches(
        case_pool(cache, [0, 1, 2], plan), plan, 7
    )
    assert draw_patches(case_pool(cache, [0, 1, 2], plan), plan, 7) != draw_patches(
        case_pool(cache, [0, 1, 2], plan), plan, 8
    )
    other = make_plan((12, 16, 14), batch_size=4, seed=1)
    assert draw_patches(case_pool(cache, [0, 1, 2], plan), plan, 7) != draw_patches(
        case_pool(cache, [0, 1, 2], other), other, 7
    )
    negative = make_plan((12, 16, 14), seed=-1)
    assert len(draw_patches(case_pool(cache, [0], negative), negative, 0)) == 2
    seeds = [draw.seed for step in range(50) for draw in draw_patches(case_pool(cache, [0, 1, 2], plan), plan, step)]
    assert len(set(seeds)) == len(seeds)


def test_cases_are_drawn_evenly_and_only_among_those_given(cache: Cache) -> None:
    plan = make_plan((8, 8, 8), batch_size=4)
    drawn = Counter(
        draw.case for step in range(300) for draw in draw_patches(case_pool(cache, [0, 2], plan), plan, step)
    )
    assert set(drawn) == {0, 2}
    assert drawn[0] / 1200 == pytest.approx(0.5, abs=0.05)


@pytest.mark.parametrize(("batch", "forced"), [(2, 1), (3, 1), (4, 1), (5, 2), (7, 2), (12, 4)])
def test_the_last_samples_of_a_batch_are_forced_as_nnunet_does(batch: int, forced: int) -> None:
    assert [is_forced(sample, batch, 0.33, 0.0) for sample in range(batch)] == [False] * (batch - forced) + (
        [True] * forced
    )


def test_a_batch_of_one_is_forced_by_chance(cache: Cache) -> None:
    plan = make_plan((8, 8, 8), batch_size=1, share=0.4)
    forced = [
        draw_patches(case_pool(cache, [0, 1], plan), plan, step)[0].forced_index is not None for step in range(600)
    ]
    assert np.mean(forced) == pytest.approx(0.4, abs=0.06)


def test_a_forced_patch_holds_its_class_and_classes_are_drawn_evenly(cache: Cache) -> None:
    plan = make_plan((6, 8, 8), batch_size=4, share=1.0)
    found: Counter[int] = Counter()
    for step in range(150):
        for draw in draw_patches(case_pool(cache, [0, 1, 2], plan), plan, step):
            assert draw.forced_index is not None
            window = tuple(slice(start, start + size) for start, size in zip(draw.start, (6, 8, 8), strict=True))
            assert (cache.labels(draw.case)[window] == draw.forced_index).any()
            found[draw.forced_index] += 1
    assert found[1] / 600 == pytest.approx(0.5, abs=0.07)


def test_a_case_without_foreground_is_placed_anywhere(cache: Cache) -> None:
    plan = make_plan((6, 8, 8), share=1.0)
    assert {
        draw.forced_index for step in range(10) for draw in draw_patches(case_pool(cache, [3], plan), plan, step)
    } == {None}


def test_no_share_forces_nothing(cache: Cache) -> None:
    plan = make_plan((6, 8, 8), share=0.0)
    assert {
        draw.forced_index for step in range(10) for draw in draw_patches(case_pool(cache, [0], plan), plan, step)
    } == {None}


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


def balanced(plan: Plan) -> Plan:
    return plan.replace(training=plan.training.replace(class_balanced=True))


@pytest.fixture(scope="module")
def rare(tmp_path_factory: pytest.TempPathFactory) -> Cache:
    """Nine cases with class 1 alone, one that has class 2 besides, one without any."""
    cases = {f"common_{number}": blocks((12, 14, 13), number, indices=(1,)) for number in range(9)}
    cases["rare"] = blocks((12, 14, 13), 9)
    cases["empty"] = blocks((12, 14, 13), 10, indices=())
    return write_cache(tmp_path_factory.mktemp("rare") / "cases", cases)


def forced_classes(cache: Cache, plan: Plan, steps: int = 300) -> Counter[int | None]:
    pool = case_pool(cache, range(len(cache.entries)), plan)
    return Counter(draw.forced_index for step in range(steps) for draw in draw_patches(pool, plan, step))


def test_balanced_draws_reach_a_class_of_one_case_as_often_as_one_of_all(rare: Cache) -> None:
    plan = make_plan((8, 8, 8), share=1.0)
    as_nnunet, evenly = forced_classes(rare, plan), forced_classes(rare, balanced(plan))
    assert as_nnunet[2] / 600 == pytest.approx(1 / 22, abs=0.03)
    assert as_nnunet[None] / 600 == pytest.approx(1 / 11, abs=0.04)
    assert evenly[2] / 600 == pytest.approx(1 / 2, abs=0.06)
    assert None not in evenly
    pool = case_pool(rare, range(11), balanced(plan))
    cases = Counter(
        draw.case for step in range(300) for draw in draw_patches(pool, balanced(plan), step) if draw.forced_index == 1
    )
    assert set(cases) == set(range(10))
    assert max(cases.values()) / sum(cases.values()) < 0.2


def test_balanced_draws_leave_the_other_samples_as_they_are(rare: Cache) -> None:
    plan = make_plan((8, 8, 8), batch_size=4)
    for step in range(20):
        one = draw_patches(case_pool(rare, range(11), plan), plan, step)
        other = draw_patches(case_pool(rare, range(11), balanced(plan)), balanced(plan), step)
        assert one[:3] == other[:3]
        assert other[3].forced_index is not None


def test_balanced_draws_of_cases_without_foreground_are_placed_anywhere(rare: Cache) -> None:
    plan = balanced(make_plan((8, 8, 8), share=1.0))
    assert {draw.forced_index for draw in draw_patches(case_pool(rare, [10], plan), plan, 0)} == {None}


@pytest.mark.parametrize("draws_class_first", [False, True])
def test_cases_come_as_often_as_they_weigh(rare: Cache, draws_class_first: bool) -> None:
    plan = make_plan((8, 8, 8), batch_size=4, share=0.5)
    plan = balanced(plan) if draws_class_first else plan
    weights = CaseWeights({f"common_{number}": 0.0 for number in range(3, 9)} | {"common_0": 4.0, "empty": 0.0})
    pool = case_pool(rare, range(11), plan, weights)
    draws = [draw for step in range(300) for draw in draw_patches(pool, plan, step)]
    assert draws[:8] == [draw for step in range(2) for draw in draw_patches(pool, plan, step)]
    anywhere = Counter(draw.case for draw in draws if draw.forced_index is None)
    assert set(anywhere) == {0, 1, 2, 9}
    assert anywhere[0] / sum(anywhere.values()) == pytest.approx(4 / 7, abs=0.07)
    on_first = Counter(draw.case for draw in draws if draw.forced_index == 1)
    assert on_first[0] / sum(on_first.values()) == pytest.approx(4 / 7 if draws_class_first else 8 / 13, abs=0.1)


def test_equal_weights_are_no_error_and_none_at_all_is(rare: Cache) -> None:
    plan = make_plan((8, 8, 8))
    assert len(draw_patches(case_pool(rare, [0, 1], plan, CaseWeights({})), plan, 0)) == 2
    nothing = CaseWeights({"common_0": 0.0, "common_1": 0.0})
    with pytest.raises(DataError, match=r"none of the 2 training cases has a weight above 0.*Raise"):
        case_pool(rare, [0, 1], plan, nothing)


@pytest.mark.parametrize(("batch", "world"), [(2, 1), (2, 2), (7, 3), (12, 5)])
def test_processes_share_a_batch_without_gap_or_overlap(batch: int, world: int) -> None:
    shares = [samples_of(batch, rank, world) for rank in range(world)]
    assert [sample for share in shares for sample in share] == list(range(batch))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_more_processes_than_samples_are_refused() -> None:
    with pytest.raises(PlanError, match=r"batch_size is 2, for 3 processes.*batch_size=3"):
        samples_of(2, 0, 3)


def test_a_share_of_the_draws_is_that_part_of_all(cache: Cache) -> None:
    plan = make_plan((8, 8, 8), batch_size=5)
    pool = case_pool(cache, [0, 1, 2], plan)
    assert draw_patches(pool, plan, 3, range(2, 4)) == draw_patches(pool, plan, 3)[2:4]


angle = st.floats(-np.pi, np.pi)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    st.tuples(*[st.integers(3, 30)] * 3),
    st.tuples(angle, angle, angle),
    st.floats(0.5, 1.5),
    st.tuples(*[st.floats(0.5, 4)] * 3),
    st.data(),
)
def test_a_chosen_voxel_is_seen_however_the_patch_is_turned(
    size: tuple[int, int, int],
    rotation: tuple[float, float, float],
    factor: float,
    spacing: tuple[float, float, float],
    data: st.DataObject,
) -> None:
    turn = SpatialDraw(rotation_rad=rotation, extent_factor=(factor, factor, factor))
    voxel = tuple(data.draw(st.integers(0, extent - 1)) for extent in size)
    d, h, w = kept_in_view((0, 0, 0), voxel, turn, size, spacing)  # type: ignore[arg-type]
    half = (np.asarray(size) - 1) / 2
    seen = np.linalg.inv(source_matrix(turn, spacing)) @ (np.asarray(voxel) - (d, h, w) - half)
    at_centre = all(abs(at - start - middle) <= 0.5 for at, start, middle in zip(voxel, (d, h, w), half, strict=True))
    assert at_centre or np.all(np.abs(seen) <= half)


def test_an_unturned_patch_stays_where_it_is() -> None:
    assert kept_in_view((1, 2, 3), (1, 2, 3), SpatialDraw(), (8, 8, 8), (1.0, 1.0, 1.0)) == (1, 2, 3)


def test_a_single_voxel_in_a_corner_is_seen_in_every_augmented_patch(tmp_path: Path) -> None:
    labels = np.zeros((26, 30, 28), dtype=np.uint8)
    labels[:3, :3, :3] = 1
    image = labels[np.newaxis].astype(np.float32)
    config = Augmentation(
        rotation_probability=1.0, scaling_probability=1.0, elastic_probability=0.5, elastic_magnitude=(0.0, 0.15)
    )
    plan = make_plan((16, 20, 18), augmentation=config, share=1.0)
    cache = write_cache(tmp_path / "cases", {"corner": (image, labels)})
    pool = case_pool(cache, [0], plan)
    for step in range(30):
        for draw in draw_patches(pool, plan, step):
            size = box_size(spatial_draw(draw.seed, config, plan.patch.size), plan.patch.size, (2.0, 1.0, 1.0))
            box = torch.zeros(size, dtype=torch.int16)
            starts = [at - (have - want) // 2 for at, have, want in zip(draw.start, size, (16, 20, 18), strict=True)]
            for d, h, w in np.argwhere(labels):
                place = (d - starts[0], h - starts[1], w - starts[2])
                if all(0 <= at < have for at, have in zip(place, size, strict=True)):
                    box[place] = 1
            _, seen = augment(
                box[None, None].float(), box[None], config, plan.patch.size, [draw.seed], spacing_mm=(2.0, 1.0, 1.0)
            )
            assert seen.any()


def test_the_cache_tells_classes_and_voxels_without_reading_the_others(cache: Cache, tmp_path: Path) -> None:
    labels = np.zeros((60, 60, 40), dtype=np.uint8)
    labels[0, 0, 0], labels[10:50, 10:50, 5:35] = 12, 3
    written = write_cache(tmp_path / "cases", {"one": (labels[np.newaxis], labels)})
    path = locations_path(written.folder, written.entries[0])
    np.savez(path, **{str(index): voxels for index, voxels in foreground_locations(labels, 14).items()})
    everything = written.locations(0)
    assert len(everything) == 13
    assert written.classes(0) == (3, 12) == tuple(index for index, voxels in everything.items() if len(voxels))
    for index in (3, 12):
        assert np.array_equal(written.voxels(0, index), everything[index])
    with pytest.raises(ResourceError, match="can't be read"):
        written.voxels(0, 99)
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(ResourceError, match="can't be read"):
        written.classes(0)


@pytest.mark.parametrize("patch_size", [(6, 12, 12), (1, 16, 16)])
def test_a_patch_of_a_case_that_is_ignored_but_for_one_slice_shows_that_slice(
    patch_size: tuple[int, int, int], tmp_path: Path
) -> None:
    sparse = np.full((60, 24, 20), 3, dtype=np.uint8)
    sparse[41, 2:, :15] = 0
    cases = {"sparse": sparse, "unknown": np.full_like(sparse, 3)}
    cache = write_cache(tmp_path / "cases", {name: (labels[np.newaxis], labels) for name, labels in cases.items()})
    plan = make_plan(patch_size, batch_size=4, share=0.0)
    plan = plan.replace(dataset=plan.dataset.replace(ignore_value=9))
    columns = set()
    for step in range(40):
        for draw in draw_patches(case_pool(cache, [0], plan), plan, step):
            assert draw.forced_index is None and draw.voxel is not None
            assert sparse[draw.voxel] == 0
            assert all(
                0 <= at - first < size for at, first, size in zip(draw.voxel, draw.start, patch_size, strict=True)
            )
            columns.add(draw.voxel[1:])
    assert len(columns) > 100
    assert all(draw.voxel is None for draw in draw_patches(case_pool(cache, [1], plan), plan, 0))
    assert draw_patches(case_pool(cache, [0], plan), plan, 5) == draw_patches(case_pool(cache, [0], plan), plan, 5)
