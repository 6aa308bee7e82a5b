"""Which post-processing helps: rules tried on held-out predictions, each kept only where it makes no class worse.

nnU-Net's order: the largest component of all foreground together, then rules for each class (largest component, a
minimum volume, both), then its holes. Components are counted once per case (`component_counts`), and every candidate is
scored from these counts, so that trying a rule costs nothing. What was chosen is measured by applying it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Float64, Integer

from sagittal.inference.postprocessing import apply
from sagittal.plan import DatasetSpec, Plan
from sagittal.plan.base import TripleMm
from sagittal.plan.postprocessing import FillHoles, LargestComponent, MinimumVolume, Rule, in_words
from sagittal.training.component_counts import CaseCounts, Counts, Parts, count_case, parts_of

MIN_CASES = 10
"""Held-out cases, all in all and of a class, below which nothing is chosen: chance would choose."""
MIN_GAIN = 1e-3
"""Dice that a rule must add to the class that it helps most."""
CHOSEN = "chosen on "
"""How the reason of rules begins that were chosen here."""
_EQUAL = 1e-12
_QUANTILES = (0.5, 0.75, 0.9, 0.97, 1.0)
"""Of the volumes of components without a true voxel: where minimum volumes are tried."""
_ALL = "all foreground"


@dataclass(frozen=True)
class HeldOut:
    """A held-out case: label maps (D, H, W) in the values of the data set's files, and spacing_mm in D, H, W."""

    reference: Integer[np.ndarray, "D H W"]
    prediction: Integer[np.ndarray, "D H W"]
    spacing_mm: TripleMm


Reader = Callable[[], HeldOut]
"""Cases are read again for each pass, so that one at a time is in memory."""


@dataclass(frozen=True)
class Chosen:
    """A rule, and the Dice that it added to each label that it changed."""

    rule: Rule
    gain: Mapping[str, float]
    cases_better: int
    cases_worse: int


@dataclass(frozen=True)
class Choice:
    """The rules that were chosen, in their order; `why` says why there are none."""

    cases: int
    chosen: tuple[Chosen, ...] = ()
    before: Mapping[str, float | None] | None = None
    after: Mapping[str, float | None] | None = None
    why: str | None = None

    @property
    def rules(self) -> tuple[Rule, ...]:
        """The rules alone."""
        return tuple(item.rule for item in self.chosen)

    def as_tree(self) -> dict[str, Any]:
        """Return what a bundle's metrics tell of it."""
        tree: dict[str, Any] = {"cases": self.cases}
        if self.why is not None:
            return {**tree, "chosen": [], "why": self.why}
        return {
            **tree,
            "chosen": [
                {
                    "rule": item.rule.model_dump(mode="json"),
                    "words": in_words(item.rule),
                    "gain": {name: round(gain, 6) for name, gain in item.gain.items()},
                    "cases_better": item.cases_better,
                    "cases_worse": item.cases_worse,
                }
                for item in self.chosen
            ],
            "dice_before": dict(self.before or {}),
            "dice_after": dict(self.after or {}),
            "note": "measured on the very cases that chose the rules, so the gain flatters; `dice` is without them",
        }


class GivenUpError(Exception):
    """The caller wants no choice any more."""


def choose(spec: DatasetSpec, cases: Sequence[Reader], *, go_on: Callable[[], bool] = lambda: True) -> Choice:
    """Return the rules that raise the mean Dice over held-out cases and make no class worse.

    Args:
        spec: what label values mean.
        cases: their predictions have no post-processing yet.
        go_on: asked before each case is read; where it is false, nothing is chosen.

    Raises:
        GivenUpError: `go_on` was false.
    """
    if len(cases) < MIN_CASES:
        return Choice(len(cases), why=f"{len(cases)} held-out cases are too few to choose by; {MIN_CASES} are needed")
    own = spec.replace(label_map=())
    search = _Search(own, cases, go_on)
    search.global_rule()
    for group in _groups(own):
        search.removals(group)
    for group in _groups(own):
        search.holes(group)
    if not search.chosen:
        return Choice(len(cases), why="no rule raised the Dice of a class without making another worse")
    before, after = search.measured()
    if not _is_accepted(before, after):
        return Choice(len(cases), why="the rules that helped one by one did not help together")
    names = [label.name for label in spec.labels]
    return Choice(len(cases), tuple(search.chosen), _named(names, before.means), _named(names, after.means))


def with_choice(plan: Plan, choice: Choice) -> Plan:
    """Return a plan with the chosen rules and the reason for them."""
    if not choice.rules:
        return plan
    gains = "; ".join(
        f"{in_words(item.rule)} (Dice {', '.join(f'{name} {gain:+.4f}' for name, gain in item.gain.items())})"
        for item in choice.chosen
    )
    reason = f"{CHOSEN}{choice.cases} held-out cases, on which the gain was measured too: {gains}"
    return plan.replace(postprocessing=choice.rules, reasons={**plan.reasons, "postprocessing": reason})


def unchosen(plan: Plan) -> Plan:
    """Return a bundle's plan as training had it: without rules that were chosen afterwards."""
    if not plan.reasons.get("postprocessing", "").startswith(CHOSEN):
        return plan
    reasons = {name: reason for name, reason in plan.reasons.items() if name != "postprocessing"}
    return plan.replace(postprocessing=(), reasons=reasons)


class _Search:
    """The rules so far, and what the next ones would do to the counts of every case."""

    def __init__(self, spec: DatasetSpec, cases: Sequence[Reader], go_on: Callable[[], bool]) -> None:
        self.spec, self.cases, self.go_on = spec, cases, go_on
        self.names = [label.name for label in spec.labels]
        self.chosen: list[Chosen] = []

    def global_rule(self) -> None:
        """Try the largest component of all foreground together."""
        if len(self.names) == 1:
            return
        counts, parts = self._count({_ALL: ()}, fill=False)
        self._try(counts, parts[_ALL], [((LargestComponent(),), lambda part: part.sizes < part.sizes.max(initial=0))])

    def removals(self, names: Sequence[str]) -> None:
        """Try which components of each label to remove; labels of one group do not touch each other's voxels."""
        counts, parts = self._count({name: (name,) for name in names}, fill=False)
        for name in names:
            counts = self._try(counts, parts[name], _removals(name, parts[name]))

    def holes(self, names: Sequence[str]) -> None:
        """Try to fill the holes of each label."""
        counts, parts = self._count({name: (name,) for name in names}, fill=True)
        for name in names:
            candidate = ((FillHoles(label=name),), lambda part: np.ones(len(part.sizes), dtype=bool))
            counts = self._try(counts, parts[name], [candidate])

    def measured(self) -> tuple[Counts, Counts]:
        """Return the counts without any rule and with those chosen, by applying them."""
        before = Counts([count_case(self.spec, case.reference, case.prediction) for case in self._read(())])
        rules = [item.rule for item in self.chosen]
        after = Counts([count_case(self.spec, case.reference, case.prediction) for case in self._read(rules)])
        return before, after

    def _count(self, targets: Mapping[str, Sequence[str]], *, fill: bool) -> tuple[Counts, dict[str, list[Parts]]]:
        counted: list[CaseCounts] = []
        parts: dict[str, list[Parts]] = {key: [] for key in targets}
        for case in self._read([item.rule for item in self.chosen]):
            counted.append(count_case(self.spec, case.reference, case.prediction))
            found = parts_of(self.spec, case.reference, case.prediction, case.spacing_mm, targets, fill=fill)
            for key, part in found.items():
                parts[key].append(part)
        return Counts(counted), parts

    def _read(self, rules: Sequence[Rule]) -> Iterator[HeldOut]:
        for read in self.cases:
            if not self.go_on():
                raise GivenUpError
            case = read()
            done = apply(case.prediction, rules, case.spacing_mm, self.spec)
            yield HeldOut(case.reference, done, case.spacing_mm)

    def _try(self, counts: Counts, parts: list[Parts], candidates: Sequence[_Candidate]) -> Counts:
        """Take the candidate that raises the mean most, where one is accepted; return the counts that follow."""
        best, kept = counts, None
        for rules, removes in candidates:
            changed = counts.changed(parts, removes)
            if changed is not None and _is_accepted(counts, changed) and changed.mean > best.mean + _EQUAL:
                best, kept = changed, rules
        if kept is not None:
            self.chosen += _told(kept, self.names, counts, best)
        return best


_Candidate = tuple[tuple[Rule, ...], Callable[[Parts], Bool[np.ndarray, " n"]]]


def _removals(name: str, parts: Sequence[Parts]) -> list[_Candidate]:
    """Return what may be tried on a class: the largest component, minimum volumes, and both."""
    largest = LargestComponent(labels=(name,))
    candidates: list[_Candidate] = [((largest,), _not_largest)]
    for volume in _thresholds(parts):
        least = MinimumVolume(label=name, volume_ml=volume)
        candidates.append(((least,), lambda part, volume=volume: part.volumes_ml < volume))  # type: ignore[misc]
        candidates.append(
            (
                (largest, least),
                lambda part, volume=volume: _not_largest(part) | (part.volumes_ml < volume),  # type: ignore[misc]
            )
        )
    return candidates


def _not_largest(part: Parts) -> Bool[np.ndarray, " n"]:
    return np.asarray(part.sizes < part.sizes.max(initial=0))


def _thresholds(parts: Sequence[Parts]) -> list[float]:
    """Return a few volumes in mL just above those of false components, of two digits, ascending."""
    false = np.concatenate([part.volumes_ml[part.is_false] for part in parts])
    if not false.size:
        return []
    volumes = np.quantile(false, _QUANTILES, method="inverted_cdf")
    return sorted({_rounded_up(float(volume)) for volume in volumes})


def _rounded_up(volume: float) -> float:
    digits = int(np.floor(np.log10(volume))) - 1
    # Truly above: a component of exactly the minimum stays.
    return float(f"{(np.floor(volume / 10.0**digits) + 1) * 10.0**digits:.3g}")


def _is_accepted(before: Counts, after: Counts) -> bool:
    """Whether enough was gained, no class lost, and more cases are better than worse."""
    known = ~np.isnan(before.means) & ~np.isnan(after.means)
    changed = known & (np.abs(after.means - before.means) > _EQUAL)
    gain = np.where(changed, after.means - before.means, 0.0)
    enough = (~np.isnan(before.dice)).sum(axis=0) >= MIN_CASES
    better, worse = _cases(before, after)
    return bool(gain.max(initial=0.0) >= MIN_GAIN and gain.min() >= 0 and enough[changed].all() and better > worse)


def _cases(before: Counts, after: Counts) -> tuple[int, int]:
    """Return the number of cases whose mean over labels got better and worse; a false alarm less is better."""
    was, now = before.dice, after.dice
    change = np.where(np.isnan(now), np.where(np.isnan(was), 0.0, 1.0), np.nan_to_num(now) - np.nan_to_num(was))
    change = change.sum(axis=1)
    return int((change > _EQUAL).sum()), int((change < -_EQUAL).sum())


def _told(rules: Sequence[Rule], names: Sequence[str], before: Counts, after: Counts) -> list[Chosen]:
    """Return what was chosen together, the gain with the last of the rules."""
    gain = {
        name: float(now - was)
        for name, was, now in zip(names, before.means, after.means, strict=True)
        if abs(now - was) > _EQUAL
    }
    better, worse = _cases(before, after)
    *first, last = rules
    return [*(Chosen(rule, {}, 0, 0) for rule in first), Chosen(last, gain, better, worse)]


def _named(names: Sequence[str], means: Float64[np.ndarray, " L"]) -> dict[str, float | None]:
    return {name: None if np.isnan(mean) else float(mean) for name, mean in zip(names, means, strict=True)}


def _groups(spec: DatasetSpec) -> list[tuple[str, ...]]:
    """Return labels in groups that are counted together: all classes at once; regions one by one, parents first."""
    if not spec.has_regions:
        return [tuple(label.name for label in spec.labels)]
    return [(label.name,) for label in sorted(spec.labels, key=lambda label: -len(label.values))]
