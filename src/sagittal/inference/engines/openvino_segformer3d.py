"""SegFormer3D as an OpenVINO graph, built from its configuration and weights, without PyTorch.

The graph computes what `networks.segformer3d` computes at inference. What is linear is folded into the weights that
follow it: the learned part of a norm before a linear layer, BatchNorm, the scale of the attention. Sizes stay open;
where the model is reshaped to fixed ones before it is compiled, OpenVINO computes the padding and the interpolation
matrices once, as it compiles.

Tokens are (N, T, C); in 2D there is no D. Letters as in `networks.segformer3d_blocks`: S tokens after the reduction of
keys and values, h heads.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import openvino
from openvino import opset13 as ops

from sagittal.inference.engines.openvino_layers import (
    Array,
    Node,
    WeightReader,
    convolution,
    integers,
    sizes_of,
)
from sagittal.inference.engines.openvino_segformer3d_decoder import STAGES, decode, upsample_logits
from sagittal.inference.engines.openvino_tokens import (
    Affine,
    Grid,
    affine_weights,
    batch_norm_weights,
    from_volume,
    group_norm,
    joined,
    linear,
    linear_weights,
    normalise,
)
from sagittal.plan.base import Triple
from sagittal.plan.segformer3d import SegFormer3DConfig

_STRIDES = (4, 8, 16, 32)
_PAD_MULTIPLE = 16
_PREFIX = "segformer_encoder."


def build(
    config: SegFormer3DConfig,
    weights: Mapping[str, Array],
    in_channels: int,
    num_outputs: int,
    *,
    with_head: bool = True,
) -> openvino.Model:
    """Return a model that maps images (N, in_channels, D, H, W), float32 of any size, to logits (N, K, D, H, W).

    Where the configuration has two spatial axes, D must be 1.

    Args:
        config: the plan's network.
        weights: arrays of the bundle, by parameter name.
        in_channels: channels of the image.
        num_outputs: K.
        with_head: false ends the network before its last step, the linear interpolation to the image's grid: logits
            (N, K, d, h, w) with a fourth of the sizes, rounded up; see `coarse_stride`.

    Raises:
        BundleError: a weight is missing, has another shape, or belongs to no layer.
    """
    reader, dims = WeightReader(weights), config.dims
    image = ops.parameter([-1, in_channels, -1, -1, -1], np.float32, name="image")
    volume = image if dims == 3 else ops.squeeze(image, integers([2]))
    sizes = sizes_of(volume)
    grids = _encode(config, reader, _padded(config, volume, sizes), in_channels)
    logits = decode(config, reader, grids, num_outputs).volume(dims)
    reader.require_all_taken()
    if with_head:
        logits = upsample_logits(logits, _STRIDES[0], sizes, dims)
    if dims == 2:
        logits = ops.unsqueeze(logits, integers([2]))
    result = ops.result(logits, name="logits")
    image.output(0).set_names({"image"})
    result.output(0).set_names({"logits"})
    return openvino.Model([result], [image], "segformer3d")


def coarse_stride(config: SegFormer3DConfig, window: Triple) -> int:
    """Return by how much the logits are coarser than such a window before the last interpolation, 1 for as fine.

    1 stands as well for windows of whose result the network crops something, and for slices.
    """
    aligned = config.dims == 3 and all(size >= _least(config) and size % _STRIDES[0] == 0 for size in window)
    return _STRIDES[0] if aligned else 1


def _least(config: SegFormer3DConfig) -> int:
    """Return the shortest axis that the reduction of keys and values takes unpadded."""
    return max(stride * (ratio - 1) + 1 for stride, ratio in zip(_STRIDES, config.sr_ratios, strict=True))


def _padded(config: SegFormer3DConfig, volume: Node, sizes: Node) -> Node:
    """Repeat the last plane of each axis that is too short for the reduction of keys and values."""
    least = _least(config)
    if least == 1:
        return volume
    target = math.ceil(least / _PAD_MULTIPLE) * _PAD_MULTIPLE
    ones = (1,) * config.dims
    missing = ops.subtract(integers([target * one for one in ones]), sizes)
    short = ops.less(sizes, integers([least * one for one in ones]))
    ends = joined(integers([0, 0]), ops.select(short, missing, integers([0 * one for one in ones])))
    return ops.pad(volume, integers([0, 0, *(0 * one for one in ones)]), ends, "edge")


def _encode(
    config: SegFormer3DConfig, weights: WeightReader, volume: Node, in_channels: int
) -> list[tuple[Grid, Affine]]:
    """Return the tokens of the four stages, finest first, normalised, and the learned part of each one's norm."""
    dims, inputs, grids = config.dims, (in_channels, *config.embed_dims), []
    for stage, width in enumerate(config.embed_dims):
        grid = _embed(weights, volume, stage, (inputs[stage], width), dims)
        for block in range(config.depths[stage]):
            grid = _block(config, weights, grid, stage, f"{_PREFIX}tf_block{stage + 1}.{block}")
        learned = affine_weights(weights, f"{_PREFIX}norm{stage + 1}", width)
        grid = grid.with_tokens(normalise(grid.tokens))
        grids.append((grid, learned))
        if stage + 1 < STAGES:
            volume = grid.with_tokens(learned(grid.tokens)).volume(dims)
    return grids


def _embed(weights: WeightReader, volume: Node, stage: int, widths: tuple[int, int], dims: int) -> Grid:
    """Convolve with a stride, then normalise each token: an axis n becomes ceil(n / stride)."""
    kernel, stride = (7, 4) if stage == 0 else (3, 2)
    (inputs, width), name = widths, f"{_PREFIX}embed_{stage + 1}"
    weight = weights.take(f"{name}.patch_embeddings.weight", (width, inputs, *(kernel,) * dims))
    bias = weights.take(f"{name}.patch_embeddings.bias", (width,))
    embedded = convolution(volume, weight, bias, strides=(stride,) * dims, padding=(kernel // 2,) * dims)
    grid = from_volume(embedded, width, dims)
    return grid.with_tokens(affine_weights(weights, f"{name}.norm", width)(normalise(grid.tokens)))


def _block(config: SegFormer3DConfig, weights: WeightReader, grid: Grid, stage: int, name: str) -> Grid:
    """x + attention(norm1 x), then x + mlp(norm2 x)."""
    grid = grid.with_tokens(ops.add(grid.tokens, _attention(config, weights, grid, stage, name)))
    return grid.with_tokens(ops.add(grid.tokens, _mix_ffn(config, weights, grid, stage, name)))


def _attention(config: SegFormer3DConfig, weights: WeightReader, grid: Grid, stage: int, block: str) -> Node:
    """Self-attention; keys and values come from a grid reduced along each axis."""
    width, heads, ratio = grid.width, config.num_heads[stage], config.sr_ratios[stage]
    before = affine_weights(weights, f"{block}.norm1", width)
    source = grid.with_tokens(normalise(grid.tokens))
    name = f"{block}.attention"
    weight, bias = linear_weights(weights, f"{name}.query", width, width, before)
    scale = np.float32(1 / math.sqrt(heads if config.attention_scale == "paper" else width // heads))
    query = _split_heads(linear(source.tokens, weight * scale, bias * scale), heads, width)
    if ratio > 1:
        source = _reduced(weights, source, ratio, (f"{name}.sr", before), config.dims)
        before = affine_weights(weights, f"{name}.sr_norm", width)
    weight, bias = linear_weights(weights, f"{name}.key_value", width, 2 * width, before)
    key = _split_heads(linear(source.tokens, weight[:width], bias[:width]), heads, width)
    value = _split_heads(linear(source.tokens, weight[width:], bias[width:]), heads, width)
    scores = ops.matmul(query, key, False, True)
    # OpenVINO (2026.4) fuses the attention; with open sizes that kernel is wrong once its first call had one key. This
    # reshape to the same shape prevents it there, and is removed where sizes are fixed.
    scores = ops.reshape(scores, ops.shape_of(scores), special_zero=False)
    mixed = ops.matmul(ops.softmax(scores, -1), value, False, False)
    tokens = ops.reshape(ops.transpose(mixed, integers([0, 2, 1, 3])), integers([0, 0, width]), special_zero=True)
    return linear(tokens, *linear_weights(weights, f"{name}.proj", width, width))


def _split_heads(tokens: Node, heads: int, width: int) -> Node:
    """Return (N, T, C) as (N, h, T, C / h)."""
    split = ops.reshape(tokens, integers([0, 0, heads, width // heads]), special_zero=True)
    return ops.transpose(split, integers([0, 2, 1, 3]))


def _reduced(weights: WeightReader, grid: Grid, ratio: int, layer: tuple[str, Affine], dims: int) -> Grid:
    """Return the grid, normalised, that keys and values come from; `layer` is its name, and what is affine before."""
    (name, before), width = layer, grid.width
    weight = weights.take(f"{name}.weight", (width, width, *(ratio,) * dims))
    bias = weights.take(f"{name}.bias", (width,))
    # No window reaches beyond the grid, so that what is affine before the convolution can become part of it.
    bias = bias + weight.reshape(width, width, -1).sum(axis=2) @ before.shift
    weight = weight * before.scale.reshape(1, -1, *(1,) * dims)
    volume = convolution(grid.volume(dims), weight, bias, strides=(ratio,) * dims, padding=(0,) * dims)
    reduced = from_volume(volume, width, dims)
    return reduced.with_tokens(normalise(reduced.tokens))


def _mix_ffn(config: SegFormer3DConfig, weights: WeightReader, grid: Grid, stage: int, block: str) -> Node:
    """Linear, depthwise convolution, norm, GELU, Linear."""
    width, hidden, dims = grid.width, grid.width * config.mlp_ratios[stage], config.dims
    before, name = affine_weights(weights, f"{block}.norm2", width), f"{block}.mlp"
    inner = linear(normalise(grid.tokens), *linear_weights(weights, f"{name}.fc1", width, hidden, before))
    weight = weights.take(f"{name}.dwconv.dwconv.weight", (hidden, 1, *(3,) * dims))
    bias = weights.take(f"{name}.dwconv.dwconv.bias", (hidden,))
    if config.norm == "batch":
        folded = batch_norm_weights(weights, f"{name}.dwconv.bn", hidden)
        weight = weight * folded.scale.reshape(-1, *(1,) * (dims + 1))
        bias = bias * folded.scale + folded.shift
    volume = grid.with_tokens(inner, hidden).volume(dims)
    ones = (1,) * dims
    mixed = from_volume(convolution(volume, weight, bias, strides=ones, padding=ones, groups=hidden), hidden, dims)
    if config.norm == "group":
        mixed = group_norm(weights, f"{name}.dwconv.bn", mixed, dims)
    return linear(ops.gelu(mixed.tokens, "erf"), *linear_weights(weights, f"{name}.fc2", hidden, width))
