"""The worst cases of a validation, kept as a few planes while their volumes are at hand."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import mean

import numpy as np
import torch
from torch import Tensor

from sagittal.data.label_index import LabelIndex
from sagittal.report.cuts import Cut, CutCase, largest_plane
from sagittal.training.distributed import World
from sagittal.training.masks import label_masks


def by_label(names: Sequence[str], scores: Sequence[float]) -> dict[str, float | None]:
    """Return scores by the names of their labels, None for NaN."""
    return {name: None if math.isnan(value) else value for name, value in zip(names, scores, strict=True)}


class WorstCases:
    """Keeps planes of the `count` cases with the lowest mean Dice that it has looked at."""

    def __init__(self, count: int) -> None:
        self._count = count
        self._kept: list[CutCase] = []

    def look(
        self,
        case: str,
        dice: Mapping[str, float | None],
        image: np.ndarray,
        logits: Tensor,
        reference: Tensor,
        index: LabelIndex,
    ) -> None:
        """Take in a case: image (C, D, H, W), logits (K, D, H, W), reference (D, H, W) as label indices."""
        found = CutCase(case, dice, ())
        if self._count and (len(self._kept) < self._count or _badness(found) < _badness(self._kept[-1])):
            found = CutCase(case, dice, _cuts(image, logits, reference, index))
            self._kept = _worst([*self._kept, found], self._count)

    def of_all(self, world: World) -> tuple[CutCase, ...]:
        """Return the worst cases of all processes, the worst first."""
        return tuple(_worst([case for part in world.gather_objects(self._kept) for case in part], self._count))


def _worst(cases: Sequence[CutCase], count: int) -> list[CutCase]:
    return sorted(cases, key=_badness)[:count]


def _badness(case: CutCase) -> tuple[float, str]:
    known = [value for value in case.dice.values() if value is not None]
    # A case without any label, rightly predicted empty, is no bad one.
    return (mean(known) if known else 1.0), case.case


def _cuts(image: np.ndarray, logits: Tensor, reference: Tensor, index: LabelIndex) -> tuple[Cut, ...]:
    wrong = torch.zeros_like(reference, dtype=torch.bool)
    there = torch.zeros_like(wrong)
    for wanted, predicted in label_masks(logits, reference, index):
        wrong |= wanted ^ predicted
        there |= wanted
    shown = wrong if bool(wrong.any()) else there
    places = [
        largest_plane(shown.sum(dim=tuple(other for other in range(3) if other != axis)).cpu().numpy())
        for axis in range(3)
    ]
    masks: list[list[tuple[np.ndarray, np.ndarray]]] = [[], [], []]
    for wanted, predicted in label_masks(logits, reference, index):
        for axis, place in enumerate(places):
            masks[axis].append((wanted.select(axis, place).cpu().numpy(), predicted.select(axis, place).cpu().numpy()))
    return tuple(
        Cut(
            axis=axis,
            index=place,
            slices=reference.shape[axis],
            image=np.take(image[0], place, axis=axis).astype(np.float32),
            reference=np.stack([wanted for wanted, _ in masks[axis]]),
            prediction=np.stack([predicted for _, predicted in masks[axis]]),
        )
        for axis, place in enumerate(places)
    )
