"""Is a data set usable? Every file is read once, every fault is found, none hides another.

Errors are what training refuses, warnings are what a person should look at, facts describe the whole. Cases are checked
in threads, which reading, unpacking and numpy let run side by side, and each thread holds one image at a time.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from sagittal.data.dataset import Case, Dataset
from sagittal.errors import DataError
from sagittal.plan.dataset import DatasetSpec
from sagittal.volumes.geometry import Geometry, axis_codes, describe, differences, is_sheared
from sagittal.volumes.io import read_stored
from sagittal.volumes.stored import Stored

Level = Literal["error", "warning", "fact"]

SAMPLE_VOXELS = 1 << 17
"""Voxels per image from which its intensity scale is estimated."""
SCALE_RANGE = 100.0
"""Intensity scales of one channel further apart than this are two orders of magnitude: worth a look."""
SCALE_OUTLIER = 10.0
"""Cases this far from the median scale are named."""
NAMED_CASES = 5


@dataclass(frozen=True)
class Finding:
    """One thing found: what it is, where, and what to do. `case` is empty where the whole data set is meant."""

    level: Level
    code: str
    case: str
    message: str
    fix: str = ""


@dataclass(frozen=True)
class Diagnosis:
    """All findings: errors first, then warnings, then facts."""

    findings: tuple[Finding, ...]

    @property
    def errors(self) -> tuple[Finding, ...]:
        """What training refuses."""
        return tuple(finding for finding in self.findings if finding.level == "error")

    @property
    def warnings(self) -> tuple[Finding, ...]:
        """What a person should look at."""
        return tuple(finding for finding in self.findings if finding.level == "warning")

    @property
    def ok(self) -> bool:
        """Whether there is no error."""
        return not self.errors

    def to_json(self) -> str:
        """Return `{"ok": bool, "findings": [{"level", "code", "case", "message", "fix"}]}`."""
        return json.dumps({"ok": self.ok, "findings": [dataclasses.asdict(each) for each in self.findings]}, indent=2)


@dataclass(frozen=True)
class _Image:
    """What is remembered of one image: the grid and a few numbers, never the voxels."""

    geometry: Geometry
    digest: str
    scale: float
    constant: bool


@dataclass(frozen=True)
class _Report:
    """What is remembered of one case. `voxels` counts each label value."""

    case: str
    findings: tuple[Finding, ...]
    images: Mapping[int, _Image]
    voxels: Mapping[int, int]


def diagnose(dataset: Dataset, workers: int = 1) -> Diagnosis:
    """Check every image and label map of a data set.

    Args:
        dataset: what `read_dataset` found.
        workers: threads; each holds one image in memory.
    """
    with ThreadPoolExecutor(max_workers=max(1, workers)) as pool:
        reports = list(pool.map(lambda case: _examine(case, dataset.spec), dataset.cases))
    findings = [finding for report in reports for finding in report.findings]
    findings += [*_unused_files(dataset), *_orientations(reports), *_intensity_scales(reports, dataset.spec)]
    findings += [*_no_foreground(reports, dataset.spec), *_duplicates(reports), *_facts(reports, dataset)]
    order: dict[Level, int] = {"error": 0, "warning": 1, "fact": 2}
    return Diagnosis(tuple(sorted(findings, key=lambda finding: order[finding.level])))


def _examine(case: Case, spec: DatasetSpec) -> _Report:
    findings: list[Finding] = []
    images: dict[int, _Image] = {}
    for channel, path in enumerate(case.images):
        name = f"channel {channel} ({spec.channel_names[channel]})"
        if not path.exists():
            message = f"{case.id}: {name} is missing: no file {path.name}."
            findings.append(Finding("error", "missing_channel", case.id, message, "Add the file, or remove the case."))
            continue
        try:
            image, found = _examine_image(read_stored(path), case.id, name)
        except DataError as error:
            findings.append(_refused(case.id, error))
            continue
        findings += found
        if images:
            findings += _other_grid(case.id, next(iter(images.values())).geometry, image.geometry, f"image and {name}")
        images[channel] = image
    voxels: dict[int, int] = {}
    if case.labels is not None:
        reference = images[min(images)].geometry if images else None
        voxels, found = _examine_labels(case, spec, reference)
        findings += found
    return _Report(case.id, tuple(findings), images, voxels)


def _refused(case: str, error: DataError) -> Finding:
    return Finding("error", error.code, case, f"{case}: {error.message}", "Replace the file, or remove the case.")


def _examine_image(stored: Stored, case: str, name: str) -> tuple[_Image, list[Finding]]:
    findings = list(_grid_findings(stored.geometry, case, name))
    values = stored.image()
    lowest, highest = float(values.min()), float(values.max())
    finite = bool(np.isfinite(lowest) and np.isfinite(highest))
    if not finite:
        count = int(values.size - np.isfinite(values).sum())
        message = f"{case}: {name} has {count} voxels that are NaN or infinite."
        findings.append(
            Finding("error", "non_finite", case, message, "Replace them, for example by the background value.")
        )
    constant = finite and lowest == highest
    if constant:
        message = f"{case}: {name} is constant: every voxel is {lowest:g}."
        findings.append(Finding("warning", "constant_image", case, message, "Look at the image; export it again."))
    digest = hashlib.sha256(np.ascontiguousarray(values).data).hexdigest()
    return _Image(stored.geometry, f"{values.shape}{digest}", _scale_of(values), constant), findings


def _grid_findings(geometry: Geometry, case: str, name: str) -> Iterator[Finding]:
    if min(geometry.shape) == 1:
        message = f"{case}: {name} is a single slice, shape (D, H, W) {geometry.shape}."
        yield Finding("error", "not_3d", case, message, "Stack the slices of a scan into one volume.")
    if not geometry.has_world:
        message = f"{case}: {name} has neither qform nor sform, so left and right are a guess."
        yield Finding("warning", "no_world", case, message, "Export the scan with its orientation, or check it by eye.")
    if is_sheared(geometry.affine):
        message = f"{case}: {name} has a sheared affine: its axes are not at right angles (a gantry tilt?)."
        yield Finding("warning", "sheared", case, message, "Resample the case onto a rectangular grid.")


def _scale_of(values: NDArray[np.float32]) -> float:
    """Return the spread of the non-zero intensities, 1st to 99th percentile, from a sample; 0 where there are none."""
    sample = values.reshape(-1)[:: max(1, values.size // SAMPLE_VOXELS)]
    sample = sample[np.isfinite(sample) & (sample != 0)]
    if sample.size == 0:
        return 0.0
    low, high = np.percentile(sample, (1, 99))
    return float(high - low)


def _examine_labels(case: Case, spec: DatasetSpec, reference: Geometry | None) -> tuple[dict[int, int], list[Finding]]:
    assert case.labels is not None
    if not case.labels.exists():
        message = f"{case.id}: the label map is missing: no file {case.labels.name}."
        return {}, [Finding("error", "missing_label", case.id, message, "Add the file, or remove the case.")]
    findings: list[Finding] = []
    try:
        stored = read_stored(case.labels)
        if reference is not None:
            findings += _other_grid(case.id, reference, stored.geometry, "image and label")
        labels = stored.labels()
    except DataError as error:
        return {}, [*findings, _refused(case.id, error)]
    if stored.voxels.dtype.kind == "f":
        message = f"{case.id}: the label map is stored as {stored.voxels.dtype}; its values are whole numbers."
        findings.append(Finding("warning", "float_label", case.id, message, "Save it with an integer type."))
    voxels = _count(labels)
    undeclared = {value: count for value, count in voxels.items() if value not in spec.declared_values}
    if undeclared:
        listed = ", ".join(f"{value} ({count} voxels)" for value, count in sorted(undeclared.items())[:10])
        declared = ", ".join(str(value) for value in sorted(spec.declared_values))
        message = f"{case.id}: label values that dataset.json lacks: {listed}. Declared are {declared}."
        findings.append(
            Finding(
                "error", "undeclared_label", case.id, message, "Declare them in dataset.json, or correct the label map."
            )
        )
    elif not spec.foreground_values & voxels.keys():
        message = f"{case.id}: the label map is empty: no voxel of {', '.join(label.name for label in spec.labels)}."
        findings.append(Finding("warning", "empty_label", case.id, message, "Check that nothing was left out."))
    return voxels, findings


def _no_foreground(reports: Sequence[_Report], spec: DatasetSpec) -> Iterator[Finding]:
    read = [report.voxels for report in reports if report.voxels]
    if read and not any(spec.foreground_values & voxels.keys() for voxels in read):
        names = ", ".join(label.name for label in spec.labels)
        message = f"none of {len(read)} label maps has a voxel of {names}: there is nothing to learn."
        yield Finding("error", "no_foreground", "", message, "Check that labels and images belong together.")


def _count(labels: NDArray[Any]) -> dict[int, int]:
    if labels.dtype == np.uint8 or labels.dtype == np.uint16:
        counts = np.bincount(labels.reshape(-1))
        return {int(value): int(counts[value]) for value in np.flatnonzero(counts)}
    values, counts = np.unique(labels, return_counts=True)
    return {int(value): int(count) for value, count in zip(values, counts, strict=True)}


def _other_grid(case: str, first: Geometry, second: Geometry, what: str) -> list[Finding]:
    found = differences(first, second)
    if not found:
        return []
    message = f"{case}: {what} grids differ ({describe(found)})."
    fix = "Resample one onto the other's grid, or correct the header that is wrong."
    return [Finding("error", "other_grid", case, message, fix)]


def _unused_files(dataset: Dataset) -> Iterator[Finding]:
    spec = dataset.spec
    for path in dataset.unused:
        if path.parent.name == "imagesTr" and path.name.endswith(spec.file_ending):
            message = f"{path.name} in imagesTr is none of the {len(spec.channel_names)} declared channels of a case."
            fix = f"Name images CASE_0000{spec.file_ending}, declare the channel in dataset.json, or remove the file."
            yield Finding("error", "undeclared_channel", "", message, fix)
        else:
            message = f"{path.name} in {path.parent.name} belongs to no case and is not used."
            yield Finding("warning", "unused_file", "", message, "Add the images that it belongs to, or remove it.")
    if dataset.declared_cases is not None and dataset.declared_cases != len(dataset.cases):
        message = f"dataset.json says numTraining {dataset.declared_cases}; {len(dataset.cases)} cases were found."
        yield Finding("warning", "case_count", "", message, "Check that no case is missing; correct numTraining.")


def _orientations(reports: Sequence[_Report]) -> Iterator[Finding]:
    cases: dict[str, list[str]] = defaultdict(list)
    for report in reports:
        if report.images:
            cases[axis_codes(report.images[min(report.images)].geometry.affine)].append(report.case)
    if len(cases) > 1:
        listed = "; ".join(
            f"{codes} {len(names)} ({_named(names)})"
            for codes, names in sorted(cases.items(), key=lambda item: -len(item[1]))
        )
        message = f"the axis order (where D, H, W point) differs between cases: {listed}."
        fix = "Nothing, if the headers are right: cases are brought into one order. Check one of each by eye."
        yield Finding("warning", "orientation", "", message, fix)


def _intensity_scales(reports: Sequence[_Report], spec: DatasetSpec) -> Iterator[Finding]:
    for channel, name in enumerate(spec.channel_names):
        scales = {
            report.case: report.images[channel].scale
            for report in reports
            if channel in report.images and report.images[channel].scale > 0
        }
        if not scales or max(scales.values()) < SCALE_RANGE * min(scales.values()):
            continue
        middle = float(np.median(list(scales.values())))
        far = [case for case, scale in scales.items() if not middle / SCALE_OUTLIER < scale < middle * SCALE_OUTLIER]
        message = (
            f"intensity scales of channel {channel} ({name}) differ by orders of magnitude: "
            f"from {min(scales.values()):.3g} to {max(scales.values()):.3g}, median {middle:.3g}; "
            f"far from it are {len(far)} cases ({_named(far)})."
        )
        fix = "Harmless where images are normalised one by one (MR). For CT, check that all are in Hounsfield units."
        yield Finding("warning", "intensity_scale", "", message, fix)


def _duplicates(reports: Sequence[_Report]) -> Iterator[Finding]:
    same: dict[str, list[tuple[str, int]]] = defaultdict(list)
    for report in reports:
        for channel, image in report.images.items():
            if not image.constant:
                same[image.digest].append((report.case, channel))
    for places in same.values():
        if len(places) > 1:
            listed = ", ".join(f"{case} channel {channel}" for case, channel in places[:NAMED_CASES])
            message = (
                f"{len(places)} images have the same voxels: {listed}{'' if len(places) <= NAMED_CASES else ', ...'}."
            )
            fix = "Remove the copies: a scan in both training and validation makes scores too good."
            yield Finding("warning", "duplicate", places[0][0], message, fix)


def _facts(reports: Sequence[_Report], dataset: Dataset) -> Iterator[Finding]:
    yield Finding(
        "fact", "cases", "", f"{len(dataset.cases)} cases with {len(dataset.spec.channel_names)} channels each."
    )
    grids = [report.images[min(report.images)].geometry for report in reports if report.images]
    if grids:
        for code, what, rows in (
            ("shapes", "voxels along D, H, W", [grid.shape for grid in grids]),
            ("spacings", "spacing_mm along D, H, W", [grid.spacing_mm for grid in grids]),
        ):
            low, middle, high = (_row(function(rows, axis=0)) for function in (np.min, np.median, np.max))
            yield Finding("fact", code, "", f"{what}: median {middle}, from {low} to {high}.")
    for label in dataset.spec.labels:
        counts = [sum(report.voxels.get(value, 0) for value in label.values) for report in reports]
        cases = sum(count > 0 for count in counts)
        values = ", ".join(str(value) for value in label.values)
        yield Finding("fact", "label", "", f"label {label.name} ({values}): {sum(counts)} voxels, in {cases} cases.")


def _row(values: NDArray[Any]) -> str:
    return " x ".join(f"{value:.4g}" for value in values)


def _named(cases: Sequence[str]) -> str:
    return ", ".join(cases[:NAMED_CASES]) + (", ..." if len(cases) > NAMED_CASES else "")
