"""Pieces that OpenVINO networks are built of: weights that are checked as they are taken, convolutions, norms, edges.

Graphs are written down in OpenVINO's own operators from the arrays of a bundle, so neither PyTorch nor a converter is
needed. Volumes are (N, C, D, H, W), slices (N, C, H, W); sizes may be open while a graph is built.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from typing import Any, TypeAlias

import numpy as np
import openvino
from openvino import opset13 as ops

from sagittal.errors import BundleError

Array: TypeAlias = np.ndarray[Any, np.dtype[Any]]
Node: TypeAlias = openvino.Node


_MOST_SUMMED_AT_ONCE = 40_000
"""Voxels: those of 34^3."""


class WeightReader:
    """The arrays of a network by name, each checked as it is taken.

    Args:
        arrays: of a bundle, any floating dtype.
    """

    def __init__(self, arrays: Mapping[str, Array]) -> None:
        self._arrays = arrays
        self._taken: set[str] = set()

    def __contains__(self, name: str) -> bool:
        return name in self._arrays

    def take(self, name: str, shape: Sequence[int]) -> Array:
        """Return an array as float32.

        Raises:
            BundleError: it is missing, or has another shape.
        """
        expected = tuple(shape)
        if name not in self._arrays:
            raise BundleError(
                f"the weights lack '{name}', expected of shape {expected}: they do not fit the plan's network. "
                "Get the bundle from its maker again.",
                code="weights_do_not_fit",
            )
        array = self._arrays[name]
        if array.shape != expected:
            raise BundleError(
                f"the weights' '{name}' has shape {array.shape}, expected {expected}: they do not fit the plan's "
                "network. Get the bundle from its maker again.",
                code="weights_do_not_fit",
            )
        self._taken.add(name)
        return np.ascontiguousarray(array, dtype=np.float32)

    def require_all_taken(self, *, but: Sequence[str] = ()) -> None:
        """Refuse weights that no layer took; those whose names begin with one of `but` may be left.

        Raises:
            BundleError: something is left.
        """
        left = sorted(name for name in self._arrays if name not in self._taken and not name.startswith(tuple(but)))
        if left:
            raise BundleError(
                f"the weights hold {', '.join(left[:3])}{' and others' if len(left) > 3 else ''}, which the plan's "
                "network does not have. Get the bundle from its maker again.",
                code="weights_do_not_fit",
            )


def constant(array: Array) -> Node:
    """Return a float32 constant."""
    return ops.constant(np.asarray(array, dtype=np.float32, order="C"))


def integers(values: Sequence[int]) -> Node:
    """Return a constant vector of int64, for axes, shapes and indices."""
    return ops.constant(np.asarray(values, dtype=np.int64))


def spatial_axes(dims: int) -> tuple[int, ...]:
    """Return the axes of space of a batch: (2, 3, 4) of volumes, (2, 3) of slices."""
    return tuple(range(2, dims + 2))


def per_channel(values: Array, dims: int) -> Node:
    """Return a vector (C,) as a constant (1, C, 1, ...) that broadcasts over a batch."""
    return constant(values.reshape(1, -1, *(1,) * dims))


def convolution(
    x: Node,
    weight: Array,
    bias: Array | None,
    *,
    strides: Sequence[int],
    padding: Sequence[int],
    ends: Sequence[int] | None = None,
    groups: int = 1,
) -> Node:
    """Convolve with weights in PyTorch's order, (out, in / groups, kernel...).

    Args:
        x: (N, in, ...).
        weight: (out, in / groups, kernel...).
        bias: (out,) or None.
        strides: one per spatial axis.
        padding: zeros before each spatial axis.
        ends: zeros behind each spatial axis; None is as many as before.
        groups: how many groups of channels are convolved apart.
    """
    geometry = list(strides), list(padding), list(padding if ends is None else ends), [1] * len(strides)
    if groups == 1:
        y = ops.convolution(x, constant(weight), *geometry)
    else:
        grouped = weight.reshape(groups, weight.shape[0] // groups, *weight.shape[1:])
        y = ops.group_convolution(x, constant(grouped), *geometry)
    return y if bias is None else ops.add(y, per_channel(bias, len(strides)))


def pointwise(x: Node, weight: Array, bias: Array | None, *, strides: Sequence[int] | None = None, dims: int) -> Node:
    """Mix the channels of each voxel: weight (out, in), bias (out,) or None; of every `strides`-th voxel."""
    kernel = weight.reshape(*weight.shape[:2], *(1,) * dims)
    return convolution(x, kernel, bias, strides=strides or (1,) * dims, padding=(0,) * dims)


def normalise_space(x: Node, eps: float, dims: int) -> Node:
    """Give each channel of each case mean 0 and variance 1 over space: (x - mean) / sqrt(variance + eps)."""
    return ops.mvn(x, integers(spatial_axes(dims)), True, eps, "inside_sqrt")


def normalise_channels(x: Node, eps: float) -> Node:
    """Give each voxel mean 0 and variance 1 over its channels."""
    return ops.mvn(x, integers([1]), True, eps, "inside_sqrt")


def sum_by_planes(model: openvino.Model) -> None:
    """Write the norms over large volumes so that their sums are taken plane by plane, then over the planes.

    OpenVINO's own operator adds up a channel's voxels one after the other in float32: at 96^3 voxels logits were 2e-4
    of the largest off. For float32 only, since mean and mean square are subtracted from one another.

    Args:
        model: of known sizes; it is changed in place.
    """
    for operator in model.get_ordered_ops():
        if operator.get_type_name() != "MVN" or operator.get_input_partial_shape(0).is_dynamic:
            continue
        shape = tuple(operator.get_input_shape(0))
        axes = operator.input_value(1).get_node()
        over_space = axes.get_type_name() == "Constant" and sorted(axes.data.tolist()) == list(range(2, len(shape)))
        if over_space and len(shape) >= 4 and prod(shape[2:]) > _MOST_SUMMED_AT_ONCE:
            x, eps = operator.input_value(0), operator.get_attributes()["eps"]
            operator.output(0).replace(_normalised_by_planes(x, shape, eps).output(0))


def _normalised_by_planes(x: openvino.Output, shape: tuple[int, ...], eps: float) -> Node:
    scale, shift = norm_by_planes(x, shape, eps)
    return ops.subtract(ops.multiply(x, scale), shift)


def norm_by_planes(
    x: Node | openvino.Output, shape: Sequence[int], eps: float, *, without_first: Sequence[bool] | None = None
) -> tuple[Node, Node]:
    """Return scale and shift (N, C, 1, ...): x * scale - shift has mean 0 and variance 1 over space.

    Args:
        x: (N, C, ...).
        shape: of x.
        eps: is added to the variance.
        without_first: for each axis of space, whether the first voxels along it do not count.
    """
    left_out = [int(first) for first in without_first or [False] * (len(shape) - 2)]
    count = prod(size - out for size, out in zip(shape[2:], left_out, strict=True))
    sums, squares = _sums_by_planes(x, len(shape) - 2, count)
    for axis, out in enumerate(left_out):
        if out:
            # Of the edges, those before it are left out already.
            axes = integers(range(2, axis + 3))
            starts, ones = integers([*left_out[:axis], 0]), integers([1] * (axis + 1))
            edge = ops.slice(x, starts, integers([*shape[2 : axis + 2], 1]), ones, axes)
            edge_sums, edge_squares = _sums_by_planes(edge, len(shape) - 2, count)
            sums, squares = ops.subtract(sums, edge_sums), ops.subtract(squares, edge_squares)
    variance = ops.relu(ops.subtract(squares, ops.multiply(sums, sums)))
    scale = ops.divide(constant(np.ones(())), ops.sqrt(ops.add(variance, constant(np.full((), eps)))))
    return scale, ops.multiply(sums, scale)


def _sums_by_planes(x: Node | openvino.Output, dims: int, count: int) -> tuple[Node, Node]:
    """Return the sums of x and of x * x over space, over `count`."""
    # H and W of a volume, W of a slice; then D, or H.
    split = 3 if dims == 3 else dims + 1
    plane, planes = integers(range(split, dims + 2)), integers(range(2, split))
    share = constant(np.full((), 1 / count))
    # A sum of sums would be made one again.
    norm = ops.reduce_l2(x, plane, True)
    sums, squares = ops.multiply(ops.reduce_sum(x, plane, True), share), ops.multiply(ops.multiply(norm, norm), share)
    return ops.reduce_sum(sums, planes, True), ops.reduce_sum(squares, planes, True)


def sizes_of(x: Node) -> Node:
    """Return the spatial sizes of a batch, int64; a constant where they are known."""
    shape = ops.shape_of(x)
    return ops.gather(shape, integers(range(2, len(x.get_output_partial_shape(0)))), integers([0]))


def pad_to_multiples(x: Node, multiples: Sequence[int]) -> Node:
    """Repeat the last plane of each spatial axis until it measures a multiple of its number."""
    if prod(multiples) == 1:
        return x
    sizes, to = sizes_of(x), integers(multiples)
    # (-n) mod m with floor semantics is what is missing to the next multiple.
    missing = ops.floor_mod(ops.negative(sizes), to)
    ends = ops.concat([integers([0, 0]), missing], 0)
    return ops.pad(x, integers([0] * (len(multiples) + 2)), ends, "edge")


def crop_end(x: Node, sizes: Node, dims: int) -> Node:
    """Return the first `sizes` voxels of each spatial axis."""
    return ops.slice(x, integers([0] * dims), sizes, integers([1] * dims), integers(spatial_axes(dims)))


def pad_front(x: Node, strides: Sequence[int]) -> Node:
    """Put a plane of zeros before each spatial axis of stride 2."""
    front = [0, 0, *(stride - 1 for stride in strides)]
    return _pad_with_zeros(x, front, [0] * len(front))


def channels_last(x: Node) -> Node:
    """Return (N, ..., C) of (N, C, ...).

    OpenVINO's convolutions have channels last in memory, so that transposes of what they give, and of what one of them
    alone reads, copy nothing; elsewhere transposes are very slow.
    """
    return ops.transpose(x, integers(_to_last(x)))


def channels_first(x: Node) -> Node:
    """Return (N, C, ...) of (N, ..., C); see `channels_last`, whose result is taken back."""
    if x.get_type_name() == "Transpose" and x.input_value(1).get_node().data.tolist() == _to_last(x):
        source: Node = x.input_value(0).get_node()
        return source
    dims = len(x.get_output_partial_shape(0)) - 2
    return ops.transpose(x, integers([0, dims + 1, *range(1, dims + 1)]))


def _to_last(x: Node) -> list[int]:
    return [0, *spatial_axes(len(x.get_output_partial_shape(0)) - 2), 1]


def spread_voxels(x: Node, strides: Sequence[int], *, at: int = 0) -> Node:
    """Put zeros between voxels: along axes of stride 2, voxel i goes to 2i + `at`, and a size n becomes 2n."""
    return x if max(strides) == 1 else channels_first(spread_last(channels_last(x), strides, at=at))


def spread_last(x: Node, strides: Sequence[int], *, at: int = 0) -> Node:
    """Do what `spread_voxels` does with x (N, ..., C)."""
    if max(strides) == 1:
        return x
    dims = len(strides)
    # Each axis of space becomes a pair: the voxel, and its place among the zeros.
    pairs = ops.unsqueeze(x, integers([2 + 2 * axis for axis in range(dims)]))
    zeros = [0] * (2 * dims + 2)
    before, behind = list(zeros), list(zeros)
    for axis, stride in enumerate(strides):
        before[2 + 2 * axis], behind[2 + 2 * axis] = at * (stride - 1), (1 - at) * (stride - 1)
    wide = _pad_with_zeros(pairs, before, behind)
    sizes = ops.multiply(ops.shape_of(x), integers([1, *strides, 1]))
    return ops.reshape(wide, sizes, False)


def _pad_with_zeros(x: Node, before: Sequence[int], behind: Sequence[int]) -> Node:
    return ops.pad(x, integers(before), integers(behind), "constant", constant(np.zeros(())))
