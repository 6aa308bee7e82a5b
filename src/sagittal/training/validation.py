"""Whole-case validation by real sliding-window prediction."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import torch

from sagittal.data.cache import Cache
from sagittal.data.label_index import LabelIndex
from sagittal.inference.sliding_window import predict_logits
from sagittal.plan.plan import Plan
from sagittal.report.cuts import CutCase
from sagittal.training.distributed import ALONE, World
from sagittal.training.masks import label_masks
from sagittal.training.signals import StopFlag
from sagittal.training.state import new_network
from sagittal.training.worst_cases import WorstCases, by_label


@dataclass(frozen=True)
class Score:
    """Dice per label, over cases; None where no case has the label, in reference or prediction."""

    dice: dict[str, float | None]
    mean_dice: float
    present: Mapping[str, int] = field(default_factory=dict)
    """In how many of the references each label is."""
    by_case: Mapping[str, Mapping[str, float | None]] = field(default_factory=dict)
    """Dice by case and label."""
    worst: tuple[CutCase, ...] = ()
    """Planes of the worst cases, the worst first."""


class StoppedError(Exception):
    """A stop was asked for before all cases were predicted."""


def validate_on_cache(
    network: torch.nn.Module,
    cache: Cache,
    cases: tuple[int, ...],
    plan: Plan,
    index: LabelIndex,
    *,
    world: World = ALONE,
    pictures: int = 0,
    stop: StopFlag | None = None,
) -> Score:
    """Predict cached cases whole, on the network's grid, without mirroring, and compare with their labels.

    A label absent from both reference and prediction of a case is left out of that label's mean; one that was missed or
    invented counts as 0. The network's mode is left as it was. Several processes share the cases, and all of them get
    the score of all cases. Of the worst `pictures` cases, planes are kept.

    Raises:
        StoppedError: `stop` was raised, in any process, before the last case of that process.
    """
    was_training = network.training
    network.eval()
    own, worst = {}, WorstCases(pictures)
    names = [label.name for label in plan.dataset.labels]
    cut = False
    for case in cases[world.rank :: world.size]:
        cut = bool(stop)
        if cut:
            break
        logits = _predict(network, cache, case, plan)
        reference = torch.from_numpy(np.asarray(cache.labels(case), dtype=np.int64)).to(logits.device)
        own[case] = _scores_of_case(logits, reference, index)
        dice = by_label(names, own[case][0])
        worst.look(cache.case_ids[case], dice, cache.image(case), logits, reference, index)
    network.train(was_training)
    if world.any_true(cut):
        raise StoppedError
    known_cases = {case: scores for part in world.gather_objects(own) for case, scores in part.items()}
    # In the order of the cases: a mean depends, in its last bits, on the order of what is added.
    table = np.array([known_cases[case][0] for case in cases], dtype=np.float64)
    present = np.array([known_cases[case][1] for case in cases], dtype=np.int64).sum(axis=0)
    means = {name: _mean(table[:, column]) for column, name in enumerate(names)}
    known = [value for value in means.values() if value is not None]
    return Score(
        dice=means,
        mean_dice=float(np.mean(known)) if known else 0.0,
        present={name: int(count) for name, count in zip(names, present, strict=True)},
        by_case={cache.case_ids[case]: by_label(names, known_cases[case][0]) for case in cases},
        worst=worst.of_all(world) if pictures else (),
    )


def measure_case_s(plan: Plan, cache: Cache, case: int, device: torch.device) -> float:
    """Return the seconds that predicting one whole case takes, the second time it is done."""
    network = new_network(plan, device).eval()
    _predict(network, cache, case, plan)
    start = time.monotonic()
    _predict(network, cache, case, plan)
    return time.monotonic() - start


def _predict(network: torch.nn.Module, cache: Cache, case: int, plan: Plan) -> torch.Tensor:
    device = next(network.parameters()).device
    # A copy: what is cached as float32 is mapped read-only, and torch warns of such an array.
    image = torch.from_numpy(np.array(cache.image(case), dtype=np.float32)).to(device)
    return predict_logits(
        network,
        image,
        patch_size=plan.patch.size,
        overlap=plan.inference.overlap,
        mirror_axes=(),
        window_batch=1,
        num_outputs=plan.dataset.num_outputs,
    )


def _scores_of_case(logits: torch.Tensor, reference: torch.Tensor, index: LabelIndex) -> tuple[list[float], list[bool]]:
    """Return each label's Dice, NaN where it is in neither, and whether the reference has it."""
    scores, present = [], []
    for wanted, predicted in label_masks(logits, reference, index):
        size = int(wanted.sum())
        total = size + int(predicted.sum())
        scores.append(2 * int((wanted & predicted).sum()) / total if total else float("nan"))
        present.append(size > 0)
    return scores, present


def _mean(values: np.ndarray) -> float | None:
    return None if np.isnan(values).all() else float(np.nanmean(values))
