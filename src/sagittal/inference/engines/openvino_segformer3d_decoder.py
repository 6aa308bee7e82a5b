"""SegFormer3D's decoder as an OpenVINO graph: the identities of `networks.segformer3d_decoder`, plane by plane.

Each stage's map goes through its own columns of the fuse at its own grid; the finest never exists at the decoder's
width C before that. What is as large as the finest grid times C exists one plane along the first axis at a time: a
loop of OpenVINO's, whose body stays within a processor's cache.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import openvino
from openvino import opset13 as ops

from sagittal.inference.engines.openvino_layers import Array, Node, WeightReader, constant, integers, sizes_of
from sagittal.inference.engines.openvino_tokens import (
    NORM_EPS,
    Affine,
    Grid,
    affine_weights,
    along,
    batch_norm_weights,
    flat,
    group_norm,
    interpolation,
    linear,
    linear_weights,
    normalise,
    size_along,
)
from sagittal.plan.segformer3d import SegFormer3DConfig

STAGES = 4
_PREFIX = "segformer_decoder."
_JITTER, _LEAST_JITTER = 1e-13, 1e-30


def decode(
    config: SegFormer3DConfig, weights: WeightReader, grids: Sequence[tuple[Grid, Affine]], num_outputs: int
) -> Grid:
    """Return the logits at the finest grid.

    Args:
        config: the plan's network.
        weights: of the network.
        grids: the encoder's tokens, finest first, each normalised, and what of its norm was learned.
        num_outputs: channels of the logits.
    """
    width, dims = config.decoder_dim, config.dims
    columns, shift = _columns(config, weights)
    rows, matrix, constant_part = _finest_rows(weights, grids[0], columns[0])
    coarse = [_projected(weights, stage, grids[stage], columns[stage]) for stage in range(1, STAGES)]
    # A voxel's interpolation weights sum to one, so that what all voxels share can go through the smallest map.
    coarse[-1] = coarse[-1].with_tokens(ops.add(coarse[-1].tokens, constant(shift + constant_part)))
    weight = weights.take(f"{_PREFIX}linear_pred.weight", (num_outputs, width, *(1,) * dims)).reshape(-1, width)
    bias = weights.take(f"{_PREFIX}linear_pred.bias", (num_outputs,))
    if config.norm == "batch":
        logits = _fuse(rows, matrix, coarse, dims, lambda fused: linear(ops.relu(fused), weight, bias))
        return rows.with_tokens(flat(logits, num_outputs), num_outputs)
    fused = rows.with_tokens(flat(_fuse(rows, matrix, coarse, dims, lambda fused: fused), width), width)
    fused = group_norm(weights, f"{_PREFIX}linear_fuse.1", fused, dims)
    return fused.with_tokens(linear(ops.relu(fused.tokens), weight, bias), num_outputs)


def upsample_logits(logits: Node, factor: int, sizes: Node, dims: int) -> Node:
    """Return logits (N, K, ...) linearly interpolated to `factor` times their grid, cropped at the end to `sizes`."""
    coarse = sizes_of(logits)
    matrices = [
        interpolation(size_along(coarse, axis), size_along(sizes, axis), ratio=1 / factor) for axis in range(dims)
    ]
    for axis, matrix in enumerate(matrices[:-1], start=2):
        logits = along(logits, axis, matrix)
    return ops.matmul(logits, matrices[-1], False, True)


def _columns(config: SegFormer3DConfig, weights: WeightReader) -> tuple[list[Array], Array]:
    """Return each stage's columns of the fuse (C, C), finest first, and what its BatchNorm adds (C,)."""
    width = config.decoder_dim
    fuse = weights.take(f"{_PREFIX}linear_fuse.0.weight", (width, STAGES * width, *(1,) * config.dims))
    # They stand in the order of the concatenation: stages 4, 3, 2, 1.
    columns = np.split(fuse.reshape(width, -1), STAGES, axis=1)[::-1]
    if config.norm == "group":
        return columns, np.zeros(width, np.float32)
    folded = batch_norm_weights(weights, f"{_PREFIX}linear_fuse.1", width)
    return [column * folded.scale[:, None] for column in columns], folded.shift


def _projected(weights: WeightReader, stage: int, grid: tuple[Grid, Affine], column: Array) -> Grid:
    """Return column(LayerNorm(proj x)) of a stage, at its own grid."""
    (tokens, before), width, name = grid, len(column), f"{_PREFIX}linear_c{stage + 1}"
    projected = linear(tokens.tokens, *linear_weights(weights, f"{name}.proj", tokens.width, width, before))
    after = affine_weights(weights, f"{name}.bn", width)
    return tokens.with_tokens(linear(normalise(projected), column * after.scale, column @ after.shift), width)


def _finest_rows(weights: WeightReader, grid: tuple[Grid, Affine], column: Array) -> tuple[Grid, Array, Array]:
    """Return rows, K + 1 wide, matrix (K + 1, C), constant (C,): column(LayerNorm(proj x)) = rows @ matrix + constant.

    The deviation that LayerNorm divides by is the norm of a projection of (x, 1), and a triangular factor of K + 1 rows
    has the same norm as that projection's C rows.
    """
    (tokens, before), inner, name = grid, len(column), f"{_PREFIX}linear_c1"
    width = tokens.width
    weight, bias = linear_weights(weights, f"{name}.proj", width, inner, before)
    centred = np.concatenate([weight, bias[:, None]], axis=1).astype(np.float64)
    centred -= centred.mean(axis=0)
    gram = centred.T @ centred
    gram[np.diag_indices_from(gram)] += _JITTER * np.trace(gram) + _LEAST_JITTER  # a projection may lack ranks
    factor = np.linalg.cholesky(gram)
    spread = linear(tokens.tokens, factor[:width].T, factor[width])
    total = ops.reduce_sum(ops.multiply(spread, spread), integers([2]), keep_dims=True)
    variance = ops.divide(total, ops.constant(np.float32(inner)))
    deviation = ops.divide(ops.constant(np.float32(1)), ops.sqrt(ops.add(variance, ops.constant(np.float32(NORM_EPS)))))
    rows = ops.concat([ops.multiply(tokens.tokens, deviation), deviation], 2)
    after = affine_weights(weights, f"{name}.bn", inner)
    matrix = ((column * after.scale) @ centred).T
    return tokens.with_tokens(rows, width + 1), matrix.astype(np.float32), column @ after.shift


def _fuse(
    rows: Grid, matrix: Array, coarse: Sequence[Grid], dims: int, finish: Callable[[Node], Node]
) -> Node | openvino.Output:
    """Return finish(rows @ matrix + the maps interpolated to its grid): (N, ..., C or what `finish` makes of it)."""
    sizes = [size_along(rows.sizes, axis) for axis in range(dims)]
    matrices = [[interpolation(size_along(grid.sizes, axis), sizes[axis]) for grid in coarse] for axis in range(dims)]
    compute = partial(_fuse_plane, matrix=matrix, finish=finish)
    last = ops.concat(matrices[-1], 1)
    if dims == 2:
        return compute(rows.spatial(), [grid.spatial() for grid in coarse], matrices[0], last)
    maps = [along(grid.spatial(), 1, m) for grid, m in zip(coarse, matrices[0], strict=True)]
    return _by_planes(compute, rows.spatial(), maps, matrices[1], last)


def _fuse_plane(
    rows: Node,
    maps: Sequence[Node],
    across: Sequence[Node],
    last: Node,
    *,
    matrix: Array,
    finish: Callable[[Node], Node],
) -> Node:
    """Fuse rows (N, ..., H, W, K + 1) with maps (N, ..., h, w, C), by interpolation along H and then along W."""
    rank = len(rows.get_output_partial_shape(0))
    lines = [along(grid, rank - 3, m) for grid, m in zip(maps, across, strict=True)]
    coarse = ops.matmul(last, ops.concat(lines, rank - 2), False, False)
    return finish(ops.add(ops.matmul(rows, constant(matrix), False, False), coarse))


def _by_planes(
    compute: Callable[..., Node], rows: Node, maps: Sequence[Node], across: Sequence[Node], last: Node
) -> openvino.Output:
    """Return compute(rows, maps, across, last), plane by plane along the first spatial axis."""
    sliced, whole = [rows, *maps], [*across, last]
    planes = []
    for value in sliced:
        shape = value.get_output_partial_shape(0)
        shape[1] = 1
        planes.append(ops.parameter(shape, np.float32))
    same = [ops.parameter(value.get_output_partial_shape(0), np.float32) for value in whole]
    computed = compute(planes[0], planes[1:], same[:-1], same[-1])
    result = ops.result(computed)
    loop = ops.tensor_iterator()
    loop.set_body(openvino.Model([result], [*planes, *same], "plane"))
    for parameter, value in zip(planes, sliced, strict=True):
        loop.set_sliced_input(parameter, value.output(0), 0, 1, 1, -1, 1)
    for parameter, value in zip(same, whole, strict=True):
        loop.set_invariant_input(parameter, value.output(0))
    return loop.get_concatenated_slices(result.output(0), 0, 1, 1, -1, 1)
