"""MedNeXt in OpenVINO's operators for one known size, in float32: its blocks' layers run some rows at a time.

The same network as `openvino_mednext` writes down for any size, in less time and memory. With bfloat16, whose volumes
are half as large, OpenVINO's loops cost more than they save.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import openvino
from openvino import opset13 as ops

from sagittal.inference.engines.openvino_layers import (
    Array,
    Node,
    channels_first,
    channels_last,
    integers,
    norm_by_planes,
    pad_front,
    spread_last,
)
from sagittal.inference.engines.openvino_mednext import NORM_EPS, Block, Graph, graph_of
from sagittal.inference.engines.openvino_rows import (
    Added,
    Mixing,
    mix,
    mix_by_rows,
    rows_at_once,
)
from sagittal.plan.base import Triple
from sagittal.plan.mednext import MedNeXtConfig


def build(
    config: MedNeXtConfig,
    weights: Mapping[str, Array],
    in_channels: int,
    num_outputs: int,
    *,
    with_head: bool,
    window: Triple,
) -> openvino.Model:
    """Return the network as a graph from one image (1, C, D, H, W) to logits, or to what the head is applied to.

    Args:
        config: of the plan.
        weights: arrays by their names in `networks.mednext`.
        in_channels: C.
        num_outputs: channels of the logits.
        with_head: end with the head.
        window: D, H, W.

    Raises:
        BundleError: the weights do not fit.
    """
    image = ops.parameter([1, in_channels, *window], np.float32, name="image")
    return graph_of(RowGraph, config, weights, image, num_outputs, with_head=with_head)


class RowGraph(Graph):
    """Passes volumes on with their channels last, (1, ..., C)."""

    def features(self, x: Node, in_channels: int) -> Node:
        """Map an image (1, C, ...) to what the finest head sees, (1, F, ...)."""
        return channels_first(super().features(x, in_channels))

    def _stem(self, x: Node, in_channels: int) -> Node:
        return channels_last(super()._stem(x, in_channels))

    def _block(self, x: Node, block: Block) -> Node:
        h = self._depthwise(channels_first(x), block)
        if not block.residual:
            return self._mixed(h, block)
        if block.kind == "same":
            return self._mixed(h, block, added=[Added(x)])
        weight, bias = self._residual_weights(block)
        return self._mixed(h, block, bias, added=[Added(_every(x, block.strides), weight)])

    def _up(self, x: Node, skip: Node, block: Block) -> Node:
        weight, bias = self._residual_weights(block) if block.residual else (None, None)
        added = [Added(skip)]
        if weight is not None:
            added.append(Added(spread_last(mix(x, weight), block.strides, at=1)))
        sizes = tuple(skip.get_output_shape(0))[1:-1]
        rows = self._rows(sizes, block)
        if rows is None:
            y = self._tail(self._depthwise_transpose(channels_first(x), block), block, bias)
            return _sum(channels_last(pad_front(y, block.strides)), added)
        zeros = [stride > 1 for stride in block.strides]
        h = self._depthwise_transpose(channels_first(x), block, front=True)
        mixing = self._mixing(block, bias)
        norm = norm_by_planes(h, tuple(h.get_output_shape(0)), NORM_EPS, without_first=zeros)
        return mix_by_rows(channels_last(h), norm, mixing, rows, added=added, zeros=zeros)

    def _mixed(self, h: Node, block: Block, extra_bias: Array | None = None, *, added: Sequence[Added] = ()) -> Node:
        """Return what `_tail` does of h (1, C, ...) + the sum of `added`, channels last."""
        shape = tuple(h.get_output_shape(0))
        rows = self._rows(shape[2:], block)
        if rows is None:
            return _sum(channels_last(self._tail(h, block, extra_bias)), added)
        norm = norm_by_planes(h, shape, NORM_EPS)
        return mix_by_rows(channels_last(h), norm, self._mixing(block, extra_bias), rows, added=added)

    def _rows(self, sizes: Sequence[int], block: Block) -> int | None:
        """Return how many rows of this block to compute at a time; None: all."""
        # GRN needs what is wide of all voxels at once.
        if self._config.norm != "group" or block.grn:
            return None
        return rows_at_once(sizes, block.in_channels, block.ratio * block.in_channels, block.out_channels)

    def _mixing(self, block: Block, extra_bias: Array | None) -> Mixing:
        contract, bias = self._contraction(block)
        return Mixing(*self._expansion(block), contract, bias if extra_bias is None else bias + extra_bias)


def _every(x: Node, strides: Sequence[int]) -> Node:
    """Return every second voxel of x (1, ..., C) along axes of stride 2."""
    if max(strides) == 1:
        return x
    dims = len(strides)
    sizes = tuple(x.get_output_shape(0))[1:-1]
    return ops.slice(x, integers([0] * dims), integers(sizes), integers(strides), integers(range(1, dims + 1)))


def _sum(y: Node, added: Sequence[Added]) -> Node:
    for term in added:
        y = ops.add(y, term.value if term.weight is None else mix(term.value, term.weight))
    return y
