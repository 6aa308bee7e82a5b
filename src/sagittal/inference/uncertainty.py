"""How sure a prediction is: entropy for each voxel, and for a case how far its averaged members agree.

Members are the mirrored copies or the folds whose mean is the prediction. Where they disagree among themselves, the
result is rarely good: the mean pairwise Dice of an ensemble's members is the plainest such estimate, and among the
best of those compared by Zenk et al. (Comparative benchmarking of failure detection methods in medical image
segmentation, Medical Image Analysis 2025); Roy et al. (Bayesian QuickNAT, NeuroImage 2019) used it first.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float32, Float64, Shaped, UInt8

from sagittal.data.preprocessing import Frame
from sagittal.inference.engines.engine import LinearHead
from sagittal.inference.labelling import VOXELS_AT_ONCE, apply_head
from sagittal.inference.memory import Comparison
from sagittal.inference.run_report import Flag, Quality
from sagittal.plan.dataset import DatasetSpec

Votes = Shaped[np.ndarray, "*decided d h w"]
"""A member's decisions: the number of a class (d, h, w), or a mask for each region (K, d, h, w)."""

FIXED_THRESHOLD = 0.8
"""Where the bundle tells of no validated case. No measurement stands behind it."""
LOW_SHARE = 0.05
_COUNTING_BYTES = 44
"""For each voxel, where every one is contested: masks, counts, the weight and its products in float64."""
_FLOAT_BYTES = 4
_FULL = 255
_FEW = 5
_TILE = 1 << 20
"""Voxels times outputs that are worked on at a time: the temporaries stay in the cache."""


class Disagreement:
    """Adds up, window by window, how many voxels of each class the members share; no volume is kept.

    Args:
        spec: the model's classes or regions.
    """

    def __init__(self, spec: DatasetSpec) -> None:
        self._spec = spec
        self._shared: Float64[np.ndarray, " K"] = np.zeros(spec.num_outputs)
        self._found: Float64[np.ndarray, " K"] = np.zeros(spec.num_outputs)
        self.looked = False
        """Whether anything was compared."""

    @property
    def has_regions(self) -> bool:
        """Whether outputs are decided one by one."""
        return self._spec.has_regions

    def look(self, members: Float32[np.ndarray, "M K d h w"], weight: Float32[np.ndarray, "d h w"]) -> None:
        """Take in the members' logits of a window, or of a part of one.

        Args:
            members: each member's logits on the same voxels, mirrored back.
            weight: how much each voxel counts, for example the weight of the window in the blend.
        """
        self.count([votes_of(member, None, None, has_regions=self._spec.has_regions) for member in members], weight)

    def count(self, votes: Sequence[Votes], weight: Float32[np.ndarray, "d h w"]) -> None:
        """Take in the members' decisions on a window, or on a part of one: what `votes_of` returns for each.

        One member alone tells nothing.
        """
        members = len(votes)
        if members < 2:
            return
        self.looked = True
        if self._spec.has_regions:
            for output in range(self._spec.num_outputs):
                found = np.zeros(weight.shape, np.uint8)
                for vote in votes:
                    found += vote[output]
                self._add(output, found, weight, members)
            return
        # Where all agree, a weighted count by class does; what is left is small, and counted class by class.
        first, *others = votes
        split = np.zeros(weight.shape, bool)
        for other in others:
            split |= other != first
        counts = np.bincount(first[~split], weight[~split], minlength=self._spec.num_outputs)
        self._shared += counts * members * (members - 1)
        self._found += counts * members * (members - 1)
        contested, share = [vote[split] for vote in votes], weight[split]
        for output in np.unique(np.concatenate(contested)) if share.size else ():
            found = np.zeros(share.shape, np.uint8)
            for vote in contested:
                found += vote == output
            self._add(int(output), found, share, members)

    def agreement(self) -> dict[str, float]:
        """Return the pairwise Dice of each class or region that a member found, over all pairs of members."""
        first = 0 if self._spec.has_regions else 1
        pairs = zip(self._spec.labels, self._shared[first:], self._found[first:], strict=True)
        return {label.name: float(shared / found) for label, shared, found in pairs if found > 0}

    def _add(self, output: int, votes: Shaped[np.ndarray, "*n"], weight: Float32[np.ndarray, "*n"], count: int) -> None:
        # n of M members have the voxel: n(n-1)/2 pairs share it, and it is in the two sizes of a pair (M-1)n times.
        weighted = votes * weight.astype(np.float64)
        self._shared[output] += float((weighted * (votes - 1.0)).sum())
        self._found[output] += float(weighted.sum()) * (count - 1)


def votes_of(
    values: Float32[np.ndarray, "F d h w"], head: LinearHead | None, rows: Sequence[int] | None, *, has_regions: bool
) -> Votes:
    """Return what one member decides for each voxel: the number of its class (d, h, w), or a mask for each region.

    Args:
        values: its logits, or the features that `head` is applied to.
        head: from features to logits; None where logits are given.
        rows: where each output is found among the logits, where mirroring makes labels change places; None: in its own.
        has_regions: whether each output is decided by itself.
    """
    columns = values.reshape(len(values), -1)
    outputs = len(columns) if head is None else len(head.bias)
    order = list(range(outputs) if rows is None else rows)
    decisions = (outputs, columns.shape[1]) if has_regions else columns.shape[1]
    found: Any = np.empty(decisions, bool if has_regions else _vote_type(outputs))
    for start in range(0, columns.shape[1], VOXELS_AT_ONCE):
        piece = columns[:, start : start + VOXELS_AT_ONCE]
        logits = (piece if head is None else apply_head(head, piece))[order]
        found[..., start : start + VOXELS_AT_ONCE] = logits > 0 if has_regions else logits.argmax(axis=0)
    return np.asarray(found.reshape(*found.shape[:-1], *values.shape[1:]))


def _vote_type(outputs: int) -> type[np.unsignedinteger[Any]]:
    return np.uint8 if outputs <= np.iinfo(np.uint8).max else np.uint16


def comparison_of(members: int, copies: int, shape: tuple[int, int], voxels: int, *, has_regions: bool) -> Comparison:
    """Return the memory that comparing takes.

    Args:
        members: folds that are told apart; 1 where they are not.
        copies: mirrored copies of a window.
        shape: outputs, and channels of what the engine gives.
        voxels: of what it gives for a window.
        has_regions: whether outputs are decided one by one.
    """
    outputs, channels = shape
    decision = outputs if has_regions else np.dtype(_vote_type(outputs)).itemsize
    votes = members * copies * decision * voxels
    # The decisions on contested voxels, joined and sorted; a mirrored output turned back, and weights as float64.
    counting = (0 if has_regions else 3 * votes) + (_COUNTING_BYTES + _FLOAT_BYTES * channels) * voxels
    apart = 2 * members * _FLOAT_BYTES * channels * voxels if members > 1 else 0
    return Comparison(per_copy=apart, per_window=votes, once=counting)


def quality_of(disagreement: Disagreement, threshold: float, threshold_from: str) -> Quality:
    """Return the estimate of a case: the mean of the classes' agreement."""
    classes = disagreement.agreement()
    mean = sum(classes.values()) / len(classes) if classes else None
    rounded = {name: round(value, 4) for name, value in classes.items()}
    return Quality(
        agreement=None if mean is None else round(mean, 4),
        classes=rounded,
        threshold=threshold,
        threshold_from=threshold_from,
    )


def quality_flags(quality: Quality) -> tuple[Flag, ...]:
    """Return why a person should look at the case, if anything says so."""
    if quality.agreement is None:
        return (Flag(code="nothing_found", message="no voxel of any class was found"),)
    if quality.agreement >= quality.threshold:
        return ()
    worst = min(quality.classes, key=quality.classes.__getitem__)
    message = (
        f"the averaged predictions agree little: {quality.agreement:.3f}, below {quality.threshold:.3f} "
        f"({quality.threshold_from}); least in {worst} ({quality.classes[worst]:.3f})"
    )
    return (Flag(code="quality", message=message),)


def threshold_of(metrics: Mapping[str, Any]) -> tuple[float, str]:
    """Return below which agreement a case is flagged, and where that comes from.

    It is the Dice that one in twenty validated cases fell short of: members that agree with each other less than the
    network agreed with the reference on its worst cases promise no better. Members agree with each other more than with
    the truth, so this flags few; without five validated cases it is a fixed number.
    """
    folds = metrics.get("folds")
    means = []
    for entry in folds.values() if isinstance(folds, Mapping) else ():
        cases = entry.get("cases") if isinstance(entry, Mapping) else None
        for scores in cases.values() if isinstance(cases, Mapping) else ():
            known = [value for value in scores.values() if isinstance(value, int | float)]
            if known:
                means.append(sum(known) / len(known))
    if len(means) < _FEW:
        return FIXED_THRESHOLD, "a fixed number: the bundle tells of too few validated cases"
    low = float(np.quantile(means, LOW_SHARE))
    return round(low, 4), f"the Dice below which 5 % of {len(means)} validated cases lie"


class EntropyMap:
    """Makes the entropy of each voxel from logits that come slab by slab: a consumer of `Predictor.predict`.

    0 is certain, 1 as unsure as can be. Of classes, it is the entropy of the softmax divided by that of a coin with as
    many sides as there are classes; of regions, that of the least certain region. Kept in steps of 1/255.

    Args:
        spec: the model's classes or regions.
        frame: where the cropped scan lies; outside of the crop the entropy is 0.
    """

    def __init__(self, spec: DatasetSpec, frame: Frame) -> None:
        self._spec, self._frame = spec, frame
        self._levels: UInt8[np.ndarray, "D H W"] = np.zeros(frame.cropped_shape, np.uint8)

    def __call__(self, rows: slice, logits: Float32[np.ndarray, "K d H W"]) -> None:
        """Take in a slab: rows of the network's first axis of the cropped scan."""
        target = self._levels[rows]
        step = max(1, _TILE // (logits.shape[0] * logits.shape[3]))
        for depth in range(logits.shape[1]):
            for start in range(0, logits.shape[2], step):
                tile = logits[:, depth, start : start + step]
                entropy = region_entropy(tile) if self._spec.has_regions else class_entropy(tile)
                target[depth, start : start + step] = np.rint(np.clip(entropy, 0, 1) * _FULL)

    def on_grid(self) -> Float32[np.ndarray, "D H W"]:
        """Return the entropy on the scan's own grid, 0 to 1."""
        whole = self._frame.uncrop_and_unorient(self._levels)
        return np.asarray(np.divide(whole, np.float32(_FULL), dtype=np.float32))


def class_entropy(logits: Float32[np.ndarray, "K ..."]) -> Float32[np.ndarray, "*n"]:
    """Return the entropy of the softmax over the first axis, divided by its largest value, log K."""
    if len(logits) < 2:
        return np.zeros(logits.shape[1:], np.float32)
    shifted = logits - logits.max(axis=0)
    shares = np.exp(shifted)
    total = shares.sum(axis=0)
    entropy = np.log(total) - (shares * shifted).sum(axis=0) / total
    return np.asarray(entropy / np.float32(math.log(len(logits))), np.float32)


def region_entropy(logits: Float32[np.ndarray, "K ..."]) -> Float32[np.ndarray, "*n"]:
    """Return the largest entropy of any output's sigmoid, in bits."""
    least_sure = np.abs(logits).min(axis=0)
    # The entropy depends on the logit's size alone and falls with it, so one output decides.
    share = np.exp(-least_sure)
    entropy = np.log1p(share) + least_sure * share / (1 + share)
    return np.asarray(entropy / np.float32(math.log(2)), np.float32)
