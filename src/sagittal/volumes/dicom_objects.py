"""What all DICOM objects that are written have in common: whose they are, what made them, their UIDs and their file.

Patient and study are copied from the source, text as UTF-8. UIDs are derived from the content: the same labels of the
same series by the same model have the same ones, so that an archive that is given an object twice keeps one.
"""

from __future__ import annotations

import colorsys
import hashlib
import importlib
import logging
import uuid
from collections.abc import MutableSequence, Sequence
from copy import deepcopy
from dataclasses import dataclass
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Integer

from sagittal.errors import DataError
from sagittal.plan.base import write_atomically
from sagittal.plan.dataset import DatasetSpec
from sagittal.volumes.dicom_codes import MAX_MEANING, Code, Concept, code_of, told
from sagittal.volumes.dicom_library import library
from sagittal.volumes.dicom_source import PATIENT, STUDY, DicomSource

MAKER = "Sagittal"
RESEARCH_USE = "Automatic, for research use; not a medical device"
_EMPTY_ALLOWED = (
    *("PatientName", "PatientID", "PatientBirthDate", "PatientSex"),
    *("StudyDate", "StudyTime", "StudyID", "AccessionNumber", "ReferringPhysicianName"),
)
"""Tags that an object must have even where nothing is known."""
_GOLDEN = 0.618034
"""Of a turn: hues that follow each other by it stay apart, however many there are."""


@dataclass(frozen=True)
class Segment:
    """One thing that was segmented.

    Attributes:
        name: of the label.
        values: that it has in the label map.
        concept: what it is, in codes.
        colour: red, green and blue, 0 to 255.
    """

    name: str
    values: tuple[int, ...]
    concept: Concept
    colour: tuple[int, int, int]

    def mask(self, plane: Integer[np.ndarray, "*shape"]) -> Bool[np.ndarray, "*shape"]:
        """Return where a label map has it."""
        return plane == self.values[0] if len(self.values) == 1 else np.isin(plane, self.values)


@dataclass(frozen=True)
class Origin:
    """What made the labels.

    Attributes:
        model: name of the model, for people.
        model_version: tells it from other models of that name: the hash of its manifest, for example.
    """

    model: str = "labels"
    model_version: str = "unknown"


def segments_of(spec: DatasetSpec, colours: Sequence[str] = ()) -> tuple[Segment, ...]:
    """Return the classes or regions that label maps of a data set hold, in their order.

    Args:
        spec: what is declared; label maps have the original values of `label_map`.
        colours: `#rrggbb` of the first ones; more are made up, each unlike the others.

    Raises:
        DataError: a declared code can't be read.
    """
    originals, codes = dict(spec.label_map), dict(spec.codes)
    return tuple(
        Segment(
            label.name,
            tuple(originals.get(value, value) for value in label.values),
            code_of(label.name, codes),
            _rgb(colours[index]) if index < len(colours) else _hue(index),
        )
        for index, label in enumerate(spec.labels)
    )


def present(planes: Integer[np.ndarray, "N H W"]) -> frozenset[int]:
    """Return the values other than 0 that a label map holds."""
    found: set[int] = set()
    for plane in planes:
        # Plane by plane: `unique` sorts a copy.
        found.update(np.unique(plane).tolist())
    return frozenset(found - {0})


def digest_of(planes: Integer[np.ndarray, "N H W"], segments: Sequence[Segment], origin: Origin) -> str:
    """Return a hash over everything that decides what is written."""
    digest = hashlib.sha256(repr((segments, origin, planes.shape, planes.dtype.str)).encode())
    for plane in planes:
        digest.update(np.ascontiguousarray(plane).data)
    return digest.hexdigest()


def uid_of(*parts: str) -> str:
    """Return the UID that belongs to these texts, of the kind that needs no registration (2.25)."""
    return f"2.25.{uuid.uuid5(uuid.NAMESPACE_OID, chr(0).join(parts)).int}"


def writing_library(path: Path) -> Any:
    """Return highdicom, with its log lines kept to itself.

    Raises:
        DataError: it is not installed.
    """
    library(path)
    try:
        highdicom = importlib.import_module("highdicom")
        importlib.import_module("highdicom.sr")
    except ImportError:
        raise DataError(
            f"{path}: writing this DICOM object needs highdicom, which is not installed. Run: "
            "pip install 'sagittal[dicom]'",
            code="missing_extra",
        ) from None
    logging.getLogger("highdicom").propagate = False
    return highdicom


def new_object(source: DicomSource, class_uid: str, modality: str, seed: str, title: str, number: int) -> Any:
    """Return pydicom's data set with patient, study, series and equipment of a new object in a series of its own.

    Args:
        source: whose it is.
        class_uid: what kind of object.
        modality: SEG, RTSTRUCT.
        seed: what its UIDs are derived from.
        title: description of the series.
        number: of the series.
    """
    pydicom = library(source.path)
    made = pydicom.dataset.FileDataset("", {}, preamble=b"\0" * 128)
    made.file_meta = pydicom.dataset.FileMetaDataset()
    made.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    made.SOPClassUID, made.SOPInstanceUID = class_uid, uid_of(seed, class_uid, "instance")
    made.Modality, made.SeriesInstanceUID = modality, uid_of(seed, class_uid, "series")
    made.SeriesNumber, made.InstanceNumber = number, 1
    made.SeriesDescription = told(title, 64)
    made.Manufacturer = made.ManufacturerModelName = MAKER
    made.SoftwareVersions = software_version()
    copy_identity(source, made)
    now = datetime.now()
    made.InstanceCreationDate = made.SeriesDate = f"{now:%Y%m%d}"
    made.InstanceCreationTime = made.SeriesTime = f"{now:%H%M%S}"
    return made


def copy_identity(source: DicomSource, made: Any) -> None:
    """Give an object the patient and the study of the source, in place. Nothing of it is checked: it is not ours."""
    pydicom = library(source.path)
    made.SpecificCharacterSet = "ISO_IR 192"
    made.StudyInstanceUID = source.study_uid
    for name in (*PATIENT, *STUDY):
        tag = pydicom.tag.Tag(name)
        value = source.tags.get(name)
        if value is None or value == "" or (isinstance(value, MutableSequence) and not len(value)):
            if name not in _EMPTY_ALLOWED:
                continue
            value = ""
        kind = pydicom.datadict.dictionary_VR(tag)
        # Names are kept in the bytes and letters of the source; as text they get those of the new object.
        value = str(value) if kind == "PN" else deepcopy(value)
        made.add(pydicom.dataelem.DataElement(tag, kind, value, validation_mode=pydicom.config.IGNORE))


def software_version() -> str:
    """Return Sagittal's version."""
    try:
        return version("sagittal")
    except PackageNotFoundError:  # a source tree that never was installed
        return "unknown"


def item(path: Path, **values: Any) -> Any:
    """Return an item of a sequence with these tags."""
    made = library(path).dataset.Dataset()
    for name, value in values.items():
        setattr(made, name, value)
    return made


def coded(path: Path, code: Code) -> Any:
    """Return a code as an item of a sequence."""
    return item(
        path, CodeValue=code.value, CodingSchemeDesignator=code.scheme, CodeMeaning=told(code.meaning, MAX_MEANING)
    )


def save(made: Any, path: Path) -> Path:
    """Write an object whole or not at all.

    Raises:
        ResourceError: the disk is full or the folder can't be written.
    """
    content = BytesIO()
    library(path).dcmwrite(content, made, enforce_file_format=True)
    return write_atomically(path, content.getvalue())


def number_text(value: float) -> str:
    """Return a number as DICOM's decimal string of at most 16 characters."""
    text = repr(float(value))
    digits = 16
    while len(text) > 16:
        digits -= 1
        text = f"{value:.{digits}g}"
    return text


def lab_of(colour: tuple[int, int, int]) -> list[int]:
    """Return an sRGB colour as DICOM's CIELab (PS3.3, C.10.7.1.1): relative to D50, each number over 16 bits."""
    linear = np.array([_linear(part / 255.0) for part in colour])
    to_xyz_d50 = np.array(
        [[0.4360747, 0.3850649, 0.1430804], [0.2225045, 0.7168786, 0.0606169], [0.0139322, 0.0971045, 0.7141733]]
    )
    x, y, z = (_bent(value) for value in to_xyz_d50 @ linear / np.array([0.96422, 1.0, 0.82521]))
    lab = np.array([116.0 * y - 16.0, 500.0 * (x - y), 200.0 * (y - z)])
    scaled = (lab + np.array([0.0, 128.0, 128.0])) / np.array([100.0, 255.0, 255.0]) * 65535.0
    return [int(value) for value in np.clip(np.rint(scaled), 0, 65535)]


def _linear(part: float) -> float:
    return part / 12.92 if part <= 0.04045 else float(((part + 0.055) / 1.055) ** 2.4)


def _bent(value: float) -> float:
    return float(np.cbrt(value)) if value > (6 / 29) ** 3 else value / (3 * (6 / 29) ** 2) + 4 / 29


def _rgb(colour: str) -> tuple[int, int, int]:
    return int(colour[1:3], 16), int(colour[3:5], 16), int(colour[5:7], 16)


def _hue(index: int) -> tuple[int, int, int]:
    bright = (0.9, 0.65, 1.0)[index // 2 % 3]
    red, green, blue = colorsys.hsv_to_rgb(index * _GOLDEN % 1.0, (0.75, 0.5)[index % 2], bright)
    return round(255 * red), round(255 * green), round(255 * blue)
