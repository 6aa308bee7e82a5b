"""What is scored: named sets of label values, and the value that counts for nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
from jaxtyping import Integer
from pydantic import ValidationError, model_validator

from sagittal.errors import DataError
from sagittal.plan.base import Frozen, describe_validation_error
from sagittal.plan.dataset import DatasetSpec, Label

BACKGROUND = "background"
IGNORE = "ignore"
_MAX_VALUE = 65535


class ClassSet(Frozen):
    """The classes and regions that an evaluation scores, in their order of appearance, and the ignore value."""

    labels: tuple[Label, ...]
    """A class has one value; a region has several, and may share them with others."""
    ignore_value: int | None = None
    """Voxels of the reference with this value are left out of both masks of every class."""
    label_map: tuple[tuple[int, int], ...] = ()
    """(value, what else it may be called in a label map): see `DatasetSpec.label_map`."""

    later_fields: ClassVar[tuple[str, ...]] = ("label_map",)

    @model_validator(mode="after")
    def _check(self) -> ClassSet:
        names = [label.name for label in self.labels]
        if len(set(names)) != len(names):
            raise ValueError(f"class names must differ, got {names}")
        if self.ignore_value is not None and self.ignore_value in self.foreground_values:
            raise ValueError(f"the ignore value {self.ignore_value} is also the value of a class")
        return self

    @property
    def foreground_values(self) -> frozenset[int]:
        """Every label value that belongs to a class."""
        return frozenset(value for label in self.labels for value in label.values)

    @property
    def declared_values(self) -> frozenset[int]:
        """Every label value that has a meaning: background, the classes and the ignore value."""
        return self.foreground_values | {0} | ({self.ignore_value} if self.ignore_value is not None else set())

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the classes, in order."""
        return tuple(label.name for label in self.labels)

    @classmethod
    def of_spec(cls, spec: DatasetSpec) -> ClassSet:
        """Take the labels of a data set's declaration."""
        return cls(labels=spec.labels, ignore_value=spec.ignore_value, label_map=spec.label_map)

    def in_own_values(self, labels: Integer[np.ndarray, "D H W"]) -> Integer[np.ndarray, "D H W"]:
        """Return a label map with the original values of `label_map` turned into the values of the classes.

        The array itself comes back where it holds none of them.
        """
        masks = {value: labels == original for value, original in self.label_map if (labels == original).any()}
        if not masks:
            return labels
        known = labels.astype(np.promote_types(labels.dtype, np.int32))
        for value, mask in masks.items():
            known[mask] = value
        return known

    @classmethod
    def of_mapping(
        cls, labels: Mapping[str, Any], *, source: str = "labels", label_map: Mapping[str, Any] | None = None
    ) -> ClassSet:
        """Read the `labels` of a dataset.json: a name to one value (a class) or to a list of values (a region).

        `background` is skipped and `ignore` names the ignore value, as in nnU-Net v2. A value that is negative or above
        65535 gets another one to count by, noted in `label_map`.

        Args:
            labels: the names and their values.
            source: where they come from, for messages.
            label_map: the entry of that name in a dataset.json that 'sagittal doctor --fix' wrote.

        Raises:
            DataError: a value is no integer or a class has the value 0, `label_map` has other keys or values than
                integers, or nothing is left to score.
        """
        found: dict[str, tuple[int, ...]] = {}
        for name, given in labels.items():
            values = tuple(given) if isinstance(given, Sequence) and not isinstance(given, str) else (given,)
            if not values or not all(isinstance(value, int) and not isinstance(value, bool) for value in values):
                raise DataError(
                    f"{source}: label '{name}' has the value {given!r}; expected an integer or a list of integers.",
                    code="label_value",
                )
            if name != BACKGROUND:
                found[str(name)] = tuple(sorted(set(values)))
        ignore = found.pop(IGNORE, None)
        if not found:
            raise DataError(f"{source}: no foreground label, so there is nothing to score.", code="no_classes")
        pairs = list((label_map or {}).items())
        if not all(key.isascii() and key.isdigit() and type(original) is int for key, original in pairs):
            raise DataError(
                f"{source}: label_map is {dict(pairs)!r}; expected values and their original values, all integers.",
                code="label_value",
            )
        stand_ins = _stand_ins({value for values in (*found.values(), ignore or ()) for value in values})
        named = [*((int(key), original) for key, original in pairs), *((new, old) for old, new in stand_ins.items())]
        try:
            return cls(
                labels=tuple(
                    Label(name=name, values=tuple(sorted(stand_ins.get(value, value) for value in values)))
                    for name, values in found.items()
                ),
                ignore_value=stand_ins.get(ignore[0], ignore[0]) if ignore else None,
                label_map=tuple(sorted(named)),
            )
        except ValidationError as error:
            raise DataError(describe_validation_error(error, source), code="label_value") from None

    @classmethod
    def of_values(cls, values: Sequence[int]) -> ClassSet:
        """Make one class per non-zero value, named by the value: what is left where nothing declares any names."""
        return cls.of_mapping({str(value): int(value) for value in sorted(set(values)) if value != 0})


def _stand_ins(values: set[int]) -> dict[int, int]:
    """Return a free value for each that is negative or above 65535: the highest ones, which label maps rarely hold."""
    free = (value for value in range(_MAX_VALUE, 0, -1) if value not in values)
    return {value: next(free) for value in sorted(values) if not 0 <= value <= _MAX_VALUE}


def present_values(labels: np.ndarray) -> tuple[int, ...]:
    """Return the distinct values of a label map, ascending."""
    if labels.dtype.kind == "u" and labels.dtype.itemsize <= 2:
        # A histogram reads the map once; np.unique sorts it.
        return tuple(int(value) for value in np.flatnonzero(np.bincount(labels.ravel())))
    return tuple(int(value) for value in np.unique(labels))
