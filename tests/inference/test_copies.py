"""What is equal is computed once: constant windows, and mirror images of a window that equal it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from streamed import Folds, Known, classes, image_of

from sagittal.inference.copies import Copies, mirrors_of, outputs_of
from sagittal.inference.timings import Timings
from sagittal.inference.uncertainty import Disagreement
from sagittal.inference.windows import gaussian

EVERY = mirrors_of((0, 1, 2), {})


def copies_of(engine: Known, mirrors: Any = EVERY, **options: Any) -> Copies:
    return Copies(engine, mirrors, (4, 5, 6), **{"window_batch": 8, "kept_values": 2, **options})


def plain_mean(engine: Known, window: np.ndarray[Any, Any], axes: tuple[int, ...] = (0, 1, 2)) -> np.ndarray[Any, Any]:
    total = np.zeros((engine.num_outputs, *window.shape[1:]))
    mirrors = mirrors_of(axes, {})
    for mirror in mirrors:
        flips = tuple(axis + 1 for axis in mirror.axes)
        total += np.flip(engine.logits(np.flip(window, flips)[None])[0], flips)
    return total / len(mirrors)


def test_every_combination_of_axes_once() -> None:
    assert [mirror.axes for mirror in EVERY] == [(), (0,), (1,), (2,), (0, 1), (0, 2), (1, 2), (0, 1, 2)]
    assert mirrors_of((1, 1), {}) == mirrors_of((1,), {}) and len(mirrors_of((), {})) == 1


@pytest.mark.parametrize(
    ("symmetric", "computed"), [((), 8), ((0,), 4), ((0, 2), 2), ((0, 1, 2), 1)], ids=["none", "D", "D and W", "all"]
)
def test_a_window_that_equals_its_mirror_images_is_computed_once(symmetric: tuple[int, ...], computed: int) -> None:
    window = image_of((4, 5, 6))
    for axis in symmetric:
        window = window + np.flip(window, axis + 1)
    engine = Known(3)
    (got,) = copies_of(engine)([window], Timings())
    assert sum(engine.batches) == computed
    np.testing.assert_allclose(got, plain_mean(engine, window), rtol=1e-4, atol=1e-4)


def test_a_window_turned_by_180_degrees_counts_too() -> None:
    window = image_of((4, 5, 6))
    window = window + np.flip(window, (1, 2))
    engine = Known(3)
    (got,) = copies_of(engine)([window], Timings())
    assert sum(engine.batches) == 4
    np.testing.assert_allclose(got, plain_mean(engine, window), rtol=1e-4, atol=1e-4)


def test_constant_windows_are_computed_once_for_each_value() -> None:
    engine = Known(3)
    copies = copies_of(engine, mirrors_of((), {}))
    air, other = np.full((1, 4, 5, 6), -1.5, np.float32), np.full((1, 4, 5, 6), 2.0, np.float32)
    timings = Timings()
    first, second, third = copies([air, other, air.copy()], timings)
    assert sum(engine.batches) == 2
    np.testing.assert_array_equal(first, third)
    first += 1e6
    (again,) = copies([air], timings)
    assert sum(engine.batches) == 2
    np.testing.assert_array_equal(again, third)
    np.testing.assert_allclose(second, engine.logits(other[None])[0], rtol=1e-5)
    assert timings.seconds["network"] > 0


def test_no_more_values_are_kept_than_there_is_room_for() -> None:
    engine = Known(3)
    copies = copies_of(engine, mirrors_of((), {}), kept_values=1)
    for value in (1.0, 2.0, 1.0, 2.0):
        copies([np.full((1, 4, 4, 4), value, np.float32)], Timings())
    assert sum(engine.batches) == 3


def test_constant_in_one_channel_is_not_constant() -> None:
    engine = Known(3)
    copies = copies_of(engine, mirrors_of((), {}))
    for seed in (0, 1):
        window = np.concatenate([np.ones((1, 4, 4, 4), np.float32), image_of((4, 4, 4), seed=seed)])
        copies([window], Timings())
    assert sum(engine.batches) == 2


def test_copies_are_batched() -> None:
    engine = Known(3)
    windows = [image_of((4, 5, 6), seed=seed) for seed in (1, 2)]
    got = copies_of(engine, window_batch=5)(windows, Timings())
    assert engine.batches == [5, 5, 5, 1]
    for window, mean in zip(windows, got, strict=True):
        np.testing.assert_allclose(mean, plain_mean(engine, window), rtol=1e-4, atol=1e-4)


def test_mirrors_that_swap_labels_keep_their_features_apart() -> None:
    engine = Known(9, features=2)
    table = (0, 2, 1, 3, 4, 5, 6, 7, 8)
    assert outputs_of(engine, EVERY, (4, 5, 6)).channels == 2
    both = outputs_of(engine, mirrors_of((0, 2), {2: table}), (4, 5, 6))
    assert both.channels == 4 and both.groups == (0, 0, 1, 1)
    assert both.head is not None and engine.head is not None
    np.testing.assert_allclose(both.head.weight[:, 2:], engine.head.weight[list(table)] / 2)
    np.testing.assert_allclose(both.head.weight[:, :2], engine.head.weight / 2)


@pytest.mark.parametrize("kind", ["logits", "features", "coarse"])
@pytest.mark.parametrize("axes", [(), (2,)])
def test_folds_are_compared_copy_by_copy(kind: str, axes: tuple[int, ...]) -> None:
    outputs, table = 9, (0, 2, 1, 3, 4, 5, 6, 7, 8)
    engine = Folds(outputs, 2, features=2 if kind == "features" else None, coarse=kind == "coarse")
    mirrors = mirrors_of(axes, {2: table})
    spec, window = classes(*range(1, outputs)), image_of((4, 6, 8))
    disagreement, expected = Disagreement(spec), Disagreement(spec)
    copies = Copies(engine, mirrors, (4, 6, 8), window_batch=3, kept_values=2, disagreement=disagreement)
    constant = np.ones((1, 4, 6, 8), np.float32)
    mean, _ = copies([window, constant], Timings())
    plain = Copies(engine, mirrors, (4, 6, 8), window_batch=3, kept_values=2)([window], Timings())
    np.testing.assert_allclose(mean, plain[0], rtol=1e-4, atol=1e-4)
    members = []
    for mirror in mirrors:
        flips = tuple(axis + 1 for axis in mirror.axes)
        for fold in engine.folds:
            shown = np.flip(window, flips)[None]
            logits = np.flip((fold.coarse_logits if kind == "coarse" else fold.logits)(shown)[0], flips)
            members.append(logits[list(mirror.outputs or range(outputs))])
    d, h, w = (gaussian(size).astype(np.float32) for size in members[0].shape[1:])
    expected.look(np.stack(members), d[:, None, None] * h[:, None] * w)
    assert disagreement.looked and len(members) == 2 * len(mirrors)
    assert disagreement.agreement() == pytest.approx(expected.agreement())
    assert min(expected.agreement().values()) < 0.9


def test_windows_of_one_value_are_not_compared_since_the_memory_decides_how_many_are_computed() -> None:
    for kept in (0, 2):
        disagreement = Disagreement(classes(1, 2))
        copies = copies_of(Known(3), kept_values=kept, disagreement=disagreement)
        for _ in range(2):
            copies([np.ones((1, 4, 5, 6), np.float32)], Timings())
        assert not disagreement.looked
