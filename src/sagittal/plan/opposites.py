"""Names of labels that differ by a direction only: left and right kidney, upper and lower lobe."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Literal

Axis = Literal[0, 1, 2]
"""Of a volume in RAS order: D, H or W."""

OPPOSITES: Mapping[Axis, Mapping[str, str]] = {
    0: {"superior": "inferior", "upper": "lower", "cranial": "caudal", "top": "bottom"},
    1: {"anterior": "posterior", "ventral": "dorsal", "front": "back"},
    2: {"left": "right", "l": "r", "lt": "rt", "lh": "rh", "sin": "dex", "sinistra": "dextra"},
}
"""By axis, words for one direction and for the other."""


def opposite_pairs(names: Sequence[str], axis: Axis) -> tuple[tuple[str, str], ...]:
    """Return all pairs of names that differ only by a direction along an axis: for W, kidney_left and kidney_right.

    Args:
        names: of labels.
        axis: 0, 1 or 2 for D, H or W in RAS order.
    """
    opposites = OPPOSITES[axis]
    by_words = {tuple(sorted(words_of(name))): name for name in names}
    pairs: dict[tuple[str, str], None] = {}
    for name in names:
        words = words_of(name)
        for position, word in enumerate(words):
            other = tuple(sorted([*words[:position], opposites.get(word, ""), *words[position + 1 :]]))
            if other in by_words:
                pairs[name, by_words[other]] = None
    return tuple(pairs)


def words_of(name: str) -> list[str]:
    """Split snake_case, CamelCase and spaced names into lower-case words."""
    return [word.lower() for word in re.findall(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])|\d+", name)]
