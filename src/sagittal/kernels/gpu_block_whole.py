"""A whole MedNeXt block on a GPU: depthwise convolution, tail and both residual paths, forward and backward.

One pass over the memory each, where a chain of operators makes several: the convolution gathers the norm's statistics
while it writes h; the residual is added where the result is written (at the odd voxels of the doubled grid, in an up
block, together with the skip); and its gradient where the convolution's is. Between the passes lie `gpu_depthwise` and
`gpu_block`; nothing here knows of autograd, which is `gpu_block_autograd`'s.

Everything is dense and channels-last. Letters as in `gpu_block`, and D H W the block's input, k its kernel.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from sagittal.kernels import gpu_block, gpu_depthwise, gpu_grn
from sagittal.kernels.gpu_block import Tail, Up
from sagittal.kernels.gpu_grn import Responses

Triple = tuple[int, int, int]


class How(NamedTuple):
    """What a block is, besides its tensors.

    Attributes:
        strides: of the depthwise convolution along D, H, W, 1 or 2 each.
        transposed: an up block: the convolution doubles what a stride of 2 would halve.
        identity: the residual is the block's input itself.
        eps: added to the variance.
        layer: normalise each voxel over its channels, instead of each channel over space.
        by_sum: GRN divides by the norms' sum instead of their mean.
    """

    strides: Triple = (1, 1, 1)
    transposed: bool = False
    identity: bool = True
    eps: float = 1e-5
    layer: bool = False
    by_sum: bool = False

    @property
    def mode(self) -> int:
        """The convolution's code for `gpu_depthwise`."""
        return gpu_depthwise.mode_of(self.strides, transposed=self.transposed)


class Parts(NamedTuple):
    """A block's parameters, of any of the kernels' dtypes; matrices may keep trailing axes of size 1.

    Attributes:
        kernel: (C, 1, kd, kh, kw), as the convolution's or the transposed convolution's weight.
        kernel_bias: (C,) or None.
        tail: norm_weight (C,), norm_bias (C,), expand (R, C), expand_bias (R,), contract (O, R), contract_bias (O,).
        residual: (O, C), the matrix of a resampling block's residual path, or None.
        residual_bias: (O,), or None.
        grn: gamma and beta of R numbers each, or None.
    """

    kernel: Tensor
    kernel_bias: Tensor | None
    tail: tuple[Tensor, ...]
    residual: Tensor | None = None
    residual_bias: Tensor | None = None
    grn: tuple[Tensor, Tensor] | None = None

    @property
    def flat(self) -> list[Tensor | None]:
        """All of them in one list; `unflat` is the way back."""
        gamma, beta = self.grn or (None, None)
        return [self.kernel, self.kernel_bias, *self.tail, self.residual, self.residual_bias, gamma, beta]


class Kept(NamedTuple):
    """What the backward pass needs besides the block's input.

    h (N, D', H', W', C); its mean and 1 / deviation, (N, C) float32, empty with the layer norm; the response norms
    (N, R) float32, empty without GRN.
    """

    h: Tensor
    mean: Tensor
    scale: Tensor
    norms: Tensor


def unflat(flat: list[Tensor | None]) -> Parts:
    """Return the parts that `Parts.flat` gave."""
    kernel, kernel_bias, *tail, residual, residual_bias, gamma, beta = flat
    assert kernel is not None
    weights = tuple(part for part in tail if part is not None)
    grn = None if gamma is None or beta is None else (gamma, beta)
    return Parts(kernel, kernel_bias, weights, residual, residual_bias, grn)


def output_size(size: Triple, how: How) -> Triple:
    """Return D, H, W of a block's result: n, ceil(n / 2), or 2n in an up block."""
    if how.transposed:
        d, h, w = (n * stride for n, stride in zip(size, how.strides, strict=True))
    else:
        d, h, w = ((n + stride - 1) // stride for n, stride in zip(size, how.strides, strict=True))
    return d, h, w


def convolved_size(size: Triple, how: How) -> Triple:
    """Return D, H, W of h, the convolution's result."""
    return gpu_depthwise.output_size(size, how.mode)


def forward(x: Tensor, skip: Tensor | None, parts: Parts, how: How) -> tuple[Tensor, Kept]:
    """Return a block's result (N, *output_size, O), and what its backward pass needs.

    Args:
        x: (N, D, H, W, C).
        skip: added to the result, of its shape; up blocks only.
        parts: the parameters.
        how: which block.
    """
    size = _triple(x.shape[1:4])
    taps, out = _taps(_as_convolved(parts.kernel, how)), convolved_size(size, how)
    kernel = parts.kernel.shape[2:]
    none = x.new_empty((0,), dtype=torch.float32)
    if how.layer:
        h, mean, scale = gpu_depthwise.convolve(x, taps, parts.kernel_bias, kernel, how.mode, out), none, none
    else:
        h, mean, variance = gpu_depthwise.convolve_with_moments(x, taps, parts.kernel_bias, kernel, how.mode, out)
        scale = torch.rsqrt(variance + how.eps)
    along = None if parts.residual is None else _through_residual(x, parts.residual, how)
    kept = Kept(h, mean, scale, none)
    tail, grn = _tail(kept, along, parts, how)
    added = skip if how.transposed else x if how.identity else along
    rows, given = h.flatten(1, 3), None if added is None else added.reshape(added.shape[0], -1, added.shape[-1])
    if grn is None:
        y = gpu_block.forward(rows, given, tail)
    else:
        y, norms = gpu_grn.forward(rows, given, tail, grn)
        kept = kept._replace(norms=norms)
    return y.view(x.shape[0], *output_size(size, how), y.shape[2]), kept


def backward(
    x: Tensor, grad_y: Tensor, kept: Kept, parts: Parts, how: How, *, wants_x: bool = True
) -> tuple[Tensor | None, list[Tensor | None]]:
    """Return the gradients at x and at the parameters in the order of `Parts.flat`; at the skip it is `grad_y` itself.

    Gradients of matrices come without extra axes, those of GRN as vectors.

    Args:
        x: as in the forward pass.
        grad_y: of the result's shape, dense.
        kept: what `forward` returned.
        parts: as in the forward pass.
        how: as in the forward pass.
        wants_x: whether the gradient at x is needed.
    """
    size = _triple(x.shape[1:4])
    tail, grn = _tail(kept, None, parts, how)
    rows, grad_rows = kept.h.flatten(1, 3), grad_y.flatten(1, 3)
    by_grn: tuple[Tensor | None, Tensor | None] = (None, None)
    if grn is None:
        grads = gpu_block.backward(rows, grad_rows, tail)
    else:
        grads, by_grn = gpu_grn.backward(rows, grad_rows, tail, grn, kept.norms)
    grad_h = grads.h.view(kept.h.shape)
    along, by_residual = None, None
    if parts.residual is not None:
        along = _dense_rows(_where_residual(grad_y, how).to(x.dtype))
        source = _dense_rows(x if how.transposed else _strided(x, how))
        by_residual = along.t() @ source
    grad_x = None
    if wants_x:
        grad_x = _data_gradient(grad_h, grad_y, along, size, parts, how)
    by_taps, by_bias = gpu_depthwise.weight_grad(x, grad_h, parts.kernel.shape[2:], how.mode)
    by_kernel = _as_convolved(by_taps.t().reshape(parts.kernel.shape), how)
    # A bias of the residual path is added wherever the contraction's is.
    by_residual_bias = None if parts.residual_bias is None else grads.weights[5]
    return grad_x, [by_kernel, by_bias, *grads.weights, by_residual, by_residual_bias, *by_grn]


def _data_gradient(
    grad_h: Tensor, grad_y: Tensor, along: Tensor | None, size: Triple, parts: Parts, how: How
) -> Tensor:
    """Return the gradient at x; along: the gradient behind the residual path's matrix, dense rows, or None."""
    code, flipped = gpu_depthwise.data_mode(how.mode)
    weight = _as_convolved(parts.kernel, how).flip([2 + axis for axis in flipped])
    through = None
    if along is not None and parts.residual is not None:
        through = along @ parts.residual.flatten(1).to(along.dtype)
    add = grad_y if how.identity else None
    if how.transposed and through is not None:
        add = through.view(grad_h.shape[0], *size, -1)
    add = None if add is None else add.to(grad_h.dtype)
    grad_x = gpu_depthwise.convolve(grad_h, _taps(weight), None, parts.kernel.shape[2:], code, size, add=add)
    if not how.transposed and through is not None:
        at = _strided(grad_x, how)
        at.add_(through.view(at.shape))
    return grad_x


def _tail(kept: Kept, odd: Tensor | None, parts: Parts, how: How) -> tuple[Tail, Responses | None]:
    *weights, bias = parts.tail
    if parts.residual_bias is not None:
        bias = bias + parts.residual_bias
    up = None
    if how.transposed:
        d, h, w = (stride == 2 for stride in how.strides)
        up = Up(_triple(kept.h.shape[1:4]), (d, h, w), odd)
    moments = None if how.layer else (kept.mean, kept.scale)
    grn = None if parts.grn is None else Responses(*parts.grn, how.by_sum)
    return Tail(moments, (*weights, bias), how.eps, up=up), grn


def _through_residual(x: Tensor, matrix: Tensor, how: How) -> Tensor:
    """Return the residual path's product, (N, rows, O): at the input's grid, or where a stride meets it."""
    source = x if how.transposed else _strided(x, how)
    product = _dense_rows(source) @ matrix.flatten(1).to(x.dtype).t()
    return product.view(x.shape[0], -1, product.shape[1])


def _strided(x: Tensor, how: How) -> Tensor:
    d, h, w = how.strides
    return x[:, ::d, ::h, ::w]


def _where_residual(grad_y: Tensor, how: How) -> Tensor:
    """Return the part of the result's gradient that the residual path sees."""
    if not how.transposed:
        return grad_y
    d, h, w = (slice(stride - 1, None, stride) for stride in how.strides)
    return grad_y[:, d, h, w]


def _dense_rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


def _as_convolved(kernel: Tensor, how: How) -> Tensor:
    """Return a kernel as the convolution takes it, or back: a transposed one is flipped where it doubles nothing."""
    if not how.transposed:
        return kernel
    return kernel.flip([2 + axis for axis, stride in enumerate(how.strides) if stride == 1])


def _taps(weight: Tensor) -> Tensor:
    """Return (C, 1, kd, kh, kw) as dense (taps, C) in float32."""
    return weight.detach().flatten(1).t().float().contiguous()


def _triple(numbers: torch.Size | tuple[int, ...]) -> Triple:
    d, h, w = numbers
    return d, h, w
