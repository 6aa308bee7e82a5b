"""The page of a quality check: one HTML file; a list of all cases, the worst first, with pictures of the worst."""

from __future__ import annotations

import base64
import hashlib
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from sagittal.plan.base import write_atomically
from sagittal.plan.volume_range import VolumeRange
from sagittal.report.colours import class_colour
from sagittal.report.page import environment
from sagittal.report.qc_pictures import Shown
from sagittal.report.qc_rules import rules_in_words
from sagittal.report.summary import millilitres

if TYPE_CHECKING:
    from sagittal.report.qc import CaseCheck, QualityCheck

MAX_ROWS = 2000
"""Cases in the list; all of them are in qc.csv."""
MAX_STRIPS = 40
"""Classes whose volumes are drawn."""
MAX_DOTS = 250
"""Cases drawn in each of them: the most suspicious, and then every so many."""
MAX_BARS = 12
"""Classes listed beside a case's pictures."""
MAX_REASONS = 8
_MARGIN = 1.15


@dataclass(frozen=True)
class Scale:
    """A logarithmic scale of volumes from 0 to 100 %."""

    low_ml: float
    high_ml: float

    @classmethod
    def around(cls, volumes_ml: Sequence[float]) -> Scale:
        """Return the scale that shows all of these, with some room; those that are 0 lie at its start."""
        found = [volume for volume in volumes_ml if volume > 0] or [1.0]
        return cls(min(found) / _MARGIN, max(found) * _MARGIN)

    def percent(self, volume_ml: float) -> float:
        """Return where a volume lies."""
        if volume_ml <= self.low_ml:
            return 0.0
        share = math.log(volume_ml / self.low_ml) / math.log(self.high_ml / self.low_ml)
        return round(100 * min(1.0, share), 2)


@dataclass(frozen=True)
class Dot:
    """A case in a strip."""

    percent: float
    flagged: bool
    title: str


@dataclass(frozen=True)
class Strip:
    """The volumes of one class over the cases, and what they are compared with, in per cent of the width."""

    name: str
    colour: str
    dots: tuple[Dot, ...]
    band: tuple[float, float] | None
    """2.5 and 97.5 % of what is usual."""
    whisker: tuple[float, float] | None
    """Smallest and largest of it."""
    median: float | None
    low_ml: float
    high_ml: float
    absent: int
    told: str
    """In words, as alt text."""


@dataclass(frozen=True)
class Bar:
    """The volume of one class of a case against what is usual."""

    name: str
    colour: str
    volume_ml: float
    usual: str
    band: tuple[float, float] | None
    place: float
    flagged: bool


@dataclass(frozen=True)
class PageParts:
    """What the page shows."""

    result: QualityCheck
    views: Mapping[str, Shown]
    facts: Mapping[str, str]
    strips: tuple[Strip, ...]
    bars: Mapping[str, tuple[Bar, ...]]
    """By case."""

    @classmethod
    def of(cls, result: QualityCheck, views: Mapping[str, Shown], facts: Mapping[str, str]) -> PageParts:
        """Lay out a result."""
        shown = [check for check in result.cases if check.case in views]
        return cls(result, views, facts, _strips(result), {check.case: _bars(check, result) for check in shown})


def write_page(path: str | os.PathLike[str], parts: PageParts) -> Path:
    """Write the page, whole or not at all, and return its path.

    Raises:
        ResourceError: the file can't be written.
    """
    return write_atomically(path, render_page(parts).encode())


def render_page(parts: PageParts) -> str:
    """Return the page's HTML."""
    templates = environment()
    script = templates.get_template("qc_sort.js.j2").render().strip()
    # The browser runs this script and no other.
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    result = parts.result
    return templates.get_template("qc.html.j2").render(
        parts=parts,
        result=result,
        verdict=_verdict(result),
        rows=result.cases[:MAX_ROWS],
        hidden_rows=max(0, len(result.cases) - MAX_ROWS),
        hidden_strips=max(0, len(result.classes.names) - MAX_STRIPS),
        max_dots=MAX_DOTS,
        max_reasons=MAX_REASONS,
        most=max((check.suspicion for check in result.cases), default=0.0) or 1.0,
        has_agreement=any(check.agreement is not None for check in result.cases),
        has_entropy=any(check.measure.entropy is not None for check in result.cases),
        volume_columns=result.classes.names if len(result.classes.names) <= 6 else (),
        rules=rules_in_words(),
        script=script,
        script_digest=digest,
    )


def _verdict(result: QualityCheck) -> str:
    cases, flagged = len(result.cases), len(result.flagged)
    counted = f"{cases} case{'s' * (cases != 1)}"
    if not cases:
        return "No case could be checked."
    if not flagged:
        return f"Nothing was flagged in {counted}. That is no proof that they are right."
    codes: dict[str, int] = {}
    for check in result.flagged:
        for code in {flag.code for flag in check.flags}:
            codes[code] = codes.get(code, 0) + 1
    common = max(sorted(codes), key=lambda code: codes[code])
    told = (
        f", most often for: {HEADINGS.get(common, common.replace('_', ' '))} ({codes[common]})" if flagged > 1 else ""
    )
    return f"Look at {flagged} of {counted}{told}."


HEADINGS: Mapping[str, str] = {
    "absent": "a class is absent",
    "cut_off": "at the edge of the scan",
    "entropy": "the model is unsure",
    "nothing_found": "nothing was found",
    "pieces": "in many pieces",
    "run_quality": "the run's quality estimate",
    "sides": "left and right differ",
    "undeclared": "unknown values",
    "volume_large": "too large",
    "volume_small": "too small",
}
"""What flags are called in short, by code; another one is called by its code."""


def _strips(result: QualityCheck) -> tuple[Strip, ...]:
    counts = dict.fromkeys(result.classes.names, 0)
    for check in result.cases:
        for name in {flag.label for flag in check.flags if flag.label}:
            counts[name] += 1
    # Those with most flags where not all can be shown, but in the order of the declaration.
    chosen = sorted(counts, key=lambda name: -counts[name])[:MAX_STRIPS]
    return tuple(_strip(result, number, name) for number, name in enumerate(counts) if name in chosen)


def _strip(result: QualityCheck, number: int, name: str) -> Strip:
    usual = result.usual.get(name)
    quantiles = None if usual is None else usual.quantiles_ml
    volumes = [check.measure.labels[name].volume_ml for check in result.cases]
    scale = Scale.around([*volumes, *(quantiles or ())])
    there = [check for check in result.cases if check.measure.labels[name].volume_ml > 0]
    flagged = [check for check in there if _about(check, name)][:MAX_DOTS]
    others = [check for check in there if not _about(check, name)]
    kept = others[:: max(1, math.ceil(len(others) / max(1, MAX_DOTS - len(flagged))))]
    dots = [
        Dot(scale.percent(check.measure.labels[name].volume_ml), is_flagged, f"{check.case}: {_volume(check, name)}")
        for checks, is_flagged in ((kept, False), (flagged, True))
        for check in checks
    ]
    absent = len(volumes) - len(there)
    return Strip(
        name=name,
        colour=class_colour(number),
        dots=tuple(dots),
        band=None if quantiles is None else (scale.percent(quantiles[1]), scale.percent(quantiles[3])),
        whisker=None if quantiles is None else (scale.percent(quantiles[0]), scale.percent(quantiles[4])),
        median=None if quantiles is None else scale.percent(quantiles[2]),
        low_ml=scale.low_ml,
        high_ml=scale.high_ml,
        absent=absent,
        told=_told(name, quantiles, [volume for volume in volumes if volume > 0], absent, len(flagged)),
    )


def _told(name: str, quantiles: Sequence[float] | None, volumes: Sequence[float], absent: int, flagged: int) -> str:
    found = f"{min(volumes):.4g} to {max(volumes):.4g} mL in {len(volumes)} cases" if volumes else "in no case"
    usual = f"usual are {quantiles[1]:.4g} to {quantiles[3]:.4g} mL" if quantiles else "nothing to compare with"
    return f"Volumes of {name}: {found}; {usual}; {flagged} flagged; absent in {absent}."


def _about(check: CaseCheck, name: str) -> bool:
    return any(flag.label == name and flag.code.startswith("volume_") for flag in check.flags)


def _volume(check: CaseCheck, name: str) -> str:
    return f"{check.measure.labels[name].volume_ml:.4g} mL"


def _bars(check: CaseCheck, result: QualityCheck) -> tuple[Bar, ...]:
    """Return the classes of a case, those with a flag first, then the least usual."""
    numbers = {name: number for number, name in enumerate(result.classes.names)}
    about = {flag.label for flag in check.flags}
    order = sorted(numbers, key=lambda name: (name not in about, -abs(check.scores.get(name, 0.0)), numbers[name]))
    bars = []
    for name in order[:MAX_BARS]:
        usual: VolumeRange | None = result.usual.get(name)
        quantiles = None if usual is None else usual.quantiles_ml
        volume = check.measure.labels[name].volume_ml
        scale = Scale.around([volume, *(quantiles or ())])
        bars.append(
            Bar(
                name=name,
                colour=class_colour(numbers[name]),
                volume_ml=volume,
                usual="–" if quantiles is None else f"{millilitres(quantiles[1])} to {millilitres(quantiles[3])}",
                band=None if quantiles is None else (scale.percent(quantiles[1]), scale.percent(quantiles[3])),
                place=scale.percent(volume),
                flagged=name in about,
            )
        )
    return tuple(bars)
