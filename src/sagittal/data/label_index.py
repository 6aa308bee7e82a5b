"""From the values in label files to small consecutive indices and back.

Training and resampling work on indices (0 is background, then the foreground values in ascending order, last the
ignored voxels), so that values such as 205 or 65535 cost no memory, and classes and regions share one path.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Integer, UInt

from sagittal.errors import DataError
from sagittal.plan import DatasetSpec
from sagittal.volumes.stored import smallest_label_type

_MAX_VALUE = 65535


@dataclass(frozen=True)
class LabelIndex:
    """The declared label values of a data set in the order of their indices; make it with `label_index`."""

    spec: DatasetSpec
    values: tuple[int, ...]
    """Value of index 0 (background, always 0), 1, 2, ... without the ignore value."""

    @property
    def num_indices(self) -> int:
        """Number of indices, background included, ignore not."""
        return len(self.values)

    @property
    def ignore_index(self) -> int | None:
        """Index of voxels that do not count: one past the others; None where the data set declares no ignore value."""
        return None if self.spec.ignore_value is None else len(self.values)

    @property
    def dtype(self) -> np.dtype[np.unsignedinteger]:
        """Smallest type that holds every index (one value is kept free to mark undeclared voxels)."""
        return np.dtype(np.uint8) if self.num_indices < np.iinfo(np.uint8).max else np.dtype(np.uint16)

    @property
    def membership(self) -> Bool[np.ndarray, "K I"]:
        """Table (outputs, indices): output k is active where index i belongs to it.

        The identity for classes; for regions, which values each region joins.
        """
        if not self.spec.has_regions:
            return np.eye(self.num_indices, dtype=bool)
        return np.array([[value in label.values for value in self.values] for label in self.spec.labels])

    def encode(self, labels: Integer[np.ndarray, "D H W"], *, source: str = "labels") -> UInt[np.ndarray, "D H W"]:
        """Return the index of each voxel's value.

        Args:
            labels: (D, H, W) values as the label file holds them.
            source: what the message calls the labels, for example the file or case.

        Raises:
            DataError: a value that the data set does not declare.
        """
        unknown = int(np.iinfo(self.dtype).max)
        table = np.full(_MAX_VALUE + 2, unknown, self.dtype)
        table[list(self.values)] = np.arange(self.num_indices)
        if self.spec.ignore_value is not None:
            table[self.spec.ignore_value] = self.num_indices
        if labels.size and (labels.min() < 0 or labels.max() > _MAX_VALUE):
            labels = np.where((labels < 0) | (labels > _MAX_VALUE), _MAX_VALUE + 1, labels)
        consecutive = self.spec.ignore_value is None and self.values == tuple(range(self.num_indices))
        if consecutive and labels.size and labels.min() >= 0 and labels.max() < self.num_indices:
            return labels.astype(self.dtype)
        indices = np.empty(labels.shape, self.dtype)
        for plane, target in zip(labels, indices, strict=True):
            # A look-up makes 8-byte indices of what it looks up: a plane at a time keeps them small.
            target[...] = table[plane]
        undeclared = indices == unknown
        if undeclared.any():
            found = np.unique(labels[undeclared])[:10].tolist()
            raise DataError(
                f"{source}: label values {[value if value <= _MAX_VALUE else 'out of 0..65535' for value in found]} "
                f"in {int(undeclared.sum())} voxels; dataset.json declares {sorted(self.spec.declared_values)}. "
                "Declare them under 'labels' or correct the label file.",
                code="undeclared_label",
            )
        return indices

    def values_of_classes(self) -> Integer[np.ndarray, " K"]:
        """Return the value that stands for each network output in a prediction.

        It is the label files' value; of one that 'sagittal doctor --fix' replaced, the original. For classes, take it
        at the largest output; for regions, write it wherever the output is above 0, output by output, later ones over
        earlier (`regions_class_order`).
        """
        stored = self.values if self.spec.regions_class_order is None else self.spec.regions_class_order
        originals = dict(self.spec.label_map)
        values = [originals.get(value, value) for value in stored]
        return np.array(values, smallest_label_type(min(0, *values), max(values)))

    def decode(self, logits: Float[np.ndarray, "K D H W"]) -> Integer[np.ndarray, "D H W"]:
        """Return the label map that the network's outputs (K, D, H, W) mean, as values of predictions."""
        values = self.values_of_classes()
        if not self.spec.has_regions:
            return np.asarray(values[np.argmax(logits, axis=0)])
        labels = np.zeros(logits.shape[1:], values.dtype)
        for value, region in zip(values, logits, strict=True):
            labels[region > 0] = value
        return labels


def label_index(spec: DatasetSpec) -> LabelIndex:
    """Return the indices of the labels that `spec` declares."""
    return LabelIndex(spec, (0, *sorted(spec.foreground_values)))
