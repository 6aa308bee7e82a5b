"""The streamed prediction equals the whole-volume computation, whatever sizes, grids and memory."""

from __future__ import annotations

import tracemalloc
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from streamed import Known, KnownCoarse, Slabs, classes, image_of, run
from torch import nn
from whole_volume import labels_on_grid

from sagittal.data.label_index import label_index
from sagittal.errors import DataError, ResourceError
from sagittal.inference.engines.engine import LinearHead
from sagittal.inference.labelling import plane_bytes
from sagittal.inference.memory import Choice
from sagittal.inference.sliding_window import predict_logits
from sagittal.plan import DatasetSpec, Label
from sagittal.plan.base import Triple

AXIS = st.integers(1, 12)
TRIPLE = st.tuples(AXIS, AXIS, AXIS)
SIDE = st.integers(3, 12)
WINDOW = st.tuples(SIDE, SIDE, SIDE)
OVERLAP = st.sampled_from([0.0, 0.3, 0.5, 0.6])
REGIONS = DatasetSpec(
    name="d",
    channel_names=("a",),
    labels=(Label(name="whole", values=(1, 2, 300)), Label(name="core", values=(2,)), Label(name="rim", values=(300,))),
    regions_class_order=(1, 300, 2),
    file_ending=".nii.gz",
)


def whole(engine: Known, image: np.ndarray[Any, Any], window: Triple, target: Triple, **options: Any) -> torch.Tensor:
    """Return the logits of the whole-volume computation on the target grid (K, D, H, W)."""

    class Network(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.from_numpy(engine.logits(x.numpy()))

    given_options = {"overlap": 0.5, "mirror_axes": (), "mirror_swaps": None, **options}
    logits = predict_logits(
        Network().eval(),
        torch.from_numpy(image.astype(np.float32)),
        patch_size=window,
        num_outputs=engine.num_outputs,
        **given_options,
    )
    return nn.functional.interpolate(logits[None], size=target, mode="trilinear", align_corners=False)[0]


@given(
    shape=TRIPLE,
    window=WINDOW,
    target=TRIPLE,
    overlap=OVERLAP,
    mirror=st.sets(st.sampled_from([0, 1, 2])),
    outputs=st.sampled_from([2, 3, 7]),
    with_head=st.booleans(),
    batch=st.integers(1, 5),
    ahead=st.booleans(),
    slab=st.sampled_from([1, 4000, 1 << 24]),
)
@settings(max_examples=25, deadline=None, derandomize=True)
def test_logits_and_labels_equal_the_whole_volume(
    shape: Triple,
    window: Triple,
    target: Triple,
    overlap: float,
    mirror: set[int],
    outputs: int,
    with_head: bool,
    batch: int,
    ahead: bool,
    slab: int,
) -> None:
    image, engine = image_of(shape), Known(outputs, features=3 if with_head else None)
    choice = Choice(batch, ahead, 2, slab_bytes=slab)
    options: dict[str, Any] = {"overlap": overlap, "mirror_axes": tuple(mirror)}
    expected = whole(engine, image, window, target, **options)
    seen = Slabs()
    labels = run(engine, image, window, target, choice=choice, consumers=(seen,), **options)
    np.testing.assert_allclose(seen.whole(), expected.numpy(), rtol=1e-4, atol=1e-4)
    best, second = expected.topk(2, dim=0).values
    clear = (best - second > 1e-4).numpy()
    np.testing.assert_array_equal(labels[clear], expected.argmax(dim=0).numpy()[clear])
    # Without consumers the outermost axis is free; nothing else may change.
    alone = run(engine, image, window, target, choice=choice, **options)
    np.testing.assert_array_equal(alone[clear], labels[clear])


EVEN = st.sampled_from([4, 6, 8, 12])


@given(
    shape=TRIPLE,
    window=st.tuples(EVEN, EVEN, EVEN),
    target=st.tuples(AXIS, AXIS, st.sampled_from([1, 9, 40, 70])),
    overlap=OVERLAP,
    mirror=st.sets(st.sampled_from([0, 1, 2])),
    regions=st.booleans(),
)
@settings(max_examples=25, deadline=None, derandomize=True)
def test_coarse_logits_give_the_whole_volumes_logits_and_labels(
    shape: Triple, window: Triple, target: Triple, overlap: float, mirror: set[int], regions: bool
) -> None:
    outputs = 3 if regions else 5
    image, engine = image_of(shape), KnownCoarse(outputs)
    options: dict[str, Any] = {"overlap": overlap, "mirror_axes": tuple(mirror)}
    expected = whole(engine, image, window, target, **options)
    options |= {"choice": Choice(2, ahead=True, kept_values=1), "spec": REGIONS if regions else None}
    seen = Slabs()
    run(engine, image, window, target, consumers=(seen,), **options)
    np.testing.assert_allclose(seen.whole(), expected.numpy(), rtol=1e-4, atol=1e-4)
    engine.asked.clear()
    labels = run(engine, image, window, target, **options)
    assert engine.asked == {"coarse"}
    wanted = labels_on_grid(expected, target, label_index(REGIONS if regions else classes(1, 2, 3, 4)))
    best, second = expected.topk(2, dim=0).values
    clear = (((expected.abs() > 1e-4).all(dim=0)) if regions else (best - second > 1e-4)).numpy()
    np.testing.assert_array_equal(labels[clear], wanted[clear])


def test_coarse_logits_are_taken_only_where_the_stride_divides_the_window() -> None:
    engine, image = KnownCoarse(5), image_of((9, 8, 7))
    run(engine, image, (5, 6, 6), (9, 8, 7))
    assert engine.asked == {"logits"}


@given(shape=TRIPLE, window=WINDOW, target=TRIPLE, with_head=st.booleans())
@settings(max_examples=25, deadline=None, derandomize=True)
def test_regions_are_those_of_the_whole_volume(shape: Triple, window: Triple, target: Triple, with_head: bool) -> None:
    image, engine = image_of(shape), Known(3, features=2 if with_head else None)
    expected = whole(engine, image, window, target)
    got = run(engine, image, window, target, spec=REGIONS)
    wanted = labels_on_grid(expected, target, label_index(REGIONS))
    clear = (expected.abs() > 1e-4).all(dim=0).numpy()
    assert got.dtype == np.uint16
    np.testing.assert_array_equal(got[clear], wanted[clear])


@given(shape=TRIPLE, window=WINDOW, overlap=OVERLAP, mirror=st.sets(st.sampled_from([0, 1, 2])))
@settings(max_examples=25, deadline=None, derandomize=True)
def test_an_identity_network_returns_its_input(shape: Triple, window: Triple, overlap: float, mirror: set[int]) -> None:
    image = image_of(shape, channels=2)
    before = image.copy()
    seen = Slabs()
    labels = run(Known(2, identity=True), image, window, shape, overlap=overlap, mirror_axes=mirror, consumers=(seen,))
    np.testing.assert_allclose(seen.whole(), image, rtol=1e-5, atol=1e-5)
    assert labels.shape == shape
    np.testing.assert_array_equal(image, before)


@pytest.mark.parametrize("features", [None, 2])
def test_outputs_that_a_mirror_swaps_are_swapped_back(features: int | None) -> None:
    # Two groups of two features stay below seven outputs, so that the head is applied last with both kinds of rows.
    engine, image = Known(7, features=features), image_of((9, 8, 11))
    options: dict[str, Any] = {"mirror_axes": (0, 2), "mirror_swaps": {2: (0, 2, 1, 3, 4, 6, 5)}}
    expected = whole(engine, image, (6, 5, 7), (12, 7, 9), **options)
    seen = Slabs()
    run(engine, image, (6, 5, 7), (12, 7, 9), consumers=(seen,), **options)
    np.testing.assert_allclose(seen.whole(), expected.numpy(), rtol=1e-4, atol=1e-4)


def test_swaps_take_the_logits_where_features_would_be_more() -> None:
    engine, image = Known(5, features=3), image_of((9, 8, 11))
    options: dict[str, Any] = {"mirror_axes": (2,), "mirror_swaps": {2: (0, 2, 1, 3, 4)}}
    seen = Slabs()
    run(engine, image, (6, 5, 7), (9, 8, 11), consumers=(seen,), **options)
    assert engine.asked == {"logits"}
    expected = whole(engine, image, (6, 5, 7), (9, 8, 11), **options)
    np.testing.assert_allclose(seen.whole(), expected.numpy(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("features", "asked"), [(3, "features"), (7, "logits"), (9, "logits"), (None, "logits")])
def test_the_head_comes_last_where_features_are_fewer(features: int | None, asked: str) -> None:
    engine = Known(7, features=features)
    run(engine, image_of((9, 8, 7)), (5, 6, 7), (9, 8, 7))
    assert engine.asked == {asked}


def test_half_accumulators_and_images_change_little() -> None:
    image, engine = image_of((21, 18, 16)), Known(7, features=3)
    choice = Choice(1, half=True, halve_image=True)
    exact, halved = Slabs(), Slabs()
    run(engine, image, (8, 8, 8), (21, 18, 16), consumers=(exact,))
    run(engine, image.astype(np.float16), (8, 8, 8), (21, 18, 16), choice=choice, consumers=(halved,))
    np.testing.assert_allclose(halved.whole(), exact.whole(), atol=2e-2)
    assert not np.array_equal(halved.whole(), exact.whole())


def test_outputs_beyond_float16_are_refused_where_it_is_needed() -> None:
    engine = Known(2, identity=True)
    image = np.full((2, 9, 9, 9), 7e4, np.float32)
    run(engine, image, (5, 5, 5), (9, 9, 9))
    with pytest.raises(ResourceError, match="float16 does not hold") as caught:
        run(engine, image, (5, 5, 5), (9, 9, 9), choice=Choice(1, half=True))
    assert caught.value.code == "memory"


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("shape", [(4, 4, 4), (4, 9, 4)])
def test_output_that_is_not_finite_is_an_error(bad: float, shape: Triple) -> None:
    class Poisoned(Known):
        def logits(self, windows: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
            logits = super().logits(windows)
            logits[0, 1, 1, 1, 1] = bad
            return logits

    with pytest.raises(DataError, match="not finite") as caught:
        run(Poisoned(2), image_of(shape), (4, 4, 4), shape)
    assert caught.value.code == "output_not_finite"


def test_windows_are_batched_and_reported() -> None:
    engine = Known(2)
    seen: list[tuple[int, int]] = []
    run(engine, image_of((8, 4, 12)), (4, 4, 8), (8, 4, 12), choice=Choice(4), on_window=lambda *at: seen.append(at))
    assert engine.batches == [4, 2]
    assert seen == [(4, 6), (6, 6)]


def test_slabs_reach_consumers_once_in_order_and_whole() -> None:
    image, engine, seen = image_of((20, 6, 30)), Known(5, features=2), Slabs()
    rows = plane_bytes(5, 9, 25)
    run(engine, image, (8, 6, 8), (33, 9, 25), choice=Choice(1, slab_bytes=2 * rows), consumers=(seen,))
    assert max(stop - start for start, stop in seen.rows) == 2
    assert [start for start, _ in seen.rows] == [0, *[stop for _, stop in seen.rows[:-1]]]
    assert seen.rows[-1][1] == 33 and seen.whole().shape == (5, 33, 9, 25)


def test_any_type_of_label_is_written_through_any_view() -> None:
    spec = classes(2, 5).replace(label_map=((5, -70_000),))
    engine, image = Known(3), image_of((9, 8, 7))
    plain = run(engine, image, (5, 5, 5), (11, 6, 9))
    whole_map = np.full((9 + 2, 11, 6 + 1), 77, np.int32)
    view = whole_map.transpose(1, 2, 0)[::-1, 1:, 2:]
    run(engine, image, (5, 5, 5), (11, 6, 9), spec=spec, labels=view)
    np.testing.assert_array_equal(view, np.array([0, 2, -70_000])[plain])
    assert (whole_map[:2] == 77).all() and (whole_map[:, :, 0] == 77).all()


def _peak_bytes(outputs: int, features: int | None, length: int) -> int:
    image = image_of((length, 24, 20))
    engine = Known(outputs, features=features)
    tracemalloc.start()
    try:
        run(engine, image, (16, 16, 16), (length, 24, 20), choice=Choice(1, slab_bytes=1 << 16))
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_memory_grows_neither_with_classes_nor_with_length() -> None:
    few, many = (_peak_bytes(outputs, 4, 64) for outputs in (8, 120))
    volume = 64 * 24 * 20
    # What grows are the logits of the few voxels that are decided at once.
    assert many - few < 3 * 2048 * 120 * 4
    assert many < 0.3 * 120 * volume * 4
    label_and_pixel = 64 * 24 * 20 * (1 + 4)
    assert _peak_bytes(8, 4, 128) - few < 1.5 * label_and_pixel


def test_a_head_of_another_width_is_our_own_bug() -> None:
    engine = Known(7, features=3)
    engine.head = LinearHead(np.ones((7, 2), np.float32), np.zeros(7, np.float32))
    with pytest.raises((AssertionError, ValueError)):
        run(engine, image_of((9, 8, 7)), (5, 6, 7), (9, 8, 7))
