"""Label values that a data set can't declare, and the ones that stand for them in a repaired copy.

Label files and networks work with 0 (background) and values from 1 to 65535, with gaps. A data set whose labels are
negative or larger gets free values instead; the map is kept in dataset.json, and predictions hold the original values.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from sagittal.errors import DataError

MAX_VALUE = 65535


@dataclass(frozen=True)
class Declared:
    """A dataset.json whose labels can be used.

    Attributes:
        content: dataset.json with usable values.
        replaced: values as the label files have them, and the usable value that stands for each.
    """

    content: dict[str, Any]
    replaced: Mapping[int, int]


def declare(
    content: Mapping[str, Any], names: Mapping[int, str] | None = None, avoid: frozenset[int] = frozenset()
) -> Declared:
    """Return dataset.json with `names` declared and with a usable value for each value that is none.

    What makes no sense for other reasons stays as it is: `parse_spec` tells.

    Args:
        content: what dataset.json holds; it is not changed.
        names: further label values, with a name for each ("ignore" for voxels that do not count).
        avoid: values that must not stand for another one.

    Raises:
        DataError: a name or value of `names` is taken, so that two values would become one; or the labels are regions,
            whose order only dataset.json can tell.
    """
    labels = dict(content["labels"]) if isinstance(content.get("labels"), dict) else None
    if labels is None:
        return Declared(dict(content), {})
    for value, name in (names or {}).items():
        _refuse_taken(value, name, labels)
        labels[name] = value
    taken = {value for _, value in _values(labels)}
    free = (value for value in range(1, MAX_VALUE + 1) if value not in taken | avoid)
    replaced = {value: next(free) for value in sorted(taken) if not 0 <= value <= MAX_VALUE}
    # The background can't be anything but 0, which parse_spec says better.
    background = labels.get("background")
    if type(background) is int:
        replaced.pop(background, None)
    usable = {name: _replace(value, replaced) if name != "background" else value for name, value in labels.items()}
    changed = {**content, "labels": usable}
    if "regions_class_order" in content:
        changed["regions_class_order"] = _replace(content["regions_class_order"], replaced)
    return Declared(changed, replaced)


def label_map(declared: Declared) -> dict[str, int]:
    """Return the `label_map` of the repaired dataset.json: usable value to original, earlier repairs included."""
    earlier = dict(declared.content.get("label_map") or {})
    return {**earlier, **{str(new): old for old, new in declared.replaced.items()}}


def _refuse_taken(value: int, name: str, labels: Mapping[str, Any]) -> None:
    remedy = "Correct dataset.json, or the label maps."
    if any(isinstance(several, list) and len(several) > 1 for several in labels.values()):
        raise DataError(
            f"--label {value}={name}: the data set has regions, and only dataset.json can tell which of them the value "
            f"belongs to. {remedy}",
            code="label_name",
        )
    if name in labels:
        raise DataError(
            f"--label {value}={name}: '{name}' is the value {labels[name]} already; two values would become one, which "
            f"can't be undone. {remedy}",
            code="label_name",
        )
    for other, given in _values(labels):
        if given == value:
            raise DataError(
                f"--label {value}={name}: the value {value} is '{other}' already. Leave the option out, or rename the "
                "label in dataset.json.",
                code="label_name",
            )


def _values(labels: Mapping[str, Any]) -> Iterator[tuple[str, int]]:
    for name, given in labels.items():
        for value in given if isinstance(given, list) else [given]:
            if type(value) is int:
                yield name, value


def _replace(given: Any, replaced: Mapping[int, int]) -> Any:
    if isinstance(given, list):
        return [_replace(value, replaced) for value in given]
    return replaced.get(given, given) if type(given) is int else given
