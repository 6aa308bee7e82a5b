"""How much memory a graph takes while it runs: its tensors, walked through in the order of execution."""

from __future__ import annotations

import math
from collections import Counter

import openvino

_IN_PLACE = frozenset(
    {"Add", "Multiply", "Subtract", "Divide", "Gelu", "Relu", "Power", "Sqrt", "Reshape", "Squeeze", "Unsqueeze"}
)
"""Operators that are fused with what makes their input, or write over it, where nobody else reads it."""
_WITHOUT_TENSOR = frozenset({"Constant", "Parameter", "Result"})


def activation_bytes(model: openvino.Model, bytes_per_value: int) -> int:
    """Return the most bytes that tensors between the operators take at any moment of a run.

    Constants and what is computed of constants alone are not counted, nor are the model's inputs and outputs.

    Args:
        model: of known sizes.
        bytes_per_value: of a floating-point number.
    """
    buffers: dict[str, str] = {}
    sizes: dict[str, int] = {}
    operators = model.get_ordered_ops()
    readers = Counter(source for operator in operators for source in _sources(operator))
    peak = live = 0
    for operator in operators:
        name = operator.get_friendly_name()
        kind = operator.get_type_name()
        if kind in _WITHOUT_TENSOR and kind != "Result":
            continue
        read = [buffers[source] for source in _sources(operator) if source in buffers]
        if not read and not _reads_parameter(operator):
            continue
        size = 0 if kind == "Result" else _bytes(operator, bytes_per_value)
        reused = next((buffer for buffer in read if readers[buffer] == 1 and sizes[buffer] == size), None)
        if kind in _IN_PLACE and reused is not None:
            # The buffer lives on under its first name, for the readers of the new one.
            buffers[name] = reused
            readers[reused] += readers[name]
        else:
            buffers[name], sizes[name] = name, size
            live += size
        peak = max(peak, live)
        for buffer in read:
            readers[buffer] -= 1
            if readers[buffer] == 0:
                live -= sizes[buffer]
    return peak


def _sources(operator: openvino.Node) -> list[str]:
    return [value.get_source_output().get_node().get_friendly_name() for value in operator.inputs()]


def _reads_parameter(operator: openvino.Node) -> bool:
    return any(value.get_source_output().get_node().get_type_name() == "Parameter" for value in operator.inputs())


def _bytes(operator: openvino.Node, bytes_per_value: int) -> int:
    return sum(
        math.prod(output.get_shape()) * (bytes_per_value if output.get_element_type().is_real() else 8)
        for output in operator.outputs()
        if output.get_partial_shape().is_static
    )
