"""The three blocks of MedNeXt: at one resolution, halving it, doubling it.

Written from arXiv 2303.09975 (section 2) and the tensor names and shapes of the official weights. A block is a
depthwise convolution (`conv1`), a normalisation (`norm`), and a chain of expansion, GELU, optional GRN and contraction
(`conv2`, `conv3`). The submodules own the weights in their official shapes; `sagittal.kernels` computes with them:
on a GPU as whole blocks, whatever is in them, on a CPU fused where the norm is per channel and there is no GRN.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Literal, TypedDict, Unpack

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sagittal.errors import PlanError
from sagittal.kernels import TailWeights, expand_contract, mednext_block, mednext_up_block, pointwise
from sagittal.kernels.bf16 import unconverted
from sagittal.kernels.block import tail_on_gpu
from sagittal.kernels.choice import takes_kernels
from sagittal.kernels.depthwise import usable, usable_in_graph
from sagittal.kernels.gpu_block_autograd import whole_block
from sagittal.kernels.gpu_block_ops import tail_on_gpu as any_tail_on_gpu
from sagittal.kernels.gpu_block_whole import How, Parts
from sagittal.kernels.native import LANES
from sagittal.kernels.response_norm import global_response_norm
from sagittal.networks.depthwise_axes import PerAxis, depthwise, depthwise_transpose, pad_front, per_axis, strided
from sagittal.networks.layout import convolution_class, transposed_class
from sagittal.networks.mednext_norms import ChannelGroupNorm, Grn, Norm, channel_norm

Checkpointing = Literal["none", "expansion", "block"]
CHECKPOINTING: tuple[Checkpointing, ...] = ("none", "expansion", "block")
Convolution = nn.Conv2d | nn.Conv3d | nn.ConvTranspose2d | nn.ConvTranspose3d


class BlockOptions(TypedDict, total=False):
    """The keyword arguments of all three blocks; `MedNeXtBlock` explains them."""

    expansion_ratio: int
    kernel_size: PerAxis
    norm: Norm
    grn: Grn
    spatial_dims: int
    residual: bool
    checkpointing: Checkpointing


class _Block(nn.Module, ABC):
    """What the three blocks share: weights under their official names, and the steps after the depthwise one.

    `strides` are those of the depthwise convolution; the options are those of `MedNeXtBlock`.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        strides: PerAxis,
        *,
        expansion_ratio: int = 4,
        kernel_size: PerAxis = 3,
        norm: Norm = "group",
        grn: Grn = False,
        spatial_dims: int = 3,
        residual: bool = True,
        checkpointing: Checkpointing = "none",
    ) -> None:
        super().__init__()
        convolution = convolution_class(spatial_dims)
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.kernel_size = per_axis(kernel_size, spatial_dims, "kernel_size")
        self.strides = per_axis(strides, spatial_dims, "stride")
        self.spatial_dims = spatial_dims
        self.grn: Grn = grn
        self.residual = residual
        self.checkpointing = checkpointing
        self._check(expansion_ratio)
        wide = expansion_ratio * in_channels
        self.conv1 = self._depthwise_module()
        self.norm = channel_norm(norm, in_channels)
        self.conv2 = convolution(in_channels, wide, kernel_size=1)
        self.conv3 = convolution(wide, out_channels, kernel_size=1)
        if grn:
            shape = (1, wide, *(1,) * spatial_dims)
            self.grn_beta = nn.Parameter(torch.zeros(shape))
            self.grn_gamma = nn.Parameter(torch.zeros(shape))

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, in_channels, D, H, W) to (N, out_channels, ...), at the size that the class states."""
        if self.checkpointing == "block" and self.training:
            return _recomputed(self._compute, x)
        return self._compute(x)

    @abstractmethod
    def _compute(self, x: Tensor) -> Tensor:
        """Do what `forward` says, keeping whatever the backward pass may want."""

    def _depthwise_module(self) -> Convolution:
        return self._depthwise(convolution_class(self.spatial_dims))

    def _depthwise(self, convolution: Callable[..., Convolution]) -> Convolution:
        return convolution(
            self.in_channels,
            self.in_channels,
            kernel_size=self.kernel_size,
            stride=self.strides,
            padding=tuple(size // 2 for size in self.kernel_size),
            groups=self.in_channels,
        )

    def _residual_module(self, convolution: Callable[..., Convolution]) -> Convolution:
        return convolution(self.in_channels, self.out_channels, kernel_size=1, stride=self.strides)

    def _on_gpu(self, x: Tensor, skip: Tensor | None = None) -> Tensor | None:
        """Return the block, plus `skip`, by the Triton kernels of whole blocks, or None where they don't compute."""
        if not takes_kernels(x):
            return None
        path = getattr(self, "res_conv", None)
        is_turned = isinstance(path, nn.ConvTranspose2d | nn.ConvTranspose3d)
        matrix = None if path is None else path.weight.transpose(0, 1) if is_turned else path.weight
        parts = Parts(
            self.conv1.weight,
            self.conv1.bias,
            self._tail_weights(),
            matrix,
            None if path is None else path.bias,
            self._grn_parts(),
        )
        return whole_block(x, skip, parts, self._how())

    def _how(self) -> How:
        d, h, w = (1,) * (3 - self.spatial_dims) + self.strides
        return How(
            (d, h, w),
            transposed=isinstance(self.conv1, nn.ConvTranspose2d | nn.ConvTranspose3d),
            identity=self.residual and not hasattr(self, "res_conv"),
            eps=self.norm.eps,
            layer=not isinstance(self.norm, ChannelGroupNorm),
            by_sum=self.grn == "v2",
        )

    def _grn_parts(self) -> tuple[Tensor, Tensor] | None:
        return (self.grn_gamma, self.grn_beta) if self.grn else None

    def _tail(self, h: Tensor, residual: Tensor | None, extra_bias: Tensor | None = None) -> Tensor:
        """Return residual + conv3(GRN(GELU(conv2(norm(h))))) + `extra_bias` (out_channels,) at every voxel."""
        if not self._recomputes_expansion(h):
            return self._expand(h, residual, extra_bias)
        # Added outside, the residual need not be kept for the second run.
        y = _recomputed(self._expand, h, None, extra_bias)
        return y if residual is None else residual + y

    def _expand(self, h: Tensor, residual: Tensor | None, extra_bias: Tensor | None) -> Tensor:
        if self._fusible():
            return expand_contract(h, self._tail_weights(extra_bias), residual=residual, eps=self.norm.eps)
        if takes_kernels(h):
            fused = any_tail_on_gpu(h, self._tail_weights(extra_bias), residual, self._grn_parts(), self._how())
            if fused is not None:
                return fused
        wide = nn.functional.gelu(pointwise(self.norm(h), self.conv2.weight, self.conv2.bias))
        if self.grn:
            wide = global_response_norm(wide, self.grn_gamma, self.grn_beta, by_sum=self.grn == "v2")
        y = pointwise(wide, self.conv3.weight, self._contract_bias(extra_bias))
        return y if residual is None else residual + y

    def _recomputes_expansion(self, x: Tensor) -> bool:
        """Tell whether the expansion of `x` is to be computed twice: not where the fused kernels do so themselves."""
        if self.checkpointing != "expansion" or not self.training:
            return False
        if not self._fusible():
            return True
        weights = self._tail_weights()
        if tail_on_gpu(x, weights) is not None:
            return False
        if self.conv2.out_channels % LANES or self.out_channels % LANES:
            return True
        # Under autocast the kernels run all the same, and leave it for that.
        with unconverted(x):
            return not (usable(x, *weights) or usable_in_graph(x, *weights))

    def _fusible(self) -> bool:
        return isinstance(self.norm, ChannelGroupNorm) and not self.grn

    def _contract_bias(self, extra_bias: Tensor | None) -> Tensor:
        bias = self.conv3.bias
        assert bias is not None
        return bias if extra_bias is None else bias + extra_bias

    def _tail_weights(self, extra_bias: Tensor | None = None) -> TailWeights:
        assert self.conv2.bias is not None
        return TailWeights(
            self.norm.weight,
            self.norm.bias,
            self.conv2.weight,
            self.conv2.bias,
            self.conv3.weight,
            self._contract_bias(extra_bias),
        )

    def _check(self, expansion_ratio: int) -> None:
        if min(self.in_channels, self.out_channels, expansion_ratio) < 1:
            raise PlanError(
                f"a MedNeXt block with in_channels={self.in_channels}, out_channels={self.out_channels}, "
                f"expansion_ratio={expansion_ratio}: expected each to be at least 1."
            )
        if any(size < 1 or size % 2 == 0 for size in self.kernel_size):
            shown = self.kernel_size[0] if len(set(self.kernel_size)) == 1 else self.kernel_size
            raise PlanError(
                f"kernel_size={shown} in a MedNeXt block: "
                "expected odd numbers, so that the grid keeps its size. Use 3, 5 or 7, and 1 along a coarse axis."
            )
        if not set(self.strides) <= {1, 2}:
            raise PlanError(f"stride={self.strides} in a MedNeXt block: expected 1 or 2 along each axis.")
        if not isinstance(self.grn, bool) and self.grn != "v2":
            raise PlanError(
                f"grn={self.grn!r} in a MedNeXt block: expected False, True (the form of v1's code) or 'v2' "
                "(arXiv 2512.17774)."
            )
        if self.checkpointing not in CHECKPOINTING:
            raise PlanError(
                f"checkpointing={self.checkpointing!r} in a MedNeXt block: expected one of {', '.join(CHECKPOINTING)}."
            )


class MedNeXtBlock(_Block):
    """Depthwise convolution, normalisation, expansion, GELU, contraction, plus the input: the resolution stays.

    (N, in_channels, D, H, W) becomes (N, out_channels, D, H, W); in 2D there is no D.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output; equal to `in_channels` where `residual`.
        expansion_ratio: width of the expansion as a multiple of `in_channels`.
        kernel_size: odd size of the depthwise kernel, or one for each spatial axis.
        norm: "group" (per channel over space) or "layer" (per voxel over channels).
        grn: global response normalisation after the GELU: False, True (v1's form) or "v2".
        spatial_dims: 3 or 2.
        residual: add the input (in the resampling blocks: a strided convolution of it).
        checkpointing: what training computes again in the backward pass instead of keeping it: "none"; "expansion"
            (all after the depthwise convolution, whose output is kept); "block" (everything, only the input is kept).
            The fused kernels recompute the expansion by themselves, so with them "expansion" changes nothing.

    Raises:
        PlanError: a size is below 1, a kernel even, an option unknown, or `residual` where the channels differ.
    """

    def __init__(self, in_channels: int, out_channels: int, **options: Unpack[BlockOptions]) -> None:
        super().__init__(in_channels, out_channels, 1, **options)
        if self.residual and in_channels != out_channels:
            raise PlanError(
                f"MedNeXtBlock(in_channels={in_channels}, out_channels={out_channels}): "
                "a residual needs equal numbers of channels. Make them equal or pass residual=False."
            )

    def _compute(self, x: Tensor) -> Tensor:
        y = self._on_gpu(x)
        if y is not None:
            return y
        if self._fusible() and len(set(self.kernel_size)) == 1 and not self._recomputes_expansion(x):
            return mednext_block(
                x, self.conv1.weight, self.conv1.bias, self._tail_weights(), residual=self.residual, eps=self.norm.eps
            )
        h = depthwise(x, self.conv1.weight, self.conv1.bias, self.strides)
        return self._tail(h, x if self.residual else None)


class MedNeXtDownBlock(_Block):
    """A MedNeXtBlock whose depthwise convolution has stride 2: a size n becomes ceil(n / 2).

    (N, in_channels, D, H, W) becomes (N, out_channels, ceil(D / 2), ceil(H / 2), ceil(W / 2)). The residual path is a
    1x1x1 convolution with the same stride (`res_conv`). Arguments and errors as in `MedNeXtBlock`; the numbers of
    channels may differ.

    Args:
        stride: 2, or 1 or 2 for each spatial axis; along an axis of stride 1 the size stays.
    """

    def __init__(
        self, in_channels: int, out_channels: int, *, stride: PerAxis = 2, **options: Unpack[BlockOptions]
    ) -> None:
        super().__init__(in_channels, out_channels, stride, **options)
        if self.residual:
            self.res_conv = self._residual_module(convolution_class(self.spatial_dims))

    def _compute(self, x: Tensor) -> Tensor:
        y = self._on_gpu(x)
        if y is not None:
            return y
        residual = None
        if self.residual:
            residual = pointwise(strided(x, self.strides), self.res_conv.weight, self.res_conv.bias)
        return self._tail(depthwise(x, self.conv1.weight, self.conv1.bias, self.strides), residual)


class MedNeXtUpBlock(_Block):
    """A MedNeXtBlock whose depthwise convolution is transposed with stride 2: a size n becomes 2n.

    (N, in_channels, D, H, W) becomes (N, out_channels, 2D, 2H, 2W). The transposed convolution makes 2n - 1; one plane
    of zeros at the front of every axis makes 2n. The residual path is a 1x1x1 transposed convolution with the same
    stride (`res_conv`), padded alike: its weights reach the odd voxels only, its bias all but the front planes.
    Arguments and errors as in `MedNeXtBlock`; the numbers of channels may differ.

    Args:
        stride: 2, or 1 or 2 for each spatial axis; along an axis of stride 1 the size stays and nothing is padded.
    """

    def __init__(
        self, in_channels: int, out_channels: int, *, stride: PerAxis = 2, **options: Unpack[BlockOptions]
    ) -> None:
        super().__init__(in_channels, out_channels, stride, **options)
        if self.residual:
            self.res_conv = self._residual_module(transposed_class(self.spatial_dims))

    def _depthwise_module(self) -> Convolution:
        return self._depthwise(transposed_class(self.spatial_dims))

    def forward(self, x: Tensor, skip: Tensor | None = None) -> Tensor:
        """Map (N, in_channels, D, H, W) to (N, out_channels, 2D, 2H, 2W), plus `skip` of that shape."""
        if skip is None:
            return super().forward(x)
        y = self._fused(x, skip)
        if y is None and not (self.checkpointing == "block" and self.training):
            y = self._on_gpu(x, skip)
        return skip + super().forward(x) if y is None else y

    def _fused(self, x: Tensor, skip: Tensor) -> Tensor | None:
        """Return skip + the block in one pass of the compiled kernels, where no gradient is wanted, else None."""
        if not self._fusible() or set(self.strides) != {2} or len(set(self.kernel_size)) > 1:
            return None
        residual = self.res_conv.weight.transpose(0, 1) if self.residual else None
        weights = self._tail_weights(self.res_conv.bias if self.residual else None)
        return mednext_up_block(x, self.conv1.weight, self.conv1.bias, weights, residual, skip, eps=self.norm.eps)

    def _compute(self, x: Tensor) -> Tensor:
        whole = self._on_gpu(x)
        if whole is not None:
            return whole
        h = depthwise_transpose(x, self.conv1.weight, self.conv1.bias, self.strides)
        y = self._tail(h, None, self.res_conv.bias if self.residual else None)
        if not self.residual:
            return pad_front(y, self.strides)
        # The product runs at the coarse grid, where a strided transposed convolution would also multiply zeros.
        return pad_front(y, self.strides, pointwise(x, self.res_conv.weight.transpose(0, 1), None))


def _recomputed(function: Callable[..., Tensor], *arguments: Tensor | None) -> Tensor:
    """Return function(*arguments), keeping only `arguments` for the backward pass, which computes the rest again."""
    # No block draws random numbers, so there is no state of the generator to keep.
    y: Tensor = checkpoint(function, *arguments, use_reentrant=False, preserve_rng_state=False)
    return y
