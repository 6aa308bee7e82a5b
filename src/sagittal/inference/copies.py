"""Mirrored copies of windows through an engine: what is equal is computed once.

Of every window the engine sees as many copies as there are combinations of mirrored axes; their outputs are mirrored
back and averaged. A window that equals one of its own mirror images needs fewer of them, and windows of one value, air
for example, are computed once for all.
"""

from __future__ import annotations

from collections.abc import Container, Sequence
from itertools import combinations
from typing import NamedTuple

import numpy as np
from jaxtyping import Float32

from sagittal.data.mirroring import Swaps, composed
from sagittal.errors import DataError, ResourceError
from sagittal.inference.engines.engine import CoarseEngine, Engine, LinearHead, MemberEngine, members_of
from sagittal.inference.engines.sharing import SharedEngine
from sagittal.inference.timings import Timings
from sagittal.inference.uncertainty import Disagreement, Votes, votes_of
from sagittal.inference.windows import gaussian
from sagittal.plan.base import Triple

_FLOAT16_LIMIT = 6e4


class Mirror(NamedTuple):
    """One combination of mirrored axes of D, H, W, and where each output is found in it; None for its own place."""

    axes: tuple[int, ...]
    outputs: tuple[int, ...] | None


def mirrors_of(axes: Sequence[int], swaps: Swaps) -> tuple[Mirror, ...]:
    """Return all combinations of `axes`, the empty one first."""
    distinct = sorted(set(axes))
    every = [chosen for count in range(len(distinct) + 1) for chosen in combinations(distinct, count)]
    return tuple(Mirror(chosen, composed(swaps, chosen)) for chosen in every)


class Outputs(NamedTuple):
    """What is blended instead of logits, and how logits are made of it.

    Attributes:
        channels: of what is blended: K, or the features of each group of mirrors side by side.
        head: from them to logits; None where they are the logits.
        groups: for each mirror, which group its features belong to; all zeros without a head.
        stride: by how much coarser than the window they are (`CoarseEngine`).
    """

    channels: int
    head: LinearHead | None
    groups: tuple[int, ...]
    stride: int = 1


def outputs_of(engine: Engine, mirrors: Sequence[Mirror], window: Triple) -> Outputs:
    """Return features with their head where these are fewer than logits, else the logits, coarse ones where there are.

    Mirrors that make labels change places change the rows of the head, so that their features are kept apart.
    """
    tables = list(dict.fromkeys(mirror.outputs for mirror in mirrors))
    head = engine.head
    if head is None or len(tables) * head.weight.shape[1] >= engine.num_outputs:
        stride = engine.coarse_stride(window) if isinstance(engine, CoarseEngine) else 1
        return Outputs(engine.num_outputs, None, (0,) * len(mirrors), stride)
    groups = tuple(tables.index(mirror.outputs) for mirror in mirrors)
    weights, bias = [], np.zeros_like(head.bias)
    for group, table in enumerate(tables):
        rows = list(range(engine.num_outputs)) if table is None else list(table)
        share = np.float32(groups.count(group) / len(mirrors))
        weights.append(head.weight[rows] * share)
        bias += head.bias[rows] * share
    joined = np.ascontiguousarray(np.concatenate(weights, axis=1))
    return Outputs(joined.shape[1], LinearHead(joined, bias), groups)


class Copies:
    """An engine that is shown windows mirrored, ready for many windows.

    Args:
        engine: computes.
        mirrors: which copies of each window it sees.
        window: D, H, W of the windows.
        window_batch: copies per call.
        kept_values: of how many values the outputs of constant windows are kept.
        half: whether float16 has to hold the outputs.
        disagreement: is shown what each fold decides on each copy of a window. Windows of one value are left out: how
            many of them are computed follows from the memory.
    """

    def __init__(
        self,
        engine: Engine,
        mirrors: Sequence[Mirror],
        window: Triple,
        *,
        window_batch: int,
        kept_values: int,
        half: bool = False,
        disagreement: Disagreement | None = None,
    ) -> None:
        self._members = 1 if disagreement is None else members_of(engine)
        self._disagreement = disagreement if len(mirrors) * self._members > 1 else None
        self._engine, self._mirrors, self._half = engine, tuple(mirrors), half
        self.outputs = outputs_of(engine, mirrors, window)
        self._heads = self._heads_of_members()
        self._window_batch, self._kept_values = window_batch, kept_values
        self._constants: dict[bytes, Float32[np.ndarray, "F d h w"]] = {}
        self._sizes = [self.outputs.groups.count(group) for group in range(max(self.outputs.groups) + 1)]

    @property
    def per_window(self) -> int:
        """Number of copies of a window that differs from all its mirror images."""
        return len(self._mirrors)

    def __call__(
        self, windows: Sequence[Float32[np.ndarray, "C d h w"]], timings: Timings
    ) -> list[Float32[np.ndarray, "F a b c"]]:
        """Return the mean output of each window's copies, as arrays that the caller may change.

        The engine's time counts as `network` in `timings`.

        Raises:
            DataError: an output is not finite.
        """
        keys = [_constant_key(window) for window in windows]
        todo = [at for at, key in enumerate(keys) if key is None or key not in self._constants]
        # The same value twice in one batch is one window.
        todo = [at for at in todo if keys[at] is None or at == keys.index(keys[at])]
        differing = {position for position, at in enumerate(todo) if keys[at] is None}
        results = dict(zip(todo, self._computed([windows[at] for at in todo], differing, timings), strict=True))
        for at in todo:
            key = keys[at]
            if key is not None and len(self._constants) < self._kept_values:
                self._constants[key] = results[at].copy()
        found = []
        for at, key in enumerate(keys):
            if at in results:
                found.append(results[at])
            else:
                assert key is not None
                known = self._constants.get(key)
                found.append((known if known is not None else results[keys.index(key)]).copy())
        return found

    def _computed(self, windows: Sequence[np.ndarray], compared: Container[int], timings: Timings) -> list[np.ndarray]:
        """Return the mean of each window's copies; of those at the positions `compared`, copies and folds are voted."""
        jobs = [(at, uses) for at, window in enumerate(windows) for uses in self._distinct(window)]
        totals: dict[int, np.ndarray] = {}
        votes: dict[int, list[Votes]] = {}
        for start in range(0, len(jobs), self._window_batch):
            batch = jobs[start : start + self._window_batch]
            shown = np.stack([_flipped(windows[at], self._mirrors[uses[0]].axes) for at, uses in batch])
            with timings.phase("network"):
                given = self._asked(shown)
            for (at, uses), answer in zip(batch, given, strict=True):
                self._require_usable(answer)
                if self._disagreement is not None and at in compared:
                    for mirror in uses:
                        votes.setdefault(at, []).extend(self._votes(answer, mirror, self._disagreement.has_regions))
                output = answer.mean(axis=0) if self._answers_apart else answer
                if len(self._mirrors) == 1:
                    totals[at] = output
                    continue
                if at not in totals:
                    totals[at] = np.zeros((self.outputs.channels, *output.shape[1:]), np.float32)
                for mirror in uses:
                    self._add(totals[at], output, mirror)
        for members in votes.values():
            assert self._disagreement is not None
            self._disagreement.count(members, _importance(members[0].shape[-3:]))
        return [totals[at] for at in range(len(windows))]

    def _heads_of_members(self) -> tuple[LinearHead | None, ...]:
        if self._disagreement is None or self.outputs.head is None:
            return (None,) * self._members
        if isinstance(self._engine, MemberEngine) and (heads := self._engine.member_heads) is not None:
            return heads
        return (self._engine.head,)

    @property
    def _answers_apart(self) -> bool:
        """Whether each fold's logits are asked for; of features each one's part is known anyway."""
        return self._members > 1 and self.outputs.head is None

    def _asked(self, shown: Float32[np.ndarray, "N C D H W"]) -> Sequence[Float32[np.ndarray, "*F d h w"]]:
        """Return the answer to each copy, in order, of one engine or of several."""
        if isinstance(self._engine, SharedEngine):
            return self._engine.answers(self._ask, shown)
        return list(self._ask(self._engine, shown))

    def _ask(self, engine: Engine, shown: np.ndarray) -> np.ndarray:
        if self.outputs.head is not None:
            return engine.features(shown)
        if self._answers_apart:
            assert isinstance(engine, MemberEngine)
            return engine.member_logits(shown, coarse=self.outputs.stride > 1)
        if self.outputs.stride > 1:
            assert isinstance(engine, CoarseEngine)
            return engine.coarse_logits(shown)
        return engine.logits(shown)

    def _add(self, total: np.ndarray, output: np.ndarray, number: int) -> None:
        """Add the mirrored output of one copy to the mean of its group."""
        mirror, group = self._mirrors[number], self.outputs.groups[number]
        back = _flipped(output, mirror.axes)
        share = np.float32(1 / self._sizes[group])
        # Features are told apart by their group, and only the head knows of labels that change places.
        order = range(len(output)) if self.outputs.head is not None or mirror.outputs is None else mirror.outputs
        for row, source in enumerate(order, start=group * len(output)):
            total[row] += back[source] * share

    def _votes(self, answer: np.ndarray, number: int, has_regions: bool) -> list[Votes]:
        """Return what each fold alone would decide of one copy."""
        mirror = self._mirrors[number]
        if self.outputs.head is not None:
            parts = np.split(answer, len(self._heads))
        else:
            parts = list(answer) if self._answers_apart else [answer]
        return [
            votes_of(_flipped(part, mirror.axes), head, mirror.outputs, has_regions=has_regions)
            for part, head in zip(parts, self._heads, strict=True)
        ]

    def _require_usable(self, output: np.ndarray) -> None:
        # No mask of the volume's size; NaN and infinity both reach the extremes.
        low, high = float(output.min()), float(output.max())
        if not (np.isfinite(low) and np.isfinite(high)):
            raise DataError(
                "the network's output is not finite. Expected numbers; the scan holds extreme values or the weights "
                "are damaged. Look at the scan with 'sagittal info', and try another one.",
                code="output_not_finite",
            )
        if self._half and max(-low, high) > _FLOAT16_LIMIT:
            raise ResourceError(
                f"the network's output reaches {max(-low, high):.3g}, which float16 does not hold, and the memory "
                "allowed does not suffice for float32. Allow more with --memory-gib.",
                code="memory",
            )

    def _distinct(self, window: np.ndarray) -> list[list[int]]:
        """Return the mirrors of a window in sets that make the same image."""
        same = {mirror.axes for mirror in self._mirrors if _equals_mirrored(window, mirror.axes)}
        sets: list[list[int]] = []
        for number, mirror in enumerate(self._mirrors):
            for known in sets:
                between = tuple(sorted(set(mirror.axes) ^ set(self._mirrors[known[0]].axes)))
                if between in same:
                    known.append(number)
                    break
            else:
                sets.append([number])
        return sets


def _importance(window: tuple[int, ...]) -> Float32[np.ndarray, "d h w"]:
    """Return the weight of each voxel of a window in the blend, up to a factor."""
    d, h, w = (gaussian(size).astype(np.float32) for size in window)
    return d[:, None, None] * h[:, None] * w


def _flipped(array: np.ndarray, axes: Sequence[int]) -> np.ndarray:
    return np.flip(array, tuple(axis + 1 for axis in axes)) if axes else array


def _equals_mirrored(window: np.ndarray, axes: Sequence[int]) -> bool:
    if not axes:
        return True
    mirrored = _flipped(window, axes)
    # Nearly all windows differ already in a few voxels.
    few = (slice(None), *(slice(None, None, max(1, size // 8)) for size in window.shape[1:]))
    return bool(np.array_equal(window[few], mirrored[few])) and bool(np.array_equal(window, mirrored))


def _constant_key(window: np.ndarray) -> bytes | None:
    """Return the values of a window that is constant in each channel, else None."""
    corner = window[:, :1, :1, :1]
    few = window[:, :: max(1, window.shape[1] // 8), 0]
    if not (few == corner[:, 0]).all() or not (window == corner).all():
        return None
    return corner.tobytes()
