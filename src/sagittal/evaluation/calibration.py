"""Calibration: of the voxels that a model calls liver with 0.8, are eight out of ten liver?

Nearly all voxels of a scan are background that no model doubts. Over the whole scan every model therefore looks
calibrated; so everything is also counted near the foreground of the reference alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Bool, Integer
from pydantic import model_validator
from scipy.ndimage import maximum_filter1d

from sagittal.errors import DataError
from sagittal.evaluation.classes import BACKGROUND, ClassSet
from sagittal.evaluation.masks import check_spacing
from sagittal.evaluation.tallies import Tally, Top, check_range, slabs
from sagittal.plan.base import Frozen, TripleMm
from sagittal.volumes.crop import bounding_box

BINS = 15
MARGIN_MM = 10.0
_VALUES = 65536
_VALUES = 65536
ABOVE_ONE = 1e-3
"""What rounding to float16 may add to a probability."""


@runtime_checkable
class Outputs(Protocol):
    """K arrays of floats (D, H, W), one after the other: an array (K, D, H, W), or what reads one from a file."""

    def __len__(self) -> int:
        """Return K."""

    def __iter__(self) -> Iterator[Any]:
        """Yield the probabilities of each class or region."""


class ReliabilityBins(Frozen):
    """Probabilities in equal bins from 0 to 1: how many, their sum, and how many came true; adds up with `+`."""

    voxels: tuple[int, ...]
    """The first bin begins at 0 and the last ends with 1; a border belongs to the bin above it."""
    probability_sums: tuple[float, ...]
    true: tuple[int, ...]

    @model_validator(mode="after")
    def _check(self) -> ReliabilityBins:
        if not len(self.voxels) == len(self.probability_sums) == len(self.true) > 0:
            raise ValueError("voxels, probability_sums and true must have one value per bin")
        return self

    def __add__(self, other: ReliabilityBins) -> ReliabilityBins:
        """Return the bins of both together; they have equally many."""
        return ReliabilityBins(
            voxels=tuple(a + b for a, b in zip(self.voxels, other.voxels, strict=True)),
            probability_sums=tuple(a + b for a, b in zip(self.probability_sums, other.probability_sums, strict=True)),
            true=tuple(a + b for a, b in zip(self.true, other.true, strict=True)),
        )

    @property
    def curve(self) -> tuple[tuple[float, float, int], ...]:
        """(mean probability, share that came true, voxels) of every bin that has voxels: a reliability diagram."""
        return tuple(
            (total / count, true / count, count)
            for count, total, true in zip(self.voxels, self.probability_sums, self.true, strict=True)
            if count
        )

    @property
    def expected_error(self) -> float | None:
        """ECE: the mean over voxels of how far their bin's probability and share of truth lie apart; None without."""
        total = sum(self.voxels)
        gaps = zip(self.probability_sums, self.true, strict=True)
        return sum(abs(probability - true) for probability, true in gaps) / total if total else None

    @property
    def maximum_error(self) -> float | None:
        """MCE: the greatest of these distances over bins that have voxels; None without any."""
        return max((abs(probability - share) for probability, share, _ in self.curve), default=None)


class CalibrationCounts(Frozen):
    """What calibration is computed from, over one set of voxels; adds up with `+`."""

    voxels: int
    brier_sums: dict[str, float]
    """By class the sum over voxels of the squared difference of its probability and of what is true (1 or 0)."""
    classes: dict[str, ReliabilityBins]
    """By class the probability that it is there, against whether it is. With softmax the background is one of them."""
    top: ReliabilityBins | None
    """Probability of the most probable class, against whether it is the right one; None for regions, which overlap."""

    def __add__(self, other: CalibrationCounts) -> CalibrationCounts:
        """Return the counts of both together; they have the same classes and bins."""
        return CalibrationCounts(
            voxels=self.voxels + other.voxels,
            brier_sums={name: value + other.brier_sums[name] for name, value in self.brier_sums.items()},
            classes={name: bins + other.classes[name] for name, bins in self.classes.items()},
            top=None if self.top is None or other.top is None else self.top + other.top,
        )

    @property
    def brier(self) -> float | None:
        """Mean over voxels of the squared errors of all classes, added up: 0 is perfect, with softmax 2 is the worst.

        None without voxels. Source: G. W. Brier, Monthly Weather Review 78 (1950).
        """
        return sum(self.brier_sums.values()) / self.voxels if self.voxels else None

    def class_brier(self, name: str) -> float | None:
        """Return the mean squared error of one class's probability, from 0 to 1; None without voxels."""
        return self.brier_sums[name] / self.voxels if self.voxels else None

    @property
    def ece(self) -> float | None:
        """Expected calibration error of the most probable class (Guo et al., ICML 2017); of regions `class_ece`."""
        return self.class_ece if self.top is None else self.top.expected_error

    @property
    def mce(self) -> float | None:
        """Maximum calibration error of the most probable class; of regions the greatest of any region."""
        if self.top is not None:
            return self.top.maximum_error
        found = [bins.maximum_error for bins in self.classes.values()]
        return max((error for error in found if error is not None), default=None)

    @property
    def class_ece(self) -> float | None:
        """Mean over classes of their expected errors, each class for itself against the rest (Kull et al., NeurIPS
        2019; with softmax the background is one of them); None without voxels."""
        found = [bins.expected_error for bins in self.classes.values()]
        defined = [error for error in found if error is not None]
        return sum(defined) / len(defined) if defined else None


class CalibrationScore(Frozen):
    """How well the probabilities of one case, or of many, agree with what is true; adds up with `+`."""

    kind: Literal["softmax", "sigmoid"]
    margin_mm: float
    """How near is near, along each axis."""
    whole: CalibrationCounts
    """All voxels that the reference doesn't ignore."""
    near_foreground: CalibrationCounts
    """Those within a box of `margin_mm` around a voxel that the reference has in any class. The prediction has no part
    in it, so that all methods are judged on the same voxels. None of them where the reference is empty."""

    def __add__(self, other: CalibrationScore) -> CalibrationScore:
        """Return the score of both together, every voxel weighing the same.

        Raises:
            DataError: other classes, bins, kind or margin.
        """
        settings = [
            (score.kind, score.margin_mm, {name: len(bins.voxels) for name, bins in score.whole.classes.items()})
            for score in (self, other)
        ]
        if settings[0] != settings[1]:
            raise DataError(
                f"calibrations of {settings[0]} and {settings[1]} (kind, margin in mm, bins by class) can't be added "
                "up. Compute them with the same settings.",
                code="calibration",
            )
        return CalibrationScore(
            kind=self.kind,
            margin_mm=self.margin_mm,
            whole=self.whole + other.whole,
            near_foreground=self.near_foreground + other.near_foreground,
        )


def calibrate(
    reference: np.ndarray,
    probabilities: Outputs,
    spacing_mm: Sequence[float],
    classes: ClassSet,
    *,
    bins: int = BINS,
    margin_mm: float = MARGIN_MM,
) -> CalibrationScore:
    """Compare the probabilities of one case with its reference.

    The probabilities come class after class, and each is let go before the next one is asked for. What is held besides
    grows with the voxels, 8 bytes for each where probabilities are float16, and not with the classes.

    Args:
        reference: label map (D, H, W). Voxels with the ignore value of `classes` count nowhere, and values that no
            class names are background.
        probabilities: floats (K, D, H, W), as an array or as `read_probabilities` gives them. K is one more than there
            are classes (softmax, the background first) or as many (sigmoid of each class or region).
        spacing_mm: voxel sizes in D, H, W order.
        classes: the classes in the order of the probabilities.
        bins: how many there are between 0 and 1.
        margin_mm: what is near the foreground; see `CalibrationScore.near_foreground`.

    Returns:
        Counts of this case; those of other cases are added with `+`.

    Raises:
        DataError: no label map, another number of classes, other shapes, numbers that are no probabilities, softmax of
            classes that share a label value, no three positive spacings, fewer than one bin, a negative margin.
    """
    spacing = check_spacing(spacing_mm)
    if bins < 1 or not 0 <= margin_mm < np.inf:
        raise DataError(
            f"bins {bins} and margin_mm {margin_mm}: expected at least 1 bin and a margin of 0 or more.",
            code="calibration",
        )
    _check_reference(reference)
    has_background = _has_background(len(probabilities), classes)
    names = ((BACKGROUND,) if has_background else ()) + classes.names
    near = _near(_holding(classes.foreground_values)[reference], spacing, margin_mm)
    tallies = _tallied(reference, near, probabilities, classes, names, bins)
    return CalibrationScore(
        kind="softmax" if has_background else "sigmoid",
        margin_mm=float(margin_mm),
        whole=_counts(names, tallies, slice(None)),
        near_foreground=_counts(names, tallies, slice(1, None)),
    )


def _tallied(
    reference: Integer[np.ndarray, "D H W"],
    near: Bool[np.ndarray, "D H W"],
    probabilities: Outputs,
    classes: ClassSet,
    names: Sequence[str],
    bins: int,
) -> list[Tally]:
    """Count every output, and with softmax, last, the most probable one."""
    ignored, has_background = classes.ignore_value, len(names) > len(classes.labels)
    order = np.zeros(_VALUES, np.uint16)
    for output, label in enumerate(classes.labels, start=1):
        order[list(label.values)] = output
    tallies = []
    top: Top | None = None
    for output, probability in enumerate(probabilities):
        _check_shape(probability, reference.shape)
        belongs = order == output if has_background else _holding(classes.labels[output].values)
        tally = Tally(bins)
        for slab in slabs(reference.shape):
            values, part = reference[slab], probability[slab]
            check_range(part, f"probabilities of '{names[output]}'")
            tally.add(part, belongs[values], near[slab], _kept(values, ignored))
        tallies.append(tally.finished())
        if top is not None:
            top.take(output, probability)
        elif has_background:
            top = Top(probability)
    if top is not None:
        tally = Tally(bins)
        for slab in slabs(reference.shape):
            values = reference[slab]
            tally.add(top.greatest[slab], top.output[slab] == order[values], near[slab], _kept(values, ignored))
        tallies.append(tally.finished())
    return tallies


def _holding(values: Iterable[int]) -> Bool[np.ndarray, " V"]:
    """Return of every label value whether it is one of these."""
    held = np.zeros(_VALUES, bool)
    held[list(values)] = True
    return held


def _kept(values: Integer[np.ndarray, "d H W"], ignored: int | None) -> Bool[np.ndarray, "d H W"] | None:
    return None if ignored is None else np.not_equal(values, ignored)


def _has_background(outputs: int, classes: ClassSet) -> bool:
    """Return whether there is an output for the background, as with softmax; refuse what fits neither."""
    count = len(classes.labels)
    if outputs not in (count, count + 1):
        raise DataError(
            f"probabilities of {outputs} outputs for {count} classes ({', '.join(classes.names)}); expected "
            f"{count + 1} (softmax, the background first) or {count} (sigmoids). Give the classes of the model.",
            code="probability",
        )
    values = [value for label in classes.labels for value in label.values]
    if outputs == count + 1 and len(set(values)) != len(values):
        raise DataError(
            f"probabilities of {outputs} outputs are a softmax, which gives a voxel one class, but some of the classes "
            f"{', '.join(classes.names)} share a label value. Expected {count} sigmoids.",
            code="probability",
        )
    return outputs == count + 1


def _near(foreground: Bool[np.ndarray, "D H W"], spacing_mm: TripleMm, margin_mm: float) -> Bool[np.ndarray, "D H W"]:
    """Return which voxels have one of the foreground within `margin_mm` along every axis."""
    near = np.zeros(foreground.shape, bool)
    box = bounding_box(foreground)
    if box is None:
        return near
    # A share of a voxel is forgiven: 10 mm are four voxels of 2.5 mm, however their quotient is rounded.
    reach = [int(margin_mm / size + 1e-6) for size in spacing_mm]
    slices = tuple(
        slice(max(0, first - margin), min(length, last + margin))
        for first, last, margin, length in zip(box.start, box.stop, reach, foreground.shape, strict=True)
    )
    grown = foreground[slices].view(np.uint8)
    for axis, margin in enumerate(reach):
        if margin:
            grown = maximum_filter1d(grown, 2 * margin + 1, axis=axis, mode="constant", cval=0)
    near[slices] = grown.view(bool)
    return near


def _counts(names: Sequence[str], tallies: Sequence[Tally], areas: slice) -> CalibrationCounts:
    """Return what was counted in these of the two areas: apart from the foreground, near it."""
    bins = [
        ReliabilityBins(
            voxels=tuple(tally.voxels[areas].sum(axis=(0, 1)).tolist()),
            probability_sums=tuple(tally.sums[areas].sum(axis=(0, 1)).tolist()),
            true=tuple(tally.voxels[areas, 1].sum(axis=0).tolist()),
        )
        for tally in tallies
    ]
    return CalibrationCounts(
        voxels=int(tallies[0].voxels[areas].sum()),
        brier_sums={name: float(tally.squares[areas].sum()) for name, tally in zip(names, tallies, strict=False)},
        classes=dict(zip(names, bins, strict=False)),
        top=bins[-1] if len(bins) > len(names) else None,
    )


def _check_reference(reference: np.ndarray) -> None:
    if reference.dtype.kind not in "iu" or reference.ndim != 3 or not reference.size:
        raise DataError(
            f"reference: dtype {reference.dtype} and shape {reference.shape}; expected a label map of integers "
            "(D, H, W).",
            code="label_dtype",
        )
    if int(reference.min()) < 0 or int(reference.max()) >= _VALUES:
        raise DataError(
            f"reference has values from {reference.min()} to {reference.max()}; label values lie between 0 and "
            f"{_VALUES - 1}.",
            code="label_value",
        )


def _check_shape(probability: np.ndarray, shape: tuple[int, ...]) -> None:
    if probability.dtype.kind != "f" or probability.shape != shape:
        raise DataError(
            f"probabilities: dtype {probability.dtype} and shape {probability.shape} of one class; expected floats of "
            f"the reference's shape {shape}.",
            code="grid_mismatch",
        )
