"""One case: every file is read once and reduced to findings and a few numbers; one image is held at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from jaxtyping import Bool, Float32, Integer
from scipy import ndimage

from sagittal.data.dataset import Case
from sagittal.data.doctor.findings import Finding
from sagittal.data.doctor.sides import Extent, Sides
from sagittal.data.doctor.signature import Signature, signature
from sagittal.data.doctor.structures import ThinStructures, may_erase, thin_structures
from sagittal.errors import DataError
from sagittal.plan.base import Triple, TripleMm
from sagittal.plan.dataset import DatasetSpec
from sagittal.volumes.crop import Box
from sagittal.volumes.geometry import Geometry, describe, differences, is_sheared, reorientation_to_ras
from sagittal.volumes.io import read_stored
from sagittal.volumes.stored import Stored, smallest_label_type

SAMPLE_VOXELS = 1 << 17
"""Voxels per image from which its intensity scale is estimated."""
HEADER_NOISE = 1e-12
"""Two affines that differ by more than this are not the same numbers; within the tolerances it is still one grid."""


@dataclass(frozen=True)
class Terms:
    """What cases are held against.

    Attributes:
        spec: what dataset.json declares, with values that label files can hold.
        replaced: declared values that no label map may hold, and the value of `spec` that stands for each.
        target_mm: the spacing that cases will have, along D, H, W in RAS order; None where it is not known.
    """

    spec: DatasetSpec
    replaced: Mapping[int, int] = field(default_factory=dict)
    target_mm: TripleMm | None = None

    @property
    def allowed_values(self) -> frozenset[int]:
        """The values that label files may hold, as they are."""
        return (self.spec.declared_values - frozenset(self.replaced.values())) | frozenset(self.replaced)


@dataclass(frozen=True)
class ImageSummary:
    """What is remembered of one image: the grid and a few numbers, never the voxels."""

    geometry: Geometry
    signature: Signature
    scale: float
    constant: bool


@dataclass(frozen=True)
class CaseReport:
    """What is remembered of one case.

    Attributes:
        case: its id.
        findings: what is wrong with this case alone.
        images: by channel; those that can be read.
        voxels: of each label value of `Terms.spec`.
        sides: where labels lie along x; None where there are no labels or no direction.
        thin: by label name, what the planned spacing may erase.
        header_noise: whether a channel or the label map states the grid of the first channel in other digits.
    """

    case: str
    findings: tuple[Finding, ...]
    images: Mapping[int, ImageSummary]
    voxels: Mapping[int, int]
    sides: Sides | None = None
    thin: Mapping[str, ThinStructures] = field(default_factory=dict)
    header_noise: bool = False

    @property
    def geometry(self) -> Geometry | None:
        """The grid of the first channel that can be read."""
        return self.images[min(self.images)].geometry if self.images else None


def examine(case: Case, terms: Terms) -> CaseReport:
    """Check the images and the label map of a case."""
    findings: list[Finding] = []
    images: dict[int, ImageSummary] = {}
    for channel, path in enumerate(case.images):
        name = f"channel {channel} ({terms.spec.channel_names[channel]})"
        if not path.exists():
            message = f"{case.id}: {name} is missing: no file {path.name}."
            findings.append(Finding("error", "missing_channel", case.id, message, "Add the file, or remove the case."))
            continue
        try:
            image, found = _examine_image(read_stored(path), case.id, name, channel)
        except DataError as error:
            findings.append(_refused(case.id, error, channel))
            continue
        findings += found
        if images:
            first = images[min(images)].geometry
            findings += _other_grid(case.id, first, image.geometry, f"image and {name}", channel)
        images[channel] = image
    grid = images[min(images)].geometry if images else None
    labels = _LabelReport({}, ()) if case.labels is None else _examine_labels(case, terms, grid)
    noise = labels.header_noise or (
        grid is not None and any(_is_noise(grid, image.geometry) for image in images.values())
    )
    return CaseReport(
        case.id, (*findings, *labels.findings), images, labels.voxels, labels.sides, labels.thin, header_noise=noise
    )


def _refused(case: str, error: DataError, channel: int = 0) -> Finding:
    fix = "Replace the file, or remove the case."
    return Finding("error", error.code, case, f"{case}: {error.message}", fix, channel=channel)


def _examine_image(stored: Stored, case: str, name: str, channel: int) -> tuple[ImageSummary, list[Finding]]:
    findings = list(_grid_findings(stored.geometry, case, name, channel))
    values = stored.image()
    lowest, highest = float(values.min()), float(values.max())
    finite = bool(np.isfinite(lowest) and np.isfinite(highest))
    if not finite:
        count = int(values.size - np.isfinite(values).sum())
        message = f"{case}: {name} has {count} voxels that are NaN or infinite."
        fix = "Replace them, for example by the background value."
        findings.append(Finding("error", "non_finite", case, message, fix, channel=channel))
    constant = finite and lowest == highest
    if constant:
        what = "empty" if lowest == 0 else "constant"
        message = f"{case}: {name} is {what}: every voxel is {lowest:g}."
        fix = "Look at the image; export it again."
        findings.append(Finding("warning", "constant_image", case, message, fix, channel=channel))
    found = signature(values, reorientation_to_ras(stored.affine))
    return ImageSummary(stored.geometry, found, _scale_of(values), constant), findings


def _grid_findings(geometry: Geometry, case: str, name: str, channel: int) -> Iterator[Finding]:
    if min(geometry.shape) == 1:
        message = f"{case}: {name} is a single slice, shape (D, H, W) {geometry.shape}."
        fix = "Stack the slices of a scan into one volume."
        yield Finding("error", "not_3d", case, message, fix, channel=channel)
    if not geometry.has_world:
        message = (
            f"{case}: {name} says nothing of its orientation (in NIfTI, qform and sform codes are both 0), so left and "
            "right are a guess."
        )
        fix = "Export the scan with its orientation, or check it by eye and write it into the header."
        yield Finding("warning", "no_world", case, message, fix, channel=channel)
    if is_sheared(geometry.affine):
        message = f"{case}: {name} has a sheared affine: its axes are not at right angles (a gantry tilt?)."
        fix = "Resample the case onto a rectangular grid."
        yield Finding("warning", "sheared", case, message, fix, channel=channel)


def _scale_of(values: Float32[np.ndarray, "D H W"]) -> float:
    """Return the spread of the non-zero intensities, 1st to 99th percentile, from a sample; 0 where there are none."""
    sample = values.reshape(-1)[:: max(1, values.size // SAMPLE_VOXELS)]
    sample = sample[np.isfinite(sample) & (sample != 0)]
    if sample.size == 0:
        return 0.0
    low, high = np.percentile(sample, (1, 99))
    return float(high - low)


@dataclass(frozen=True)
class _LabelReport:
    voxels: Mapping[int, int]
    findings: tuple[Finding, ...]
    sides: Sides | None = None
    thin: Mapping[str, ThinStructures] = field(default_factory=dict)
    header_noise: bool = False


def _examine_labels(case: Case, terms: Terms, reference: Geometry | None) -> _LabelReport:
    assert case.labels is not None
    if not case.labels.exists():
        message = f"{case.id}: the label map is missing: no file {case.labels.name}."
        return _LabelReport(
            {}, (Finding("error", "missing_label", case.id, message, "Add the file, or remove the case."),)
        )
    findings: list[Finding] = []
    try:
        stored = read_stored(case.labels)
        if reference is not None:
            findings += _other_grid(case.id, reference, stored.geometry, "image and label")
        labels = stored.labels()
    except DataError as error:
        return _LabelReport({}, (*findings, _refused(case.id, error)))
    if stored.voxels.dtype.kind == "f":
        message = f"{case.id}: the label map is stored as {stored.voxels.dtype}; its values are whole numbers."
        fix = "Save it with an integer type; 'sagittal doctor --fix' does."
        findings.append(Finding("warning", "float_label", case.id, message, fix))
    found = _count(labels)
    findings += _value_findings(case.id, found, terms)
    voxels = {terms.replaced.get(value, value): count for value, count in found.items()}
    noise = reference is not None and _is_noise(reference, stored.geometry)
    if not terms.spec.foreground_values & voxels.keys():
        return _LabelReport(voxels, tuple(findings), header_noise=noise)
    labels = relabelled(labels, terms.replaced)
    places = _places(labels, terms.spec)
    sides = _sides(case.id, labels, places, stored.geometry) if stored.geometry.has_world else None
    thin = _thin(labels, places, stored.geometry, terms)
    return _LabelReport(voxels, tuple(findings), sides, thin, noise)


def _value_findings(case: str, voxels: Mapping[int, int], terms: Terms) -> Iterator[Finding]:
    undeclared = {value: count for value, count in voxels.items() if value not in terms.allowed_values}
    spec = terms.spec
    present = {terms.replaced.get(value, value) for value in voxels}
    if undeclared:
        listed = ", ".join(f"{value} ({count} voxels)" for value, count in sorted(undeclared.items())[:10])
        declared = ", ".join(str(value) for value in sorted(terms.allowed_values))
        message = f"{case}: label values that dataset.json lacks: {listed}. Declared are {declared}."
        fix = (
            "Declare them in dataset.json, or correct the label map; "
            "'sagittal doctor --fix OUT --label VALUE=NAME' declares them in a copy."
        )
        yield Finding("error", "undeclared_label", case, message, fix)
    elif not spec.foreground_values & present:
        message = f"{case}: the label map is empty: no voxel of {', '.join(label.name for label in spec.labels)}."
        yield Finding("warning", "empty_label", case, message, "Check that nothing was left out.")


def _count(labels: Integer[np.ndarray, "D H W"]) -> dict[int, int]:
    if labels.dtype == np.uint8 or labels.dtype == np.uint16:
        counts = np.bincount(labels.reshape(-1))
        return {int(value): int(counts[value]) for value in np.flatnonzero(counts)}
    values, counts = np.unique(labels, return_counts=True)
    return {int(value): int(count) for value, count in zip(values, counts, strict=True)}


def relabelled(labels: Integer[np.ndarray, "D H W"], replaced: Mapping[int, int]) -> Integer[np.ndarray, "D H W"]:
    """Return the label map with every key of `replaced` turned into its value, in the smallest type that holds it.

    The array itself comes back where nothing is to be replaced.
    """
    masks = {new: labels == old for old, new in replaced.items() if (labels == old).any()}
    if not masks:
        return labels
    kept = labels.copy()
    for mask in masks.values():
        kept[mask] = 0
    kept = kept.astype(smallest_label_type(int(kept.min()), max(int(kept.max()), *masks)))
    for new, mask in masks.items():
        kept[mask] = new
    return kept


def _places(labels: Integer[np.ndarray, "D H W"], spec: DatasetSpec) -> dict[int, Box]:
    """Return the box of every foreground value that is present."""
    if labels.min() < 0 or labels.max() > max(spec.foreground_values):
        labels = np.where(np.isin(labels, sorted(spec.foreground_values)), labels, 0).astype(np.uint16)
    found = ndimage.find_objects(labels)
    return {
        value: Box(tuple(part.start for part in found[value - 1]), tuple(part.stop for part in found[value - 1]))
        for value in sorted(spec.foreground_values)
        if value <= len(found) and found[value - 1] is not None
    }


def _sides(
    case: str, labels: Integer[np.ndarray, "D H W"], places: Mapping[int, Box], geometry: Geometry
) -> Sides | None:
    across = geometry.affine[0, :3]
    middle = np.array([(size - 1) / 2 for size in geometry.shape])
    half_width = float(np.abs(across) @ np.array(geometry.shape)) / 2
    extents = {}
    for value, box in places.items():
        mask = labels[box.slices] == value
        mean, variance = geometry.affine[0, 3], 0.0
        for axis in range(3):
            counts = mask.sum(axis=tuple(other for other in range(3) if other != axis))
            position = np.arange(box.start[axis], box.stop[axis])
            centre = float(counts @ position / counts.sum())
            mean += across[axis] * centre
            variance += across[axis] ** 2 * float(counts @ (position - centre) ** 2 / counts.sum())
        extents[value] = Extent(int(mask.sum()), float(mean), variance)
    return Sides(case, float(across @ middle + geometry.affine[0, 3]), half_width, extents)


def _thin(
    labels: Integer[np.ndarray, "D H W"], places: Mapping[int, Box], geometry: Geometry, terms: Terms
) -> dict[str, ThinStructures]:
    if terms.target_mm is None:
        return {}
    target = in_stored_order(terms.target_mm, geometry)
    if not may_erase(geometry.spacing_mm, target):
        return {}
    found = {}
    for label in terms.spec.labels:
        boxes = [places[value] for value in label.values if value in places]
        if not boxes:
            continue
        whole = boxes[0]
        for box in boxes[1:]:
            whole = whole.union(box)
        mask: Bool[np.ndarray, "d h w"] = np.isin(labels[whole.slices], label.values)
        thin = thin_structures(mask, whole, geometry.shape, geometry.spacing_mm, target)
        if thin is not None:
            found[label.name] = thin
    return found


def in_stored_order(ras: TripleMm, geometry: Geometry) -> TripleMm:
    """Return lengths along RAS order's D, H, W as lengths along the file's own axes."""
    permutation: Triple = reorientation_to_ras(geometry.affine).permutation
    d, h, w = (ras[permutation.index(axis)] for axis in range(3))
    return d, h, w


def _other_grid(case: str, first: Geometry, second: Geometry, what: str, channel: int = 0) -> list[Finding]:
    found = differences(first, second)
    if not found:
        return []
    message = f"{case}: {what} grids differ ({describe(found)})."
    fix = "Resample one onto the other's grid, or correct the header that is wrong."
    return [Finding("error", "other_grid", case, message, fix, channel=channel)]


def _is_noise(first: Geometry, second: Geometry) -> bool:
    apart: np.ndarray[Any, np.dtype[np.float64]] = np.abs(first.affine - second.affine)
    return bool(apart.max() > HEADER_NOISE) and not differences(first, second)
