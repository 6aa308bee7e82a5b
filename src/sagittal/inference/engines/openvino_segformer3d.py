"""SegFormer3D as an OpenVINO graph, built from its configuration and weights, without PyTorch.

The graph computes what `networks.segformer3d` computes at inference, in the same steps: what is linear is folded into
the weights that follow it, each map of the decoder is fused at its own grid, and all interpolation is matrix products.
Sizes stay open; where the model is reshaped to fixed ones before it is compiled, OpenVINO computes padding and
interpolation matrices once, while it compiles.

Tokens are (N, T, C) with T = D * H * W, or (N, D, H, W, C) beside a convolution; in 2D there is no D. C is a width, S
the tokens after the reduction of keys and values, h the heads.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import openvino
from openvino import opset13 as ops

from sagittal.errors import BundleError, PlanError
from sagittal.plan.segformer3d import SegFormer3DConfig

_STAGES = 4
_STRIDES = (4, 8, 16, 32)
_PAD_MULTIPLE = 16
_EPS = 1e-5
_GROUPS = 32
_CHANNELS_PER_GROUP = 4
_JITTER, _LEAST_JITTER = 1e-13, 1e-30

_Array = np.ndarray[Any, Any]
_Node = Any  # openvino's types are opaque to a type checker


def build(
    config: SegFormer3DConfig,
    weights: Mapping[str, _Array],
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
        with_head: must be true: SegFormer3D has no linear layer at the image's grid. What it interpolates are its
            logits, at a quarter of the grid.

    Raises:
        PlanError: `with_head` is false.
        BundleError: a weight is missing or has another shape.
    """
    if not with_head:
        raise PlanError("SegFormer3D has no features at the image's grid: its decoder interpolates the logits.")
    return _Builder(config, _Weights(weights)).model(in_channels, num_outputs)


@dataclass(frozen=True)
class _Weights:
    """Arrays by name, with errors that say which is missing."""

    arrays: Mapping[str, _Array]

    def get(self, name: str, shape: tuple[int, ...]) -> _Array:
        """Return the array called `name` in float32."""
        if name not in self.arrays:
            raise BundleError(f"the weights have no '{name}', which SegFormer3D needs. Get the bundle again.")
        array = self.arrays[name]
        if array.shape != shape:
            raise BundleError(
                f"the weight '{name}' has shape {array.shape}, the plan's network needs {shape}. Get the bundle again."
            )
        return np.ascontiguousarray(array, dtype=np.float32)


@dataclass(frozen=True)
class _Affine:
    """x -> x * scale + shift, (C,) each: the learned part of a LayerNorm."""

    scale: _Array
    shift: _Array


@dataclass(frozen=True)
class _Grid:
    """Tokens (N, T, C) and the sizes of their grid, a node (dims,) of int64."""

    tokens: _Node
    sizes: _Node
    width: int


class _Builder:
    """The graph, part by part."""

    def __init__(self, config: SegFormer3DConfig, weights: _Weights) -> None:
        self.config = config
        self.weights = weights
        self.dims = config.dims

    def model(self, in_channels: int, num_outputs: int) -> openvino.Model:
        """Return the whole network."""
        image = ops.parameter([-1, in_channels, -1, -1, -1], np.float32, name="image")
        volume = image if self.dims == 3 else ops.squeeze(image, _ints([2]))
        sizes = _spatial_sizes(volume)
        grids = self._encoder(self._padded(volume, sizes), in_channels)
        logits = _upsample_logits(self._decoder(grids, num_outputs), sizes, self.dims)
        if self.dims == 2:
            logits = ops.unsqueeze(logits, _ints([2]))
        result = ops.result(logits, name="logits")
        result.output(0).set_names({"logits"})
        image.output(0).set_names({"image"})
        return openvino.Model([result], [image], "segformer3d")

    def _padded(self, volume: _Node, sizes: _Node) -> _Node:
        """Repeat the last plane of an axis that is too short for the reduction of keys and values."""
        strides_and_ratios = zip(_STRIDES, self.config.sr_ratios, strict=True)
        least = max(stride * (ratio - 1) + 1 for stride, ratio in strides_and_ratios)
        if least == 1:
            return volume
        target = -(-least // _PAD_MULTIPLE) * _PAD_MULTIPLE
        short = ops.less(sizes, _ints([least] * self.dims))
        missing = ops.select(short, ops.subtract(_ints([target] * self.dims), sizes), _ints([0] * self.dims))
        ends = ops.concat([_ints([0, 0]), missing], axis=0)
        return ops.pad(volume, _ints([0] * (2 + self.dims)), ends, "edge")

    def _encoder(self, volume: _Node, in_channels: int) -> list[tuple[_Grid, _Affine]]:
        """Return the tokens of the four stages, finest first, each with the learned part of its last LayerNorm."""
        config, grids = self.config, []
        for stage in range(_STAGES):
            width = config.embed_dims[stage]
            grid = self._embedding(volume, stage, in_channels if stage == 0 else config.embed_dims[stage - 1])
            for block in range(config.depths[stage]):
                grid = self._block(grid, stage, f"segformer_encoder.tf_block{stage + 1}.{block}.")
            normalised = _Grid(_normalise(grid.tokens), grid.sizes, width)
            affine = self._affine(f"segformer_encoder.norm{stage + 1}.", width)
            grids.append((normalised, affine))
            if stage < _STAGES - 1:
                scaled = _Grid(_apply(affine, normalised.tokens), grid.sizes, width)
                volume = self._volume(scaled)
        return grids

    def _embedding(self, volume: _Node, stage: int, inputs: int) -> _Grid:
        """Convolve with a stride and normalise each token: an axis n becomes ceil(n / stride)."""
        width, kernel, stride = self.config.embed_dims[stage], 7 if stage == 0 else 3, 4 if stage == 0 else 2
        prefix = f"segformer_encoder.embed_{stage + 1}."
        weight = self.weights.get(prefix + "patch_embeddings.weight", (width, inputs, *(kernel,) * self.dims))
        bias = self.weights.get(prefix + "patch_embeddings.bias", (width,))
        grid = self._tokens(self._convolution(volume, weight, bias, stride=stride, padding=kernel // 2), width)
        tokens = _apply(self._affine(prefix + "norm.", width), _normalise(grid.tokens))
        return _Grid(tokens, grid.sizes, width)

    def _block(self, grid: _Grid, stage: int, prefix: str) -> _Grid:
        """x + attention(norm1 x), then x + mlp(norm2 x)."""
        attended = self._attention(grid, stage, prefix)
        tokens = ops.add(grid.tokens, attended)
        mixed = self._mix_ffn(_Grid(tokens, grid.sizes, grid.width), stage, prefix)
        return _Grid(ops.add(tokens, mixed), grid.sizes, grid.width)

    def _attention(self, grid: _Grid, stage: int, prefix: str) -> _Node:
        config, width, heads = self.config, grid.width, self.config.num_heads[stage]
        before = self._affine(prefix + "norm1.", width)
        normalised = _normalise(grid.tokens)
        name = prefix + "attention."
        weight, bias = self._linear(name + "query", width, width, before)
        scale = 1 / math.sqrt(heads if config.attention_scale == "paper" else width // heads)
        query = _split_heads(_matmul(normalised, weight * scale, bias * scale), heads, width)
        source, ratio = normalised, config.sr_ratios[stage]
        if ratio > 1:
            source = self._reduced(_Grid(normalised, grid.sizes, width), ratio, name, before)
            before = self._affine(name + "sr_norm.", width)
        weight, bias = self._linear(name + "key_value", width, 2 * width, before)
        key = _split_heads(_matmul(source, weight[:width], bias[:width]), heads, width)
        value = _split_heads(_matmul(source, weight[width:], bias[width:]), heads, width)
        weights = ops.softmax(ops.matmul(query, key, False, True), axis=-1)
        mixed = ops.transpose(ops.matmul(weights, value, False, False), _ints([0, 2, 1, 3]))
        joined = ops.reshape(mixed, _ints([0, 0, width]), special_zero=True)
        return _matmul(joined, *self._linear(name + "proj", width, width))

    def _reduced(self, grid: _Grid, ratio: int, name: str, before: _Affine) -> _Node:
        """Return the tokens (N, S, C), normalised, that keys and values come from."""
        width = grid.width
        weight = self.weights.get(name + "sr.weight", (width, width, *(ratio,) * self.dims))
        # Its windows never reach beyond the grid, so the norm before it becomes part of it.
        bias = self.weights.get(name + "sr.bias", (width,)) + np.tensordot(
            weight.reshape(width, width, -1).sum(axis=2), before.shift, 1
        )
        weight = weight * before.scale.reshape(1, -1, *(1,) * self.dims)
        return _normalise(self._tokens(self._convolution(self._volume(grid), weight, bias, stride=ratio), width).tokens)

    def _mix_ffn(self, grid: _Grid, stage: int, prefix: str) -> _Node:
        """Linear, depthwise convolution, norm, GELU, Linear."""
        width, hidden = grid.width, grid.width * self.config.mlp_ratios[stage]
        before = self._affine(prefix + "norm2.", width)
        inner = _matmul(_normalise(grid.tokens), *self._linear(prefix + "mlp.fc1", width, hidden, before))
        name = prefix + "mlp.dwconv."
        weight = self.weights.get(name + "dwconv.weight", (hidden, 1, *(3,) * self.dims))
        bias = self.weights.get(name + "dwconv.bias", (hidden,))
        if self.config.norm == "batch":
            folded = self._batch_norm(name + "bn.", hidden)
            weight = weight * folded.scale.reshape(-1, *(1,) * (1 + self.dims))
            bias = bias * folded.scale + folded.shift
        volume = self._convolution(self._volume(_Grid(inner, grid.sizes, hidden)), weight, bias, padding=1)
        if self.config.norm == "group":
            volume = self._group_norm(volume, name + "bn.", hidden)
        mixed = ops.gelu(self._tokens(volume, hidden).tokens, "erf")
        return _matmul(mixed, *self._linear(prefix + "mlp.fc2", hidden, width))

    def _decoder(self, grids: list[tuple[_Grid, _Affine]], num_outputs: int) -> _Node:
        """Return the logits (N, K, ...) at the finest grid."""
        width = self.config.decoder_dim
        fuse = self.weights.get("segformer_decoder.linear_fuse.0.weight", (width, 4 * width, *(1,) * self.dims))
        # The columns stand in the order of the concatenation: stages 4, 3, 2, 1.
        columns = np.split(fuse.reshape(width, 4 * width), _STAGES, axis=1)[::-1]
        shift = np.zeros(width, np.float32)
        if self.config.norm == "batch":
            folded = self._batch_norm("segformer_decoder.linear_fuse.1.", width)
            columns = [column * folded.scale[:, None] for column in columns]
            shift = folded.shift
        rows, matrix, constant = self._finest_rows(grids[0], columns[0])
        finest = grids[0][0]
        fused = ops.matmul(rows, ops.constant(matrix), False, False)
        coarse = [self._projected(stage, grids[stage], columns[stage]) for stage in range(1, _STAGES)]
        # A voxel's interpolation weights sum to one, so what all voxels share can go through the smallest map.
        last = coarse[-1]
        coarse[-1] = _Grid(ops.add(last.tokens, ops.constant(shift + constant)), last.sizes, width)
        fused = self._add_upsampled(_Grid(fused, finest.sizes, width), coarse)
        if self.config.norm == "group":
            volume = self._volume(_Grid(fused, finest.sizes, width))
            volume = self._group_norm(volume, "segformer_decoder.linear_fuse.1.", width)
            fused = self._tokens(volume, width).tokens
        fused = ops.relu(fused)
        weight = self.weights.get("segformer_decoder.linear_pred.weight", (num_outputs, width, *(1,) * self.dims))
        bias = self.weights.get("segformer_decoder.linear_pred.bias", (num_outputs,))
        logits = _matmul(fused, weight.reshape(num_outputs, width), bias)
        return self._volume(_Grid(logits, finest.sizes, num_outputs))

    def _projected(self, stage: int, grid: tuple[_Grid, _Affine], column: _Array) -> _Grid:
        """Return a stage's tokens times its columns of the fuse, at its own grid."""
        (tokens, width), inner = (grid[0].tokens, grid[0].width), self.config.decoder_dim
        name = f"segformer_decoder.linear_c{stage + 1}."
        projected = _normalise(_matmul(tokens, *self._linear(name + "proj", width, inner, grid[1])))
        after = self._affine(name + "bn.", inner)
        return _Grid(_matmul(projected, column * after.scale, column @ after.shift), grid[0].sizes, inner)

    def _finest_rows(self, grid: tuple[_Grid, _Affine], column: _Array) -> tuple[_Node, _Array, _Array]:
        """Return rows (N, T, K + 1), matrix (K + 1, C), constant (C,): column(LayerNorm(proj x)) = rows @ matrix + it.

        As in `networks.segformer3d_decoder`: the deviation that LayerNorm divides by is the norm of a projection of
        (x, 1), and a triangular factor of K + 1 rows has the same norm as the projection of C rows.
        """
        tokens, width, inner = grid[0].tokens, grid[0].width, self.config.decoder_dim
        name = "segformer_decoder.linear_c1."
        weight, bias = self._linear(name + "proj", width, inner, grid[1])
        centred = np.concatenate([weight, bias[:, None]], axis=1).astype(np.float64)
        centred -= centred.mean(axis=0)
        gram = centred.T @ centred
        gram[np.diag_indices_from(gram)] += _JITTER * np.trace(gram) + _LEAST_JITTER  # a projection may lack ranks
        factor = np.linalg.cholesky(gram)
        spread = _matmul(tokens, factor[:width].T.astype(np.float32), factor[width].astype(np.float32))
        variance = ops.divide(ops.reduce_sum(ops.multiply(spread, spread), _ints([2]), keep_dims=True), _floats(inner))
        deviation = ops.divide(_floats(1), ops.sqrt(ops.add(variance, _floats(_EPS))))
        rows = ops.concat([ops.multiply(tokens, deviation), deviation], axis=2)
        after = self._affine(name + "bn.", inner)
        matrix = ((column * after.scale) @ centred).T
        return rows, np.ascontiguousarray(matrix, dtype=np.float32), column @ after.shift

    def _add_upsampled(self, finest: _Grid, coarse: list[_Grid]) -> _Node:
        """Return tokens (N, T, C): `finest` plus each map linearly interpolated to its grid."""
        sizes = [_size(finest.sizes, axis) for axis in range(self.dims)]
        lines, matrices = [], []
        for grid in coarse:
            positions = [_size(grid.sizes, axis) for axis in range(self.dims)]
            values = ops.reshape(grid.tokens, _shape(_ints([-1]), grid.sizes, _ints([grid.width])), special_zero=False)
            # From the last axis to the first, so that the largest product reads memory in order.
            for axis in reversed(range(self.dims - 1)):
                matrix = _interpolation(positions[axis], sizes[axis])
                values = _along(values, axis, matrix, [*positions[:axis], *sizes[axis : self.dims - 1]], positions)
            lines.append(values)
            matrices.append(_interpolation(positions[-1], sizes[-1]))
        values, matrix = ops.concat(lines, axis=self.dims), ops.concat(matrices, axis=1)
        grid = _Grid(finest.tokens, finest.sizes, finest.width)
        fused = ops.reshape(grid.tokens, _shape(_ints([-1]), grid.sizes, _ints([grid.width])), special_zero=False)
        fused = ops.add(fused, ops.matmul(matrix, values, False, False))
        return ops.reshape(fused, _ints([0, -1, grid.width]), special_zero=True)

    def _volume(self, grid: _Grid) -> _Node:
        """Return tokens (N, T, C) as a volume (N, C, ...)."""
        volume = ops.reshape(grid.tokens, _shape(_ints([-1]), grid.sizes, _ints([grid.width])), special_zero=False)
        return ops.transpose(volume, _ints([0, self.dims + 1, *range(1, self.dims + 1)]))

    def _tokens(self, volume: _Node, width: int) -> _Grid:
        """Return a volume (N, C, ...) as tokens (N, T, C)."""
        moved = ops.transpose(volume, _ints([0, *range(2, self.dims + 2), 1]))
        return _Grid(ops.reshape(moved, _ints([0, -1, width]), special_zero=True), _spatial_sizes(volume), width)

    def _convolution(self, volume: _Node, weight: _Array, bias: _Array, *, stride: int = 1, padding: int = 0) -> _Node:
        """Convolve (N, C, ...); a weight (C, 1, ...) of more than one channel is depthwise."""
        strides, pads, ones = [stride] * self.dims, [padding] * self.dims, [1] * self.dims
        weight = np.ascontiguousarray(weight, dtype=np.float32)
        if weight.shape[1] == 1 and stride == 1:
            grouped = ops.constant(weight[:, None])
            result = ops.group_convolution(volume, grouped, strides, pads, pads, ones)
        else:
            result = ops.convolution(volume, ops.constant(weight), strides, pads, pads, ones)
        return ops.add(result, ops.constant(bias.astype(np.float32).reshape(1, -1, *ones)))

    def _group_norm(self, volume: _Node, name: str, width: int) -> _Node:
        groups = math.gcd(_GROUPS, width)
        while groups > 1 and width // groups < _CHANNELS_PER_GROUP:
            groups //= 2
        affine = self._affine(name, width)
        return ops.group_normalization(volume, ops.constant(affine.scale), ops.constant(affine.shift), groups, _EPS)

    def _affine(self, prefix: str, width: int) -> _Affine:
        return _Affine(self.weights.get(prefix + "weight", (width,)), self.weights.get(prefix + "bias", (width,)))

    def _batch_norm(self, prefix: str, width: int) -> _Affine:
        """Return what a BatchNorm does with its running statistics."""
        affine = self._affine(prefix, width)
        mean = self.weights.get(prefix + "running_mean", (width,))
        variance = self.weights.get(prefix + "running_var", (width,))
        scale = affine.scale / np.sqrt(variance + np.float32(_EPS))
        return _Affine(scale, affine.shift - mean * scale)

    def _linear(self, name: str, inputs: int, outputs: int, before: _Affine | None = None) -> tuple[_Array, _Array]:
        """Return weight (outputs, inputs) and bias of a Linear that also does what `before` it is learned."""
        weight = self.weights.get(name + ".weight", (outputs, inputs))
        bias = self.weights.get(name + ".bias", (outputs,))
        if before is None:
            return weight, bias
        return weight * before.scale, bias + weight @ before.shift


def _matmul(tokens: _Node, weight: _Array, bias: _Array) -> _Node:
    """tokens (N, T, C) @ weight (O, C) transposed + bias (O,)."""
    product = ops.matmul(tokens, ops.constant(np.ascontiguousarray(weight, dtype=np.float32)), False, True)
    return ops.add(product, ops.constant(bias.astype(np.float32)))


def _normalise(tokens: _Node) -> _Node:
    """LayerNorm over the last axis without its learned part."""
    return ops.mvn(tokens, _ints([-1]), True, _EPS, "inside_sqrt")


def _apply(affine: _Affine, tokens: _Node) -> _Node:
    return ops.add(ops.multiply(tokens, ops.constant(affine.scale)), ops.constant(affine.shift))


def _split_heads(tokens: _Node, heads: int, width: int) -> _Node:
    """(N, T, C) -> (N, h, T, C / h)."""
    split = ops.reshape(tokens, _ints([0, 0, heads, width // heads]), special_zero=True)
    return ops.transpose(split, _ints([0, 2, 1, 3]))


def _upsample_logits(logits: _Node, sizes: _Node, dims: int) -> _Node:
    """Interpolate (N, K, ...) to four times its grid, corners not aligned, cropped at the end to `sizes`."""
    coarse = _spatial_sizes(logits)
    lead = ops.gather(ops.shape_of(logits), _ints([0, 1]), _ints(0))
    shape = [_size(coarse, axis) for axis in range(dims)]
    for axis in range(dims):
        size = _size(sizes, axis)
        matrix = _interpolation(_size(coarse, axis), size, ratio=1 / _STRIDES[0])
        if axis == dims - 1:
            return ops.matmul(logits, matrix, False, True)
        after = shape[axis + 1 :]
        folded = ops.reshape(logits, _shape(lead, *shape[: axis + 1], _ints([-1])), special_zero=False)
        shape[axis] = size
        product = ops.matmul(matrix, folded, False, False)
        logits = ops.reshape(product, _shape(lead, *shape[: axis + 1], *after), special_zero=False)
    raise AssertionError("a volume has axes")


def _along(values: _Node, axis: int, matrix: _Node, shape: list[_Node], positions: list[_Node]) -> _Node:
    """Multiply `matrix` to one axis of (N, ..., W, C); `shape` are the sizes of the axes before W afterwards."""
    width = values.get_output_partial_shape(0)[-1].get_length()
    before = positions[:axis]
    folded = ops.reshape(
        values,
        _shape(_ints([-1]), *before, positions[axis], _folded(shape[axis + 1 :], positions[-1], width)),
        special_zero=False,
    )
    product = ops.matmul(matrix, folded, False, False)
    return ops.reshape(product, _shape(_ints([-1]), *shape, positions[-1], _ints([width])), special_zero=False)


def _folded(sizes: list[_Node], last: _Node, width: int) -> _Node:
    """Return the product of sizes, (1,)."""
    product = ops.multiply(last, _ints([width]))
    for size in sizes:
        product = ops.multiply(product, size)
    return product


def _interpolation(positions: _Node, size: _Node, ratio: float | None = None) -> _Node:
    """Return the weights (size, positions) of linear interpolation of an axis, corners not aligned.

    Row i has the two weights of output i, whose centre lies at (i + 1/2) * positions / size - 1/2 of the input;
    `ratio` stands for positions / size where the axis is cropped as well.
    """
    count, length = (ops.squeeze(ops.convert(number, "f32"), _ints([0])) for number in (positions, size))
    rows = ops.range(_floats(0), length, _floats(1), "f32")
    columns = ops.range(_floats(0), count, _floats(1), "f32")
    step = ops.divide(count, length) if ratio is None else _floats(ratio)
    centres = ops.subtract(ops.multiply(ops.add(rows, _floats(0.5)), step), _floats(0.5))
    centres = ops.minimum(ops.maximum(centres, _floats(0)), ops.subtract(count, _floats(1)))
    distance = ops.abs(ops.subtract(ops.unsqueeze(centres, _ints([1])), ops.unsqueeze(columns, _ints([0]))))
    return ops.maximum(ops.subtract(_floats(1), distance), _floats(0))


def _spatial_sizes(volume: _Node) -> _Node:
    """Return the sizes behind N and C, (dims,) of int64."""
    dims = volume.get_output_partial_shape(0).rank.get_length() - 2
    return ops.gather(ops.shape_of(volume), _ints(list(range(2, 2 + dims))), _ints(0))


def _size(sizes: _Node, axis: int) -> _Node:
    return ops.gather(sizes, _ints([axis]), _ints(0))


def _shape(*parts: _Node) -> _Node:
    return ops.concat(list(parts), axis=0)


def _ints(values: int | list[int]) -> _Node:
    return ops.constant(np.array(values, dtype=np.int64))


def _floats(value: float) -> _Node:
    return ops.constant(np.float32(value))
