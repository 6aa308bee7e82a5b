"""The files that are made of a prediction; each appears whole or not at all, and is listed with size and hash.

    labels.nii.gz           the label map, on exactly the scan's grid
    image.nii.gz            the first channel as it was read
    volumes.json            mL of each class or region
    preview.png             three planes
    labels.seg.dcm ...      DICOM objects of a DICOM series, see `WRITERS`

A new DICOM object is one entry in `WRITERS` (and its name in `jobs.Format`).
"""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from sagittal.errors import SagittalError
from sagittal.plan.base import write_atomically
from sagittal.plan.dataset import DatasetSpec
from sagittal.report.prediction import preview_png
from sagittal.serve.jobs import Format, ResultFile
from sagittal.volumes import Volume
from sagittal.volumes.dicom_objects import Origin, Segment, segments_of
from sagittal.volumes.dicom_overview import write_overview
from sagittal.volumes.dicom_rtstruct import write_rtstruct
from sagittal.volumes.dicom_segmentation import write_dicom_seg
from sagittal.volumes.dicom_source import DicomSource, read_source
from sagittal.volumes.dicom_volumes import write_volumes_sr

NIFTI, PNG, JSON, DICOM = "application/gzip", "image/png", "application/json", "application/dicom"
LABELS, SCAN, VOLUMES, PREVIEW = "labels.nii.gz", "image.nii.gz", "volumes.json", "preview.png"
_MEASURED: tuple[Format, ...] = ("seg", "labelmap")
"""What a report refers to: the first of these that was written."""
_READ_BYTES = 4 << 20
_OWNER_ALONE = 0o600


@dataclass(frozen=True, eq=False)
class Made:
    """A prediction that is to be written.

    Attributes:
        labels: as it is written, with the classes that were asked for.
        image: first channel as it was read.
        image_file: a gzipped NIfTI file that holds exactly this, None where there is none.
        spec: the classes that were asked for.
        volumes_ml: of each of them.
        title: heads the preview.
        model: name of the model, for DICOM objects.
        model_version: tells it from others of that name.
        colours: of the classes, `#rrggbb`.
    """

    labels: Volume
    image: Volume
    image_file: Path | None
    spec: DatasetSpec
    volumes_ml: Mapping[str, float]
    title: str
    model: str = ""
    model_version: str = "unknown"
    colours: tuple[str, ...] = ()

    @cached_property
    def preview(self) -> bytes:
        """The picture, as PNG."""
        return preview_png(self.title, self.labels, self.image, self.spec, dict(self.volumes_ml))

    @property
    def segments(self) -> tuple[Segment, ...]:
        """The classes as DICOM objects tell them."""
        return segments_of(self.spec, self.colours)

    @property
    def origin(self) -> Origin:
        """What made the labels, as DICOM objects tell it."""
        return Origin(self.model, self.model_version)


class Writer(NamedTuple):
    """A DICOM object: the name of its file, and what writes it."""

    name: str
    write: Callable[[Made, DicomSource, Path], object]


def _seg(made: Made, source: DicomSource, path: Path) -> Path:
    return write_dicom_seg(made.labels, made.segments, source, path, origin=made.origin)


def _labelmap(made: Made, source: DicomSource, path: Path) -> Path:
    return write_dicom_seg(made.labels, made.segments, source, path, kind="labelmap", origin=made.origin)


def _rtstruct(made: Made, source: DicomSource, path: Path) -> Path:
    return write_rtstruct(made.labels, made.segments, source, path, origin=made.origin)


def _overview(made: Made, source: DicomSource, path: Path) -> Path:
    with Image.open(io.BytesIO(made.preview)) as picture:
        return write_overview(np.asarray(picture.convert("RGB")), source, path)


def _report(made: Made, source: DicomSource, path: Path) -> Path:
    beside = [path.with_name(WRITERS[name].name) for name in _MEASURED]
    segmentation = next((file for file in beside if file.exists()), None)
    return write_volumes_sr(made.volumes_ml, made.segments, source, path, origin=made.origin, segmentation=segmentation)


WRITERS: dict[Format, Writer] = {
    "seg": Writer("labels.seg.dcm", _seg),
    "labelmap": Writer("labels.labelmap.dcm", _labelmap),
    "rtstruct": Writer("labels.rtstruct.dcm", _rtstruct),
    "overview": Writer("overview.dcm", _overview),
    "sr": Writer("volumes.sr.dcm", _report),
}
"""In the order that they are written: the report refers to the segmentation."""


def write_results(
    made: Made, folder: Path, series: Path | None, formats: tuple[Format, ...] | None
) -> tuple[tuple[ResultFile, ...], tuple[str, ...]]:
    """Write everything that is made of a prediction into a folder, and return the files and what to know of them.

    Args:
        made: the prediction.
        folder: that is there and empty.
        series: the DICOM series that it was made from, None where it was none.
        formats: of DICOM objects; None: all, and one that can't be written becomes a remark instead of an error.

    Raises:
        SagittalError: the disk is full, or an object that was asked for can't be written.
    """
    files, flags = [], []
    made.labels.write(folder / LABELS)
    files.append(_listed(folder / LABELS, "nifti", NIFTI))
    _write_image(made, folder / SCAN)
    files.append(_listed(folder / SCAN, "nifti", NIFTI))
    write_atomically(folder / VOLUMES, (json.dumps({"volumes_ml": dict(made.volumes_ml)}, indent=2) + "\n").encode())
    files.append(_listed(folder / VOLUMES, "json", JSON))
    write_atomically(folder / PREVIEW, made.preview)
    files.append(_listed(folder / PREVIEW, "png", PNG))
    wanted = tuple(name for name in WRITERS if formats is None or name in formats)
    if series is not None and wanted:
        try:
            source = read_source(series)
        except SagittalError as error:
            if formats is not None:
                raise
            return tuple(files), (f"no DICOM objects: {error.message}",)
        for name in wanted:
            path = folder / WRITERS[name].name
            try:
                WRITERS[name].write(made, source, path)
            except SagittalError as error:
                if formats is not None or error.code == "disk":
                    raise
                path.unlink(missing_ok=True)
                flags.append(f"no {path.name}: {error.message}")
            else:
                files.append(_listed(path, name, DICOM))
    return tuple(files), tuple(flags)


def keep(folder: Path) -> None:
    """Have the disk keep the files of a folder and their names, for the eyes of their owner alone."""
    files = list(folder.iterdir())
    for path in [*files, folder, folder.parent]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            if path in files:
                os.fchmod(descriptor, _OWNER_ALONE)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _write_image(made: Made, path: Path) -> None:
    if made.image_file is not None:
        with suppress(OSError):  # another disk, or one without links
            os.link(made.image_file, path)
            return
    made.image.write(path)


def _listed(path: Path, form: str, media_type: str) -> ResultFile:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_READ_BYTES):
            digest.update(block)
    return ResultFile(
        name=path.name, format=form, media_type=media_type, bytes=path.stat().st_size, sha256=digest.hexdigest()
    )
