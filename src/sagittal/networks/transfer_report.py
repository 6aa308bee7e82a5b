"""What became of every tensor when one network's weights were carried into another."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Fate = Literal["copied", "interpolated", "adapted", "fresh", "dropped"]

_FATES: tuple[Fate, ...] = ("copied", "interpolated", "adapted", "fresh", "dropped")


@dataclass(frozen=True)
class TensorReport:
    """One tensor's fate.

    Attributes:
        name: in the network.
        fate: `copied` as it was; `interpolated` to another kernel size; `adapted` to other input channels; `fresh`, it
            keeps its initial value; `dropped`, only the source has it.
        shape: in the target; of a dropped tensor, in the source.
        source_shape: in the source; None where it is fresh.
        note: what was done, where that is not plain.
    """

    name: str
    fate: Fate
    shape: tuple[int, ...]
    source_shape: tuple[int, ...] | None = None
    note: str = ""


@dataclass(frozen=True)
class TransferReport:
    """Every tensor of the target, in its order, then those of the source that were dropped. `print` shows a table."""

    tensors: tuple[TensorReport, ...]

    def names(self, fate: Fate) -> tuple[str, ...]:
        """Return the names of the tensors with this fate."""
        return tuple(tensor.name for tensor in self.tensors if tensor.fate == fate)

    @property
    def copied(self) -> tuple[str, ...]:
        """Names of the tensors that are equal to the source's."""
        return self.names("copied")

    @property
    def interpolated(self) -> tuple[str, ...]:
        """Names of the depthwise kernels that were brought to another size."""
        return self.names("interpolated")

    @property
    def adapted(self) -> tuple[str, ...]:
        """Names of the tensors whose input channels were matched."""
        return self.names("adapted")

    @property
    def fresh(self) -> tuple[str, ...]:
        """Names of the tensors that keep their initial values."""
        return self.names("fresh")

    @property
    def dropped(self) -> tuple[str, ...]:
        """Names that only the source has."""
        return self.names("dropped")

    def summary(self) -> str:
        """Return one line: how many of each fate, and the names of those that were not simply copied."""
        counts = Counter(tensor.fate for tensor in self.tensors)
        parts = []
        for fate in _FATES:
            if counts[fate] or fate == "copied":
                named = "" if fate == "copied" else f" ({', '.join(patterns(self.names(fate)))})"
                parts.append(f"{counts[fate]} {fate}{named}")
        return "; ".join(parts)

    def table(self) -> str:
        """Return one line per tensor: fate, name, shape in the target, and what was done."""
        rows = [("fate", "tensor", "shape", "from")]
        for tensor in self.tensors:
            came_from = "" if tensor.source_shape in (None, tensor.shape) else _shape(tensor.source_shape)
            rows.append(
                (tensor.fate, tensor.name, _shape(tensor.shape), " ".join(filter(None, (came_from, tensor.note))))
            )
        widths = [max(len(row[column]) for row in rows) for column in range(3)]
        lines = [
            "  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[3]]) for row in rows
        ]
        return "\n".join(line.rstrip() for line in lines)

    def __str__(self) -> str:
        return self.table()


def patterns(names: Sequence[str]) -> list[str]:
    """Return the names with their numbers replaced by `*`, each once: `enc_block_*.*.conv1.weight`."""
    return list(dict.fromkeys(re.sub(r"(?<![A-Za-z0-9])\d+(?![A-Za-z0-9])", "*", name) for name in names))


def _shape(shape: tuple[int, ...] | None) -> str:
    return "" if shape is None else "x".join(map(str, shape)) or "scalar"
