"""Is a data set usable? Every file is read once, every fault is found, none hides another.

Cases are checked in threads, which reading, unpacking and numpy let run side by side; each holds one image at a time.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

from sagittal.data.dataset import Case, Dataset
from sagittal.data.doctor import whole
from sagittal.data.doctor.case import CaseReport, Terms, examine
from sagittal.data.doctor.findings import Diagnosis, Finding
from sagittal.data.doctor.leaks import split_faults
from sagittal.data.doctor.sides import suspected_flips
from sagittal.data.doctor.target import planned_spacing
from sagittal.errors import DataError
from sagittal.plan.base import TripleMm
from sagittal.volumes import read_header
from sagittal.volumes.geometry import Geometry, reorientation_to_ras, spacing_of


def diagnose(
    dataset: Dataset,
    workers: int = 1,
    *,
    spacing_mm: TripleMm | None = None,
    replaced: Mapping[int, int] | None = None,
) -> Diagnosis:
    """Check every image and label map of a data set.

    Args:
        dataset: what `read_dataset` found.
        workers: threads; each holds one image in memory.
        spacing_mm: the spacing that cases will be resampled to, along D, H, W in RAS order; by itself the one that
            planning would choose.
        replaced: declared values that no label map may hold, and the values of `dataset.spec` that stand for them; see
            `label_values.declare`.
    """
    replaced = replaced or {}
    with ThreadPoolExecutor(max_workers=max(1, workers), thread_name_prefix="doctor") as pool:
        if spacing_mm is None:
            spacing_mm = _planned([grid for grid in pool.map(_grid, dataset.cases) if grid is not None])
        terms = Terms(dataset.spec, replaced, spacing_mm)
        reports = list(pool.map(lambda case: examine(case, terms), dataset.cases))
    return Diagnosis.of(
        [*(finding for report in reports for finding in report.findings), *_together(reports, dataset, terms)]
    )


def _together(reports: Sequence[CaseReport], dataset: Dataset, terms: Terms) -> Iterator[Finding]:
    spec = dataset.spec
    yield from whole.replaced_values(spec, terms.replaced)
    yield from whole.unused_files(dataset)
    yield from whole.orientations(reports)
    yield from suspected_flips([report.sides for report in reports if report.sides is not None], spec.labels)
    yield from whole.intensity_scales(reports, spec)
    yield from whole.missing_labels(reports, spec)
    yield from whole.regions_order(spec)
    groups = whole.copies(reports)
    yield from whole.duplicates(groups)
    # A case's channels copied one by one are one leak.
    copied = list(dict.fromkeys(tuple(sorted({case for case, _, _ in group})) for group in groups))
    yield from split_faults(dataset.folder, frozenset(case.id for case in dataset.cases), copied)
    yield from whole.tiny_structures(reports, spec, terms.target_mm)
    yield from whole.facts(reports, dataset)
    yield from whole.header_noise(reports)


def _grid(case: Case) -> Geometry | None:
    """Return the grid of a case's first channel; None where the header can't be read, which `examine` reports."""
    try:
        return read_header(case.images[0]).geometry
    except DataError:
        return None


def _planned(grids: Sequence[Geometry]) -> TripleMm | None:
    if not grids:
        return None
    changes = [reorientation_to_ras(grid.affine) for grid in grids]
    spacings = [spacing_of(change.affine(grid.affine, grid.shape)) for change, grid in zip(changes, grids, strict=True)]
    return planned_spacing(spacings, [change.shape(grid.shape) for change, grid in zip(changes, grids, strict=True)])
