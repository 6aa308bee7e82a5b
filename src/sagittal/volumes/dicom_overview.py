"""A picture as a DICOM secondary capture beside the scan it shows, so that every viewer of an archive can open it."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
from jaxtyping import UInt8

from sagittal.errors import DataError
from sagittal.volumes.dicom_objects import MAKER, RESEARCH_USE, new_object, save
from sagittal.volumes.dicom_source import DicomSource

CLASS = "1.2.840.10008.5.1.4.1.1.7"
_SERIES_NUMBER = 9004


def write_overview(picture: UInt8[np.ndarray, "*shape"], source: DicomSource, path: Path) -> Path:
    """Write a picture as a secondary capture of the source's patient and study.

    Args:
        picture: (H, W, 3), red, green and blue. It must not name the patient: the object says that nothing is burnt
            in.
        source: the series that it shows.
        path: file to write.

    Raises:
        DataError: it is no picture of that kind.
        ResourceError: the file can't be written.
    """
    if picture.ndim != 3 or picture.shape[2] != 3 or picture.dtype != np.uint8:
        raise DataError(f"{path}: a picture of shape {picture.shape} {picture.dtype}. Expected (H, W, 3) of uint8.")
    content = np.ascontiguousarray(picture).tobytes()
    seed = hashlib.sha256(content).hexdigest() + source.series_uid
    title = f"{MAKER} overview, for research use"
    made = new_object(source, CLASS, "OT", seed, title, _SERIES_NUMBER)
    made.ConversionType = "WSD"
    made.ImageType = ["DERIVED", "SECONDARY"]
    made.DerivationDescription = RESEARCH_USE
    made.ContentDate = made.DateOfSecondaryCapture = made.SeriesDate
    made.ContentTime = made.TimeOfSecondaryCapture = made.SeriesTime
    # Several planes side by side have no one orientation, nor a side.
    made.PatientOrientation = made.Laterality = None
    made.BurnedInAnnotation = "NO"
    made.SamplesPerPixel, made.PhotometricInterpretation, made.PlanarConfiguration = 3, "RGB", 0
    made.Rows, made.Columns = picture.shape[:2]
    made.BitsAllocated = made.BitsStored = 8
    made.HighBit, made.PixelRepresentation = 7, 0
    made.PixelData = content + b"\0" * (len(content) % 2)
    made["PixelData"].VR = "OB"
    return save(made, path)
