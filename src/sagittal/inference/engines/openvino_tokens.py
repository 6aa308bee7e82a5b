"""Pieces of OpenVINO graphs of transformers: token grids, linear layers, norms of tokens, interpolation by matrices.

Tokens are (N, T, C) with T the product of their grid's sizes, which may be open while a graph is built. OpenVINO keeps
volumes (N, C, ...) channels last on a CPU, so that going between tokens and volumes copies nothing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import openvino
from openvino import opset13 as ops

from sagittal.inference.engines.openvino_layers import Array, Node, WeightReader, constant, integers, sizes_of

_GROUPS = 32
_CHANNELS_PER_GROUP = 4

NORM_EPS = 1e-5
"""Of every norm in PyTorch, unless said otherwise."""


@dataclass(frozen=True)
class Affine:
    """x * scale + shift, (C,) each: the learned part of a norm, or a norm with running statistics."""

    scale: Array
    shift: Array

    def __call__(self, tokens: Node) -> Node:
        """Apply it to the last axis."""
        return ops.add(ops.multiply(tokens, constant(self.scale)), constant(self.shift))


@dataclass(frozen=True)
class Grid:
    """Tokens (N, T, C) of a grid whose sizes, slow to fast, are a node (dims,) of int64."""

    tokens: Node
    sizes: Node
    width: int

    def spatial(self) -> Node:
        """Return the tokens as (N, ..., C)."""
        shape = joined(integers([-1]), self.sizes, integers([self.width]))
        return ops.reshape(self.tokens, shape, special_zero=False)

    def volume(self, dims: int) -> Node:
        """Return the tokens as (N, C, ...)."""
        return ops.transpose(self.spatial(), integers([0, dims + 1, *range(1, dims + 1)]))

    def with_tokens(self, tokens: Node, width: int | None = None) -> Grid:
        """Return other tokens on the same grid."""
        return Grid(tokens, self.sizes, self.width if width is None else width)


def from_volume(volume: Node, width: int, dims: int) -> Grid:
    """Return a volume (N, C, ...) as tokens."""
    moved = ops.transpose(volume, integers([0, *range(2, dims + 2), 1]))
    return Grid(flat(moved, width), sizes_of(volume), width)


def flat(spatial: Node | openvino.Output, width: int) -> Node:
    """Return (N, ..., C) as (N, T, C)."""
    return ops.reshape(spatial, integers([0, -1, width]), special_zero=True)


def linear(tokens: Node, weight: Array, bias: Array) -> Node:
    """Multiply the last axis by weight (out, in) and add bias (out,)."""
    return ops.add(ops.matmul(tokens, constant(weight), False, True), constant(bias))


def linear_weights(
    weights: WeightReader, name: str, inputs: int, outputs: int, before: Affine | None = None
) -> tuple[Array, Array]:
    """Return weight (outputs, inputs) and bias of a linear layer that also does what `before` it is affine."""
    weight = weights.take(f"{name}.weight", (outputs, inputs))
    bias = weights.take(f"{name}.bias", (outputs,))
    return (weight, bias) if before is None else (weight * before.scale, bias + weight @ before.shift)


def affine_weights(weights: WeightReader, name: str, width: int) -> Affine:
    """Return the learned part of a norm."""
    return Affine(weights.take(f"{name}.weight", (width,)), weights.take(f"{name}.bias", (width,)))


def batch_norm_weights(weights: WeightReader, name: str, width: int) -> Affine:
    """Return what a BatchNorm does with its running statistics."""
    learned = affine_weights(weights, name, width)
    mean = weights.take(f"{name}.running_mean", (width,))
    variance = weights.take(f"{name}.running_var", (width,))
    if (steps := f"{name}.num_batches_tracked") in weights:
        weights.take(steps, ())
    scale = learned.scale / np.sqrt(variance + np.float32(NORM_EPS))
    return Affine(scale, learned.shift - mean * scale)


def normalise(tokens: Node) -> Node:
    """LayerNorm over the last axis without its learned part."""
    return ops.mvn(tokens, integers([-1]), True, NORM_EPS, "inside_sqrt")


def group_norm(weights: WeightReader, name: str, grid: Grid, dims: int) -> Grid:
    """Apply a GroupNorm, with as many groups as `networks.norms.volume_norm` makes of the width."""
    learned, groups = affine_weights(weights, name, grid.width), math.gcd(_GROUPS, grid.width)
    while groups > 1 and grid.width // groups < _CHANNELS_PER_GROUP:
        groups //= 2
    scale, shift = constant(learned.scale), constant(learned.shift)
    volume = ops.group_normalization(grid.volume(dims), scale, shift, groups, NORM_EPS)
    return from_volume(volume, grid.width, dims)


def interpolation(positions: Node, size: Node, ratio: float | None = None) -> Node:
    """Return the weights (size, positions) of linear interpolation of an axis, corners not aligned.

    Row i has the two weights of output i, whose centre lies at (i + 1/2) * positions / size - 1/2 of the input.

    Args:
        positions: of the input, (1,) int64.
        size: of the output, (1,) int64.
        ratio: what to take for positions / size, where the output is cropped at its end.
    """
    count, length = (ops.squeeze(ops.convert(number, "f32"), integers([0])) for number in (positions, size))
    zero, half, one = (ops.constant(np.float32(number)) for number in (0, 0.5, 1))
    step = ops.divide(count, length) if ratio is None else ops.constant(np.float32(ratio))
    rows, columns = ops.range(zero, length, one, "f32"), ops.range(zero, count, one, "f32")
    centres = ops.subtract(ops.multiply(ops.add(rows, half), step), half)
    centres = ops.minimum(ops.maximum(centres, zero), ops.subtract(count, one))
    distance = ops.abs(ops.subtract(ops.unsqueeze(centres, integers([1])), ops.unsqueeze(columns, integers([0]))))
    return ops.maximum(ops.subtract(one, distance), zero)


def along(x: Node, axis: int, matrix: Node) -> Node:
    """Multiply a matrix (m, n) to an axis, but the last, of length n: one product of large matrices."""
    rank = len(x.get_output_partial_shape(0))
    shape, rows = ops.shape_of(x), ops.gather(ops.shape_of(matrix), integers([0]), integers([0]))
    before, after = _sizes(shape, range(axis)), _sizes(shape, range(axis + 1, rank))
    folded = ops.reshape(x, joined(before, _sizes(shape, [axis]), integers([-1])), special_zero=False)
    product = ops.matmul(matrix, folded, False, False)
    return ops.reshape(product, joined(before, rows, after), special_zero=False)


def size_along(sizes: Node, axis: int) -> Node:
    """Return one of the sizes, (1,)."""
    return _sizes(sizes, [axis])


def joined(*parts: Node) -> Node:
    """Return the parts of a shape one after the other."""
    return ops.concat(list(parts), 0)


def _sizes(shape: Node, axes: Sequence[int]) -> Node:
    return ops.gather(shape, integers(axes), integers([0]))
