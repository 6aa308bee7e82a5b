"""From logits to labels on the scan's grid: values, order of regions, ties, types, and the size of slabs."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from streamed import Known, classes, run
from torch import nn

from sagittal.inference import streaming
from sagittal.inference.labelling import LabelWriter
from sagittal.inference.memory import Choice, row_bytes
from sagittal.plan import DatasetSpec, Label
from sagittal.plan.base import Triple

AXIS = st.integers(1, 12)
TRIPLE = st.tuples(AXIS, AXIS, AXIS)


REGIONS = DatasetSpec(
    name="d",
    channel_names=("a",),
    labels=(Label(name="whole", values=(1, 2, 300)), Label(name="core", values=(2,)), Label(name="rim", values=(300,))),
    regions_class_order=(1, 300, 2),
    file_ending=".nii.gz",
)


def logits_of(shape: Triple, outputs: int) -> torch.Tensor:
    return torch.randn((outputs, *shape), generator=torch.Generator().manual_seed(3))


def labels_on_grid(
    logits: torch.Tensor, target: Triple, spec: DatasetSpec, *, slab_bytes: int = 1 << 24
) -> np.ndarray[Any, Any]:
    """Return what the stream makes of logits that a network gives in one window."""
    size: Triple = (logits.shape[1], logits.shape[2], logits.shape[3])
    engine = Known(len(logits), identity=True)
    return run(engine, logits.numpy(), size, target, spec=spec, choice=Choice(1, slab_bytes=slab_bytes))


@given(shape=TRIPLE, target=TRIPLE, slab_bytes=st.sampled_from([1, 5000, 1 << 30]))
@settings(max_examples=60, deadline=None, derandomize=True)
def test_slabs_equal_the_whole_volume_at_once(shape: Triple, target: Triple, slab_bytes: int) -> None:
    logits = logits_of(shape, 4)
    got = labels_on_grid(logits, target, classes(2, 5, 700), slab_bytes=slab_bytes)
    whole = nn.functional.interpolate(logits[None].double(), size=target, mode="trilinear", align_corners=False)[0]
    best, second = whole.topk(2, dim=0).values
    clear = (best - second > 1e-4).numpy()
    expected = np.array([0, 2, 5, 700])[whole.argmax(dim=0).numpy()]
    assert got.dtype == np.uint16 and got.shape == target
    np.testing.assert_array_equal(got[clear], expected[clear])


@given(shape=TRIPLE, target=TRIPLE, slab_bytes=st.sampled_from([1, 1 << 30]))
@settings(max_examples=40, deadline=None, derandomize=True)
def test_regions_are_written_in_their_order(shape: Triple, target: Triple, slab_bytes: int) -> None:
    logits = logits_of(shape, 3)
    got = labels_on_grid(logits, target, REGIONS, slab_bytes=slab_bytes)
    probs = nn.functional.interpolate(logits[None].double(), size=target, mode="trilinear", align_corners=False)[
        0
    ].sigmoid()
    expected = np.zeros(target, np.uint16)
    for value, region in zip((1, 300, 2), probs.numpy(), strict=True):
        expected[region > 0.5] = value
    clear = (np.abs(probs.numpy() - 0.5) > 1e-4).all(axis=0)
    np.testing.assert_array_equal(got[clear], expected[clear])


def test_same_grid_is_only_decided() -> None:
    logits = torch.tensor([[[[0.0, 1.0]]], [[[2.0, -1.0]]], [[[1.0, 1.5]]]])
    got = labels_on_grid(logits, (1, 1, 2), classes(3, 9))
    assert got.dtype == np.uint8
    assert got.tolist() == [[[3, 9]]]


def test_ties_take_the_first_class() -> None:
    got = labels_on_grid(torch.zeros((3, 2, 3, 4)), (2, 3, 4), classes(3, 9))
    assert not got.any()


def test_zero_is_not_inside_a_region() -> None:
    assert not labels_on_grid(torch.zeros((3, 2, 3, 4)), (4, 3, 2), REGIONS).any()


@pytest.mark.parametrize("planes", [1, 2])
def test_memory_decides_the_planes_of_a_slab(planes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    logits = logits_of((4, 5, 3), 2)
    seen: list[int] = []

    class Spy(LabelWriter):
        def __call__(self, place: Any, values: Any, outputs: Any = None) -> None:
            seen.append(place[0].stop - place[0].start)
            super().__call__(place, values, outputs)

    monkeypatch.setattr(streaming, "LabelWriter", Spy)
    budget = planes * row_bytes(2, (4, 5, 3), 0, (4, 5, 3), (4, 8, 9))
    labels_on_grid(logits, (4, 8, 9), classes(1), slab_bytes=budget)
    assert seen == [planes] * (4 // planes)


@pytest.mark.parametrize(
    ("label_map", "dtype"), [(((1, -3),), np.int16), (((5, 100_000),), np.int32), (((1, -1), (5, 2**40)), np.int64)]
)
def test_replaced_values_are_undone(label_map: tuple[tuple[int, int], ...], dtype: type) -> None:
    spec = classes(1, 5)
    logits = logits_of((3, 4, 5), 3)
    plain = labels_on_grid(logits, (6, 7, 8), spec)
    undone = labels_on_grid(logits, (6, 7, 8), spec.replace(label_map=label_map))
    assert undone.dtype == dtype
    expected = plain.astype(np.int64)
    for value, original in label_map:
        expected[plain == value] = original
    np.testing.assert_array_equal(undone, expected)


def test_replaced_values_of_regions_are_undone() -> None:
    spec = REGIONS.replace(label_map=((300, -7),))
    logits = logits_of((3, 4, 5), 3)
    plain = labels_on_grid(logits, (3, 4, 5), REGIONS).astype(np.int64)
    undone = labels_on_grid(logits, (3, 4, 5), spec)
    np.testing.assert_array_equal(undone, np.where(plain == 300, -7, plain))
