"""Measuring a data set: shapes, spacings and foreground intensities of its training cases, in one pass over the files.

nnU-Net's rules (fingerprint_extractor.py): each case is cropped to its non-zero box; each gives 100 million divided by
the number of cases intensities, drawn with replacement from its foreground; statistics are of all draws pooled.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Float32, Int64, UInt

from sagittal.data.dataset import Case, Dataset, content_hash
from sagittal.data.label_index import LabelIndex, label_index
from sagittal.data.labelled_case import named, read_case
from sagittal.errors import DataError
from sagittal.plan import ChannelIntensities, Fingerprint
from sagittal.plan.base import Triple, TripleMm
from sagittal.plan.volume_range import VolumeRange
from sagittal.volumes import Volume
from sagittal.volumes.crop import nonzero_box
from sagittal.volumes.geometry import Reorientation, reorientation_to_ras, spacing_of

Orientation = Literal["RAS", "stored"]
STORED_ORDER = Reorientation((0, 1, 2), (False, False, False))

INTENSITY_BUDGET = 100_000_000
"""Foreground intensities drawn from all cases together."""
_CHUNK = 4_000_000
_EVEN_DRAWS = 100


@dataclass(frozen=True)
class Sample:
    """Intensities drawn with replacement: the distinct values, ascending, and how often each was drawn.

    The same multiset as the list of draws, mostly in a few per cent of its memory: a small structure is drawn many
    times over, and a CT has a few thousand distinct values.
    """

    values: Float32[np.ndarray, " n"]
    counts: Int64[np.ndarray, " n"]


@dataclass(frozen=True)
class CaseMeasurement:
    """What one case adds to the fingerprint."""

    shape_vox: Triple
    spacing_mm: TripleMm
    relative_size_after_crop: float
    samples: tuple[Sample, ...]
    """One per channel."""
    class_volumes_ml: tuple[float, ...]
    """One per foreground index, 0 where the case lacks it."""


def extract_fingerprint(
    dataset: Dataset, *, workers: int, orientation: Orientation = "RAS", content_sha256: str | None = None
) -> Fingerprint:
    """Measure all training cases.

    Voxels of the ignore value are not foreground (nnU-Net counts them). A case without foreground adds no intensities.

    Args:
        dataset: labelled cases.
        workers: threads; each holds one case in memory.
        orientation: axis order of shapes and spacings: anatomical ("RAS") or as the files store them.
        content_sha256: `content_hash(dataset)` where it was just taken.

    Raises:
        DataError: a case can't be used (the message names it), or no case has any foreground.
    """
    index = label_index(dataset.spec)
    budget = INTENSITY_BUDGET // len(dataset.cases)
    with ThreadPoolExecutor(max_workers=max(1, workers), thread_name_prefix="fingerprint") as pool:
        hashing = pool.submit(content_hash, dataset) if content_sha256 is None else None
        futures = [pool.submit(measure_case, case, index, budget, orientation) for case in dataset.cases]
        try:
            measured = [future.result() for future in futures]
            content = str(content_sha256) if hashing is None else hashing.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    channels = list(zip(*(case.samples for case in measured), strict=True))
    if not any(sample.values.size for sample in channels[0]):
        raise DataError(
            f"{dataset.folder}: none of {len(measured)} label maps has a foreground voxel. Expected at least one of "
            f"{sorted(dataset.spec.foreground_values)}. Check that labels and images belong together.",
            code="no_foreground",
        )
    return Fingerprint(
        orientation=orientation,
        content_sha256=content,
        shapes_vox=tuple(case.shape_vox for case in measured),
        spacings_mm=tuple(case.spacing_mm for case in measured),
        intensities=tuple(pooled_intensities(samples) for samples in channels),
        median_relative_size_after_crop=float(np.median([case.relative_size_after_crop for case in measured])),
        class_volumes_ml=tuple(
            float(np.median([volume for volume in volumes if volume])) if any(volumes) else None
            for volumes in zip(*(case.class_volumes_ml for case in measured), strict=True)
        ),
        label_volumes=label_volumes([case.class_volumes_ml for case in measured], index),
    )


def label_volumes(cases_ml: Sequence[Sequence[float]], index: LabelIndex) -> tuple[VolumeRange, ...]:
    """Return how large each label is, class or region, from the volumes of the foreground indices in each case."""
    positions = {value: place for place, value in enumerate(index.values[1:])}
    return tuple(
        VolumeRange.of([sum(case[positions[value]] for value in label.values) for case in cases_ml])
        for label in index.spec.labels
    )


def measure_case(case: Case, index: LabelIndex, budget: int, orientation: Orientation = "RAS") -> CaseMeasurement:
    """Measure one case; draw `budget` foreground intensities per channel.

    Raises:
        DataError: the case can't be used; the message names it.
    """
    with named(case):
        volumes, indices = read_case(case, index)
        return _measure(volumes, indices, index, budget, orientation)


def _measure(
    volumes: Sequence[Volume],
    stored_indices: UInt[np.ndarray, "D H W"],
    index: LabelIndex,
    budget: int,
    orientation: Orientation,
) -> CaseMeasurement:
    scan = volumes[0]
    change = reorientation_to_ras(scan.affine) if orientation == "RAS" else STORED_ORDER
    channels = [change.apply(volume.array[0]) for volume in volumes]
    box = nonzero_box(channels)
    d, h, w = box.slices
    indices = change.apply(stored_indices)[d, h, w]
    foreground = (indices > 0) & (indices < index.num_indices)
    random = np.random.RandomState(1234)
    # The random numbers go on from channel to channel, as nnU-Net's do.
    values = (channel[d, h, w][foreground].astype(np.float32) for channel in channels)
    samples = tuple(draw_with_replacement(found, budget, random) for found in values)
    spacing = spacing_of(change.affine(scan.affine, scan.geometry.shape))
    relative = float(np.prod(box.shape) / np.prod(scan.geometry.shape))
    voxels = np.bincount(indices.ravel(), minlength=index.num_indices)[1 : index.num_indices]
    volumes_ml = tuple((voxels * float(np.prod(spacing)) / 1000).tolist())
    return CaseMeasurement(box.shape, spacing, relative, samples, volumes_ml)


def draw_with_replacement(values: Float32[np.ndarray, " n"], budget: int, random: np.random.RandomState) -> Sample:
    """Draw `budget` of `values` with replacement: the draws of numpy's `RandomState.choice`, as counts.

    Where each value would be drawn a hundred times and more, all are taken equally often: what so many draws tend to.
    """
    counts = np.zeros(values.size, np.int64)
    if values.size * _EVEN_DRAWS <= budget and values.size:
        counts += budget // values.size
        counts[: budget % values.size] += 1
        budget = 0
    for start in range(0, budget if values.size else 0, _CHUNK):
        drawn = random.randint(0, values.size, size=min(_CHUNK, budget - start))
        counts += np.bincount(drawn, minlength=values.size)
    kept = counts > 0
    distinct, places = np.unique(values[kept], return_inverse=True)
    # Sums of counts stay far below 2^53, so the float64 of weighted bins is exact.
    return Sample(distinct, np.bincount(places, counts[kept], distinct.size).astype(np.int64))


def pooled_intensities(samples: Sequence[Sample]) -> ChannelIntensities:
    """Return the statistics of all samples of a channel as one multiset; at least one sample holds a value."""
    values = np.concatenate([sample.values for sample in samples])
    counts = np.concatenate([sample.counts for sample in samples])
    order = np.argsort(values, kind="stable")
    values, counts = values[order].astype(np.float64), counts[order]
    last_place = np.cumsum(counts) - 1
    total = int(last_place[-1]) + 1
    mean = float(np.sum(values * counts) / total)
    variance = float(np.sum((values - mean) ** 2 * counts) / total)

    def percentile(share: float) -> float:
        # Linear between the two neighbouring places of the sorted list, numpy's default.
        place = share * (total - 1)
        below = int(np.floor(place))
        low, high = values[np.searchsorted(last_place, [below, min(below + 1, total - 1)])]
        return float(low + (high - low) * (place - below))

    return ChannelIntensities(
        mean=mean,
        median=percentile(0.5),
        std=float(np.sqrt(variance)),
        min=float(values[0]),
        max=float(values[-1]),
        percentile_00_5=percentile(0.005),
        percentile_99_5=percentile(0.995),
    )
