from __future__ import annotations

import itertools
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from cached_cases import blocks, make_plan, write_cache

from sagittal.data import loader
from sagittal.data.cache import Cache, image_path, labels_path
from sagittal.data.case_weights import CaseWeights
from sagittal.data.loader import TrainingBatches, make_batch
from sagittal.data.sampling import case_pool, draw_patches
from sagittal.errors import PlanError, ResourceError
from sagittal.plan.augmentation import Augmentation

SHAPES = [(20, 31, 25), (9, 40, 18), (22, 24, 30)]
PATCH = (12, 16, 14)


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    return write_cache(
        tmp_path / "cases", {f"case_{index}": blocks(shape, index) for index, shape in enumerate(SHAPES)}
    )


def threads_of_the_pool() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("sagittal-batches")]


def test_an_unchanged_patch_is_what_the_case_holds_and_zero_beyond_it(cache: Cache) -> None:
    plan = make_plan(PATCH, batch_size=3)
    pool = case_pool(cache, [0, 1, 2], plan)
    beyond = 0
    for step in range(10):
        batch = make_batch(pool, plan, step)
        assert batch.step == step
        assert (batch.images.shape, batch.images.dtype) == ((3, 1, *PATCH), torch.float32)
        assert (batch.labels.shape, batch.labels.dtype) == ((3, *PATCH), torch.int64)
        for sample, draw in enumerate(draw_patches(pool, plan, step)):
            padded_image = np.pad(cache.image(draw.case).astype(np.float32), ((0, 0), *[(20, 20)] * 3))
            padded_labels = np.pad(cache.labels(draw.case), 20)
            window = tuple(slice(at + 20, at + 20 + size) for at, size in zip(draw.start, PATCH, strict=True))
            assert np.array_equal(batch.images[sample].numpy(), padded_image[(slice(None), *window)])
            assert np.array_equal(batch.labels[sample].numpy(), padded_labels[window])
            beyond += min(draw.start) < 0
    assert beyond > 0


@pytest.mark.parametrize("workers", [1, 3])
def test_threads_change_neither_order_nor_content(tmp_path: Path, workers: int) -> None:
    # Large enough for torch to share a sum out over threads, where it may.
    cache = write_cache(tmp_path / "big", {str(seed): blocks((44, 45, 50), seed) for seed in range(3)})
    config = Augmentation(contrast_probability=1.0, gamma_probability=1.0, gamma_inverted_probability=1.0)
    plan = make_plan((40, 40, 40), augmentation=config, steps=5)
    with TrainingBatches(cache, [0, 1, 2], plan, workers=0) as batches:
        alone = list(batches)
    with TrainingBatches(cache, [0, 1, 2], plan, workers=workers) as batches:
        together = list(batches)
    assert [batch.step for batch in alone] == [batch.step for batch in together] == list(range(5))
    for first, second in zip(alone, together, strict=True):
        assert torch.equal(first.images, second.images)
        assert torch.equal(first.labels, second.labels)


def test_a_resumed_run_goes_on_with_the_same_batches(cache: Cache) -> None:
    plan = make_plan(PATCH, augmentation=Augmentation(), steps=6)
    whole = list(TrainingBatches(cache, [0, 1], plan))
    rest = list(TrainingBatches(cache, [0, 1], plan, start_step=4))
    assert [batch.step for batch in rest] == [4, 5]
    assert torch.equal(whole[4].images, rest[0].images)
    assert torch.equal(whole[5].labels, rest[1].labels)


def test_a_rotated_patch_shows_the_label_where_the_image_is_bright(tmp_path: Path) -> None:
    shape = (28, 36, 30)
    labels = np.zeros(shape, dtype=np.uint8)
    labels[10:18, 12:22, 11:20] = 1
    cache = write_cache(tmp_path / "cases", {"cube": (labels[None].astype(np.float32), labels)})
    config = make_plan(PATCH).training.augmentation.replace(rotation_probability=1.0, scaling_probability=1.0)
    plan = make_plan(PATCH, augmentation=config, share=1.0)
    for step in range(8):
        batch = make_batch(case_pool(cache, [0], plan), plan, step)
        bright, inside = batch.images[:, 0] > 0.5, batch.labels == 1
        assert 2 * (bright & inside).sum() / (bright.sum() + inside.sum()) > 0.9


@pytest.mark.parametrize("workers", [0, 2])
def test_a_damaged_case_reaches_the_consumer_by_name(cache: Cache, workers: int) -> None:
    path = image_path(cache.folder, cache.entries[1])
    path.write_bytes(path.read_bytes()[:300])
    with (
        TrainingBatches(cache, [1], make_plan(PATCH), workers=workers) as batches,
        pytest.raises(ResourceError, match=r"case_1.*Delete"),
    ):
        next(batches)


def test_a_cache_whose_image_and_labels_do_not_fit_is_refused_with_the_case(cache: Cache) -> None:
    np.save(image_path(cache.folder, cache.entries[0]), np.zeros((1, 3, 3, 3), dtype=np.float16))
    with pytest.raises(ResourceError, match="case_0: its cached voxels can't be read") as caught:
        make_batch(case_pool(cache, [0], make_plan(PATCH)), make_plan(PATCH), 0)
    assert isinstance(caught.value.__cause__, ValueError)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_bug_keeps_its_type_and_says_which_step(cache: Cache, workers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    original = loader.make_batch

    def fails_at_two(*args: object, **options: object) -> object:
        if args[2] == 2:
            raise ZeroDivisionError("on purpose")
        return original(*args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(loader, "make_batch", fails_at_two)
    with TrainingBatches(cache, [0], make_plan(PATCH), workers=workers) as batches:
        assert [next(batches).step, next(batches).step] == [0, 1]
        with pytest.raises(ZeroDivisionError, match="on purpose") as caught:
            next(batches)
    assert "while the batch of step 2 was made of case_0, case_0" in caught.value.__notes__


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("error", [MemoryError("no room"), RuntimeError("[alloc] can't allocate memory: 8 bytes")])
def test_short_memory_is_told_with_step_and_cases(
    cache: Cache, workers: int, error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = loader.augment

    def fails_later(*args: object, **options: object) -> object:
        if next(counter) >= 2:
            raise error
        return original(*args, **options)  # type: ignore[arg-type]

    counter = itertools.count()
    monkeypatch.setattr(loader, "augment", fails_later)
    with (
        TrainingBatches(cache, [2], make_plan(PATCH), workers=workers) as batches,
        pytest.raises(
            ResourceError, match=r"batch of step \d: out of memory on cpu .* case_2, case_2 .*smaller"
        ) as caught,
    ):
        for _ in range(5):
            next(batches)
    assert caught.value.code == "memory"


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("damage", ["removed", "truncated"])
def test_a_case_damaged_on_the_way_ends_it_with_case_and_step(cache: Cache, workers: int, damage: str) -> None:
    path = image_path(cache.folder, cache.entries[2])
    with TrainingBatches(cache, [2], make_plan(PATCH, steps=50), workers=workers) as batches:
        next(batches)
        if damage == "removed":
            path.unlink()
        else:
            # Written anew beside it: the bytes under a map that a thread reads must not vanish.
            short = path.with_suffix(".part")
            short.write_bytes(path.read_bytes()[:400])
            short.replace(path)
        with pytest.raises(ResourceError, match=r"batch of step \d+: .*case_2.*Delete"):
            for _ in range(20):
                next(batches)


@pytest.mark.parametrize("world", [2, 3, 4])
def test_processes_make_the_batch_of_one_between_them(cache: Cache, world: int) -> None:
    plan = make_plan(PATCH, augmentation=Augmentation(), batch_size=4, steps=3)
    alone = list(TrainingBatches(cache, [0, 1, 2], plan))
    shares = [list(TrainingBatches(cache, [0, 1, 2], plan, rank=rank, world=world)) for rank in range(world)]
    for whole, *parts in zip(alone, *shares, strict=True):
        assert {part.step for part in parts} == {whole.step}
        assert torch.equal(torch.cat([part.images for part in parts]), whole.images)
        assert torch.equal(torch.cat([part.labels for part in parts]), whole.labels)
        assert tuple(case for part in parts for case in part.cases) == whole.cases


def test_more_processes_than_samples_are_refused_at_once(cache: Cache) -> None:
    with pytest.raises(PlanError, match="for 3 processes"):
        TrainingBatches(cache, [0], make_plan(PATCH), rank=0, world=3)


def test_weights_decide_on_the_cases(cache: Cache) -> None:
    weights = CaseWeights({"case_0": 0.0, "case_2": 0.0})
    batches = list(TrainingBatches(cache, [0, 1, 2], make_plan(PATCH), weights=weights))
    assert {case for batch in batches for case in batch.cases} == {"case_1"}


def test_labels_of_many_classes_come_out_whole(tmp_path: Path) -> None:
    cache = write_cache(tmp_path / "cases", {"many": blocks((20, 20, 20), 0)})
    labels = np.arange(8000, dtype=np.uint16).reshape(20, 20, 20) % 300
    np.save(labels_path(cache.folder, cache.entries[0]), labels)
    plan = make_plan((20, 20, 20), share=0.0)
    assert np.array_equal(make_batch(case_pool(cache, [0], plan), plan, 0).labels[0].numpy(), labels)


def test_close_ends_threads_and_iteration(cache: Cache) -> None:
    batches = TrainingBatches(cache, [0, 1], make_plan(PATCH, steps=1000), workers=2)
    next(batches)
    assert threads_of_the_pool()
    batches.close()
    batches.close()
    assert not threads_of_the_pool()
    assert list(batches) == []


def test_batches_are_made_ahead_but_not_without_bound(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    original = loader.make_batch

    def counted(*args: object, **options: object) -> object:
        made.append(args[2])
        return original(*args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(loader, "make_batch", counted)
    with TrainingBatches(cache, [0], make_plan(PATCH, steps=100), workers=1) as batches:
        next(batches)
        deadline = time.monotonic() + 200
        while len(made) < 1 + loader.AHEAD and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.05)
        assert made == list(range(1 + loader.AHEAD))


def test_waits_are_measured_and_the_number_of_threads_is_given_back(
    cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    original = loader.make_batch

    def slow(*args: object, **options: object) -> object:
        seen.append(torch.get_num_threads())
        time.sleep(0.05)
        return original(*args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(loader, "make_batch", slow)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        batches = TrainingBatches(cache, [0], make_plan(PATCH))
        assert batches.waited_s == 0.0
        next(batches)
        assert batches.waited_s >= 0.05
        assert batches.last_wait_s == batches.waited_s
        next(batches)
        assert 0.05 <= batches.last_wait_s < batches.waited_s
        assert seen == [1, 1]
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_no_cases_are_refused(cache: Cache) -> None:
    with pytest.raises(ResourceError, match="no training cases"):
        TrainingBatches(cache, [], make_plan(PATCH))


def test_threads_of_the_pool_compute_alone_and_leave_the_others_their_number(
    cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = set()
    original = loader.make_batch

    def watched(*args: object, **options: object) -> object:
        seen.add(torch.get_num_threads())
        return original(*args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(loader, "make_batch", watched)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        with TrainingBatches(cache, [0], make_plan(PATCH), workers=2) as batches:
            next(batches)
            assert torch.get_num_threads() == 2
        assert seen == {1}
    finally:
        torch.set_num_threads(before)
