"""Several volumes under one series: echoes, b-values, time points, stacks. Which are they, and what tells them apart?

A series comes apart where its slices lie in several stacks, or share places and one or a few numbers of their headers
divide them into groups in which none do.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from sagittal.volumes import slice_stack
from sagittal.volumes.dicom_headers import Slice

PART_MARK = "@"
"""Stands between the UID of a series and the number of a volume in it."""
_STACK = "stack"
_MAX_NUMBERS = 3
_MAX_LISTED = 8


@dataclass(frozen=True, eq=False)
class Part:
    """One of the volumes of a series.

    Attributes:
        name: what tells it from the others, `EchoTime 80` for example; empty where there is one.
        slices: its slices, in the order given.
    """

    name: str
    slices: tuple[Slice, ...]


def parts_of(slices: Sequence[Slice]) -> tuple[Part, ...]:
    """Return the volumes of a series in the order of what tells them apart; one where nothing does."""
    stacks = _divided(slices, (_STACK,))
    if len(stacks) < 2:
        return _of_stack(slices, "")
    found: list[Part] = []
    for values, group in stacks.items():
        found.extend(_of_stack(group, f"{_STACK} {values[0]}"))
    return tuple(found)


def listed(parts: Sequence[Part], series_uid: str) -> str:
    """Return the names of the parts as one may ask for them."""
    texts = [f"{series_uid}{PART_MARK}{number} ({part.name})" for number, part in enumerate(parts, start=1)]
    more = f" and {len(texts) - _MAX_LISTED} more" if len(texts) > _MAX_LISTED else ""
    return ", ".join(texts[:_MAX_LISTED]) + more


def split_part(series_uid: str) -> tuple[str, int | None]:
    """Return the series and the number of the volume in it that a name like `1.2.3@2` asks for."""
    uid, mark, number = series_uid.partition(PART_MARK)
    return (uid, int(number)) if mark and number.isascii() and number.isdigit() else (series_uid, None)


def _of_stack(slices: Sequence[Slice], name: str) -> tuple[Part, ...]:
    places = _places(slices)
    if len(set(places)) == len(places):
        return (Part(name, tuple(slices)),)
    place_of = {id(piece): place for piece, place in zip(slices, places, strict=True)}
    varying = [key for key in _names(slices) if len(_divided(slices, (key,))) > 1]
    for count in range(1, _MAX_NUMBERS + 1):
        for keys in combinations(varying, count):
            groups = _divided(slices, keys)
            if all(len({place_of[id(piece)] for piece in group}) == len(group) for group in groups.values()):
                return tuple(
                    Part(", ".join(filter(None, (name, _told(keys, values)))), tuple(group))
                    for values, group in groups.items()
                )
    return (Part(name, tuple(slices)),)


def _names(slices: Sequence[Slice]) -> list[str]:
    return [name for name in dict.fromkeys(key for piece in slices for key in piece.varying) if name != _STACK]


def _divided(slices: Sequence[Slice], keys: tuple[str, ...]) -> dict[tuple[str, ...], list[Slice]]:
    groups: dict[tuple[str, ...], list[Slice]] = {}
    for piece in slices:
        groups.setdefault(tuple(piece.varying.get(key, "none") for key in keys), []).append(piece)
    return dict(sorted(groups.items(), key=lambda item: [_order(value) for value in item[0]]))


def _order(value: str) -> tuple[float, str]:
    try:
        return float(value), ""
    except ValueError:
        return float("inf"), value


def _told(keys: Sequence[str], values: Sequence[str]) -> str:
    return ", ".join(f"{key} {value}" for key, value in zip(keys, values, strict=True))


def _places(slices: Sequence[Slice]) -> list[int]:
    """Return the number of the place along the normal, and of the orientation, that each slice has."""
    first = slices[0]
    normal = slice_stack.normal_of(first.row, first.column)
    heights = np.array([float(piece.position_mm @ normal) for piece in slices])
    order = np.argsort(heights, kind="stable")
    places = np.empty(len(slices), dtype=np.int64)
    places[order] = np.cumsum(np.concatenate([[0], np.diff(heights[order]) >= slice_stack.STEP_TOLERANCE_MM]))
    return [int(place) for place in places]
