"""Depthwise convolutions of volumes on a GPU, by the Triton programs of `gpu_depthwise_kernels`.

What PyTorch offers there reads its input once per tap and adds the weight gradient up without an order. Here a block
of planes is read about once, the norm's statistics come with the result, and every sum has one order: the same bits
at each run.

Everything takes and gives dense channels-last memory, (N, D, H, W, C), in float32, bfloat16 or float16, and adds in
float32. A convolution has a mode for each axis, as a code: one digit for all axes, or three for D, H, W. The digits: 1
and 2 are strides, 3 (`native.TRANSPOSED`) is the transposed form of stride 2. A transposed convolution's axis of
stride 1 is an ordinary one with the kernel flipped (`flipped_axes`).
"""

import importlib
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from types import ModuleType
from typing import Final, NamedTuple

import torch
from torch import Tensor

from sagittal.kernels.native import TRANSPOSED

DTYPES: Final = (torch.float32, torch.bfloat16, torch.float16)
_PARTS_MERGED = 64
_ENOUGH = 1024
"""Programs that fill an H100: 132 processors with 2 to 3 of them at a time, and three rounds for an even end."""
_LEAST_RUN = 8
"""Planes per program, at the least: a program of kernel 3 also reads two planes beside its run."""


_VECTOR: Final = 2
"""Neighbouring channels of a thread. Kernel 3's 27 taps of two channels are 54 registers, which a thread can hold."""
_REGISTERS: Final = 128
"""Of a thread at the most, so that two programs of eight warps share a processor's 65536."""


_LEAST_PLANE: Final = 256
"""Positions of a plane from which on a tile of 16 patches is filled."""
_LEAST_CHANNELS: Final = 8
_HALF: Final = (torch.bfloat16, torch.float16)
_Sizes = tuple[int, int, int]
_BANDS: Final[Mapping[tuple[int, torch.dtype], _Sizes]] = {
    (kernel, dtype): sizes for kernel, sizes in {3: (4, 16, 3), 5: (4, 16, 2), 7: (2, 8, 2)}.items() for dtype in _HALF
}
"""(Largest kernel, dtype) to rows of a patch, channels and stages of loads, where banded products are faster."""
_WEIGHT_BANDS: Final[Mapping[tuple[int, torch.dtype], _Sizes]] = {
    (kernel, dtype): sizes for kernel, sizes in {3: (4, 16, 2), 5: (2, 8, 2), 7: (4, 8, 2)}.items() for dtype in _HALF
}
"""The same for the gradient of the taps."""
_BAND_MEMORY: Final = 176 * 1024
"""Bytes of shared memory that the largest of these programs takes: an H100 has them, an A100 has not."""
_SUMS: Final = 25
"""Banded sums of the taps' gradient that a thread can hold, four registers each."""


class _Tile(NamedTuple):
    height: int
    width: int
    channels: int
    warps: int


class _Band(NamedTuple):
    """Sixteen patches of rows x 8 positions, so many side by side, and channels, one for each warp."""

    rows: int
    across: int
    channels: int
    stages: int

    @property
    def height(self) -> int:
        return 16 // self.across * self.rows

    @property
    def width(self) -> int:
        return 8 * self.across


def mode_of(strides: Sequence[int], *, transposed: bool) -> int:
    """Return the code of a convolution with these strides, 1 or 2 each, along D, H, W."""
    digits = [TRANSPOSED if transposed and stride == 2 else stride for stride in strides]
    return digits[0] if len(set(digits)) == 1 else 100 * digits[0] + 10 * digits[1] + digits[2]


def modes_of(mode: int) -> tuple[int, int, int]:
    """Return the modes along D, H, W of a code."""
    return (mode, mode, mode) if mode < 10 else (mode // 100, mode // 10 % 10, mode % 10)


def output_size(size: Sequence[int], mode: int) -> tuple[int, int, int]:
    """Return D, H, W of the result: n, ceil(n / 2) or 2n - 1 along each axis."""
    depth, height, width = (
        2 * n - 1 if m == TRANSPOSED else (n + m - 1) // m for n, m in zip(size, modes_of(mode), strict=True)
    )
    return depth, height, width


def fits(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Return whether the kernels can take these, wherever they lie: dtypes, and a voxel at least."""
    floats = all(tensor.dtype in DTYPES for tensor in (x, weight) if tensor is not None)
    return floats and (bias is None or bias.dtype in DTYPES) and x.numel() > 0 and weight.numel() > 0


def convolve(
    x: Tensor,
    taps: Tensor,
    bias: Tensor | None,
    kernel: Sequence[int],
    mode: int,
    out: Sequence[int],
    *,
    add: Tensor | None = None,
) -> Tensor:
    """Return the depthwise convolution of x (N, D, H, W, C) as (N, *out, C), plus `add` of that shape.

    Args:
        x: dense.
        taps: (kd * kh * kw, C), dense float32.
        bias: (C,) or None.
        kernel: kd, kh, kw, odd.
        mode: see the module.
        out: D, H, W of the result; in mode 3 it may be 2n instead of 2n - 1, for the gradient of a strided form.
        add: dense, or None.
    """
    y, _ = _convolve(x, taps, bias, kernel, mode, out, add, moments=False)
    return y


def convolve_with_moments(
    x: Tensor, taps: Tensor, bias: Tensor | None, kernel: Sequence[int], mode: int, out: Sequence[int]
) -> tuple[Tensor, Tensor, Tensor]:
    """Return `convolve`'s result, and its mean and biased variance over space, (N, C) float32 each.

    They are those of the result as stored, rounded to its dtype, and are gathered while it is written.
    """
    y, parts = _convolve(x, taps, bias, kernel, mode, out, None, moments=True)
    assert parts is not None
    while parts.shape[1] > 1:
        parts = _merged(parts)
    count, mean, squares = parts[:, 0].unbind(1)
    return y, mean.contiguous(), squares / count


def weight_grad(x: Tensor, grad: Tensor, kernel: Sequence[int], mode: int) -> tuple[Tensor, Tensor]:
    """Return the gradients of taps (kd * kh * kw, C) and bias (C,), float32, given dense input and output gradient."""
    modes = modes_of(mode)
    if TRANSPOSED not in modes:
        return _weight_grad(x, grad, kernel, modes)
    # grad[2i + j - p] meets x[i]: the strided case with the two exchanged, backwards along an axis of stride 1
    strides = [2 if each == TRANSPOSED else each for each in modes]
    taps, _ = _weight_grad(grad, x, kernel, strides)
    flipped = [axis for axis, each in enumerate(modes) if each == 1]
    channels = x.shape[4]
    return taps.view(*kernel, channels).flip(flipped).reshape(-1, channels), grad.sum((0, 1, 2, 3), dtype=torch.float32)


def data_mode(mode: int) -> tuple[int, tuple[int, ...]]:
    """Return the code of the convolution that takes the gradient back, and the axes to flip its kernel along."""
    modes = modes_of(mode)
    back = [{1: 1, 2: TRANSPOSED, TRANSPOSED: 2}[each] for each in modes]
    code = back[0] if len(set(back)) == 1 else 100 * back[0] + 10 * back[1] + back[2]
    return code, tuple(axis for axis, each in enumerate(modes) if each == 1)


def _convolve(
    x: Tensor,
    taps: Tensor,
    bias: Tensor | None,
    kernel: Sequence[int],
    mode: int,
    out: Sequence[int],
    add: Tensor | None,
    *,
    moments: bool,
) -> tuple[Tensor, Tensor | None]:
    samples, depth, height, width, channels = x.shape
    modes = modes_of(mode)
    band = _band(x, kernel, modes, _BANDS)
    hold = kernel[0] * kernel[1] * kernel[2] <= 27
    # Two positions of two channels are a thread's: for kernel 3, 124 registers, of which 54 are taps and 12 sums, and
    # 270 instructions per plane for 108 multiply-adds (ptxas for sm_90). Taps that do not stay are shared by four.
    tile = band or _tile(channels, rows=8 if hold or modes != (1, 1, 1) else 16)
    halves = [each == TRANSPOSED for each in modes]
    positions = [(size + 1) // 2 if half else size for size, half in zip(out, halves, strict=True)]
    tiles = _parts(positions[1], tile.height), _parts(positions[2], tile.width), _parts(channels, tile.channels)
    classes = 2 ** sum(halves)
    run = _run(positions[0], tiles[0] * tiles[1] * tiles[2] * classes * samples)
    runs = _parts(positions[0], run)
    y = x.new_empty((samples, *out, channels))
    parts = None
    if moments:
        parts = x.new_empty((samples, classes * runs * tiles[0] * tiles[1], 3, channels), dtype=torch.float32)
    tensors = _dense(x, taps, x if bias is None else bias, x if add is None else add, y, y if parts is None else parts)
    flags = {"HAS_BIAS": bias is not None, "HAS_ADD": add is not None, "MOMENTS": moments, "CUTS": _interpreted()}
    options = {**dict(zip(("KD", "KH", "KW"), kernel, strict=True)), **flags, **_options(tile)}
    grid = (tiles[0] * tiles[1] * tiles[2], classes * runs, samples)
    with _on(x):
        if band is not None:
            _bands().band_slide[grid](*tensors, depth, height, width, channels, run, *tiles, **options)
        elif modes == (1, 1, 1):
            _programs().slide[grid](*tensors, depth, height, width, channels, run, *tiles, HOLD=hold, **options)
        else:
            by_axis = dict(zip(("MODE_D", "MODE_H", "MODE_W"), modes, strict=True))
            _programs().gather[grid](*tensors, depth, height, width, channels, *out, run, *tiles, **by_axis, **options)
    return y, parts


def _options(tile: _Tile | _Band) -> dict[str, int]:
    """Return the constants and compiler's options of a tile."""
    if isinstance(tile, _Band):
        blocks = {"ROWS": tile.rows, "ACROSS": tile.across, "BLOCK_C": tile.channels}
        return {
            **blocks,
            "num_warps": tile.channels,
            "num_stages": tile.stages,
            "maxnreg": min(255, 2048 // tile.channels),
        }
    blocks = {"BLOCK_H": tile.height, "BLOCK_W": tile.width, "BLOCK_C": tile.channels, "VECTOR": _VECTOR}
    return {**blocks, "num_warps": tile.warps, "maxnreg": _REGISTERS}


def _merged(parts: Tensor) -> Tensor:
    """Merge (N, P, 3, C) into (N, ceil(P / 64), 3, C)."""
    samples, count, _, channels = parts.shape
    groups, block = _parts(count, _PARTS_MERGED), 32
    merged = parts.new_empty((samples, groups, 3, channels))
    with _on(parts):
        _programs().merge[(groups, _parts(channels, block), samples)](
            parts, merged, count, channels, _PARTS_MERGED, BLOCK_P=_PARTS_MERGED, BLOCK_C=block, num_warps=4
        )
    return merged


def _weight_grad(x: Tensor, grad: Tensor, kernel: Sequence[int], strides: Sequence[int]) -> tuple[Tensor, Tensor]:
    samples, depth, height, width, channels = x.shape
    out = grad.shape[1:4]
    band = _band(x, kernel, strides, _WEIGHT_BANDS) if x.dtype == grad.dtype else None
    tile = band or _tile(channels, rows=4)  # one position of two channels: 54 sums, 108 registers
    tiles_h, tiles_w = _parts(out[1], tile.height), _parts(out[2], tile.width)
    tiles_c = _parts(channels, tile.channels)
    run = _run(out[0], tiles_h * tiles_w * tiles_c * samples)
    runs = _parts(out[0], run)
    count = kernel[0] * kernel[1] * kernel[2]
    parts = x.new_empty((samples * runs * tiles_h * tiles_w, count + 1, channels), dtype=torch.float32)
    tensors = _dense(x, grad, parts)
    grid = (tiles_h * tiles_w * tiles_c, samples * runs)
    options = {**dict(zip(("KD", "KH", "KW"), kernel, strict=True)), **_options(tile)}
    with _on(x):
        if band is not None:
            planes = kernel[0] if kernel[0] * kernel[1] <= _SUMS else 1
            _bands().band_weight_parts[(*grid, kernel[0] // planes)](
                *tensors, depth, height, width, channels, run, runs, tiles_w, tiles_c,
                PLANES=planes, CUTS=_interpreted(), **options,
            )  # fmt: skip
        else:
            # A thread holds two sums for each tap: 54 registers for 27 taps. Larger kernels take a row at a time.
            rows = kernel[1] if count <= 27 else 1
            by_axis = dict(zip(("STRIDE_D", "STRIDE_H", "STRIDE_W"), strides, strict=True))
            _programs().weight_parts[(*grid, kernel[1] // rows)](
                *tensors, depth, height, width, channels, *out, run, runs, tiles_w, tiles_c,
                ROWS=rows, **by_axis, **options,
            )  # fmt: skip
    total = parts.sum(0)
    return total[:-1], total[-1]


def _tile(channels: int, *, rows: int) -> _Tile:
    """Return the tile with so many rows of four positions; where channels are few, positions make up for them."""
    return _Tile(rows, 4, 32, 8) if channels > 16 else _Tile(rows, 8, 16, 8)


def _band(
    x: Tensor, kernel: Sequence[int], modes: Sequence[int], sizes_of: Mapping[tuple[int, torch.dtype], _Sizes]
) -> _Band | None:
    """Choose the path: the tile of a banded product on tensor cores, or None where the CUDA cores multiply.

    This is the one place that does; docs/kernels.md has the estimate behind it.
    """
    _, _, height, width, channels = x.shape
    sizes = sizes_of.get((max(kernel), x.dtype))
    if sizes is None or kernel[2] == 1 or tuple(modes) != (1, 1, 1):
        return None
    if height * width < _LEAST_PLANE or channels < _LEAST_CHANNELS:
        return None  # most of a tile would lie outside
    if x.is_cuda and _shared_memory(x.device) < _BAND_MEMORY:
        return None
    shapes = [_Band(sizes[0], across, *sizes[1:]) for across in (4, 2, 1)]
    return min(shapes, key=lambda band: _parts(height, band.height) * _parts(width, band.width))


@cache
def _shared_memory(device: torch.device) -> int:
    """Return the bytes of shared memory that a program may have."""
    properties = torch.cuda.get_device_properties(device)
    # PyTorch's stubs do not know the name, and its AMD build has no such number.
    return int(getattr(properties, "shared_memory_per_block_optin", 0))


def _run(planes: int, programs: int) -> int:
    """Return the planes of a program's run, when a run through all of them would make so many programs."""
    runs = min(_parts(_ENOUGH, programs), _parts(planes, _LEAST_RUN))
    return _parts(planes, runs)


def _parts(size: int, part: int) -> int:
    return (size + part - 1) // part


def _dense(*tensors: Tensor) -> tuple[Tensor, ...]:
    assert all(tensor.is_contiguous() for tensor in tensors), "the programs would read or write beyond a strided tensor"
    return tensors


def _on(x: Tensor) -> AbstractContextManager[object]:
    """Return a context in which Triton launches on x's device, whichever is the current one."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


@cache
def _programs() -> ModuleType:
    """Import the programs at their first use: Triton may be absent, and is half a second elsewhere."""
    return importlib.import_module("sagittal.kernels.gpu_depthwise_kernels")


@cache
def _bands() -> ModuleType:
    return importlib.import_module("sagittal.kernels.gpu_depthwise_band_kernels")


@cache
def _interpreted() -> bool:
    """Return whether Triton's interpreter runs the programs."""
    return not isinstance(_programs().slide, importlib.import_module("triton.runtime.jit").JITFunction)
