from __future__ import annotations

from itertools import combinations
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from sagittal.errors import DataError
from sagittal.inference.sliding_window import predict_logits
from sagittal.inference.windows import gaussian, window_starts
from sagittal.plan.base import Triple

AXIS = st.integers(1, 14)
TRIPLE = st.tuples(AXIS, AXIS, AXIS)


class Recorder(nn.Module):
    """Give back what comes in, plus what `change` adds, and remember the calls."""

    def __init__(self, change: Any = None) -> None:
        super().__init__()
        self.change = change
        self.calls: list[tuple[int, ...]] = []
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        self.calls.append(tuple(x.shape))
        return x if self.change is None else self.change(x)


def predict(network: nn.Module, image: Tensor, window: Triple, **options: Any) -> Tensor:
    given = {"overlap": 0.5, "mirror_axes": (), "window_batch": 1, "num_outputs": image.shape[0], **options}
    return predict_logits(network, image, patch_size=window, **given)


def image_of(shape: Triple, channels: int = 2, seed: int = 0) -> Tensor:
    return torch.randn((channels, *shape), generator=torch.Generator().manual_seed(seed))


@given(
    shape=TRIPLE,
    window=TRIPLE,
    overlap=st.sampled_from([0.0, 0.25, 0.5, 0.75]),
    mirror=st.sets(st.sampled_from([0, 1, 2])),
    batch=st.integers(1, 5),
)
@settings(max_examples=60, deadline=None, derandomize=True)
def test_an_identity_network_returns_its_input(
    shape: Triple, window: Triple, overlap: float, mirror: set[int], batch: int
) -> None:
    image = image_of(shape)
    before = image.clone()
    options = {"overlap": overlap, "mirror_axes": tuple(mirror), "window_batch": batch}
    logits = predict(Recorder(), image, window, **options)
    assert logits.dtype == torch.float32 and logits.is_contiguous()
    torch.testing.assert_close(logits, image, rtol=1e-5, atol=1e-5)
    assert torch.equal(image, before)


def test_blending_equals_a_plain_sum() -> None:
    image = image_of((11, 7, 9), channels=1)
    window = (6, 5, 4)

    def shifting(x: Tensor) -> Tensor:
        # Depends on the place inside the window, so that wrong weights or places show.
        ramp = torch.arange(x[0, 0].numel(), dtype=torch.float32).reshape(x.shape[2:])
        return torch.cat([x, x * ramp, x - ramp], dim=1)

    got = predict(Recorder(shifting), image, window, num_outputs=3, window_batch=4)
    weight = gaussian(6)[:, None, None] * gaussian(5)[:, None] * gaussian(4)
    total, weights = np.zeros((3, 11, 7, 9)), np.zeros((11, 7, 9))
    for d in window_starts(11, 6, 0.5):
        for h in window_starts(7, 5, 0.5):
            for w in window_starts(9, 4, 0.5):
                place = (slice(d, d + 6), slice(h, h + 5), slice(w, w + 4))
                total[:, *place] += shifting(image[None, :, *place])[0].double().numpy() * weight
                weights[place] += weight
    np.testing.assert_allclose(got.numpy(), total / weights, rtol=1e-4, atol=1e-4)


def test_mirroring_averages_every_combination() -> None:
    image = image_of((4, 5, 6), channels=1)
    ramp = torch.arange(120, dtype=torch.float32).reshape(4, 5, 6)
    recorder = Recorder(lambda x: x * ramp)
    got = predict(recorder, image, (4, 5, 6), mirror_axes=(2, 0))
    expected = torch.zeros_like(image)
    for flips in [()] + [c for n in (1, 2) for c in combinations((1, 3), n)]:
        expected += (image.flip(flips) * ramp).flip(flips) / 4
    assert len(recorder.calls) == 4
    torch.testing.assert_close(got, expected)


def test_outputs_that_a_mirror_swaps_are_swapped_back() -> None:
    image = image_of((4, 5, 6), channels=4)
    ramp = torch.arange(120, dtype=torch.float32).reshape(4, 5, 6)
    got = predict(Recorder(lambda x: x * ramp), image, (4, 5, 6), mirror_axes=(0, 2), mirror_swaps={2: (0, 2, 1, 3)})
    expected = torch.zeros_like(image)
    for flips in [(), (1,), (3,), (1, 3)]:
        output = (image.flip(flips) * ramp).flip(flips)
        expected += (output[[0, 2, 1, 3]] if 3 in flips else output) / 4
    torch.testing.assert_close(got, expected)


@given(
    shape=st.tuples(*[st.integers(5, 12)] * 3),
    mirror=st.sets(st.sampled_from([0, 1, 2])),
    axis=st.integers(0, 2),
    batch=st.integers(1, 3),
)
@settings(max_examples=40, deadline=None, derandomize=True)
def test_a_network_that_knows_its_sides_gives_the_same_labels_mirrored_or_not(
    shape: Triple, mirror: set[int], axis: int, batch: int
) -> None:
    # It knows left from right by what lies on either side of a voxel, so a mirrored scan shows it the other side.
    def sided(x: Tensor) -> Tensor:
        slope = torch.gradient(x[:, 0], dim=axis + 1)[0]
        organ = (x[:, 0] - 0.3).abs()
        return torch.stack([0.2 - organ, slope, -slope, organ - 1], dim=1)

    image = image_of(shape, channels=1)
    options: dict[str, Any] = {"num_outputs": 4, "window_batch": batch}
    plain = predict(Recorder(sided), image, (5, 6, 7), **options)
    options |= {"mirror_axes": tuple(mirror), "mirror_swaps": {axis: (0, 2, 1, 3)}}
    mirrored = predict(Recorder(sided), image, (5, 6, 7), **options)
    torch.testing.assert_close(mirrored, plain, rtol=1e-5, atol=1e-5)
    assert (mirrored.argmax(0) == plain.argmax(0)).float().mean() > 0.999


def test_without_swaps_a_network_that_knows_its_sides_is_confused_by_a_mirror() -> None:
    image = image_of((6, 6, 8), channels=1)
    sided = Recorder(
        lambda x: torch.cat([x.diff(dim=4, prepend=x[..., :1]), -x.diff(dim=4, prepend=x[..., :1])], dim=1)
    )
    plain = predict(sided, image, (6, 6, 8), num_outputs=2)
    confused = predict(sided, image, (6, 6, 8), num_outputs=2, mirror_axes=(2,))
    assert (confused.argmax(0) != plain.argmax(0)).float().mean() > 0.1


@pytest.mark.parametrize(("axes", "calls"), [((), 1), ((1,), 2), ((0, 1, 2), 8), ((0, 0), 2)])
def test_number_of_mirrored_calls(axes: tuple[int, ...], calls: int) -> None:
    recorder = Recorder()
    predict(recorder, image_of((4, 4, 4)), (4, 4, 4), mirror_axes=axes)
    assert len(recorder.calls) == calls


def test_windows_are_batched_and_reported() -> None:
    recorder = Recorder()
    seen: list[tuple[int, int]] = []
    options: dict[str, Any] = {"window_batch": 4, "on_window": lambda done, total: seen.append((done, total))}
    predict(recorder, image_of((8, 4, 12)), (4, 4, 8), **options)
    assert recorder.calls == [(4, 2, 4, 4, 8), (2, 2, 4, 4, 8)]
    assert seen == [(4, 6), (6, 6)]


def test_one_window_is_seen_once_without_blending() -> None:
    recorder = Recorder()
    image = image_of((3, 5, 8))
    seen: list[tuple[int, int]] = []
    got = predict(recorder, image, (4, 8, 8), on_window=lambda done, total: seen.append((done, total)))
    assert recorder.calls == [(1, 2, 4, 8, 8)]
    assert seen == [(1, 1)]
    assert torch.equal(got, image)


def test_padding_is_zero_at_both_sides() -> None:
    inside = Recorder(lambda x: x.sum(dim=(2, 3, 4), keepdim=True).expand_as(x))
    image = torch.ones((1, 2, 3, 4))
    assert torch.equal(predict(inside, image, (5, 6, 8)), torch.full((1, 2, 3, 4), 24.0))


def test_a_constant_stays_constant_to_the_corner() -> None:
    got = predict(Recorder(lambda x: torch.full_like(x, 7.25)), image_of((40, 33, 37)), (32, 32, 32))
    torch.testing.assert_close(got, torch.full((2, 40, 33, 37), 7.25), rtol=1e-6, atol=0)


def test_the_same_twice_is_the_same_bit_for_bit() -> None:
    torch.manual_seed(0)
    network = nn.Conv3d(2, 3, 3, padding=1).eval()
    image = image_of((11, 12, 13))
    first, second = (predict(network, image, (8, 8, 8), num_outputs=3, mirror_axes=(0, 1)) for _ in range(2))
    assert torch.equal(first, second)
    assert not first.requires_grad


def test_batches_change_only_rounding() -> None:
    torch.manual_seed(0)
    network = nn.Conv3d(2, 3, 3, padding=1).eval()
    image = image_of((11, 12, 13))
    one = predict(network, image, (8, 8, 8), num_outputs=3)
    torch.testing.assert_close(predict(network, image, (8, 8, 8), num_outputs=3, window_batch=5), one)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("shape", [(4, 4, 4), (4, 9, 4)])
def test_output_that_is_not_finite_is_an_error(bad: float, shape: Triple) -> None:
    def poison(x: Tensor) -> Tensor:
        x = x.clone()
        x[0, 0, 1, 1, 1] = bad
        return x

    with pytest.raises(DataError, match="not finite") as caught:
        predict(Recorder(poison), image_of(shape), (4, 4, 4))
    assert caught.value.code == "output_not_finite"


def test_train_mode_and_wrong_shapes_are_our_own_bugs() -> None:
    with pytest.raises(AssertionError, match="eval mode"):
        predict(Recorder().train(), image_of((4, 4, 4)), (4, 4, 4))
    with pytest.raises(AssertionError, match="the network gave"):
        predict(Recorder(), image_of((4, 4, 4)), (4, 4, 4), num_outputs=5)


def test_half_precision_outputs_are_summed_in_float32() -> None:
    got = predict(Recorder(lambda x: x.half()), image_of((9, 9, 9)), (8, 8, 8))
    assert got.dtype == torch.float32
