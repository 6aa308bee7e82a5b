"""What shows only beside the other cases: stray files, orientations, scales, copies, what is nowhere labelled."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sagittal.data.dataset import Dataset
from sagittal.data.doctor.case import CaseReport
from sagittal.data.doctor.findings import Finding, Level, counted, named
from sagittal.data.doctor.structures import ThinStructures
from sagittal.plan.base import TripleMm
from sagittal.plan.dataset import DatasetSpec
from sagittal.volumes.geometry import axis_codes

SCALE_RANGE = 100.0
"""Intensity scales of one channel further apart than this are two orders of magnitude: worth a look."""
SCALE_OUTLIER = 10.0
"""Cases this far from the median scale are named."""
SHOWN_COPIES = 5


def unused_files(dataset: Dataset) -> Iterator[Finding]:
    """Yield what lies in the folders and belongs to no case, and a number of cases that isn't the declared one."""
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


def replaced_values(spec: DatasetSpec, replaced: Mapping[int, int]) -> Iterator[Finding]:
    """Yield an error for every declared value that no label map may hold."""
    for value, stand_in in replaced.items():
        names = [label.name for label in spec.labels if stand_in in label.values] or ["ignore"]
        message = (
            f"dataset.json gives label {', '.join(names)} the value {value}; label values must lie between 1 and 65535."
        )
        fix = "'sagittal doctor --fix OUT' replaces it in a copy; predictions get the original value back."
        yield Finding("error", "label_value", "", message, fix)


def orientations(reports: Sequence[CaseReport]) -> Iterator[Finding]:
    """Yield a warning where cases store their axes in different orders."""
    cases: dict[str, list[str]] = defaultdict(list)
    for report in reports:
        if report.geometry is not None:
            cases[axis_codes(report.geometry.affine)].append(report.case)
    if len(cases) > 1:
        ordered = sorted(cases.items(), key=lambda item: -len(item[1]))
        listed = "; ".join(f"{codes} {len(names)} ({named(names)})" for codes, names in ordered)
        message = f"the axis order (where D, H, W point) differs between cases: {listed}."
        fix = (
            "Nothing, if the headers are right: cases are brought into one order. Check one of each by eye. "
            "'sagittal doctor --fix' stores all in one order."
        )
        look_at = tuple(names[0] for _, names in ordered)
        yield Finding("warning", "orientation", "", message, fix, look_at=look_at)


def header_noise(reports: Sequence[CaseReport]) -> Iterator[Finding]:
    """Yield a fact where files of one case state the same grid in other digits."""
    noisy = [report.case for report in reports if report.header_noise]
    if noisy:
        message = (
            f"in {counted(len(noisy), 'case')} ({named(noisy)}) image and label headers differ within the tolerances."
        )
        fix = "Nothing; other tools may be stricter: 'sagittal doctor --fix' makes them equal."
        yield Finding("fact", "header_noise", "", message, fix)


def intensity_scales(reports: Sequence[CaseReport], spec: DatasetSpec) -> Iterator[Finding]:
    """Yield a warning for every channel whose cases differ by orders of magnitude."""
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
            f"far from it {'is' if len(far) == 1 else 'are'} {counted(len(far), 'case')} ({named(far)})."
        )
        fix = "Harmless where images are normalised one by one (MR). For CT, check that all are in Hounsfield units."
        usual = min(scales, key=lambda case: abs(scales[case] - middle))
        yield Finding("warning", "intensity_scale", "", message, fix, look_at=(*far[:2], usual), channel=channel)


def missing_labels(reports: Sequence[CaseReport], spec: DatasetSpec) -> Iterator[Finding]:
    """Yield an error where no case has any foreground, else a warning for every label that none has."""
    read = [report.voxels for report in reports if report.voxels]
    if not read:
        return
    if not any(spec.foreground_values & voxels.keys() for voxels in read):
        names = ", ".join(label.name for label in spec.labels)
        message = f"none of {len(read)} label maps has a voxel of {names}: there is nothing to learn."
        yield Finding("error", "no_foreground", "", message, "Check that labels and images belong together.")
        return
    for label in spec.labels:
        if not any(set(label.values) & voxels.keys() for voxels in read):
            values = ", ".join(str(value) for value in label.values)
            message = (
                f"label {label.name} ({values}) is declared, and none of {len(read)} label maps has a voxel of it."
            )
            fix = "Check the values in dataset.json, or remove the label from it: a network can't learn it."
            yield Finding("warning", "absent_label", "", message, fix)


def regions_order(spec: DatasetSpec) -> Iterator[Finding]:
    """Yield a warning for every value whose regions the value that is written for it does not stand for.

    Regions are written in the order of regions_class_order, later ones over earlier: what a perfect network finds of a
    value is written as the value of the last of its regions.
    """
    order = spec.regions_class_order
    if order is None:
        return

    def joined(value: int) -> list[int]:
        return [place for place, label in enumerate(spec.labels) if value in label.values]

    def told(places: Sequence[int]) -> str:
        return ", ".join(spec.labels[place].name for place in places) or "no region"

    for value in sorted(spec.foreground_values):
        wanted = joined(value)
        written = order[wanted[-1]]
        if joined(written) != wanted:
            message = (
                f"regions_class_order {list(order)}: value {value} ({told(wanted)}) is predicted as {written} "
                f"({told(joined(written))}), so even a perfect prediction would be wrong there."
            )
            fix = (
                "Give each region, in the order of 'labels', a value that is in it and in all that hold it, the whole "
                "first: [2, 1, 3] for regions [1, 2, 3], [1, 3] and [3]. Values that no order tells apart need a "
                "region of their own."
            )
            yield Finding("warning", "regions_order", "", message, fix)


def copies(reports: Sequence[CaseReport]) -> list[list[tuple[str, int, str]]]:
    """Return the groups of images, as (case, channel, hash in RAS order), that have the same voxels in some order."""
    same: dict[str, list[tuple[str, int, str]]] = defaultdict(list)
    for report in reports:
        for channel, image in report.images.items():
            if not image.constant:
                same[image.signature.any_order].append((report.case, channel, image.signature.in_ras))
    return [group for group in same.values() if len(group) > 1]


def duplicates(groups: Sequence[Sequence[tuple[str, int, str]]]) -> Iterator[Finding]:
    """Yield a warning for every group of `copies`."""
    for group in groups:
        listed = ", ".join(f"{case} channel {channel}" for case, channel, _ in group[:SHOWN_COPIES])
        more = ", ..." if len(group) > SHOWN_COPIES else ""
        turned = "" if len({in_ras for _, _, in_ras in group}) == 1 else ", turned or mirrored"
        message = f"{len(group)} images have the same voxels{turned}: {listed}{more}."
        fix = "Remove the copies: a scan in both training and validation makes scores too good."
        look_at = tuple(dict.fromkeys(case for case, _, _ in group))[:2]
        yield Finding("warning", "duplicate", group[0][0], message, fix, look_at=look_at, channel=group[0][1])


def tiny_structures(reports: Sequence[CaseReport], spec: DatasetSpec, target_mm: TripleMm | None) -> Iterator[Finding]:
    """Yield for each label what the planned spacing erases, as a warning, or makes thinner than a voxel, as a fact."""
    for label in spec.labels:
        thin = {report.case: report.thin[label.name] for report in reports if label.name in report.thin}
        if not thin or target_mm is None:
            continue
        worst = max(thin, key=lambda case: (thin[case].erased, -thin[case].thinnest_mm / thin[case].planned_mm))
        total = _summed(thin, "structures")
        counts = f"{_summed(thin, 'thin')} of {counted(total, 'structure')} in {counted(len(thin), 'case')}"
        thinnest: ThinStructures = min(thin.values(), key=lambda one: one.thinnest_mm / one.planned_mm)
        planned = " x ".join(f"{length:.3g}" for length in target_mm)
        message = (
            f"label {label.name}: {counts} are thinner than a voxel of the planned spacing, {planned} mm (D, H, W in "
            f"RAS order); the thinnest measures {thinnest.thinnest_mm:.3g} of {thinnest.planned_mm:.3g} mm"
        )
        erased = _summed(thin, "erased")
        if erased:
            gone = [case for case in thin if thin[case].erased == thin[case].structures]
            message += f". {erased} would have no voxel left, most of them in {worst}"
            message += f"; nothing of the label would be left in {len(gone)} ({named(gone)})" if gone else ""
        fix = "Plan with a finer spacing (--set preprocessing.spacing_mm=...), or accept that these are never found."
        level: Level = "warning" if erased else "fact"
        yield Finding(
            level, "tiny_structure", worst if erased else "", f"{message}.", fix, look_at=(worst,), label=label.name
        )


def _summed(thin: Mapping[str, ThinStructures], name: str) -> int:
    return sum(int(getattr(one, name)) for one in thin.values())


def facts(reports: Sequence[CaseReport], dataset: Dataset) -> Iterator[Finding]:
    """Yield what describes the whole: numbers of cases, shapes, spacings, labels."""
    cases, channels = len(dataset.cases), len(dataset.spec.channel_names)
    yield Finding("fact", "cases", "", f"{cases} cases with {channels} channels each.")
    grids = [report.geometry for report in reports if report.geometry is not None]
    if grids:
        for code, what, rows in (
            ("shapes", "voxels along D, H, W", [grid.shape for grid in grids]),
            ("spacings", "spacing_mm along D, H, W", [grid.spacing_mm for grid in grids]),
        ):
            low, middle, high = (_row(function(rows, axis=0)) for function in (np.min, np.median, np.max))
            yield Finding("fact", code, "", f"{what}: median {middle}, from {low} to {high}.")
    for label in dataset.spec.labels:
        counts = [sum(report.voxels.get(value, 0) for value in label.values) for report in reports]
        present = sum(count > 0 for count in counts)
        values = ", ".join(str(value) for value in label.values)
        yield Finding("fact", "label", "", f"label {label.name} ({values}): {sum(counts)} voxels, in {present} cases.")


def _row(values: NDArray[Any]) -> str:
    return " x ".join(f"{value:.4g}" for value in values)
