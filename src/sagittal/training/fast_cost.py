"""What fast prediction costs: held-out cases are predicted that way too, and the difference in Dice is kept."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from sagittal.bundle import hash_case
from sagittal.data.dataset import Case, Dataset
from sagittal.evaluation.classes import ClassSet
from sagittal.inference.fast import FAST_STEP
from sagittal.inference.predictor import Predictor
from sagittal.plan.plan import Plan
from sagittal.training.component_counts import Counts, count_case
from sagittal.training.distributed import World
from sagittal.training.signals import StopFlag
from sagittal.volumes import read_labels

FAST_CASES = 20
"""Held-out cases of a fold that are predicted the fast way too, at most."""
KEY = "fast_cases"
"""Where a fold's entry has their Dice, by hash of the case and label."""

Dices = Mapping[str, Mapping[str, float | None]]
"""Dice by hash of the case and label."""


def dice_of_fast(
    predictor: Predictor, data: Dataset, cases: Sequence[Case], world: World, stop: StopFlag, seconds: float | None
) -> dict[str, dict[str, float | None]]:
    """Return the Dice of held-out cases predicted not mirrored with fewer windows.

    Args:
        predictor: of the fold.
        data: where the references are.
        cases: those that were predicted as the plan says; the first ones are taken.
        world: the processes share them, and all get the result.
        stop: a raised flag ends it after the case in progress.
        seconds: that it may take, or None.
    """
    began, spec = time.monotonic(), predictor.plan.dataset
    classes, own = ClassSet.of_spec(spec), dict[str, dict[str, float | None]]()
    for case in cases[:FAST_CASES][world.rank :: world.size]:
        taken = time.monotonic() - began
        if stop or (seconds is not None and taken * (len(own) + 1) / max(len(own), 1) >= seconds):
            break
        found = classes.in_own_values(predictor.predict(case.images, mirror=False, step=FAST_STEP).array[0])
        labels, _ = read_labels(data.folder / "labelsTr" / f"{case.id}{spec.file_ending}")
        dice = Counts([count_case(spec, classes.in_own_values(labels), found)]).dice[0]
        own[hash_case(case.id)] = {
            label.name: None if np.isnan(value) else float(value)
            for label, value in zip(spec.labels, dice, strict=True)
        }
    return {name: scores for part in world.gather_objects(own) for name, scores in part.items()}


def cost_of_fast(plan: Plan, plain: Dices, fast: Dices, how: str) -> dict[str, Any] | None:
    """Return what a bundle's metrics tell of fast prediction, over the cases that were predicted both ways.

    Args:
        plan: names the labels.
        plain, fast: Dice by case, of each way.
        how: `low`, by the second model, or `step`, with fewer windows.
    """
    both = sorted(set(plain) & set(fast))
    dice, cost = dict[str, float | None](), dict[str, float | None]()
    for label in plan.dataset.labels:
        pairs = [(plain[case].get(label.name), fast[case].get(label.name)) for case in both]
        known = [(was, now) for was, now in pairs if was is not None and now is not None]
        dice[label.name] = float(np.mean([now for _, now in known])) if known else None
        cost[label.name] = float(np.mean([was - now for was, now in known])) if known else None
    if not both:
        return None
    return {
        "how": how,
        "cases": len(both),
        "dice": dice,
        "mean_dice": _mean(dice),
        "cost": cost,
        "mean_cost": _mean(cost),
        "against": "the whole model at the plan's step; neither way is mirrored",
    }


def fast_of_folds(plan: Plan, folds: Mapping[str, Mapping[str, Any]]) -> dict[str, Any] | None:
    """Return the cost of fewer windows over the held-out cases of folds, None where it was not measured."""
    return cost_of_fast(plan, by_case(folds, "cases"), by_case(folds, KEY), "step")


def by_case(folds: Mapping[str, Mapping[str, Any]], key: str) -> dict[str, Mapping[str, float | None]]:
    """Return the scores of all folds' cases; a case that several folds hold out counts once for each."""
    return {f"{name}/{case}": dice for name, entry in folds.items() for case, dice in entry.get(key, {}).items()}


def _mean(values: Mapping[str, float | None]) -> float | None:
    known = [value for value in values.values() if value is not None]
    return float(np.mean(known)) if known else None
