"""When a prediction without a reference is suspicious: each rule a few lines, with the same in words for the page.

A rule compares a case with what is usual and gives a flag with a reason and points. The points only put cases in an
order in which to look at them; they are no probability of an error.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from sagittal.plan.base import Frozen
from sagittal.plan.opposites import Axis, opposite_pairs
from sagittal.plan.volume_range import VolumeRange
from sagittal.report.qc_case import CaseMeasure

MOST_Z = 3.5
"""Iglewicz and Hoaglin's limit for the robust z-score."""
LEAST_CASES = 5
"""With fewer, nothing can be said of what is usual."""
BEYOND_RANGE = 1.25
"""How many times above the largest or below the smallest volume of training is out of its range."""
USUALLY = 0.9
"""Share of the folder's cases that have a class, from which on its absence is flagged."""
SIDES_FACTOR, SIDES_FACTOR_UNKNOWN = 2.0, 4.0
_WIDTH_AXIS: Axis = 2


class QCFlag(Frozen):
    """One reason to look at a case."""

    code: str
    label: str | None
    """The class or region that it is about."""
    reason: str
    points: float
    """What it adds to the suspicion, 1 to 10."""


class RunFlag(Frozen):
    """What the prediction run itself flagged."""

    code: str
    message: str


@dataclass(frozen=True)
class Usual:
    """What is usual; make it with `usual_of`.

    Attributes:
        volumes: of each label, in training or in the folder.
        from_training: names of the labels whose volumes are training's.
        pieces: number of connected components of each label over the folder's cases that have it.
        cut_off: share of them in which the label touches an edge of the scan.
        entropy: mean entropy, over the folder.
        sides: of each pair of opposite labels the usual logarithm of (first / second), None where it is not known.
    """

    volumes: Mapping[str, VolumeRange]
    from_training: frozenset[str]
    pieces: Mapping[str, VolumeRange]
    cut_off: Mapping[str, float]
    entropy: VolumeRange
    sides: Mapping[tuple[str, str], float | None]


def usual_of(cases: Sequence[CaseMeasure], training: Mapping[str, VolumeRange]) -> Usual:
    """Take what is usual from training where it has at least five cases, and else from the folder itself."""
    names = list(cases[0].labels) if cases else []
    volumes, pieces, cut_off = {}, {}, {}
    known = {name for name in names if name in training and training[name].cases >= LEAST_CASES}
    for name in names:
        found = [case.labels[name] for case in cases]
        there = [label for label in found if label.volume_ml > 0]
        volumes[name] = training[name] if name in known else VolumeRange.of([label.volume_ml for label in found])
        pieces[name] = VolumeRange.of([float(label.pieces) for label in there])
        cut_off[name] = sum(bool(label.edges) for label in there) / max(1, len(there))
    pairs = opposite_pairs(names, _WIDTH_AXIS)
    return Usual(
        volumes=volumes,
        from_training=frozenset(known),
        pieces=pieces,
        cut_off=cut_off,
        entropy=VolumeRange.of([case.entropy for case in cases if case.entropy]),
        sides={pair: _usual_ratio(pair, cases, volumes, known) for pair in pairs},
    )


def _usual_ratio(
    pair: tuple[str, str], cases: Sequence[CaseMeasure], volumes: Mapping[str, VolumeRange], known: set[str]
) -> float | None:
    one, other = (volumes[name] for name in pair)
    if known.issuperset(pair) and one.quantiles_ml and other.quantiles_ml:
        return math.log(one.quantiles_ml[2] / other.quantiles_ml[2])
    both = [[case.labels[name].volume_ml for name in pair] for case in cases]
    ratios = [math.log(first / second) for first, second in both if first > 0 and second > 0]
    return statistics.median(ratios) if len(ratios) >= LEAST_CASES else None


def scores_of(case: CaseMeasure, usual: Usual) -> dict[str, float]:
    """Return the robust z-score of each label's volume; those that can't be compared are left out."""
    found = {}
    for name, label in case.labels.items():
        z = usual.volumes[name].robust_z(label.volume_ml) if usual.volumes[name].present >= LEAST_CASES else None
        if z is not None:
            found[name] = round(z, 3)
    return found


def suspicion_of(flags: Sequence[QCFlag], scores: Mapping[str, float]) -> float:
    """Return the sum of the flags' points; without any, below 1: how near the least usual volume is to a flag."""
    if flags:
        return round(sum(flag.points for flag in flags), 3)
    return round(min(0.999, max((abs(z) for z in scores.values()), default=0.0) / MOST_Z), 3)


def flags_of(
    case: CaseMeasure, scores: Mapping[str, float], usual: Usual, told: Sequence[RunFlag] = ()
) -> tuple[QCFlag, ...]:
    """Return why a case is suspicious, the most points first; `told` is what the prediction run flagged."""
    found = [*_nothing_or_absent(case, usual), *_volumes(case, scores, usual), *_sides(case, usual)]
    found += [*_pieces(case, usual), *_cut_off(case, usual), *_entropy(case, usual), *_undeclared(case)]
    found += [
        QCFlag(code=f"run_{flag.code}", label=None, reason=f"The prediction run: {flag.message}", points=2.0)
        for flag in told
        # What the rules above tell themselves.
        if not (flag.code == "nothing_found" and any(own.code == "nothing_found" for own in found))
    ]
    return tuple(sorted(found, key=lambda flag: -flag.points))


def _nothing_or_absent(case: CaseMeasure, usual: Usual) -> Iterator[QCFlag]:
    if not any(label.volume_ml for label in case.labels.values()):
        yield QCFlag(code="nothing_found", label=None, reason="No voxel of any class was found.", points=10.0)
        return
    for name, label in case.labels.items():
        if label.volume_ml == 0 and _is_always_there(usual.volumes[name], name in usual.from_training):
            volumes = usual.volumes[name]
            share = f"all {volumes.cases}" if volumes.absent == 0 else f"{volumes.present} of {volumes.cases}"
            whose = "training cases" if name in usual.from_training else "cases of this folder"
            reason = f"{name} is absent; {share} {whose} have it."
            yield QCFlag(code="absent", label=name, reason=reason, points=4.0)


def _is_always_there(volumes: VolumeRange, in_training: bool) -> bool:
    if volumes.present < LEAST_CASES:
        return False
    return volumes.absent == 0 if in_training else volumes.present >= USUALLY * volumes.cases


def _volumes(case: CaseMeasure, scores: Mapping[str, float], usual: Usual) -> Iterator[QCFlag]:
    for name, z in scores.items():
        quantiles = usual.volumes[name].quantiles_ml
        volume = case.labels[name].volume_ml
        assert quantiles is not None  # it has a score
        smallest, low, _, high, largest = quantiles
        is_outside = name in usual.from_training and not (smallest / BEYOND_RANGE <= volume <= largest * BEYOND_RANGE)
        if abs(z) < MOST_Z and not is_outside:
            continue
        size = "large" if z > 0 else "small"
        reason = (
            f"{name} is unusually {size}: {volume:.4g} mL; 95 % of {_whose(name, usual)} lie between {low:.4g} and "
            f"{high:.4g} mL, all between {smallest:.4g} and {largest:.4g} mL (robust z {z:+.1f})."
        )
        yield QCFlag(code=f"volume_{size}", label=name, reason=reason, points=_points(z, 5.0))


def _sides(case: CaseMeasure, usual: Usual) -> Iterator[QCFlag]:
    for (one, other), expected in usual.sides.items():
        first, second = case.labels[one].volume_ml, case.labels[other].volume_ml
        factor = SIDES_FACTOR if expected is not None else SIDES_FACTOR_UNKNOWN
        if first > 0 and second > 0:
            apart = math.exp(abs(math.log(first / second) - (expected or 0.0)))
            if apart > factor:
                usually = "usually they are alike" if expected is None else f"usual is {math.exp(expected):.3g} to 1"
                reason = f"{one} and {other} differ by far: {first:.4g} and {second:.4g} mL; {usually}."
                yield QCFlag(code="sides", label=min((one, first), (other, second), key=lambda side: side[1])[0],
                             reason=reason, points=round(min(4.0, 1.0 + math.log2(apart / factor)), 3))  # fmt: skip
        elif first > 0 or second > 0:
            missing, there = (one, other) if second > 0 else (other, one)
            are_told = _is_always_there(usual.volumes[missing], missing in usual.from_training)
            if not are_told and 2 * usual.volumes[missing].present >= usual.volumes[missing].cases:
                reason = f"{missing} is absent while {there} is there ({case.labels[there].volume_ml:.4g} mL)."
                yield QCFlag(code="sides", label=there, reason=reason, points=2.0)


def _pieces(case: CaseMeasure, usual: Usual) -> Iterator[QCFlag]:
    for name, label in case.labels.items():
        pieces = usual.pieces[name]
        z = pieces.robust_z(float(label.pieces))
        if pieces.present < LEAST_CASES or z is None or pieces.quantiles_ml is None:
            continue
        middle = pieces.quantiles_ml[2]
        if z >= MOST_Z and label.pieces >= 2 * middle:
            reason = f"{name} is in {label.pieces} pieces; {middle:g} is the median of this folder."
            yield QCFlag(code="pieces", label=name, reason=reason, points=_points(z, 3.0))


def _cut_off(case: CaseMeasure, usual: Usual) -> Iterator[QCFlag]:
    at: dict[str, list[str]] = {}
    for name, label in case.labels.items():
        if label.edges and (usual.pieces[name].present < LEAST_CASES or usual.cut_off[name] < 0.5):
            at.setdefault(_joined(label.edges), []).append(name)
    for edges, names in at.items():
        verb = "reaches" if len(names) == 1 else "reach"
        reason = f"{_joined(names)} {verb} the edge of the scan ({edges}) and may be cut off there."
        yield QCFlag(code="cut_off", label=names[0], reason=reason, points=1.0)


def _entropy(case: CaseMeasure, usual: Usual) -> Iterator[QCFlag]:
    z = None if not case.entropy else usual.entropy.robust_z(case.entropy)
    if z is not None and usual.entropy.present >= LEAST_CASES and z >= MOST_Z:
        reason = f"The model is unusually unsure: mean entropy {case.entropy:.3f} (robust z {z:+.1f} in this folder)."
        yield QCFlag(code="entropy", label=None, reason=reason, points=_points(z, 3.0))


def _undeclared(case: CaseMeasure) -> Iterator[QCFlag]:
    if case.undeclared:
        shown = ", ".join(map(str, case.undeclared[:8])) + (", ..." if len(case.undeclared) > 8 else "")
        reason = f"The file holds values that no class names: {shown}. They count as background here."
        yield QCFlag(code="undeclared", label=None, reason=reason, points=3.0)


def _points(z: float, most: float) -> float:
    return round(min(most, max(1.0, abs(z) / MOST_Z)), 3)


def _joined(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _whose(name: str, usual: Usual) -> str:
    return "the training cases" if name in usual.from_training else "this folder's cases"


def rules_in_words() -> tuple[tuple[str, str], ...]:
    """Return each rule with its heading."""
    return (
        (
            "Volume",
            f"The robust z-score is {MOST_Z} or more: the distance of the volume's logarithm from the median one, "
            "divided by 1.4826 times the median absolute deviation (by 0.1 at the least). Against training also: more "
            f"than {BEYOND_RANGE} times the largest volume, or the smallest more than {BEYOND_RANGE} times it. "
            f"|z| / {MOST_Z} points, 1 to 5.",
        ),
        (
            "Absent",
            "A class was not found that all training cases have (without a bundle: at least 90 % of this folder's). "
            "4 points; 10 where nothing at all was found.",
        ),
        (
            "Left and right",
            "Two classes whose names differ by left and right: their ratio is more than "
            f"{SIDES_FACTOR:g} times off the usual one (the ratio of training's medians, else the median ratio of this "
            f"folder; where fewer than {LEAST_CASES} cases have both, they are taken to be alike and "
            f"{SIDES_FACTOR_UNKNOWN:g} times counts). 1 to 4 points, more for a larger difference; 2 where one of them "
            "is absent that at least half of the cases have.",
        ),
        (
            "Pieces",
            f"At least twice as many connected pieces as the median of this folder, and a robust z-score of {MOST_Z} "
            "or more. Voxels are connected by faces, edges and corners; pieces below 0.1 % of the class are not "
            "counted. 1 to 3 points.",
        ),
        (
            "Edge of the scan",
            "A class reaches the first or last voxel along an axis, and does so in fewer than half of this folder's "
            f"cases (or fewer than {LEAST_CASES} cases have it). 1 point for each edge.",
        ),
        (
            "Unsure",
            "With 'predict --entropy': the mean entropy over all classes has a robust z-score of "
            f"{MOST_Z} or more in this folder. 1 to 3 points.",
        ),
        ("The run's own flags", "What 'sagittal predict' flagged, its quality estimate included. 2 points each."),
        ("Unknown values", "The label map holds values that no class names. 3 points."),
        (
            "Order",
            "Suspicion is the sum of the points. Below 1 nothing was flagged, and it is the share of the limit that "
            "the least usual volume reaches. It is an order in which to look, not a probability: a case without a flag "
            f"may be wrong. With fewer than {LEAST_CASES} cases to compare with, a rule says nothing.",
        ),
    )
