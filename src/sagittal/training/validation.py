"""Whole-case validation by real sliding-window prediction."""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np
import torch

from sagittal.data.cache import Cache
from sagittal.data.label_index import LabelIndex
from sagittal.inference.sliding_window import predict_logits
from sagittal.plan.plan import Plan
from sagittal.training.distributed import ALONE, World
from sagittal.training.state import new_network


@dataclass(frozen=True)
class Score:
    """Dice per label, over cases; None where no case has the label, in reference or prediction."""

    dice: dict[str, float | None]
    mean_dice: float


def validate_on_cache(
    network: torch.nn.Module,
    cache: Cache,
    cases: tuple[int, ...],
    plan: Plan,
    index: LabelIndex,
    *,
    world: World = ALONE,
) -> Score:
    """Predict cached cases whole, on the network's grid, without mirroring, and compare with their labels.

    A label absent from both reference and prediction of a case is left out of that label's mean; one that was missed or
    invented counts as 0. The network's mode is left as it was. Several processes share the cases, and all of them get
    the score of all cases.
    """
    was_training = network.training
    network.eval()
    own = {}
    for case in cases[world.rank :: world.size]:
        logits = _predict(network, cache, case, plan)
        reference = torch.from_numpy(np.asarray(cache.labels(case), dtype=np.int64)).to(logits.device)
        own[case] = _dice_of_case(logits, reference, index)
    network.train(was_training)
    known_cases = {case: dice for part in world.gather_objects(own) for case, dice in part.items()}
    # In the order of the cases: a mean depends, in its last bits, on the order of what is added.
    scores = [known_cases[case] for case in cases]
    names = [label.name for label in plan.dataset.labels]
    table = np.array(scores, dtype=np.float64)
    means = {name: _mean(table[:, column]) for column, name in enumerate(names)}
    known = [value for value in means.values() if value is not None]
    return Score(dice=means, mean_dice=float(np.mean(known)) if known else 0.0)


def measure_case_s(plan: Plan, cache: Cache, case: int, device: torch.device) -> float:
    """Return the seconds that predicting one whole case takes, the second time it is done."""
    network = new_network(plan, device).eval()
    _predict(network, cache, case, plan)
    start = time.monotonic()
    _predict(network, cache, case, plan)
    return time.monotonic() - start


def _predict(network: torch.nn.Module, cache: Cache, case: int, plan: Plan) -> torch.Tensor:
    device = next(network.parameters()).device
    image = torch.from_numpy(np.asarray(cache.image(case), dtype=np.float32)).to(device)
    return predict_logits(
        network,
        image,
        patch_size=plan.patch.size,
        overlap=plan.inference.overlap,
        mirror_axes=(),
        window_batch=1,
        num_outputs=plan.dataset.num_outputs,
    )


def _dice_of_case(logits: torch.Tensor, reference: torch.Tensor, index: LabelIndex) -> list[float]:
    valid = (
        torch.ones_like(reference, dtype=torch.bool) if index.ignore_index is None else reference != index.ignore_index
    )
    membership = torch.from_numpy(index.membership).to(reference.device)
    winner = None if index.spec.has_regions else logits.argmax(0)
    scores = []
    for output in range(0 if index.spec.has_regions else 1, logits.shape[0]):
        wanted = membership[output][reference.where(valid, torch.zeros_like(reference))] & valid
        predicted = (logits[output] > 0 if winner is None else winner == output) & valid
        total = int(wanted.sum()) + int(predicted.sum())
        scores.append(2 * int((wanted & predicted).sum()) / total if total else float("nan"))
    return scores


def _mean(values: np.ndarray) -> float | None:
    return None if np.isnan(values).all() else float(np.nanmean(values))
