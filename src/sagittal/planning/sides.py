"""Which axes may be mirrored, judged by the labels' names: left and right change places, front and back do not."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

from sagittal.plan import DatasetSpec
from sagittal.plan.base import Triple
from sagittal.plan.opposites import OPPOSITES, Axis, opposite_pairs, words_of

Axes = tuple[Axis, ...]

_ALONG = {0: "up and down", 1: "front to back", 2: "left to right"}
_SIDES: Axis = 2
"""The axis of RAS order along which a body is its own mirror image."""

_UNLIKE = {"heart", "cardiac", "atrium", "atrial", "ventricle", "ventricular", "coronary", "liver", "hepatic"}
"""Words of organs whose left part is no mirror image of the right: a right ventricle has a thin wall."""

_ALIKE = {"lateral", "brain", "cerebral"}
"""Words that tell a ventricle of the brain, which is one, from one of the heart."""


class Mirroring(NamedTuple):
    """Which axes of the network's arrays are mirrored, which labels change places then, and why."""

    axes: Axes
    why: str
    swapped_labels: tuple[tuple[Axis, int, int], ...] = ()
    """(axis of the network's arrays, label value, label value)."""
    why_swapped: str = "no two labels change places along a mirrored axis"


def mirroring(
    spec: DatasetSpec, orientation: Literal["RAS", "stored"] = "RAS", transpose: Triple = (0, 1, 2)
) -> Mirroring:
    """Return which axes are mirrored and which labels change places then.

    The left and right of a body are mirror images, so such labels change places. An axis is left out where two labels
    differ only by a direction along it and no swap makes one of the other: mirrored, one would look like the other. In
    stored order nothing says which axis that is, so then none is mirrored.
    """
    names = [label.name for label in spec.labels]
    pairs = {axis: found for axis in OPPOSITES if (found := opposite_pairs(names, axis))}
    if not pairs:
        return Mirroring(tuple(OPPOSITES), "nnU-Net's default, all axes; no two labels differ by a direction only")
    if orientation == "stored":
        one, other = next(iter(pairs.values()))[0]
        why = f"none: '{one}' and '{other}' differ by a direction only, and the files' axes have no known one"
        return Mirroring((), why)
    hindered = {axis: told for axis, found in pairs.items() if (told := _obstacle(spec, axis, found)) is not None}
    axes = tuple(place for place in OPPOSITES if transpose[place] not in hindered)
    why = "; ".join(f"not {_ALONG[axis]}, because of {told}" for axis, told in hindered.items())
    why = f"{why}: mirrored, one would look like the other" if hindered else "nnU-Net's default, all axes"
    if _SIDES not in pairs or _SIDES in hindered:
        return Mirroring(axes, why)
    sides = pairs[_SIDES]
    more = f" (and {len(sides) - 1} more such pairs)" if len(sides) > 1 else ""
    whose = f"'{sides[0][0]}' and '{sides[0][1]}'{more}"
    place = next(place for place in OPPOSITES if transpose[place] == _SIDES)
    return Mirroring(
        axes,
        f"{why}; left to right, {whose} change places (training.augmentation.swapped_labels)",
        tuple((place, one, other) for one, other in _value_pairs(spec, sides)),
        f"{whose} are mirror images: mirrored from left to right, each looks like the other",
    )


def _obstacle(spec: DatasetSpec, axis: Axis, pairs: Sequence[tuple[str, str]]) -> str | None:
    """Return the pair that no swap makes right in a mirror along the axis, and why if that is not plain, else None."""
    told = f"'{pairs[0][0]}' and '{pairs[0][1]}'"
    if axis != _SIDES:
        return told
    for one, other in pairs:
        words = set(words_of(one))
        if words & _UNLIKE and not words & _ALIKE:
            return f"'{one}' and '{other}', which are no mirror images of each other"
    swapped = _value_pairs(spec, pairs)
    values = [value for pair in swapped for value in pair]
    regions = {label.name: label.values for label in spec.labels}
    for one, other in pairs:
        if (len(regions[one]), len(regions[other])) != (1, 1):
            return f"'{one}' and '{other}', which join several label values"
    if len(set(values)) != len(values):
        return f"{told}, for a label value is in several pairs"
    if spec.cut_by_swaps(swapped) is not None:
        return f"{told}, whose swap would cut another region in two"
    return None


def _value_pairs(spec: DatasetSpec, pairs: Sequence[tuple[str, str]]) -> tuple[tuple[int, int], ...]:
    values = {label.name: label.values[0] for label in spec.labels}
    return tuple(dict.fromkeys((values[one], values[other]) for one, other in pairs))
