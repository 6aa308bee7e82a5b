"""Self-attention within windows of a 3D token grid, plain or shifted, with a bias for each relative position.

As in Swin (arXiv 2103.14030), in three dimensions, for grids of any size. Masks and indices are computed from shapes,
so that a traced network holds them as constants. Letters: T tokens of a window, h heads.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from sagittal.networks.layout import Size, divide_up, round_up, triple


class WindowAttention(nn.Module):
    """Attention within windows of a token grid, with a learned bias for each relative position.

    A window is never longer than the grid, and an axis that one window covers is not shifted. Other axes are padded to
    whole windows; no token attends to the padding, nor to those that only the cyclic shift made its neighbours.
    """

    def __init__(self, width: int, heads: int, window: Size) -> None:
        super().__init__()
        self.heads = heads
        self.window = window
        # Five axes, the last three of space, like a convolution's kernel.
        self.position_bias = nn.Parameter(torch.empty(1, heads, *(2 * length - 1 for length in window)))
        self.index: Tensor
        self.register_buffer("index", relative_index(window), persistent=False)
        self.proj = nn.Linear(width, width)
        nn.init.trunc_normal_(self.position_bias, std=0.02)

    def forward(self, packed: Tensor, *, shifted: bool) -> Tensor:
        """Map queries, keys and values, side by side in a grid (N, D, H, W, 3 * C), to a grid (N, D, H, W, C).

        Args:
            packed: the three projections in the order query, key, value.
            shifted: move the windows by half their length.
        """
        depth, height, width = packed.shape[1:4]
        window, counts = fit_windows((depth, height, width), self.window)
        whole = triple(count * length for count, length in zip(counts, window, strict=True))
        shifts = triple(
            length // 2 if shifted and count > 1 else 0 for length, count in zip(window, counts, strict=True)
        )
        mask = None
        if any(shifts) or whole != (depth, height, width):
            mask = separating_mask((depth, height, width), window, shifts, packed.device)
        packed = nn.functional.pad(packed, (0, 0, 0, whole[2] - width, 0, whole[1] - height, 0, whole[0] - depth))
        mixed = self._attend(split_windows(_rolled(packed, shifts, -1), window), window, mask)
        grid = _rolled(join_windows(mixed, counts, window), shifts, 1)
        result: Tensor = self.proj(grid[:, :depth, :height, :width])
        return result

    def _attend(self, packed: Tensor, window: Size, mask: Tensor | None) -> Tensor:
        """Map (N, windows, T, 3 * C) to (N, windows, T, C); `mask` (windows, T, T) is True where nothing may pass."""
        batch, windows, tokens, _ = packed.shape
        query, key, value = packed.reshape(batch, windows, tokens, 3, self.heads, -1).permute(3, 0, 1, 4, 2, 5)
        bias = self._bias(window).to(query.dtype)
        # Attention has one batch axis and one of heads. The windows go with the batch where all have the same bias,
        # else with the heads: then neither case needs a copy of the bias for each image.
        first = 0
        if mask is not None:
            bias = bias.masked_fill(mask[:, None], -math.inf).flatten(0, 1)[None]
            first = 1
        query, key, value = (part.flatten(first, first + 1) for part in (query, key, value))
        mixed = nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=bias)
        mixed = mixed.reshape(batch, windows, self.heads, tokens, -1).transpose(2, 3)
        # The kernels of attention differ in the layout of their output: a view that an exported graph took of one's
        # would not be possible of another's.
        return mixed.clone(memory_format=torch.contiguous_format).flatten(3)

    def _bias(self, window: Size) -> Tensor:
        """Return the bias (1, h, T, T) between the tokens of a window, which may be shorter than the table's."""
        d, h, w = window
        tokens = d * h * w
        index = self.index[:d, :h, :w, :d, :h, :w].reshape(tokens, tokens)
        # Indexing, because the gradient of index_select is not deterministic on every device.
        return self.position_bias.flatten(2)[:, :, index]


def fit_windows(sizes: Size, window: Size) -> tuple[Size, Size]:
    """Return the window along each axis, shortened to the axis, and how many of them cover it."""
    fitted = triple(min(size, length) for size, length in zip(sizes, window, strict=True))
    return fitted, triple(divide_up(size, length) for size, length in zip(sizes, fitted, strict=True))


def split_windows(grid: Tensor, window: Size) -> Tensor:
    """Map a grid (N, D, H, W, C), in whole windows, to (N, windows, T, C)."""
    counts = [size // length for size, length in zip(grid.shape[1:4], window, strict=True)]
    d, h, w = window
    parts = grid.reshape(grid.shape[0], counts[0], d, counts[1], h, counts[2], w, grid.shape[4])
    return parts.permute(0, 1, 3, 5, 2, 4, 6, 7).reshape(grid.shape[0], math.prod(counts), d * h * w, grid.shape[4])


def join_windows(windows: Tensor, counts: Size, window: Size) -> Tensor:
    """Undo `split_windows`: map (N, windows, T, C) to (N, D, H, W, C)."""
    parts = windows.reshape(windows.shape[0], *counts, *window, windows.shape[3]).permute(0, 1, 4, 2, 5, 3, 6, 7)
    whole = (count * length for count, length in zip(counts, window, strict=True))
    return parts.reshape(windows.shape[0], *whole, windows.shape[3])


def relative_index(window: Size) -> Tensor:
    """Return where in a flat table of biases the offset between each query and key of a window lies.

    Args:
        window: (d, h, w).

    Returns:
        int64 (d, h, w, d, h, w), query first, into a table of (2 * d - 1, 2 * h - 1, 2 * w - 1) with offset 0 in its
        middle.
    """
    index = torch.zeros(6 * (1,), dtype=torch.int64)
    for axis, length in enumerate(window):
        positions = torch.arange(length)
        shape = [1] * 6
        shape[axis] = shape[3 + axis] = length
        offsets = positions[:, None] - positions + length - 1
        index = index * (2 * length - 1) + offsets.reshape(shape)
    return index


def separating_mask(sizes: Size, window: Size, shifts: Size, device: torch.device) -> Tensor:
    """Return which pairs of a window's tokens must not attend to each other.

    Args:
        sizes: of the grid, before it is padded to whole windows.
        window: length along each axis.
        shifts: by how much the padded grid was rolled towards the start of each axis.
        device: of the mask.

    Returns:
        Bool (windows, T, T): True where one token is padding and the other is not, or where only the roll brought the
        two together.
    """
    regions = torch.zeros((1, 1, 1, 1, 1), dtype=torch.int64, device=device)
    for axis, (size, length, shift) in enumerate(zip(sizes, window, shifts, strict=True)):
        whole = round_up(size, length)
        rolled = torch.arange(whole, device=device)
        wrapped = rolled >= whole - shift
        padding = (rolled + shift) % whole >= size
        shape = [1] * 5
        shape[1 + axis] = whole
        regions = regions * 4 + (wrapped + 2 * padding).reshape(shape)
    region = split_windows(regions, window)[0, :, :, 0]
    return region[:, :, None] != region[:, None, :]


def _rolled(grid: Tensor, shifts: Size, sign: int) -> Tensor:
    return torch.roll(grid, [sign * shift for shift in shifts], dims=(1, 2, 3)) if any(shifts) else grid
