"""Series that new DICOM objects refer to, in every orientation, and what checks such objects."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from dicom_scans import LPS, SERIES, write_series

from sagittal.plan.dataset import DatasetSpec, Label
from sagittal.volumes import Volume

STUDY, FRAME_OF_REFERENCE = "1.2.826.0.1.3680043.8.498.3", "1.2.826.0.1.3680043.8.498.5"
SHAPE = (6, 11, 9)
"""No multiple of eight voxels in a frame, so that the bits of one end within a byte."""
SPACING_MM = (2.5, 0.8, 1.3)
_OBLIQUE = np.linalg.qr(np.array([[0.2, -0.4, 0.9], [0.3, 0.9, 0.35], [0.95, -0.2, -0.25]]))[0]
_AXES = {
    "axial": [(0, 0, 1), (0, -1, 0), (-1, 0, 0)],
    "left-handed": [(0, 0, -1), (0, -1, 0), (-1, 0, 0)],
    "feet first": [(0, 0, 1), (0, -1, 0), (1, 0, 0)],
    "prone": [(0, 0, 1), (0, 1, 0), (1, 0, 0)],
    "sagittal": [(-1, 0, 0), (0, 0, -1), (0, -1, 0)],
    "coronal": [(0, 1, 0), (0, 0, -1), (-1, 0, 0)],
    "oblique": _OBLIQUE.T.tolist(),
    "oblique, left-handed": (_OBLIQUE * [-1, 1, 1]).T.tolist(),
}
ORIENTATIONS = tuple(_AXES)
SPEC = DatasetSpec(
    name="targets",
    channel_names=("MR",),
    labels=(
        Label(name="liver", values=(1,)),
        Label(name="liver tumor", values=(2,)),
        Label(name="kidney_left", values=(5,)),
        Label(name="Knöchel", values=(9,)),
    ),
    file_ending=".nii.gz",
)
REGIONS = SPEC.replace(
    labels=(Label(name="whole tumor", values=(1, 2, 5)), Label(name="tumor core", values=(2, 5))),
    regions_class_order=(1, 2),
)


def scan_of(orientation: str, shape: tuple[int, int, int] = SHAPE) -> Volume:
    """Return a scan whose D, H, W point where the orientation says."""
    affine = np.eye(4)
    affine[:3, :3] = np.array(_AXES[orientation], dtype=float).T * SPACING_MM
    affine[:3, 3] = (-31.5, 22.25, 812.0)
    return Volume(np.random.default_rng(3).integers(0, 2000, (1, *shape)).astype(np.int16), affine)


def labels_of(scan: Volume, seed: int = 0, holes: bool = True) -> Volume:
    """Return a label map in RAS order: blobs with holes, single voxels and voxels at the border."""
    shape = scan.geometry.shape
    array = np.zeros(shape, np.uint8)
    array[1:-1, 1:-2, 1:] = 1
    array[2:4, 3:6, 2:6] = 2
    array[2:, 7:, 0:4] = 5
    array[0, 0, 0] = array[-1, -1, -1] = 5
    if holes:
        array[2, 4, 3] = array[3, 8, 6] = array[3, 8, 4] = 0
        array[np.random.default_rng(seed).random(shape) < 0.1] = 0
    return scan.with_array(array[None]).reoriented()


def whole(data: Any, index: int) -> None:
    """Complete a slice of `write_series` to what a scanner sends."""
    data.StudyInstanceUID, data.FrameOfReferenceUID = STUDY, FRAME_OF_REFERENCE
    data.SOPInstanceUID = data.file_meta.MediaStorageSOPInstanceUID = f"{SERIES}.6.{index + 1}"
    data.PatientBirthDate, data.PatientSex, data.PatientAge = "19700101", "F", "050Y"
    data.StudyDate, data.StudyTime, data.StudyID = "20200101", "101010", "1"
    data.AccessionNumber = data.ReferringPhysicianName = ""


def written_series(folder: Path, scan: Volume, **options: Any) -> Path:
    """Write a whole series."""
    change = options.pop("change", None)

    def both(data: Any, index: int) -> None:
        whole(data, index)
        if change is not None:
            change(data, index)

    return write_series(folder, scan, change=both, **options)


def require_valid(path: Path, but: str = "(?!)") -> None:
    """Have dciodvfy look at an object; without it the test is skipped, except under CI.

    Args:
        path: of the object.
        but: errors that are the checker's, as a regular expression.
    """
    checker = shutil.which("dciodvfy")
    if checker is None:
        if os.environ.get("CI") == "true":
            pytest.fail("dciodvfy is absent (Debian: dicom3tools)")
        pytest.skip("dciodvfy is absent (Debian: dicom3tools)")
    told = subprocess.run([checker, str(path)], capture_output=True, text=True, check=False).stderr
    errors = [line for line in told.splitlines() if line.startswith("Error") and not re.search(but, line)]
    assert errors == []


def world_voxels(mask: np.ndarray, affine: np.ndarray) -> np.ndarray:
    """Return the places (RAS, mm) of the voxels of a mask, in an order that does not depend on that of the axes."""
    indices = np.argwhere(mask)
    points = np.round(indices @ affine[:3, :3].T + affine[:3, 3], 2) + 0.0
    return points[np.lexsort(points.T)]


def frame_points(dataset: Any, plane: np.ndarray, position: Any) -> np.ndarray:
    """Return the places (LPS, mm) of the voxels of a frame, by the standard's equation alone (PS3.3, C.7.6.2.1)."""
    shared = dataset.SharedFunctionalGroupsSequence[0]
    orientation = np.array(shared.PlaneOrientationSequence[0].ImageOrientationPatient, dtype=float)
    between_rows, between_columns = (float(each) for each in shared.PixelMeasuresSequence[0].PixelSpacing)
    rows, columns = np.nonzero(plane)
    points = np.outer(columns * between_columns, orientation[:3]) + np.outer(rows * between_rows, orientation[3:])
    return points + np.array(position, dtype=float)


def sorted_ras(points: np.ndarray) -> np.ndarray:
    """Return points in LPS as `world_voxels` has them."""
    points = np.round(points * LPS, 2) + 0.0
    return points[np.lexsort(points.T)]
