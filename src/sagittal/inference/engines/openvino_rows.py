"""Layers that mix the channels of each voxel, computed some rows of voxels at a time.

Between its two layers a MedNeXt block is 2 to 8 times as wide as outside. Written as operators on whole volumes, that
goes to main memory and back, and the norm before it once more. Here a loop of OpenVINO's normalises, expands and
contracts as many rows as a processor's cache holds; only what comes in and goes out is as large as the volume.

Such a loop takes and gives channels last, (1, ..., C), as OpenVINO's convolutions have them in memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import log, prod
from typing import NamedTuple

import numpy as np
import openvino
from openvino import opset13 as ops

from sagittal.inference.engines.openvino_layers import Array, Node, constant, integers

_CACHE_BYTES = 2**20
"""For all that a loop's body holds at a time: half of a core's second-level cache, which is 1 to 2 MiB on most."""
_MOST_OFF = 4
"""By which factor the rows may miss that, more or less, where the sizes have no better divisor."""
_FEWEST_VOXELS = 8_000
"""Those of 20^3; in smaller volumes the loop costs what it saves."""


class Mixing(NamedTuple):
    """Weight (out, in) and bias (out,) of the layers before and after the GELU."""

    expand: Array
    expand_bias: Array
    contract: Array
    contract_bias: Array


class Added(NamedTuple):
    """What is added to the result: (1, ..., in), mixed by a weight (out, in), or as it is."""

    value: Node
    weight: Array | None = None


def rows_at_once(sizes: Sequence[int], channels: int, wide: int, out_channels: int) -> int | None:
    """Return how many rows (lines of voxels along the last axis) to compute at a time; None: all.

    Args:
        sizes: voxels along each axis of space.
        channels: of what comes in.
        wide: channels between the two layers.
        out_channels: of what goes out.
    """
    *others, width = sizes
    lines = prod(others)
    if lines * width < _FEWEST_VOXELS:
        return None
    # In and out, what is normalised, what is wide, and what is added.
    fitting = _CACHE_BYTES / (4 * width * (wide + 2 * channels + 2 * out_channels))
    divisors = [rows for rows in range(1, lines + 1) if lines % rows == 0]
    best = min(divisors, key=lambda rows: abs(log(rows / fitting)))
    return best if fitting / _MOST_OFF <= best <= fitting * _MOST_OFF else None


def mix_by_rows(
    x: Node,
    norm: tuple[Node, Node],
    mixing: Mixing,
    rows: int,
    *,
    added: Sequence[Added] = (),
    zeros: Sequence[bool] | None = None,
) -> Node:
    """Return contract(GELU(expand(x * scale - shift))), zero where `zeros` say so, + the sum of `added`.

    Args:
        x: (1, ..., C), of known sizes.
        norm: scale and shift, (1, C, 1, ...).
        mixing: the two layers.
        rows: how many at a time; they divide the number of rows.
        added: of the result's sizes each.
        zeros: for each axis of space, whether the first voxels along it are set to zero.
    """
    *sizes, channels = x.get_output_shape(0)[1:]
    sliced = [_pieces(value, rows) for value in (x, *(term.value for term in added))]
    whole = [ops.reshape(value, integers([1, 1, 1, channels]), False) for value in norm]
    if zeros is not None:
        lines, line = _masks(sizes, zeros)
        sliced.append(constant(lines.reshape(-1, rows, 1, 1)))
        whole.append(constant(line.reshape(1, 1, -1, 1)))
    pieces = [ops.parameter([1, *value.get_output_shape(0)[1:]], np.float32) for value in sliced]
    same = [ops.parameter(value.get_output_shape(0), np.float32) for value in whole]
    y = ops.subtract(ops.multiply(pieces[0], same[0]), same[1])
    y = ops.gelu(_layer(y, mixing.expand, mixing.expand_bias), "erf")
    y = _layer(y, mixing.contract, mixing.contract_bias)
    if zeros is not None:
        y = ops.multiply(y, ops.multiply(pieces[-1], same[-1]))
    for term, piece in zip(added, pieces[1:], strict=False):
        y = ops.add(y, piece if term.weight is None else _layer(piece, term.weight))
    result = ops.result(y)
    loop = ops.tensor_iterator()
    loop.set_body(openvino.Model([result], [*pieces, *same], "rows"))
    for piece, value in zip(pieces, sliced, strict=True):
        loop.set_sliced_input(piece, value.output(0), 0, 1, 1, -1, 0)
    for parameter, value in zip(same, whole, strict=True):
        loop.set_invariant_input(parameter, value.output(0))
    mixed = loop.get_concatenated_slices(result.output(0), 0, 1, 1, -1, 0)
    return ops.reshape(mixed, integers([1, *sizes, len(mixing.contract)]), False)


def mix(x: Node, weight: Array) -> Node:
    """Mix the channels of each voxel of x (1, ..., in) by a weight (out, in)."""
    return _layer(x, weight)


def _pieces(x: Node, rows: int) -> Node:
    """Return (pieces, rows of each, W, C)."""
    *sizes, channels = x.get_output_shape(0)[1:]
    return ops.reshape(x, integers([prod(sizes[:-1]) // rows, rows, sizes[-1], channels]), False)


def _layer(x: Node, weight: Array, bias: Array | None = None) -> Node:
    y = ops.matmul(x, constant(weight), False, True)
    return y if bias is None else ops.add(y, constant(bias.reshape(1, 1, 1, -1)))


def _masks(sizes: Sequence[int], zeros: Sequence[bool]) -> tuple[Array, Array]:
    """Return 0 for what is set to zero and else 1, of every line of voxels and of the voxels of a line."""
    lines = np.ones(sizes[:-1], np.float32)
    for axis, is_zero in enumerate(zeros[:-1]):
        if is_zero:
            lines[(slice(None),) * axis + (0,)] = 0
    line = np.ones(sizes[-1], np.float32)
    line[: int(zeros[-1])] = 0
    return lines, line
