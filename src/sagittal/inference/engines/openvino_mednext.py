"""MedNeXt in OpenVINO's operators: the graph of `networks.mednext`, for prediction, from a bundle's arrays.

Equal to the PyTorch network except for rounding. What is constant at prediction is folded into the weights: the norms'
affine part into the expansion, the bias of the depthwise convolutions into nothing, where a norm over space takes any
constant away, GRN's offset into the contraction.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import openvino
from openvino import opset13 as ops

from sagittal.inference.engines.openvino_layers import (
    Array,
    Node,
    WeightReader,
    constant,
    convolution,
    crop_end,
    integers,
    normalise_channels,
    normalise_space,
    pad_front,
    pad_to_multiples,
    pointwise,
    sizes_of,
    spatial_axes,
    spread_voxels,
)
from sagittal.plan.mednext import HALVINGS, MedNeXtConfig

NORM_EPS = 1e-5
_GRN_EPS = 1e-6
_STAGES = 9


def build(
    config: MedNeXtConfig, weights: Mapping[str, Array], in_channels: int, num_outputs: int, *, with_head: bool
) -> openvino.Model:
    """Return the network as a graph from images (N, C, D, H, W) to logits, or to what the head is applied to.

    N, D, H and W are open; `Model.reshape` fixes them. A network of slices takes and gives D = 1.

    Args:
        config: of the plan.
        weights: arrays by their names in `networks.mednext`.
        in_channels: C.
        num_outputs: channels of the logits.
        with_head: end with the head.

    Raises:
        BundleError: the weights do not fit.
    """
    image = ops.parameter([-1, in_channels, -1, -1, -1], np.float32, name="image")
    return graph_of(Graph, config, weights, image, num_outputs, with_head=with_head)


def graph_of(
    form: type[Graph],
    config: MedNeXtConfig,
    weights: Mapping[str, Array],
    image: Node,
    num_outputs: int,
    *,
    with_head: bool,
) -> openvino.Model:
    """Return the graph from an image as `form` writes it down; what `build` says of arguments and errors holds."""
    reader = WeightReader(weights)
    x: Node = ops.squeeze(image, integers([2])) if config.dims == 2 else image
    in_channels = image.get_output_partial_shape(0)[1].get_length()
    sizes = sizes_of(x)
    x = form(config, reader).features(pad_to_multiples(x, config.multiples), in_channels)
    weight, bias = head_weights(reader, config, num_outputs)
    if with_head:
        x = pointwise(x, weight, bias, dims=config.dims)
    reader.require_all_taken(but=[f"out_{scale}." for scale in range(1, config.scales)])
    x = crop_end(x, sizes, config.dims)
    if config.dims == 2:
        x = ops.unsqueeze(x, integers([2]))
    return openvino.Model([ops.result(x)], [image], "mednext")


def head(config: MedNeXtConfig, weights: Mapping[str, Array], num_outputs: int) -> tuple[Array, Array]:
    """Return weight (K, F) and bias (K,) of the linear last layer.

    Raises:
        BundleError: the weights do not fit.
    """
    return head_weights(WeightReader(weights), config, num_outputs)


def head_weights(reader: WeightReader, config: MedNeXtConfig, num_outputs: int) -> tuple[Array, Array]:
    """Return the head's weight (K, F) and bias (K,), which are kept as a transposed convolution (F, K, 1, 1, 1)."""
    name = "out_0.conv_out"
    weight = reader.take(f"{name}.weight", (config.channels, num_outputs, *(1,) * config.dims))
    return np.ascontiguousarray(weight.reshape(weight.shape[:2]).T), reader.take(f"{name}.bias", (num_outputs,))


@dataclass(frozen=True)
class Block:
    """What tells one block from another; `kind` is "same", "down" or "up"."""

    name: str
    kind: str
    in_channels: int
    out_channels: int
    ratio: int
    kernel: tuple[int, ...]
    strides: tuple[int, ...]
    residual: bool
    grn: bool


class Graph:
    """Writes the network down, block by block; volumes are (N, C, ...).

    Args:
        config: of the plan.
        reader: of the weights.
    """

    def __init__(self, config: MedNeXtConfig, reader: WeightReader) -> None:
        self._config = config
        self._reader = reader
        self._dims = config.dims
        self._flat = config.flat_levels or (0,) * self._dims
        self._strides: Sequence[tuple[int, ...]] = config.strides or ((2,) * self._dims,) * HALVINGS
        ratio = config.expansion_ratio
        self._ratios = (ratio,) * _STAGES if isinstance(ratio, int) else ratio
        self._decoder_kernel = config.decoder_kernel_size or config.kernel_size

    def features(self, x: Node, in_channels: int) -> Node:
        """Map an image to what the finest head sees."""
        x = self._stem(x, in_channels)
        skips = []
        for level in range(HALVINGS):
            x = self._stage(x, f"enc_block_{level}", level, level)
            skips.append(x)
            x = self._block(x, self._resampling(f"down_{level}", "down", level, level + 1))
        x = self._stage(x, "bottleneck", HALVINGS, HALVINGS)
        for level in reversed(range(HALVINGS)):
            index = _STAGES - 1 - level
            x = self._up(x, skips.pop(), self._resampling(f"up_{level}", "up", level, index))
            x = self._stage(x, f"dec_block_{level}", level, index)
        return x

    def _stem(self, x: Node, in_channels: int) -> Node:
        width = self._config.channels
        weight = self._reader.take("stem.weight", (width, in_channels, *(1,) * self._dims))
        return pointwise(x, weight, self._reader.take("stem.bias", (width,)), dims=self._dims)

    def _stage(self, x: Node, name: str, level: int, index: int) -> Node:
        width = self._config.channels << level
        for number in range(self._config.block_counts[index]):
            block = Block(
                name=f"{name}.{number}",
                kind="same",
                in_channels=width,
                out_channels=width,
                ratio=self._ratios[index],
                kernel=self._kernel(level, index),
                strides=(1,) * self._dims,
                residual=self._config.block_residual,
                grn=bool(self._config.grn),
            )
            x = self._block(x, block)
        return x

    def _resampling(self, name: str, kind: str, level: int, index: int) -> Block:
        """Describe the block between `level` and the next coarser one, of the ratio of stage `index`."""
        fine, coarse = self._config.channels << level, self._config.channels << (level + 1)
        going_down = kind == "down"
        # v1's code has no GRN in the first down block.
        has_grn = self._config.grn == "v2" or (self._config.grn is True and not (going_down and level == 0))
        return Block(
            name=name,
            kind=kind,
            in_channels=fine if going_down else coarse,
            out_channels=coarse if going_down else fine,
            ratio=self._ratios[index],
            # The encoder's kernels lead down to the bottleneck, whose own stage is the decoder's.
            kernel=self._kernel(level, index - 1 if going_down else index),
            strides=self._strides[level],
            residual=self._config.resampling_residual,
            grn=has_grn,
        )

    def _kernel(self, level: int, index: int) -> tuple[int, ...]:
        size = self._config.kernel_size if index < HALVINGS else self._decoder_kernel
        return tuple(1 if level < levels else size for levels in self._flat)

    def _block(self, x: Node, block: Block) -> Node:
        """Add the block of kind "same" or "down"."""
        y = self._tail(self._depthwise(x, block), block, None)
        if not block.residual:
            return y
        if block.kind == "same":
            return ops.add(y, x)
        weight, bias = self._residual_weights(block)
        return ops.add(y, pointwise(x, weight, bias, strides=block.strides, dims=self._dims))

    def _up(self, x: Node, skip: Node, block: Block) -> Node:
        """Add an up block, whose first planes are zero and whose residual path reaches the odd voxels, and the skip."""
        weight, bias = self._residual_weights(block) if block.residual else (None, None)
        y = self._tail(self._depthwise_transpose(x, block), block, bias)
        y = ops.add(skip, pad_front(y, block.strides))
        if weight is None:
            return y
        return ops.add(y, spread_voxels(pointwise(x, weight, None, dims=self._dims), block.strides, at=1))

    def _depthwise(self, x: Node, block: Block) -> Node:
        weight, bias = self._depthwise_weights(block)
        padding = [size // 2 for size in block.kernel]
        return convolution(x, weight, bias, strides=block.strides, padding=padding, groups=block.in_channels)

    def _depthwise_transpose(self, x: Node, block: Block, *, front: bool = False) -> Node:
        """Convolve transposed: a size n becomes 2n - 1, or, with `front`, 2n, of which the first means nothing.

        OpenVINO's own operator is many times slower than a plain convolution with zeros between the voxels. The zero
        behind the last voxel takes the place of one of padding.
        """
        weight, bias = self._depthwise_weights(block)
        flipped = np.flip(weight, spatial_axes(self._dims))
        padding = [
            size // 2 + (stride - 1 if front else 0) for size, stride in zip(block.kernel, block.strides, strict=True)
        ]
        ends = [size // 2 - stride + 1 for size, stride in zip(block.kernel, block.strides, strict=True)]
        ones = (1,) * self._dims
        spread = spread_voxels(x, block.strides)
        return convolution(spread, flipped, bias, strides=ones, padding=padding, ends=ends, groups=block.in_channels)

    def _depthwise_weights(self, block: Block) -> tuple[Array, Array | None]:
        shape = (block.in_channels, 1, *block.kernel)
        weight = self._reader.take(f"{block.name}.conv1.weight", shape)
        bias = self._reader.take(f"{block.name}.conv1.bias", shape[:1])
        return weight, None if self._config.norm == "group" else bias

    def _tail(self, h: Node, block: Block, extra_bias: Array | None) -> Node:
        """Return conv3(GRN(GELU(conv2(norm(h))))) + `extra_bias`."""
        if self._config.norm == "group":
            h = normalise_space(h, NORM_EPS, self._dims)
        else:
            h = normalise_channels(h, NORM_EPS)
        weight, bias = self._expansion(block)
        wide = ops.gelu(pointwise(h, weight, bias, dims=self._dims), "erf")
        if block.grn:
            wide = ops.multiply(wide, self._response_scale(wide, block))
        weight, bias = self._contraction(block)
        return pointwise(wide, weight, bias if extra_bias is None else bias + extra_bias, dims=self._dims)

    def _expansion(self, block: Block) -> tuple[Array, Array]:
        """Return weight and bias of conv2, with the norm's scale and shift folded into them."""
        channels, wide = block.in_channels, block.ratio * block.in_channels
        gamma = self._reader.take(f"{block.name}.norm.weight", (channels,)).astype(np.float64)
        beta = self._reader.take(f"{block.name}.norm.bias", (channels,))
        weight = self._pointwise_weight(f"{block.name}.conv2.weight", wide, channels)
        return weight * gamma, self._reader.take(f"{block.name}.conv2.bias", (wide,)) + weight @ beta

    def _contraction(self, block: Block) -> tuple[Array, Array]:
        """Return weight and bias of conv3, with GRN's offset folded into them."""
        wide = block.ratio * block.in_channels
        weight = self._pointwise_weight(f"{block.name}.conv3.weight", block.out_channels, wide)
        bias = self._reader.take(f"{block.name}.conv3.bias", (block.out_channels,)).astype(np.float64)
        if block.grn:
            beta = self._reader.take(f"{block.name}.grn_beta", (1, wide, *(1,) * self._dims))
            bias = bias + weight @ beta.reshape(-1)
        return weight, bias

    def _response_scale(self, wide: Node, block: Block) -> Node:
        """Return by what GRN multiplies each channel."""
        gamma = self._reader.take(f"{block.name}.grn_gamma", (1, block.ratio * block.in_channels, *(1,) * self._dims))
        response = ops.reduce_l2(wide, integers(spatial_axes(self._dims)), True)
        pool = ops.reduce_sum if self._config.grn == "v2" else ops.reduce_mean
        total = ops.add(pool(response, integers([1]), True), constant(np.full((), _GRN_EPS)))
        return ops.add(ops.multiply(ops.divide(response, total), constant(gamma)), constant(np.ones(())))

    def _residual_weights(self, block: Block) -> tuple[Array, Array]:
        """Return weight (out, in) and bias (out,) of a resampling block's residual path."""
        name, shape = f"{block.name}.res_conv", (block.out_channels, block.in_channels)
        bias = self._reader.take(f"{name}.bias", shape[:1])
        if block.kind == "up":
            weight = self._reader.take(f"{name}.weight", (*shape[::-1], *(1,) * self._dims))
            return weight.reshape(shape[::-1]).T, bias
        return self._reader.take(f"{name}.weight", (*shape, *(1,) * self._dims)).reshape(shape), bias

    def _pointwise_weight(self, name: str, out_channels: int, in_channels: int) -> Array:
        """Return a 1x1x1 convolution's weights as a matrix (out, in) in float64, to fold others into it."""
        weight = self._reader.take(name, (out_channels, in_channels, *(1,) * self._dims))
        return weight.reshape(out_channels, in_channels).astype(np.float64)
