"""Windowed attention: windows, positions and masks against the definition of Swin, written out token by token."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from sagittal.networks.window_attention import (
    WindowAttention,
    fit_windows,
    join_windows,
    relative_index,
    separating_mask,
    split_windows,
)


def plain_window_attention(attention: WindowAttention, packed: Tensor, *, shifted: bool) -> Tensor:
    """Attend token by token: which tokens share a window is worked out from their coordinates."""
    sizes, heads = packed.shape[1:4], attention.heads
    query, key, value = packed[0].chunk(3, dim=-1)
    width = query.shape[-1] // heads
    lengths = [min(size, length) for size, length in zip(sizes, attention.window, strict=True)]
    shifts = [length // 2 if shifted and size > length else 0 for size, length in zip(sizes, lengths, strict=True)]
    middle = [length - 1 for length in attention.window]
    tokens = list(itertools.product(*map(range, sizes)))
    # A window that begins before the grid holds the first tokens alone: shifted windows lie at shift - length.
    home = {
        token: tuple((at - shift) // length for at, shift, length in zip(token, shifts, lengths, strict=True))
        for token in tokens
    }
    result = torch.zeros_like(query)
    for token in tokens:
        seen = [other for other in tokens if home[other] == home[token]]
        for head in range(heads):
            part = slice(head * width, (head + 1) * width)
            scores = []
            for other in seen:
                offset = [a - b + m for a, b, m in zip(token, other, middle, strict=True)]
                product = query[token][part] @ key[other][part] / width**0.5
                scores.append(product + attention.position_bias[(0, head, *offset)])
            weights = torch.stack(scores).softmax(0)
            result[token][part] = sum(weight * value[other][part] for weight, other in zip(weights, seen, strict=True))
    return attention.proj(result)[None]


@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize("sizes", [(2, 4, 6), (3, 5, 4), (1, 2, 7), (2, 3, 4), (1, 1, 1)])
def test_attention_follows_its_definition(sizes: tuple[int, int, int], shifted: bool) -> None:
    torch.manual_seed(0)
    attention = WindowAttention(4, 2, (2, 3, 4)).double()
    packed = torch.randn(1, *sizes, 12, dtype=torch.float64)
    with torch.no_grad():
        attention.position_bias.normal_()
        expected = plain_window_attention(attention, packed, shifted=shifted)
        torch.testing.assert_close(attention(packed, shifted=shifted), expected)
        twice = attention(torch.cat([packed, -packed]), shifted=shifted)
        torch.testing.assert_close(twice[:1], expected)


def test_windows_are_no_longer_than_the_grid() -> None:
    assert fit_windows((2, 7, 8), (4, 4, 4)) == ((2, 4, 4), (1, 2, 2))


def test_windows_split_and_join() -> None:
    grid = torch.arange(2 * 2 * 6 * 4 * 3).reshape(2, 2, 6, 4, 3)
    windows = split_windows(grid, (1, 3, 2))
    assert windows.shape == (2, 8, 6, 3)
    assert torch.equal(windows[1, 3], grid[1, 0, 3:, 2:].reshape(6, 3))
    assert torch.equal(join_windows(windows, (2, 2, 2), (1, 3, 2)), grid)


def test_offsets_are_found_in_the_table() -> None:
    index = relative_index((3, 4, 5))
    table = torch.arange(5 * 7 * 9).reshape(5, 7, 9)
    assert index[1, 2, 3, 1, 2, 3] == table[2, 3, 4]
    assert index[2, 0, 4, 0, 3, 0] == table[4, 0, 8]
    assert index[0, 1, 2, 1, 0, 2] == table[1, 4, 4]


def test_padding_and_wrapped_tokens_are_kept_apart() -> None:
    mask = separating_mask((1, 1, 5), (1, 1, 3), (0, 0, 1), torch.device("cpu"))
    # Rolled by one, the six tokens 0 to 4 and the padding stand in the order 1 2 3 | 4 padding 0.
    assert not mask[0].any()
    assert torch.equal(~mask[1], torch.eye(3, dtype=torch.bool))
