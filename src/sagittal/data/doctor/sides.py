"""Left and right: cases whose labels lie on the other side than their names say, or than in all other cases.

Two tests, both on centroids along the world's x axis (to the patient's right). Where labels come in pairs, named left
and right, each pair says by itself whether the case is mirrored. Where there are none, a case is suspected only if the
others agree beyond chance on which side things lie and this one fits them once it is mirrored. Mirroring a scan's array
or one axis of its header turns the sign of every measure used here, so a mirrored case shows in all of them.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from jaxtyping import Float64
from scipy import special

from sagittal.data.doctor.findings import Finding, counted, named
from sagittal.plan.dataset import Label

LEFT_WORDS, RIGHT_WORDS = frozenset({"left", "l", "lh", "lt"}), frozenset({"right", "r", "rh", "rt"})
_WORD = re.compile(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])|\d+")

SWAPPED_SHARE = 0.9
"""A single pair counts as swapped where this share of at least `SWAPPED_OTHERS` other cases have it the right way."""
SWAPPED_OTHERS = 5
MIN_OTHERS = 7
"""Without pairs: fewer other cases prove nothing, since seven of seven agree by chance in 0.8 %."""
MAX_CHANCE = 0.01
MAX_SHARE = 0.1
"""Without pairs: where more cases differ, both sides are usual, as with tumours."""
APART = 4.0
"""Spreads of the other cases between their median and the middle; a mirrored case lies twice as far from them."""
FITS = 2.5
"""Spreads of the other cases within which a case fits them once it is mirrored."""
BETWEEN = 1 / 3
"""Of the way from the middle to the median, on both sides: where things are found on both sides, some lie here."""
MAX_BETWEEN = 0.02
"""Share of the other cases that may lie between."""
LEAST_SPREAD = 0.03
"""Of half the image's width: fewer cases than it takes to measure a spread may agree better than that by chance."""
MAX_LABELS = 24
"""Distances between all pairs of more labels say nothing new."""

_FIX = (
    "Look at the case: compare it with another one. If it is mirrored, export it again with its orientation, "
    "or correct its header or its labels."
)


@dataclass(frozen=True)
class Extent:
    """Where the voxels of a label lie along the world's x axis: their number, mean and variance, in mm."""

    voxels: int
    mean_mm: float
    variance_mm2: float


@dataclass(frozen=True)
class Sides:
    """What one case says about left and right.

    Attributes:
        case: its id.
        centre_mm: the middle of the image, world x.
        half_width_mm: half of the image's width along x.
        extents: of each label value that is present.
    """

    case: str
    centre_mm: float
    half_width_mm: float
    extents: Mapping[int, Extent]

    def of(self, label: Label) -> Extent | None:
        """Return where a class or region lies; None where it has no voxel."""
        parts = [self.extents[value] for value in label.values if value in self.extents]
        if not parts:
            return None
        voxels = sum(part.voxels for part in parts)
        mean = sum(part.voxels * part.mean_mm for part in parts) / voxels
        second = sum(part.voxels * (part.variance_mm2 + part.mean_mm**2) for part in parts) / voxels
        return Extent(voxels, mean, max(0.0, second - mean**2))


def side_pairs(labels: Sequence[Label]) -> tuple[tuple[Label, Label], ...]:
    """Return the labels that are named alike but for left and right (or L and R, lh and rh), left first."""
    sides: dict[tuple[str, ...], dict[str, Label]] = {}
    for label in labels:
        words = [word.lower() for word in _WORD.findall(label.name)]
        found = [place for place, word in enumerate(words) if word in LEFT_WORDS | RIGHT_WORDS]
        if len(found) == 1:
            side = "left" if words[found[0]] in LEFT_WORDS else "right"
            words[found[0]] = "*"
            sides.setdefault(tuple(words), {})[side] = label
    return tuple((pair["left"], pair["right"]) for pair in sides.values() if len(pair) == 2)


def suspected_flips(cases: Sequence[Sides], labels: Sequence[Label]) -> Iterator[Finding]:
    """Yield a warning for every case that may be mirrored, or one for all where most of them are."""
    pairs = side_pairs(labels)
    verdicts = {sides.case: _pair_verdicts(sides, pairs) for sides in cases}
    if any(verdicts.values()):
        yield from _by_pairs(verdicts)
    else:
        yield from _by_majority(cases, labels)


@dataclass(frozen=True)
class _Verdict:
    """One pair of one case whose two halves lie clearly apart along x."""

    left: str
    right: str
    left_mm: float
    right_mm: float

    @property
    def upright(self) -> bool:
        return self.right_mm > self.left_mm

    @property
    def name(self) -> str:
        return f"{self.left} and {self.right}"

    def __str__(self) -> str:
        distance = abs(self.left_mm - self.right_mm)
        side = "left" if self.upright else "right"
        where = f"world x {self.left_mm:.0f} and {self.right_mm:.0f} mm"
        return f"{self.left} lies {distance:.0f} mm to the {side} of {self.right} ({where})"


def _pair_verdicts(sides: Sides, pairs: Sequence[tuple[Label, Label]]) -> list[_Verdict]:
    found = []
    for left, right in pairs:
        one, other = sides.of(left), sides.of(right)
        if one is None or other is None:
            continue
        spreads = math.sqrt(one.variance_mm2) + math.sqrt(other.variance_mm2)
        if abs(one.mean_mm - other.mean_mm) > spreads:
            found.append(_Verdict(left.name, right.name, one.mean_mm, other.mean_mm))
    return found


def _by_pairs(verdicts: Mapping[str, Sequence[_Verdict]]) -> Iterator[Finding]:
    balance = {case: sum(1 if one.upright else -1 for one in several) for case, several in verdicts.items() if several}
    mirrored = [case for case, sign in balance.items() if sign < 0]
    upright = [case for case, sign in balance.items() if sign > 0]
    if len(mirrored) >= 3 and len(mirrored) > len(upright):
        worst = _farthest(verdicts[mirrored[0]], upright=False)
        other = f" The others ({named(upright)}) are the other way round." if upright else ""
        message = (
            f"left and right are exchanged in {len(mirrored)} of {len(balance)} cases with labels named left and "
            f"right, for example in {mirrored[0]}: {worst}.{other}"
        )
        fix = (
            "Are the names meant as seen on the screen, or do the headers have a wrong left-right axis? Find out; "
            "rename the labels or correct the headers."
        )
        yield Finding("warning", "suspected_flip", "", message, fix, look_at=(mirrored[0], *upright[:1]))
        return
    for case in mirrored:
        several = verdicts[case]
        reversed_pairs = sum(not one.upright for one in several)
        pairs = counted(len(several), "pair")
        other = (
            f"; {len(upright)} of {len(balance) - 1} other cases are the right way round" if len(balance) > 1 else ""
        )
        message = (
            f"{case}: left and right seem exchanged, {reversed_pairs} of {pairs} of labels lie the wrong way round: "
            f"{_farthest(several, upright=False)}{other}."
        )
        yield Finding("warning", "suspected_flip", case, message, _FIX, look_at=(case, *upright[:1]))
    for case in [case for case, sign in balance.items() if sign >= 0]:
        yield from _swapped_pairs(case, verdicts)


def _farthest(several: Sequence[_Verdict], *, upright: bool) -> _Verdict:
    chosen = [one for one in several if one.upright == upright]
    return max(chosen, key=lambda one: abs(one.left_mm - one.right_mm))


def _swapped_pairs(case: str, verdicts: Mapping[str, Sequence[_Verdict]]) -> Iterator[Finding]:
    for one in verdicts[case]:
        if one.upright:
            continue
        others = {
            name: other.upright
            for name, several in verdicts.items()
            for other in several
            if name != case and other.name == one.name
        }
        if len(others) >= SWAPPED_OTHERS and sum(others.values()) >= SWAPPED_SHARE * len(others):
            message = (
                f"{case}: the labels {one.name} seem exchanged: {one}; "
                f"{sum(others.values())} of {len(others)} other cases have them the right way round."
            )
            example = next(name for name, right in others.items() if right)
            fix = "Look at the case, and exchange the two labels where they are wrong."
            yield Finding("warning", "suspected_flip", case, message, fix, look_at=(case, example))


def _by_majority(cases: Sequence[Sides], labels: Sequence[Label]) -> Iterator[Finding]:
    if len(cases) <= MIN_OTHERS:
        return
    measures = _measures(cases, labels)
    told: dict[str, list[str]] = {}
    usable: dict[str, int] = {}
    for name, values in measures.items():
        wrong = _against_all(values)
        if wrong is None:
            continue
        for case in values:
            usable[case] = usable.get(case, 0) + 1
        for case, text in wrong.items():
            told.setdefault(case, []).append(f"{name}: {text}")
    for case, texts in told.items():
        # A mirrored scan has everything on the other side; one label of many there is anatomy.
        if 2 * len(texts) > usable[case]:
            count = f"{len(texts)} of {counted(usable[case], 'measure')} that the other cases agree on"
            message = f"{case}: left and right may be exchanged, by {count}. {texts[0]}."
            example = next(sides.case for sides in cases if sides.case not in told)
            yield Finding("warning", "suspected_flip", case, message, _FIX, look_at=(case, example))


def _measures(cases: Sequence[Sides], labels: Sequence[Label]) -> dict[str, dict[str, float]]:
    """Return the offsets along x, in halves of the image's width, by what is measured and by case."""
    found: dict[str, dict[str, float]] = {}
    for sides in cases:
        means = {label.name: extent.mean_mm for label in labels[:MAX_LABELS] if (extent := sides.of(label)) is not None}
        for name, mean in means.items():
            offset = (mean - sides.centre_mm) / sides.half_width_mm
            found.setdefault(f"{name} from the image's centre", {})[sides.case] = offset
        for (one, first), (other, second) in combinations(means.items(), 2):
            found.setdefault(f"{other} from {one}", {})[sides.case] = (second - first) / sides.half_width_mm
    return found


def _against_all(values: Mapping[str, float]) -> dict[str, str] | None:
    """Return the cases that fit the others only when mirrored, with the statistics; None where the others disagree."""
    offsets = np.array(list(values.values()))
    if offsets.size <= MIN_OTHERS:
        return None
    side = 1.0 if np.median(offsets) > 0 else -1.0
    minority = [case for case, offset in values.items() if side * offset < 0]
    if len(minority) > max(1.0, MAX_SHARE * offsets.size):
        return None
    wrong = {}
    for case in minority:
        others = np.array([offset for name, offset in values.items() if name != case])
        if (agreement := _agreement(others)) is None:
            return None
        if abs(values[case] + agreement.middle) <= FITS * agreement.spread:
            sides = {True: "right", False: "left"}
            wrong[case] = (
                f"{abs(values[case]):.2f} of half the width to the {sides[values[case] > 0]}, in {agreement.agreeing} "
                f"of {others.size} other cases to the {sides[agreement.middle > 0]} (median "
                f"{abs(agreement.middle):.2f}, spread {agreement.spread:.2f}; sign test p = {agreement.chance:.1g}); "
                "mirrored, the case fits them"
            )
    return wrong if minority or _agreement(offsets) is not None else None


@dataclass(frozen=True)
class _Agreement:
    """On which side cases have something: median and spread of their offsets, and the sign test."""

    middle: float
    spread: float
    agreeing: int
    chance: float


def _agreement(offsets: Float64[np.ndarray, " n"]) -> _Agreement | None:
    """Return on which side the cases have it, None where they do not agree beyond doubt."""
    middle = float(np.median(offsets))
    spread = max(LEAST_SPREAD, 1.4826 * float(np.median(np.abs(offsets - middle))))
    agreeing = int((offsets * middle > 0).sum())
    chance = _chance(agreeing, offsets.size)
    between = int((np.abs(offsets) < BETWEEN * abs(middle)).sum())
    clear = abs(middle) > APART * spread and between <= MAX_BETWEEN * offsets.size
    return _Agreement(middle, spread, agreeing, chance) if clear and chance <= MAX_CHANCE else None


def _chance(agreeing: int, count: int) -> float:
    """Return how likely at least `agreeing` of `count` cases lie on one given side if both sides are equally usual."""
    return float(special.bdtrc(agreeing - 1, count, 0.5))
