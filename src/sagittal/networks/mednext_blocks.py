"""The three blocks of MedNeXt: at one resolution, halving it, doubling it.

Written from arXiv 2303.09975 (section 2) and the tensor names and shapes of the official weights. A block is a
depthwise convolution (`conv1`), a normalisation (`norm`), and a chain of expansion, GELU, optional GRN and contraction
(`conv2`, `conv3`). The submodules own the weights in their official shapes; `sagittal.kernels` computes with them,
fused where the norm is per channel and there is no GRN.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, TypedDict, Unpack

import torch
from torch import Tensor, nn

from sagittal.errors import PlanError
from sagittal.kernels import TailWeights, depthwise_conv, depthwise_conv_transpose, expand_contract, mednext_block
from sagittal.networks.layout import every_second_voxel, pointwise

Norm = Literal["group", "layer"]
Grn = bool | Literal["v2"]
Convolution = nn.Conv2d | nn.Conv3d | nn.ConvTranspose2d | nn.ConvTranspose3d


class BlockOptions(TypedDict, total=False):
    """The keyword arguments of all three blocks; `MedNeXtBlock` explains them."""

    expansion_ratio: int
    kernel_size: int
    norm: Norm
    grn: Grn
    spatial_dims: int
    residual: bool


_GRN_EPS = 1e-6


class ChannelGroupNorm(nn.GroupNorm):
    """Normalise each channel of each case over space: GroupNorm with one group per channel, eps 1e-5."""

    def __init__(self, channels: int) -> None:
        super().__init__(num_groups=channels, num_channels=channels, eps=1e-5)

    def forward(self, x: Tensor) -> Tensor:
        """Normalise (N, C, ...); one voxel in a batch of one gives the bias, where `nn.GroupNorm` raises."""
        return torch.group_norm(x, self.num_groups, self.weight, self.bias, self.eps)


class ChannelLayerNorm(nn.LayerNorm):
    """Normalise each voxel over its channels, in 2D and 3D, eps 1e-5."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, eps=1e-5)

    def forward(self, x: Tensor) -> Tensor:
        """Normalise (N, C, ...) over C."""
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


def global_response_norm(x: Tensor, gamma: Tensor, beta: Tensor, *, by_sum: bool) -> Tensor:
    """Scale each channel by its share of the response: gamma * (x * n) + beta + x.

    n is the channel's L2 norm over space, divided by the mean of all channels' norms (MedNeXt v1's code, ConvNeXt-V2)
    or by their sum (`by_sum`, MedNeXt-v2, arXiv 2512.17774), plus 1e-6.

    Args:
        x: (N, C, ...).
        gamma: (1, C, 1, ...), like `beta`.
        beta: (1, C, 1, ...).
        by_sum: divide by the sum instead of the mean.
    """
    # A sum of squares over a whole volume overflows float16 and loses bits in bfloat16.
    dtype = torch.float32 if x.dtype in (torch.float16, torch.bfloat16) else x.dtype
    response = torch.linalg.vector_norm(x, dim=tuple(range(2, x.ndim)), keepdim=True, dtype=dtype)
    total = response.sum(dim=1, keepdim=True) if by_sum else response.mean(dim=1, keepdim=True)
    scale = 1 + gamma * (response / (total + _GRN_EPS))
    return torch.addcmul(beta.to(x.dtype), x, scale.to(x.dtype))


class _Block(nn.Module):
    """What the three blocks share: weights under their official names, and the steps after the depthwise one.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output.
        expansion_ratio: width of the expansion as a multiple of `in_channels`.
        kernel_size: odd size of the depthwise kernel.
        norm: "group" (per channel over space) or "layer" (per voxel over channels).
        grn: global response normalisation after the GELU: False, True (v1's form) or "v2".
        spatial_dims: 3 or 2.
        residual: add the residual path.

    Raises:
        PlanError: an argument makes no sense.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        expansion_ratio: int = 4,
        kernel_size: int = 3,
        norm: Norm = "group",
        grn: Grn = False,
        spatial_dims: int = 3,
        residual: bool = True,
    ) -> None:
        super().__init__()
        _check_block(in_channels, out_channels, expansion_ratio, kernel_size, grn)
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.kernel_size = kernel_size
        self.spatial_dims = spatial_dims
        self.grn: Grn = grn
        self.residual = residual
        convolution = convolution_class(spatial_dims)
        wide = expansion_ratio * in_channels
        self.conv1 = self._depthwise_module()
        self.norm = channel_norm(norm, in_channels)
        self.conv2 = convolution(in_channels, wide, kernel_size=1)
        self.conv3 = convolution(wide, out_channels, kernel_size=1)
        if grn:
            shape = (1, wide, *(1,) * spatial_dims)
            self.grn_beta = nn.Parameter(torch.zeros(shape))
            self.grn_gamma = nn.Parameter(torch.zeros(shape))

    def _depthwise_module(self) -> Convolution:
        return self._depthwise(convolution_class(self.spatial_dims), stride=1)

    def _depthwise(self, convolution: Callable[..., Convolution], *, stride: int) -> Convolution:
        return convolution(
            self.in_channels,
            self.in_channels,
            kernel_size=self.kernel_size,
            stride=stride,
            padding=self.kernel_size // 2,
            groups=self.in_channels,
        )

    def _tail(self, h: Tensor, residual: Tensor | None, extra_bias: Tensor | None = None) -> Tensor:
        """Return residual + conv3(GRN(GELU(conv2(norm(h))))) + `extra_bias` (out_channels,) at every voxel."""
        if self._fusible():
            return expand_contract(h, self._tail_weights(extra_bias), residual=residual, eps=self.norm.eps)
        wide = nn.functional.gelu(pointwise(self.norm(h), self.conv2.weight, self.conv2.bias))
        if self.grn:
            wide = global_response_norm(wide, self.grn_gamma, self.grn_beta, by_sum=self.grn == "v2")
        y = pointwise(wide, self.conv3.weight, self._contract_bias(extra_bias))
        return y if residual is None else residual + y

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


class MedNeXtBlock(_Block):
    """Depthwise convolution, normalisation, expansion, GELU, contraction, plus the input: the resolution stays.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output; equal to `in_channels` where `residual`.
        expansion_ratio: width of the expansion as a multiple of `in_channels`.
        kernel_size: odd size of the depthwise kernel.
        norm: "group" (per channel over space) or "layer" (per voxel over channels).
        grn: global response normalisation after the GELU: False, True (v1's form) or "v2".
        spatial_dims: 3 or 2.
        residual: add the input.

    Raises:
        PlanError: a size is below 1, the kernel is even, or `residual` where the channels differ.
    """

    def __init__(self, in_channels: int, out_channels: int, **options: Unpack[BlockOptions]) -> None:
        super().__init__(in_channels, out_channels, **options)
        if self.residual and in_channels != out_channels:
            raise PlanError(
                f"MedNeXtBlock(in_channels={in_channels}, out_channels={out_channels}): "
                "a residual needs equal numbers of channels. Make them equal or pass residual=False."
            )

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, in_channels, D, H, W) to (N, out_channels, D, H, W)."""
        if self._fusible():
            return mednext_block(
                x, self.conv1.weight, self.conv1.bias, self._tail_weights(), residual=self.residual, eps=self.norm.eps
            )
        return self._tail(depthwise_conv(x, self.conv1.weight, self.conv1.bias), x if self.residual else None)


class MedNeXtDownBlock(_Block):
    """A MedNeXtBlock whose depthwise convolution has stride 2: a size n becomes ceil(n / 2).

    The residual path is a 1x1x1 convolution with stride 2. Arguments and errors as in `MedNeXtBlock`; the numbers of
    channels may differ.
    """

    def __init__(self, in_channels: int, out_channels: int, **options: Unpack[BlockOptions]) -> None:
        super().__init__(in_channels, out_channels, **options)
        if self.residual:
            self.res_conv = convolution_class(self.spatial_dims)(in_channels, out_channels, kernel_size=1, stride=2)

    def _depthwise_module(self) -> Convolution:
        return self._depthwise(convolution_class(self.spatial_dims), stride=2)

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, in_channels, D, H, W) to (N, out_channels, ceil(D / 2), ceil(H / 2), ceil(W / 2))."""
        residual = None
        if self.residual:
            residual = pointwise(every_second_voxel(x, 0), self.res_conv.weight, self.res_conv.bias)
        return self._tail(depthwise_conv(x, self.conv1.weight, self.conv1.bias, stride=2), residual)


class MedNeXtUpBlock(_Block):
    """A MedNeXtBlock whose depthwise convolution is transposed with stride 2: a size n becomes 2n.

    The transposed convolution makes 2n - 1; one plane of zeros at the front of every axis makes 2n. The residual path
    is a 1x1x1 transposed convolution with stride 2, padded alike: its weights reach the odd voxels only, its bias all
    but the front planes. Arguments and errors as in `MedNeXtBlock`; the numbers of channels may differ.
    """

    def __init__(self, in_channels: int, out_channels: int, **options: Unpack[BlockOptions]) -> None:
        super().__init__(in_channels, out_channels, **options)
        if self.residual:
            self.res_conv = transposed_class(self.spatial_dims)(in_channels, out_channels, kernel_size=1, stride=2)

    def _depthwise_module(self) -> Convolution:
        return self._depthwise(transposed_class(self.spatial_dims), stride=2)

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, in_channels, D, H, W) to (N, out_channels, 2D, 2H, 2W)."""
        h = depthwise_conv_transpose(x, self.conv1.weight, self.conv1.bias)
        y = self._tail(h, None, self.res_conv.bias if self.residual else None)
        y = nn.functional.pad(y, (1, 0) * (x.ndim - 2))
        if self.residual:
            # The product runs at the coarse grid, where a strided transposed convolution would also multiply zeros.
            every_second_voxel(y, 1).add_(pointwise(x, self.res_conv.weight.transpose(0, 1), None))
        return y


def channel_norm(norm: Norm, channels: int) -> ChannelGroupNorm | ChannelLayerNorm:
    """Return the normalisation called `norm`; raise PlanError for an unknown name."""
    if norm == "group":
        return ChannelGroupNorm(channels)
    if norm == "layer":
        return ChannelLayerNorm(channels)
    raise PlanError(f"norm={norm!r} is not a normalisation of MedNeXt. Expected 'group' or 'layer'.")


def convolution_class(spatial_dims: int) -> type[nn.Conv2d] | type[nn.Conv3d]:
    """Return the convolution of 2 or 3 spatial axes; raise PlanError for any other number."""
    if spatial_dims == 3:
        return nn.Conv3d
    if spatial_dims == 2:
        return nn.Conv2d
    raise PlanError(f"spatial_dims={spatial_dims!r}: expected 3 (volumes) or 2 (slices).")


def transposed_class(spatial_dims: int) -> type[nn.ConvTranspose2d] | type[nn.ConvTranspose3d]:
    """Return the transposed convolution of 2 or 3 spatial axes; raise PlanError for any other number."""
    return nn.ConvTranspose3d if convolution_class(spatial_dims) is nn.Conv3d else nn.ConvTranspose2d


def _check_block(in_channels: int, out_channels: int, expansion_ratio: int, kernel_size: int, grn: Grn) -> None:
    if min(in_channels, out_channels, expansion_ratio) < 1:
        raise PlanError(
            f"a MedNeXt block with in_channels={in_channels}, out_channels={out_channels}, "
            f"expansion_ratio={expansion_ratio}: expected each to be at least 1."
        )
    if kernel_size < 1 or kernel_size % 2 == 0:
        raise PlanError(
            f"kernel_size={kernel_size} in a MedNeXt block: "
            "expected an odd number, so that the grid keeps its size. Use 3, 5 or 7."
        )
    if not isinstance(grn, bool) and grn != "v2":
        raise PlanError(
            f"grn={grn!r} in a MedNeXt block: expected False, True (the form of v1's code) or 'v2' (arXiv 2512.17774)."
        )
