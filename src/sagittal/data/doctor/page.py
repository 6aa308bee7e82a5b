"""The pictures of a diagnosis: for each finding, the cases that it is about, with what it is about outlined."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Shaped
from numpy.typing import NDArray
from scipy import ndimage

from sagittal.data.dataset import Case, Dataset
from sagittal.data.doctor.findings import Diagnosis, Finding
from sagittal.errors import DataError
from sagittal.plan.dataset import DatasetSpec
from sagittal.report.doctor import DoctorPage, Picture, Told, draw_marks, write_doctor_page
from sagittal.report.pictures import CT_SOFT_TISSUE
from sagittal.volumes.geometry import Geometry, differences, reorientation_to_ras, spacing_of
from sagittal.volumes.io import read_stored
from sagittal.volumes.stored import Stored

MAX_PICTURED = 6
"""Findings of one code that are shown in pictures; the others are told in words."""
MAX_PICTURES = 48
"""In all: some 6 MB."""
MAX_VIEWS = 3
"""Cases shown for one finding."""
MAX_MARKS = 8
"""Labels outlined in a picture: there are so many colours."""

_NOT_SHOWN = f"No picture: the page shows the first {MAX_PICTURED} of a kind."
_UNREADABLE = "No picture: nothing of the case can be read."
_IMAGE_ONLY = frozenset({"duplicate", "leak", "intensity_scale", "constant_image"})

Mask = Bool[np.ndarray, "D H W"]


def write_page(path: Path, dataset: Dataset, diagnosis: Diagnosis, replaced: Mapping[int, int] | None = None) -> Path:
    """Write the diagnosis as one HTML file with a picture per finding and return its path.

    The scans that it shows are read once more, one case at a time.

    Args:
        path: file to write.
        dataset, diagnosis, replaced: as for `diagnose`.

    Raises:
        ResourceError: the page can't be written.
    """
    cases = {case.id: case for case in dataset.cases}
    meaning = _Meaning.of(dataset.spec, replaced or {})
    pictured: Counter[str] = Counter()
    told: list[Told] = []
    for finding in diagnosis.findings:
        wanted = [cases[name] for name in finding.shown_cases[:MAX_VIEWS] if name in cases]
        pictures: tuple[Picture, ...] = ()
        why_not = ""
        if finding.level != "fact" and wanted:
            if pictured[finding.code] < MAX_PICTURED and sum(len(one.pictures) for one in told) < MAX_PICTURES:
                pictures = _pictures(wanted, finding, dataset, meaning)
                why_not = "" if pictures else _UNREADABLE
            else:
                why_not = _NOT_SHOWN
            pictured[finding.code] += 1
        # Names only: a full path tells a reader of the page who ran it, and where.
        message = finding.message.replace(f"{dataset.folder}{os.sep}", "")
        told.append(Told(finding.level, finding.code, finding.case, message, finding.fix, pictures, why_not))
    facts = {"cases": str(len(dataset.cases)), "channels": str(len(dataset.spec.channel_names))}
    return write_doctor_page(path, DoctorPage(dataset.spec.name, told, facts))


@dataclass(frozen=True)
class _Meaning:
    """What the values in label files mean, as they stand there.

    Attributes:
        names: a class by its name, several regions joined by commas, "ignore".
        values: of each label, by its name.
    """

    names: Mapping[int, str]
    values: Mapping[str, tuple[int, ...]]

    @classmethod
    def of(cls, spec: DatasetSpec, replaced: Mapping[int, int]) -> _Meaning:
        in_files = {stand_in: original for original, stand_in in replaced.items()}
        values = {label.name: tuple(in_files.get(value, value) for value in label.values) for label in spec.labels}
        names: dict[int, str] = {}
        for name, several in values.items():
            for value in several:
                names[value] = f"{names[value]}, {name}" if value in names else name
        if spec.ignore_value is not None:
            names[in_files.get(spec.ignore_value, spec.ignore_value)] = "ignore"
        return cls(names, values)


def _pictures(wanted: Sequence[Case], finding: Finding, dataset: Dataset, meaning: _Meaning) -> tuple[Picture, ...]:
    found = [_picture(case, channel, finding, dataset, meaning) for case in wanted for channel in _channels(finding)]
    return tuple(picture for picture in found if picture is not None)


def _channels(finding: Finding) -> tuple[int, ...]:
    """Return the channels to show; of two on different grids, one beside the other."""
    return (0, finding.channel) if finding.code == "other_grid" and finding.channel else (finding.channel,)


def _picture(case: Case, channel: int, finding: Finding, dataset: Dataset, meaning: _Meaning) -> Picture | None:
    image = _readable(case.images[channel])
    labels = None if case.labels is None else _readable(case.labels)
    stored = image or labels
    if stored is None:
        return None
    values = None if image is None else image.image()
    caption = "the label map alone: the image can't be read"
    if image is not None:
        caption = f"channel {channel} ({dataset.spec.channel_names[channel]})"
    marks: dict[str, Mask] = {}
    if finding.code == "non_finite" and values is not None:
        marks = {"not a number": ~np.isfinite(values)}
    elif labels is not None and finding.code not in _IMAGE_ONLY:
        marks = _marks(labels, stored.geometry, finding, meaning)
        if image is not None and differences(image.geometry, labels.geometry):
            caption += ", the label map where its own header puts it"
    window = CT_SOFT_TISSUE if dataset.spec.channel_names[channel] == "CT" else None
    if finding.code == "intensity_scale" and values is not None and np.isfinite(values).any():
        low, high = (float(value) for value in np.percentile(values[np.isfinite(values)], (1, 99)))
        caption += f", black is {low:.3g} and white {high:.3g}"
        window = (low, high) if high > low else None
    to_ras = reorientation_to_ras(stored.affine)
    turned = {name: to_ras.apply(mask) for name, mask in marks.items()}
    view = draw_marks(
        case.id,
        turned,
        None if values is None else to_ras.apply(values),
        to_ras.shape(stored.geometry.shape),
        spacing_of(to_ras.affine(stored.affine, stored.geometry.shape)),
        window=window,
        sides_known=stored.geometry.has_world,
    )
    return Picture(caption, view)


def _readable(path: Path) -> Stored | None:
    try:
        return read_stored(path)
    except DataError:
        return None


def _marks(labels: Stored, grid: Geometry, finding: Finding, meaning: _Meaning) -> dict[str, Mask]:
    """Return what to outline of a label map, on the grid of the picture."""
    values = _on_grid(labels.image() if labels.is_scaled else labels.voxels, labels.geometry, grid)
    if finding.label:
        return _thinnest_piece(values, meaning.values[finding.label], finding.label, grid)
    broken = np.zeros(values.shape, bool)
    if values.dtype.kind == "f":
        broken = ~np.isfinite(values) | (values != np.rint(values))
    if finding.code == "non_integer_label":
        return {"not a whole number": broken}
    present, counts = np.unique(values[~broken], return_counts=True)
    by_size = [int(present[place]) for place in np.argsort(-counts, kind="stable") if present[place] != 0]
    undeclared = [value for value in by_size if value not in meaning.names]
    # What the finding is about; the rest would decide where the picture is taken.
    shown = undeclared if finding.code == "undeclared_label" else by_size
    marks: dict[str, Mask] = {}
    for value in sorted(shown[:MAX_MARKS]):
        name = meaning.names.get(value, f"undeclared value {value}")
        mask = np.asarray(values == value)
        marks[name] = marks[name] | mask if name in marks else mask
    return marks


def _on_grid(values: NDArray[Any], source: Geometry, target: Geometry) -> Shaped[np.ndarray, "D H W"]:
    """Return a label map on another grid, the nearest voxel in the world; itself where the grids are the same."""
    if not differences(source, target):
        return values
    matrix = np.linalg.inv(source.affine) @ target.affine
    return np.asarray(ndimage.affine_transform(values, matrix, output_shape=target.shape, order=0, cval=0))


def _thinnest_piece(values: NDArray[Any], wanted: Sequence[int], name: str, grid: Geometry) -> dict[str, Mask]:
    pieces, _ = ndimage.label(np.isin(values, wanted), structure=np.ones((3, 3, 3), bool))
    places = ndimage.find_objects(pieces)
    if not places:
        return {}
    extents = np.array([[part.stop - part.start for part in place] for place in places]) * np.array(grid.spacing_mm)
    thinnest = int(np.lexsort((extents.prod(axis=1), extents.min(axis=1)))[0])
    return {f"thinnest structure of {name}": np.asarray(pieces == thinnest + 1)}
