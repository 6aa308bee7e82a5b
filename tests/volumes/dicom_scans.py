"""DICOM series for the tests, written with pydicom. The patient is called SECRET: no message may say so."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gdcm
import numpy as np
import pydicom
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
from pydicom.uid import (
    CTImageStorage,
    EnhancedCTImageStorage,
    EnhancedMRImageStorage,
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


def recode(folder: Path, syntax: str) -> None:
    """Compress every file of a folder with GDCM."""
    for path in sorted(folder.rglob("*.dcm")):
        reader = gdcm.ImageReader()
        reader.SetFileName(str(path))
        assert reader.Read()
        change = gdcm.ImageChangeTransferSyntax()
        change.SetTransferSyntax(gdcm.TransferSyntax(gdcm.TransferSyntax.GetTSType(syntax)))
        change.SetInput(reader.GetImage())
        assert change.Change(), syntax
        writer = gdcm.ImageWriter()
        writer.SetFileName(str(path))
        writer.SetFile(reader.GetFile())
        writer.SetImage(change.GetOutput())
        assert writer.Write()


def write_enhanced(
    path: Path,
    volume: Volume,
    *,
    modality: str = "CT",
    syntax: str = ExplicitVRLittleEndian,
    values: dict[str, list[float]] | None = None,
    change: Callable[[Any], None] | None = None,
    rescale: Callable[[int], tuple[float, float]] | None = None,
) -> Path:
    """Write one enhanced object whose frames, in shuffled order, are the slices along D of every channel.

    Args:
        path: of the file.
        volume: (C, D, H, W); each channel is a volume of its own under the same places.
        modality: CT or MR.
        syntax: uncompressed.
        values: by name (`echo`, `b`, `stack`), a number per channel.
        change: of the whole data set, before it is written.
        rescale: slope and intercept of each frame, by its number in the file.
    """
    affine, (channels, depth) = volume.affine, volume.array.shape[:2]
    kind = EnhancedCTImageStorage if modality == "CT" else EnhancedMRImageStorage
    data = one_slice(volume.array[0, 0], SERIES, modality, syntax)
    data.SOPClassUID = data.file_meta.MediaStorageSOPClassUID = kind
    frames = [(channel, index) for channel in range(channels) for index in range(depth)]
    frames = [frames[place] for place in np.random.default_rng(5).permutation(len(frames))]
    order = ">" if syntax == ExplicitVRBigEndian else "<"
    stored = volume.array.astype(volume.array.dtype.newbyteorder(order))
    data.PixelData = b"".join(stored[frame].tobytes() for frame in frames)
    data.NumberOfFrames, data.FrameOfReferenceUID = len(frames), f"{SERIES}.7"
    shared, measures, orientation = Dataset(), Dataset(), Dataset()
    measures.PixelSpacing = [*volume.spacing_mm[1:]]
    orientation.ImageOrientationPatient = [
        float(value)
        for value in (
            *(affine[:3, 2] * LPS / volume.spacing_mm[2]),
            *(affine[:3, 1] * LPS / volume.spacing_mm[1]),
        )
    ]
    shared.PixelMeasuresSequence, shared.PlaneOrientationSequence = [measures], [orientation]
    data.SharedFunctionalGroupsSequence = [shared]
    own = []
    for number, (channel, index) in enumerate(frames):
        frame, place, content = Dataset(), Dataset(), Dataset()
        place.ImagePositionPatient = [float(value) for value in (affine @ [index, 0, 0, 1])[:3] * LPS]
        frame.PlanePositionSequence = [place]
        content.StackID = str(int((values or {}).get("stack", [1] * channels)[channel]))
        frame.FrameContentSequence = [content]
        if "echo" in (values or {}):
            echo = Dataset()
            echo.EffectiveEchoTime = values["echo"][channel]
            frame.MREchoSequence = [echo]
        if "b" in (values or {}):
            diffusion = Dataset()
            diffusion.DiffusionBValue = values["b"][channel]
            frame.MRDiffusionSequence = [diffusion]
        if rescale is not None:
            scaling = Dataset()
            scaling.RescaleSlope, scaling.RescaleIntercept = (str(value) for value in rescale(number))
            frame.PixelValueTransformationSequence = [scaling]
        own.append(frame)
    data.PerFrameFunctionalGroupsSequence = own
    if change is not None:
        change(data)
    path.parent.mkdir(parents=True, exist_ok=True)
    save(data, path)
    return path


def along_z(count: int, heights: list[float] | None = None, tilt: float = 0.0):
    """Return a 2 mm x 2 mm scan of `count` slices at `heights`, each moved to the front by `tilt` per mm."""
    values = np.random.default_rng(8).integers(0, 200, (1, count, 6, 7)).astype(np.int16)
    scan = Volume(values, np.diag([3.0, 2.0, 2.0, 1.0])[:, [2, 1, 0, 3]])

    def place(data, index):
        height = 3.0 * index if heights is None else heights[index]
        data.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
        data.PixelSpacing = [2.0, 2.0]
        data.ImagePositionPatient = [5.0, -7.0 + tilt * height, height]

    return scan, place
