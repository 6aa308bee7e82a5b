"""The DICOM objects of a label map: which there are, what they are called and how one call writes them.

CASE.seg.dcm        segmentation, a bit per voxel and class
CASE.labelmap.dcm   segmentation, a number per voxel
CASE.rtstruct.dcm   contours
CASE.overview.dcm   a picture
CASE.sr.dcm         volumes in mL
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from sagittal.errors import PlanError, did_you_mean
from sagittal.inference.run_report import Flag
from sagittal.plan.dataset import DatasetSpec
from sagittal.report.colours import CLASS_COLOURS, PREDICTION_COLOUR
from sagittal.report.prediction import preview_png
from sagittal.volumes import Volume
from sagittal.volumes.dicom_objects import Origin, Segment, segments_of
from sagittal.volumes.dicom_overview import write_overview
from sagittal.volumes.dicom_rtstruct import write_rtstruct
from sagittal.volumes.dicom_segmentation import SegKind, require_apart, write_dicom_seg
from sagittal.volumes.dicom_source import DicomSource
from sagittal.volumes.dicom_volumes import write_volumes_sr

SEG, LABELMAP, RTSTRUCT, OVERVIEW, REPORT = KINDS = ("seg", "labelmap", "rtstruct", "overview", "sr")
NO_DICOM = Flag(code="no_dicom", message="no DICOM series, so that no DICOM objects were written")
_TITLE = "Overview"
"""Not the name of the case, which may be the patient's."""


def parse_kinds(text: str | None, option: str = "--dicom") -> tuple[str, ...]:
    """Return the kinds of objects in `seg,rtstruct`, each once and in their order.

    Raises:
        PlanError: a kind that there is not.
    """
    asked = {part.strip().lower() for part in (text or "").split(",") if part.strip()}
    for kind in sorted(asked - set(KINDS)):
        raise PlanError(f"{option} {kind}: no such DICOM object.{did_you_mean(kind, KINDS)}", code="usage")
    if text is not None and not asked:
        raise PlanError(f"{option}: no object is named. Known: {', '.join(KINDS)}.", code="usage")
    return tuple(kind for kind in KINDS if kind in asked)


def require_writable_kinds(kinds: Sequence[str], spec: DatasetSpec, option: str = "--dicom") -> None:
    """Refuse before any work what can't be written of these classes.

    Raises:
        DataError: regions overlap, which a label map can't hold.
    """
    if LABELMAP in kinds:
        require_apart(segments_of(spec), f"{option} {LABELMAP}")


def dicom_paths(folder: Path, case: str) -> dict[str, Path]:
    """Return where the objects of a case are written, by kind."""
    return {kind: folder / f"{case}.{kind}.dcm" for kind in KINDS}


def segments_with_colours(spec: DatasetSpec) -> tuple[Segment, ...]:
    """Return the segments in the colours of the reports."""
    return segments_of(spec, (PREDICTION_COLOUR,) if len(spec.labels) == 1 else CLASS_COLOURS)


def write_dicom_outputs(
    paths: Mapping[str, Path],
    labels: Volume,
    spec: DatasetSpec,
    source: DicomSource,
    scan: Volume | None,
    volumes_ml: Mapping[str, float],
    origin: Origin,
    *,
    nearest: bool = False,
) -> tuple[Path, ...]:
    """Write the objects that `paths` has a kind for, and return their paths.

    Args:
        paths: by kind.
        labels: one channel, with the original values of `label_map`.
        spec: what its values mean.
        source: the series that the objects refer to.
        scan: on the labels' grid, for the overview; None: outlines alone.
        volumes_ml: of each class or region, by name.
        origin: what made the labels.
        nearest: resample labels of another grid onto the series'.

    Raises:
        DataError: the labels lie on another grid than the series, or a label map can't hold them.
        ResourceError: a file can't be written.
    """
    segments = segments_with_colours(spec)
    written: dict[str, Path] = {}
    for kind in [kind for kind in KINDS if kind in paths]:
        path = paths[kind]
        if kind in (SEG, LABELMAP):
            seg_kind: SegKind = "binary" if kind == SEG else "labelmap"
            written[kind] = write_dicom_seg(
                labels, segments, source, path, kind=seg_kind, origin=origin, nearest=nearest
            )
        elif kind == RTSTRUCT:
            written[kind] = write_rtstruct(labels, segments, source, path, origin=origin, nearest=nearest)
        elif kind == OVERVIEW:
            png = preview_png(_TITLE, labels, scan, spec, volumes_ml)
            picture = np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))
            written[kind] = write_overview(picture, source, path)
        else:
            measured = written.get(SEG) or written.get(LABELMAP)
            written[kind] = write_volumes_sr(volumes_ml, segments, source, path, origin=origin, segmentation=measured)
    return tuple(written.values())
