"""DICOM series for the tests, written with pydicom. The patient is called SECRET: no message may say so."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.uid import (
    CTImageStorage,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    MRImageStorage,
)

from sagittal.volumes import Volume

SERIES = "1.2.826.0.1.3680043.8.498.1"
SECRET = "SECRET"
LPS = np.array([-1.0, -1.0, 1.0])

Change = Callable[[FileDataset, int], None]


def write_series(
    folder: Path,
    volume: Volume,
    *,
    change: Change | None = None,
    series_uid: str = SERIES,
    modality: str = "MR",
    syntax: str = ExplicitVRLittleEndian,
) -> Path:
    """Write the slices along D, in shuffled files, each after `change(dataset, index)`; return the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    affine = volume.affine
    height_mm, width_mm = volume.spacing_mm[1:]
    names = np.random.default_rng(11).permutation(len(volume.array[0]))
    for index, plane in enumerate(volume.array[0]):
        position = (affine @ [index, 0, 0, 1])[:3] * LPS
        data = one_slice(plane, series_uid, modality, syntax)
        data.ImagePositionPatient = [float(value) for value in position]
        data.ImageOrientationPatient = [
            float(value) for value in (*(affine[:3, 2] * LPS / width_mm), *(affine[:3, 1] * LPS / height_mm))
        ]
        data.PixelSpacing = [height_mm, width_mm]
        data.InstanceNumber = index + 1
        if change is not None:
            change(data, index)
        save(data, folder / f"{names[index]:03d}_{series_uid[-1]}.dcm")
    return folder


def one_slice(plane: np.ndarray, series_uid: str, modality: str = "MR", syntax: str = ExplicitVRLittleEndian) -> Any:
    """Return the data set of a slice without a place."""
    kind = CTImageStorage if modality == "CT" else MRImageStorage
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = kind
    meta.MediaStorageSOPInstanceUID = pydicom.uid.generate_uid(entropy_srcs=[series_uid, plane.tobytes().hex()])
    meta.TransferSyntaxUID = syntax
    data = FileDataset(
        "slice",
        {},
        preamble=b"\0" * 128,
        file_meta=meta,
        is_implicit_VR=syntax == ImplicitVRLittleEndian,
        is_little_endian=syntax != ExplicitVRBigEndian,
    )
    data.SOPClassUID, data.SOPInstanceUID = kind, meta.MediaStorageSOPInstanceUID
    data.SeriesInstanceUID, data.Modality = series_uid, modality
    data.PatientName, data.PatientID, data.SeriesDescription = f"{SECRET}^NAME", f"{SECRET}1", SECRET
    data.ImageType = ["ORIGINAL", "PRIMARY", "M"]
    data.SamplesPerPixel, data.PhotometricInterpretation = 1, "MONOCHROME2"
    data.Rows, data.Columns = plane.shape
    bits = 8 * plane.dtype.itemsize
    data.BitsAllocated, data.BitsStored, data.HighBit = bits, bits, bits - 1
    data.PixelRepresentation = int(plane.dtype.kind == "i")
    # A thickness that has nothing to do with the distance of the slices.
    data.SliceThickness = "17.5"
    order = ">" if syntax == ExplicitVRBigEndian else "<"
    data.PixelData = plane.astype(plane.dtype.newbyteorder(order)).tobytes()
    data["PixelData"].VR = "OW" if bits > 8 else "OB"
    return data


def save(data: Any, path: Path) -> None:
    """Write a data set as a file."""
    with warnings.catch_warnings():
        # Sixteen characters of a decimal string hold fewer digits than the affine has.
        warnings.simplefilter("ignore")
        previous = pydicom.config.settings.writing_validation_mode
        pydicom.config.settings.writing_validation_mode = pydicom.config.IGNORE
        try:
            data.save_as(path, enforce_file_format=True)
        finally:
            pydicom.config.settings.writing_validation_mode = previous
