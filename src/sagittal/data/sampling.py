"""Which patches make up a training step: a pure function of the plan, the prepared cases and the step.

nnU-Net's rules, by default: cases are drawn uniformly with replacement; the last samples of a batch are forced onto
the foreground, on a random voxel of a class that is drawn uniformly among those that the case has. What differs:

- The chosen voxel is moved off the centre by up to a quarter of the patch, because a network that always sees its
  target in the centre learns the place instead of the thing; and however the patch is turned, the voxel stays in view.
- A batch of one is forced with the probability of the share, where rounding would never force it.
- With `training.class_balanced` a forced sample draws its class first, uniformly among all that any case has, then a
  case that has it: a class that one case in a hundred has comes as often as one that they all have.
- Cases may have weights (case_weights.csv).

Where the data set declares an ignore label, samples that are not forced lie around a voxel that is not ignored, whose
place is drawn among all of them (nnU-Net's rule): a patch of ignored voxels alone teaches nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float64, UInt

from sagittal.data.augmentation import spatial_draw
from sagittal.data.cache import Cache
from sagittal.data.case_weights import CaseWeights
from sagittal.data.label_index import label_index
from sagittal.data.spatial import SpatialDraw, source_matrix
from sagittal.errors import DataError, PlanError
from sagittal.plan.base import Triple, TripleMm
from sagittal.plan.plan import Plan

JITTER_SHARE = 4
"""A forced voxel lies up to one part in this many of the patch's size off the centre, along each axis."""
_STEPS_TO_CENTRE = 10
_LOOKED_AT = (16, 256, 4096)
"""Voxels of a case that are looked at, a round after the other, to find one that is not ignored."""


@dataclass(frozen=True, slots=True)
class PatchDraw:
    """Where one training patch lies, and the seed of its augmentation."""

    case: int
    """Index of the case in the cache."""
    start: Triple
    """First voxel of the patch, D, H, W; negative where the patch begins before the case."""
    seed: int
    forced_index: int | None
    """Label index that the patch was placed on, None where it was placed anywhere."""
    voxel: Triple | None = None
    """The voxel that the patch was placed around: of that index, or one that is not ignored."""


@dataclass(frozen=True)
class Urn:
    """Cases to draw from with replacement, each as often as its weight says."""

    cases: tuple[int, ...]
    """Their indices in the cache."""
    running_totals: Float64[np.ndarray, " n"] | None = None
    """Of their weights; None where they are equal."""

    def draw(self, rng: np.random.Generator) -> int:
        """Return one of the cases."""
        if self.running_totals is None:
            return self.cases[int(rng.integers(len(self.cases)))]
        place = rng.random() * self.running_totals[-1]
        # Rounding may take the place to the very end, where it must not fall on a case of no weight.
        last = int(np.searchsorted(self.running_totals, self.running_totals[-1], side="left"))
        return self.cases[min(int(np.searchsorted(self.running_totals, place, side="right")), last)]


@dataclass(frozen=True)
class CasePool:
    """The cases of a run and what draws need to know of them, looked up once; make one with `case_pool`."""

    cache: Cache
    every: Urn
    by_class: Mapping[int, Urn]
    """The cases that have each label index, where classes are drawn first; else empty."""
    ignore_index: int | None = None
    """The label index of ignored voxels, where there are any."""


def case_pool(cache: Cache, cases: Sequence[int], plan: Plan, weights: CaseWeights | None = None) -> CasePool:
    """Return the cases to draw from.

    Args:
        cache: preprocessed cases.
        cases: which of them to draw from.
        plan: whether classes are drawn first.
        weights: how often each case is drawn; None for equally often.

    Raises:
        DataError: none of the cases has a weight above 0.
        ResourceError: a cached case can't be read.
    """
    drawn = [case for case in cases if weights is None or weights.of(cache.case_ids[case]) > 0]
    if not drawn:
        raise DataError(
            f"none of the {len(cases)} training cases has a weight above 0 in case_weights.csv. Expected at least one. "
            "Raise a weight, or remove the file and make a new plan.",
            code="case_weights",
        )
    having: dict[int, list[int]] = {}
    if plan.training.class_balanced:
        for case in drawn:
            for index in cache.classes(case):
                having.setdefault(index, []).append(case)
    by_class = {index: _urn(cache, having[index], weights) for index in sorted(having)}
    return CasePool(cache, _urn(cache, drawn, weights), by_class, label_index(plan.dataset).ignore_index)


def draw_patches(pool: CasePool, plan: Plan, step: int, samples: Iterable[int] | None = None) -> tuple[PatchDraw, ...]:
    """Draw the patches of one step; the same plan, step and cases give the same patches, whatever came before.

    Args:
        pool: cases.
        plan: seed, patch, batch, shares.
        step: which batch.
        samples: which of its samples, for a process that makes a share of the batch; None for all.
    """
    chosen = range(plan.training.batch_size) if samples is None else samples
    return tuple(_draw_patch(pool, plan, step, sample) for sample in chosen)


def samples_of(batch_size: int, rank: int, world: int) -> range:
    """Return which samples of a batch one of several processes makes: contiguous, sizes differing by one at most.

    Args:
        batch_size: of all processes together.
        rank: number of the process, from 0.
        world: how many processes there are.

    Raises:
        PlanError: there are more processes than samples.
    """
    assert 0 <= rank < world
    if world > batch_size:
        raise PlanError(
            f"training.batch_size is {batch_size}, for {world} processes: expected a sample for each at least. Start "
            f"{batch_size} or fewer, or make the plan with --set training.batch_size={world}.",
            code="batch_too_small",
        )
    return range(rank * batch_size // world, (rank + 1) * batch_size // world)


def is_forced(sample: int, batch_size: int, share: float, chance: float) -> bool:
    """Return whether a sample of the batch is placed on the foreground; `chance` (0..1) decides a batch of one."""
    if batch_size == 1:
        return chance < share
    return sample >= round(batch_size * (1 - share))


def _draw_patch(pool: CasePool, plan: Plan, step: int, sample: int) -> PatchDraw:
    training, patch_size, cache = plan.training, plan.patch.size, pool.cache
    entropy = (training.seed % 2**64, step, sample)
    rng = np.random.default_rng(np.random.SeedSequence(entropy))
    case = pool.every.draw(rng)
    seed = int(rng.integers(2**63 - 1))
    index = None
    if is_forced(sample, training.batch_size, training.foreground_oversampling, float(rng.random())):
        classes = tuple(pool.by_class) if training.class_balanced else cache.classes(case)
        if classes:
            index = classes[int(rng.integers(len(classes)))]
            case = pool.by_class[index].draw(rng) if training.class_balanced else case
    labels = cache.labels(case)
    shape, voxel = labels.shape, None
    if index is not None:
        voxels = cache.voxels(case, index)
        voxel = _triple(voxels[int(rng.integers(len(voxels)))])
    elif pool.ignore_index is not None:
        voxel = known_voxel(rng, labels, pool.ignore_index)
    if voxel is None:
        d, h, w = (place_anywhere(rng, size, extent) for size, extent in zip(patch_size, shape, strict=True))
        return PatchDraw(case, (d, h, w), seed, None)
    d, h, w = (place_around(rng, at, size, extent) for at, size, extent in zip(voxel, patch_size, shape, strict=True))
    turn = spatial_draw(seed, training.augmentation, patch_size)
    start = kept_in_view((d, h, w), voxel, turn, patch_size, plan.preprocessing.network_spacing_mm)
    return PatchDraw(case, start, seed, index, voxel)


def known_voxel(rng: np.random.Generator, labels: UInt[np.ndarray, "D H W"], ignore_index: int) -> Triple | None:
    """Return a voxel that is not ignored, each as likely as any other, or None where next to all are ignored."""
    for count in _LOOKED_AT:
        places = np.stack([rng.integers(extent, size=count) for extent in labels.shape])
        known = np.flatnonzero(labels[tuple(places)] != ignore_index)
        if known.size:
            return _triple(places[:, known[0]])
    return None


def place_anywhere(rng: np.random.Generator, size: int, extent: int) -> int:
    """Return the start of a patch of `size` along an axis of `extent`: inside, or around the whole axis if it is short.

    A short axis lies in the middle of the patch, as in prediction, give or take half of the room at either end.
    """
    if extent >= size:
        return int(rng.integers(extent - size + 1))
    room = size - extent
    return -(room // 2) + int(rng.integers(-(room // 4), room // 4 + 1))


def place_around(rng: np.random.Generator, voxel: int, size: int, extent: int) -> int:
    """Return the start of a patch that holds `voxel`, near its centre but not on it, and that stays inside the axis."""
    if extent < size:
        return place_anywhere(rng, size, extent)
    reach = size // JITTER_SHARE
    start = voxel - size // 2 + int(rng.integers(-reach, reach + 1))
    return min(max(start, 0), extent - size)


def kept_in_view(start: Triple, voxel: Triple, turn: SpatialDraw, patch_size: Triple, spacing_mm: TripleMm) -> Triple:
    """Return the start of a patch moved towards `voxel` as far as the patch, once turned and scaled, must to show it.

    A voxel near a corner of the patch is turned out of it otherwise, and a tiny structure with it. A patch that is
    moved may reach beyond the case.

    Args:
        start: first voxel of the patch before it is turned, D, H, W.
        voxel: D, H, W; inside the patch.
        turn: how the patch will be turned about its centre.
        patch_size: D, H, W.
        spacing_mm: D, H, W.
    """
    if turn.is_exact:
        return start
    half = (np.asarray(patch_size, dtype=np.float64) - 1) / 2
    bent = np.zeros(3) if turn.elastic is None else np.asarray(turn.elastic.reach_vox)
    to_patch = np.linalg.inv(source_matrix(turn, spacing_mm))
    offset = np.asarray(voxel) - start - half
    for left in range(_STEPS_TO_CENTRE, -1, -1):
        moved = np.rint(np.asarray(voxel) - half - offset * (left / _STEPS_TO_CENTRE))
        seen = np.abs(to_patch @ (np.asarray(voxel) - moved - half))
        if np.all(seen <= half - bent):
            break
    return _triple(moved)


def _triple(values: np.ndarray) -> Triple:
    d, h, w = (int(value) for value in values)
    return d, h, w


def _urn(cache: Cache, cases: Sequence[int], weights: CaseWeights | None) -> Urn:
    if weights is None:
        return Urn(tuple(cases))
    return Urn(tuple(cases), np.cumsum([weights.of(cache.case_ids[case]) for case in cases]))
