"""The end of a run: post-processing chosen on the held-out predictions beside a bundle and written into its plan."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from sagittal.bundle import hash_case
from sagittal.data.dataset import Dataset
from sagittal.evaluation.classes import ClassSet
from sagittal.plan.plan import Plan
from sagittal.training.joining import bundle_at, rewrite
from sagittal.training.postprocessing_choice import Choice, GivenUpError, HeldOut, Reader, choose, unchosen, with_choice
from sagittal.training.signals import StopFlag
from sagittal.volumes import read_labels
from sagittal.volumes.volume import require_same_grid

KEY = "postprocessing"
"""Where a bundle's metrics tell what was chosen."""
_READS = 6
"""How often each case is read at most where labels are classes; a little more where they are regions."""


def choose_for_bundle(
    out: Path,
    run_folder: Path,
    plan: Plan,
    data: Dataset,
    stop: StopFlag,
    *,
    ends: float | None,
    say: Callable[[str], None],
) -> Mapping[str, Any]:
    """Choose rules on the held-out predictions of a bundle's folds and write them into it; return its metrics.

    Nothing is done where the plan says so or has rules of its own, and where the same folds were chosen on before.

    Args:
        out: the bundle.
        run_folder: where each fold's held-out predictions are.
        plan: the plan that the folds were trained by.
        data: the references.
        stop: a raised flag ends the search; the bundle stays as it is, and the next run begins it anew.
        ends: when the time is up, on the clock of `time.monotonic`.
        say: receives lines for a person.
    """
    bundle = bundle_at(out)
    if bundle is None or unchosen(bundle.plan) != plan:
        return {}
    metrics = bundle.metrics
    if not is_due(plan, metrics):
        return metrics
    readers = _readers(run_folder, plan, data, metrics)
    if readers is None:
        choice = Choice(0, why=f"the held-out predictions are no longer in {run_folder.name}")
    else:
        clock = _Clock(ends, len(readers) * _READS)
        try:
            choice = choose(plan.dataset, readers, go_on=lambda: not stop and clock.suffices())
        except GivenUpError:
            if stop:
                return metrics
            choice = Choice(len(readers), why="no time of the budget was left to choose by")
    for line in _told(choice):
        say(line)
    metrics = {**metrics, KEY: {"folds": _scored(metrics), **choice.as_tree()}}
    rewrite(bundle, with_choice(plan, choice), metrics)
    return metrics


def is_due(plan: Plan, metrics: Mapping[str, Any]) -> bool:
    """Whether rules have still to be chosen for a bundle of these metrics, for example after a stop."""
    folds = _scored(metrics)
    if plan.training.postprocessing == "none" or plan.postprocessing or not folds:
        return False
    return bool(metrics.get(KEY, {}).get("folds") != folds)


def _scored(metrics: Mapping[str, Any]) -> list[str]:
    return sorted(name for name, entry in metrics.get("folds", {}).items() if entry["cases"])


class _Clock:
    """Whether the time suffices for all that is to be read, by what was read so far."""

    def __init__(self, ends: float | None, reads: int) -> None:
        self.ends, self.reads, self.done, self.began = ends, reads, 0, time.monotonic()

    def suffices(self) -> bool:
        now = time.monotonic()
        left = max(self.reads - self.done, 1)
        needed = left * (now - self.began) / max(self.done, 1)
        self.done += 1
        return self.ends is None or now + needed <= self.ends


def _readers(run_folder: Path, plan: Plan, data: Dataset, metrics: Mapping[str, Any]) -> list[Reader] | None:
    """Return how to read each held-out case, None where a prediction is missing."""
    by_hash = {hash_case(case.id): case.id for case in data.cases}
    readers: list[Reader] = []
    for name, entry in sorted(metrics["folds"].items()):
        for hashed in entry["cases"]:
            case = by_hash.get(hashed)
            file = f"{case}{plan.dataset.file_ending}"
            prediction, reference = run_folder / f"fold_{name}" / "validation" / file, data.folder / "labelsTr" / file
            if case is None or not prediction.is_file() or not reference.is_file():
                return None
            readers.append(partial(_read, reference, prediction, ClassSet.of_spec(plan.dataset)))
    return readers


def _read(reference: Path, prediction: Path, classes: ClassSet) -> HeldOut:
    wanted, grid = read_labels(reference)
    found, other = read_labels(prediction)
    require_same_grid(grid, other, "reference and held-out prediction")
    return HeldOut(classes.in_own_values(wanted), classes.in_own_values(found), grid.spacing_mm)


def _told(choice: Choice) -> list[str]:
    if choice.why is not None:
        return [f"postprocessing: none, for {choice.why}"]
    lines = [f"postprocessing: chosen on {choice.cases} held-out cases, which is where its gain was measured too"]
    for item in choice.as_tree()["chosen"]:
        gains = ", ".join(f"{name} {gain:+.4f}" for name, gain in item["gain"].items())
        lines.append(f"  {item['words']}" + (f": Dice {gains}" if gains else ""))
    return lines
