"""A MedNeXt block's tail on a GPU: norm, expansion, GELU, GRN, contraction and residual as one Triton kernel.

Activations are rows, channels-last: h (N, L, C), residual and y (N, L, O), all of one dtype (float32, bfloat16,
float16); statistics and parameters are taken in any. The hidden activation (N, L, R) never reaches memory: the
backward pass computes it again from h. Passes over an activation, where C = O:

- forward: h and residual read, y written (3); with `moments` taken separately one more;
- backward: h and grad_y read, the gradient behind the centring written (3), that and h read, grad_h written (3); where
  the hidden channels are more than one chunk, the matrices' gradients read h and grad_y once more (2). The layer norm
  needs no second step. With the depthwise convolution's five (grad_h and grad_y read, grad_x written; x and grad_h
  read) a whole block's backward makes eleven, or thirteen.

The hidden channels' sums for GRN read h once more in the forward pass, h and grad_y once more in the backward pass.

Letters: N batch, L voxels, C channels, R hidden channels, O output channels.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from functools import cache, partial
from math import prod
from types import ModuleType
from typing import Any, Literal, NamedTuple, TypeVar

import torch
from torch import Tensor

from sagittal.kernels import gpu_block_wide

Kind = Literal["whole", "data", "weights"]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)

WIDEST = 128
"""Channels up to which the fused kernels compute; wider blocks are `gpu_block_wide`'s."""

_PROGRAMS = 528
"""Slabs that sums over voxels are made in, four for each multiprocessor of an H100: fixed, so that every device adds
up in the same order."""

_MATRIX_PROGRAMS = 264
_LEAST = 16
_Result = TypeVar("_Result")


class Tiles(NamedTuple):
    """How a kernel is cut: voxels and hidden channels of a tile (powers of two, 16 at least), warps, stages."""

    rows: int
    hidden: int
    warps: int = 4
    stages: int = 2

    def smaller(self, *, fixed: bool) -> Tiles:
        """Return the next size to try where this one doesn't fit into a multiprocessor; `fixed`: all hidden stay."""
        if fixed or self.rows >= self.hidden:
            return self._replace(rows=self.rows // 2)
        return self._replace(hidden=self.hidden // 2)


class Up(NamedTuple):
    """How an up block's output lies around h: one plane more at the front of each doubled axis, zero but for the
    residual.

    Attributes:
        size: D, H, W of h.
        doubled: which of them the block doubled: 2n - 1 voxels in h, 2n in the output.
        odd: what the residual path adds, at every other voxel of h along a doubled axis, from the first one: dense
            (N, l, O), l = D*H*W of the block's input; or None.
    """

    size: tuple[int, int, int]
    doubled: tuple[bool, bool, bool]
    odd: Tensor | None = None

    @property
    def code(self) -> int:
        """The doubled axes as a number: 4 for D, 2 for H, 1 for W."""
        d, h, w = self.doubled
        return 4 * d + 2 * h + w

    @property
    def full(self) -> tuple[int, int, int]:
        """D, H, W of the output."""
        d, h, w = (size + twice for size, twice in zip(self.size, self.doubled, strict=True))
        return d, h, w


class Tail(NamedTuple):
    """What stands around the activations of a block's tail.

    Attributes:
        moments: each case's and channel's mean and 1 / deviation, (N, C) float32; None for the layer norm.
        weights: norm_weight (C,), norm_bias (C,), expand (R, C), expand_bias (R,), contract (O, R), contract_bias (O,);
            matrices may keep trailing axes of size 1.
        eps: added to the variance by the layer norm.
        gain: GRN's factor of each case's hidden channel, (N, R) float32, or None without GRN.
        offset: GRN's shift, (R,).
        up: where the result has another grid than h: `residual`, y and `grad_y` are then (N, L of that grid, O).
    """

    moments: tuple[Tensor, Tensor] | None
    weights: Sequence[Tensor]
    eps: float = 1e-5
    gain: Tensor | None = None
    offset: Tensor | None = None
    up: Up | None = None


class Gradients(NamedTuple):
    """Gradients of a tail: grad_h in h's dtype, the rest as `Tail.weights` in float32, matrices without extra axes."""

    h: Tensor
    weights: tuple[Tensor, ...]


class _Sizes(NamedTuple):
    cases: int
    voxels: int
    channels: int
    hidden: int
    outputs: int
    height: int
    width: int

    @property
    def numbers(self) -> tuple[int, int, int, int, int, int]:
        return self[1:]

    @property
    def widths(self) -> tuple[int, int]:
        return _power(self.channels), _power(self.outputs)


_fitting: dict[tuple[object, ...], Tiles] = {}


def moments(h: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return each case's and channel's mean over voxels and 1 / sqrt(variance + eps), (N, C) each, in float32.

    Args:
        h: dense (N, L, C).
        eps: added to the variance.
    """
    cases, voxels, channels = h.shape
    width = _power(channels)
    rows = max(_LEAST, min(256, 8192 // width))
    slabs, span = _slabs(voxels, rows, _PROGRAMS, cases)
    sums = h.new_empty((cases, slabs, 2, channels), dtype=torch.float32)
    _run(h, _kernels().slab_moments, (slabs, cases), (h, sums, voxels, channels, span), {"M": rows, "BC": width})
    counts = torch.full((slabs, 1), float(span), device=h.device)
    counts[-1] = voxels - (slabs - 1) * span
    shares = counts / voxels
    mean = (sums[:, :, 0] * shares).sum(1)
    between = (sums[:, :, 0] - mean[:, None]).square_().mul_(shares).sum(1)
    return mean, torch.rsqrt(sums[:, :, 1].sum(1) / voxels + between + eps)


def forward(h: Tensor, residual: Tensor | None, tail: Tail, *, tiles: Tiles | None = None) -> Tensor:
    """Return residual + contract(GRN(GELU(expand(norm(h))))), (N, L, O).

    Args:
        h: dense (N, L, C).
        residual: dense (N, L, O) of any dtype, or None; a wider dtype than h's is the result's.
        tail: statistics and parameters.
        tiles: how to cut; by default what suits an H100.
    """
    sizes, parameters = _sizes(h, tail), _parameters(h, tail)
    dtype = h.dtype if residual is None else torch.promote_types(h.dtype, residual.dtype)
    up = tail.up
    y = h.new_empty((sizes.cases, sizes.voxels if up is None else prod(up.full), sizes.outputs), dtype=dtype)
    if max(sizes.widths) > WIDEST:
        gpu_block_wide.forward(h, residual, tail, y)
        return y
    if up is not None:
        _fill_front(y, residual, up)
    bias, gain, offset = tail.weights[5].contiguous(), *_respond(h, tail)
    odd = None if up is None else up.odd
    added = [h if part is None else part for part in (residual, odd)]

    def run(cut: Tiles) -> Tensor:
        grid = (_ceil(sizes.voxels, cut.rows), sizes.cases)
        arguments = (h, *parameters, bias, gain, offset, *added, y, *sizes.numbers, tail.eps)
        given = {"GRN": tail.gain is not None, "RESIDUAL": residual is not None, "ODD": odd is not None}
        _run(h, _kernels().forward, grid, arguments, {**_options(h, sizes, tail, cut), **given})
        return y

    return _fitted(("forward", h.dtype, *sizes.widths), tiles or forward_tiles(h.dtype, max(sizes.widths)), run)


def backward(
    h: Tensor, grad_y: Tensor, tail: Tail, *, pull: Tensor | None = None, tiles: Tiles | None = None
) -> Gradients:
    """Return the gradients at h and the six weights; the one at the residual is `grad_y` itself.

    Args:
        h: dense (N, L, C), as in the forward pass.
        grad_y: dense (N, L, O).
        tail: as in the forward pass.
        pull: with GRN, the gradient at each case's hidden channel's norm over the norm, (N, R) float32.
        tiles: how to cut; by default what suits an H100.
    """
    sizes = _sizes(h, tail)
    if max(sizes.widths) > WIDEST:
        parts = gpu_block_wide.gradients(h, grad_y, tail, pull)
    else:
        inputs = (h, *_parameters(h, tail), *_respond(h, tail), h if pull is None else pull, grad_y)
        parts = _swept(inputs, tail, sizes, tiles)
    along, channels, outputs, by_expand, by_contract, hidden = parts
    straight, inner = channels[:, 0], channels[:, 1]
    if tail.moments is not None:
        _finish(along, h, tail.moments, tail.weights[0], straight, inner)
    vectors = inner.sum(0), straight.sum(0)
    return Gradients(
        along, (*vectors, by_expand.sum(0), hidden.sum(0), by_contract.sum(0).t().contiguous(), outputs.sum(0))
    )


def hidden_sums(h: Tensor, grad_y: Tensor | None, tail: Tail, *, tiles: Tiles | None = None) -> Tensor:
    """Return sums over voxels of GELU(expand(norm(h))), squared or times the gradient behind it: (N, R) float32.

    Args:
        h: dense (N, L, C).
        grad_y: the gradient behind the contraction, dense (N, L, O), or None for the squares.
        tail: statistics and parameters; GRN's are not looked at.
        tiles: how to cut; by default what suits an H100.
    """
    sizes, parameters = _sizes(h, tail), _parameters(h, tail)
    if max(sizes.widths) > WIDEST:
        return gpu_block_wide.hidden_sums(h, grad_y, tail)

    def run(cut: Tiles) -> Tensor:
        chunks = _ceil(sizes.hidden, cut.hidden)
        slabs, span = _slabs(sizes.voxels, cut.rows, _PROGRAMS, sizes.cases * chunks)
        sums = h.new_empty((sizes.cases, slabs, sizes.hidden), dtype=torch.float32)
        grid = (chunks, slabs, sizes.cases)
        arguments = (h, *parameters, h if grad_y is None else grad_y, sums, *sizes.numbers, tail.eps, span)
        _run(
            h, _kernels().responses, grid, arguments, {**_options(h, sizes, tail, cut), "GRADIENT": grad_y is not None}
        )
        return sums.sum(1)

    key = ("sums", grad_y is None, h.dtype, *sizes.widths)
    return _fitted(key, tiles or backward_tiles("weights", h.dtype, max(sizes.widths), sizes.hidden), run)


def folded_weights(tail: Tail) -> tuple[Tensor, Tensor]:
    """Return the expansion with a case's statistics and the norm's affine part inside it: (N, R, C) and (N, R).

    The channel norm only: expand(norm(h)) of a case is then one product of h, for runtimes without these kernels.
    """
    assert tail.moments is not None
    mean, scale = tail.moments
    norm_weight, norm_bias, expand, expand_bias = (
        part.flatten(1) if part.ndim > 1 else part for part in tail.weights[:4]
    )
    factor = scale * norm_weight
    shift = norm_bias - mean * factor
    return expand * factor[:, None], shift @ expand.t() + expand_bias


def forward_tiles(dtype: torch.dtype, width: int) -> Tiles:
    """Return how the forward kernel is cut for activations of `width` channels, a power of two."""
    if dtype == torch.float32:
        return Tiles(max(32, min(64, 4096 // width)), 32, 8 if width > 32 else 4, 1)
    return Tiles(128, 64, 4 if width <= 32 else 8, 2)


def backward_tiles(kind: Kind, dtype: torch.dtype, width: int, hidden: int) -> Tiles:
    """Return how a backward kernel is cut; found by compiling for an H100 and counting what registers don't hold."""
    if dtype == torch.float32:
        return Tiles(32, _power(hidden) if kind == "whole" else 32, 4 if width <= 32 else 8, 1)
    if kind == "whole":
        if width > 32:
            # 32 voxels beside 128 hidden channels put 56 to 768 bytes of each thread aside, 16 none.
            return Tiles(16 if hidden > 64 else 32, _power(hidden), 8, 1)
        return Tiles(64, _power(hidden), 8 if hidden > 64 else 4, 2)
    if kind == "data":
        return Tiles(64, 64 if width == 64 else 32, 4 if width <= 32 else 8, 1)
    return Tiles(32, 64 if width == 64 else 32, 4 if width <= 32 else 8, 1)


def _swept(inputs: Sequence[Tensor], tail: Tail, sizes: _Sizes, tiles: Tiles | None) -> list[Tensor]:
    """Run the backward kernels: one where all hidden channels make one chunk and registers hold the sums, else two."""
    dtype, wide = inputs[0].dtype, max(sizes.widths)
    room = (tiles or backward_tiles("whole", dtype, wide, sizes.hidden)).hidden
    alone = room >= sizes.hidden and room * wide <= (2048 if dtype == torch.float32 else 8192)
    kinds: tuple[Kind, ...] = ("whole",) if alone else ("data", "weights")
    found: list[Tensor] = []
    for kind in kinds:
        key = (kind, dtype, *sizes.widths, room if alone else 0)
        cut = tiles or backward_tiles(kind, dtype, wide, sizes.hidden)
        found += _fitted(key, cut, partial(_sweep, kind, inputs, tail, sizes), fixed=alone)
    return found


def _sweep(kind: Kind, inputs: Sequence[Tensor], tail: Tail, sizes: _Sizes, cut: Tiles) -> list[Tensor]:
    """Run the kernel `backward_<kind>`; sums over voxels come as one for each case."""
    h = inputs[0]
    chunks = _ceil(sizes.hidden, cut.hidden) if kind == "weights" else 1
    programs = _PROGRAMS if kind == "data" else _MATRIX_PROGRAMS
    slabs, span = _slabs(sizes.voxels, cut.rows, programs, sizes.cases * chunks)
    shapes: list[tuple[int, ...]] = []
    if kind != "weights":
        shapes += [(2, sizes.channels), (sizes.outputs,)]
    if kind != "data":
        shapes += [(sizes.hidden, sizes.channels), (sizes.hidden, sizes.outputs), (sizes.hidden,)]
    sums = [h.new_empty((sizes.cases, slabs, *shape), dtype=torch.float32) for shape in shapes]
    along = [] if kind == "weights" else [torch.empty_like(h)]
    grid = (chunks, slabs, sizes.cases) if kind == "weights" else (slabs, sizes.cases)
    options = {**_options(h, sizes, tail, cut), "GRN": tail.gain is not None}
    arguments = (*inputs, *along, *sums, *sizes.numbers, tail.eps, span)
    _run(h, getattr(_kernels(), f"backward_{kind}"), grid, arguments, options)
    return [*along, *(part.sum(1) for part in sums)]


def _finish(
    along: Tensor, h: Tensor, moments: tuple[Tensor, Tensor], norm_weight: Tensor, straight: Tensor, inner: Tensor
) -> None:
    """Make `along`, the gradient behind the centring, that at h; straight and inner (N, C) are its sums."""
    voxels, channels = h.shape[1:]
    mean, scale = moments
    factor = scale * norm_weight
    terms = mean, factor, factor * scale * inner / voxels, factor * straight / voxels
    width = _power(channels)
    rows = max(_LEAST, min(128, 8192 // width))
    arguments = (along, h, *(term.contiguous() for term in terms), voxels, channels)
    _run(
        h,
        _kernels().finish,
        (_ceil(voxels, rows), h.shape[0]),
        arguments,
        {"M": rows, "BC": width, "WIDEN": _interpreting()},
    )


def _fill_front(y: Tensor, residual: Tensor | None, up: Up) -> None:
    """Write the front planes of an up block's result, which the kernel leaves out: the residual, or zeros."""
    y = y.view(y.shape[0], *up.full, y.shape[2])
    given = None if residual is None else residual.view(y.shape)
    for axis, twice in enumerate(up.doubled, start=1):
        if twice and given is None:
            y.narrow(axis, 0, 1).zero_()
        elif twice and given is not None:
            y.narrow(axis, 0, 1).copy_(given.narrow(axis, 0, 1))


def _sizes(h: Tensor, tail: Tail) -> _Sizes:
    cases, voxels, channels = h.shape
    grid = (1, 1) if tail.up is None else tail.up.size[1:]
    return _Sizes(cases, voxels, channels, tail.weights[2].shape[0], tail.weights[4].shape[0], *grid)


def _parameters(h: Tensor, tail: Tail) -> tuple[Tensor, ...]:
    """Return mean, scale, norm_weight, norm_bias, expand, expand_bias, contract as the kernels read them."""
    mean, scale = (h, h) if tail.moments is None else (part.contiguous() for part in tail.moments)
    norm_weight, norm_bias, expand, expand_bias, contract, _ = tail.weights
    matrix, other = (part.flatten(1).to(h.dtype).contiguous() for part in (expand, contract))
    return mean, scale, norm_weight.contiguous(), norm_bias.contiguous(), matrix, expand_bias.contiguous(), other


def _respond(h: Tensor, tail: Tail) -> tuple[Tensor, Tensor]:
    """Return GRN's factor and shift; without GRN, any tensors, which nobody reads."""
    if tail.gain is None or tail.offset is None:
        return h, h
    return tail.gain.contiguous(), tail.offset.flatten().contiguous()


def _options(h: Tensor, sizes: _Sizes, tail: Tail, cut: Tiles) -> dict[str, Any]:
    return {
        "M": cut.rows,
        "BC": sizes.widths[0],
        "BH": cut.hidden,
        "BO": sizes.widths[1],
        "LAYER": tail.moments is None,
        "UP": 0 if tail.up is None else tail.up.code,
        "EXACT": h.dtype == torch.float32,
        "WIDEN": _interpreting(),
        "num_warps": cut.warps,
        "num_stages": cut.stages,
    }


def _fitted(key: tuple[object, ...], tiles: Tiles, run: Callable[[Tiles], _Result], *, fixed: bool = False) -> _Result:
    """Return run(tiles), with smaller ones where these don't fit into a multiprocessor; what fitted is remembered."""
    key = (*key, tiles)
    tiles = _fitting.get(key, tiles)
    while True:
        try:
            result = run(tiles)
        except _out_of_resources():
            if (tiles.rows if fixed else max(tiles.rows, tiles.hidden)) <= _LEAST:
                raise
            tiles = tiles.smaller(fixed=fixed)
        else:
            _fitting[key] = tiles
            return result


def _run(h: Tensor, kernel: Any, grid: tuple[int, ...], arguments: Sequence[object], options: dict[str, Any]) -> None:
    """Launch a kernel on h's device, which need not be the current one."""
    if not h.is_cuda:
        kernel[grid](*arguments, **options)
        return
    with torch.cuda.device(h.device):
        kernel[grid](*arguments, **options)


@cache
def _kernels() -> ModuleType:
    """Import the kernels at their first use: Triton may be absent, and is half a second elsewhere."""
    return importlib.import_module("sagittal.kernels.gpu_block_kernels")


@cache
def _out_of_resources() -> type[Exception]:
    error: type[Exception] = importlib.import_module("triton.runtime.errors").OutOfResources
    return error


@cache
def _interpreting() -> bool:
    """Return whether Triton's interpreter runs the kernels."""
    return not isinstance(_kernels().forward, importlib.import_module("triton.runtime.jit").JITFunction)


def _slabs(voxels: int, rows: int, programs: int, others: int) -> tuple[int, int]:
    """Return how many slabs of voxels, each of whole tiles, and the voxels of one, for `programs` in all."""
    tiles = _ceil(voxels, rows)
    span = _ceil(tiles, max(1, programs // others))
    return _ceil(tiles, span), span * rows


def _ceil(number: int, divisor: int) -> int:
    return -(-number // divisor)


def _power(number: int) -> int:
    """Return the next power of two, at least 16: what a product on tensor cores takes."""
    return max(_LEAST, 1 << (number - 1).bit_length())
