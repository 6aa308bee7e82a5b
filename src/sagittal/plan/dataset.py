"""What a data set declares about itself: its channels, its labels and how its files end."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import ClassVar, Self

from pydantic import model_validator

from sagittal.plan.base import Frozen

_CODE = re.compile(r"[^:\\\s]{1,16}:[^:\\\s]{1,16}:[^\\\x00-\x1f]{1,64}")
"""As DICOM has them: short strings for scheme and value, a long one for the meaning."""


class Label(Frozen):
    """One thing to segment: a class (one value in the label files) or a region (a union of several values)."""

    name: str
    values: tuple[int, ...]
    """Values of the label files that belong to it, ascending, never 0."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not self.name:
            raise ValueError("a label needs a name")
        if not self.values or min(self.values) < 1 or max(self.values) > 65535:
            raise ValueError(f"label '{self.name}': values must be between 1 and 65535, got {list(self.values)}")
        if tuple(sorted(set(self.values))) != self.values:
            raise ValueError(f"label '{self.name}': values must be ascending and distinct, got {list(self.values)}")
        return self


class DatasetSpec(Frozen):
    """The declared part of a data set, independent of where its files lie.

    Network outputs: with classes, output 0 is the background and output i is `labels[i - 1]`; with regions, output i is
    `labels[i]` and there is no background output.
    """

    name: str
    channel_names: tuple[str, ...]
    labels: tuple[Label, ...]
    """Foreground labels: classes ascending by value, regions in the order of dataset.json."""
    ignore_value: int | None = None
    """Value of voxels that count neither in training nor in evaluation."""
    regions_class_order: tuple[int, ...] | None = None
    """For regions: the value written for each region in turn, later ones over earlier ones (nnU-Net's rule)."""
    label_map: tuple[tuple[int, int], ...] = ()
    """(value in the label files, value before 'sagittal doctor --fix'), ascending; predictions hold the latter.

    Only values that can't be declared are replaced: those outside of 0..65535.
    """
    codes: tuple[tuple[str, str], ...] = ()
    """(name of a label, what it is in a coding scheme: `SCT:10200004:Liver`), for DICOM objects."""
    file_ending: str

    later_fields: ClassVar[tuple[str, ...]] = ("label_map", "codes")

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not self.channel_names:
            raise ValueError("at least one channel is needed")
        if not self.labels:
            raise ValueError("at least one foreground label is needed")
        if len({label.name for label in self.labels}) != len(self.labels):
            raise ValueError(f"label names must differ, got {[label.name for label in self.labels]}")
        if self.ignore_value is not None and self.ignore_value in self.foreground_values:
            raise ValueError(f"the ignore value {self.ignore_value} is also a foreground value")
        if self.regions_class_order is not None:
            if len(self.regions_class_order) != len(self.labels):
                raise ValueError(
                    f"regions_class_order has {len(self.regions_class_order)} values for {len(self.labels)} regions"
                )
        elif any(len(label.values) > 1 for label in self.labels):
            raise ValueError("labels that join several values (regions) need regions_class_order")
        elif [label.values[0] for label in self.labels] != sorted(self.foreground_values):
            raise ValueError("classes must have distinct values in ascending order")
        self._check_label_map()
        self._check_codes()
        return self

    def _check_label_map(self) -> None:
        values, originals = (tuple(pair[side] for pair in self.label_map) for side in (0, 1))
        if list(values) != sorted(set(values)) or not set(values) <= self.declared_values - {0}:
            raise ValueError(f"label_map: keys must be declared label values other than 0, got {list(values)}")
        if len(set(originals)) != len(originals) or any(0 <= original <= 65535 for original in originals):
            raise ValueError(
                f"label_map: original values must be distinct and outside of 0..65535, got {list(originals)}"
            )

    def _check_codes(self) -> None:
        names = [name for name, _ in self.codes]
        unknown = sorted(set(names) - {label.name for label in self.labels})
        if unknown or len(set(names)) != len(names):
            raise ValueError(f"codes: expected one for a declared label each, got {unknown or names}")
        for name, code in self.codes:
            if not _CODE.fullmatch(code):
                raise ValueError(
                    f"codes: '{code[:80]}' for label '{name}'; expected SCHEME:VALUE:MEANING of at most 16, 16 and 64 "
                    "characters, for example SCT:10200004:Liver"
                )

    @property
    def has_regions(self) -> bool:
        """Whether labels may overlap, so that each gets a sigmoid of its own."""
        return self.regions_class_order is not None

    @property
    def num_outputs(self) -> int:
        """Channels of the network's output: classes with background, or regions."""
        return len(self.labels) + (0 if self.has_regions else 1)

    @property
    def foreground_values(self) -> frozenset[int]:
        """All label values that mean something other than background or ignore."""
        return frozenset(value for label in self.labels for value in label.values)

    def cut_by_swaps(self, pairs: Iterable[tuple[int, int]]) -> Label | None:
        """Return the first label that is none of the declared ones once each pair of values has changed places."""
        partner = {value: other for pair in pairs for value, other in (pair, pair[::-1])}
        known = {frozenset(label.values) for label in self.labels}
        swapped = ((label, frozenset(partner.get(value, value) for value in label.values)) for label in self.labels)
        return next((label for label, values in swapped if values not in known), None)

    @property
    def declared_values(self) -> frozenset[int]:
        """All values that a label file may hold."""
        ignore = () if self.ignore_value is None else (self.ignore_value,)
        return self.foreground_values | {0, *ignore}
