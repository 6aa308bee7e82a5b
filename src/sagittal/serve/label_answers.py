"""The label map of a job in the form that plug-ins of MONAI Label ask for: which file, which voxels, which values."""

from __future__ import annotations

import gzip
import json
import tempfile
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sagittal.serve.refusals import RefusalError
from sagittal.volumes import Volume, read_labels

EXTENSIONS = (".nii.gz", ".nii", ".nrrd", ".mha")
_INSTEAD = {".seg.nrrd": ".nrrd"}
"""Slicer reads it as label map, which it is."""
DTYPES = ("uint8", "uint16", "int16", "int32", "float32")


@dataclass(frozen=True)
class Answer:
    """A label map that is sent.

    Attributes:
        name: of the file.
        content: of it.
        label_names: value of each class that is somewhere in it.
    """

    name: str
    content: bytes
    label_names: dict[str, int]


def label_answer(labels: Path, values: Mapping[str, int], params: Mapping[str, Any], *, is_counted: bool) -> Answer:
    """Return a label map as it was asked for.

    Args:
        labels: the job's file.
        values: of the classes in it.
        params: `result_extension`, `result_dtype` and `result_compress` (NRRD only) of the request.
        is_counted: give the classes that are there the values 1, 2, 3 and on.

    Raises:
        RefusalError: an extension or a type that is not written (422).
    """
    extension = params.get("result_extension") or EXTENSIONS[0]
    extension = _INSTEAD.get(extension, extension) if isinstance(extension, str) else ""
    if extension not in EXTENSIONS:
        raise _unknown("result_extension", EXTENSIONS)
    array, geometry = read_labels(labels)
    there = {int(value) for value in np.unique(array)} - {0}
    found = dict(sorted(((name, value) for name, value in values.items() if value in there), key=lambda item: item[1]))
    if is_counted and list(found.values()) != list(range(1, len(found) + 1)):
        table = np.zeros(max(there) + 1, dtype=array.dtype)
        for number, value in enumerate(found.values(), 1):
            table[value] = number
        array = table[array]
        found = {name: number for number, name in enumerate(found, 1)}
    dtype = params.get("result_dtype") or array.dtype.name
    if dtype not in DTYPES:
        raise _unknown("result_dtype", DTYPES)
    if array.size and array.max() > (np.iinfo(dtype).max if dtype != "float32" else np.inf):
        dtype = "uint16"
    name = f"labels{extension}"
    with tempfile.TemporaryDirectory(dir=labels.parent) as folder:
        volume = Volume(array[None].astype(dtype), geometry.affine)
        content = volume.write(Path(folder) / name).read_bytes()
    if extension == ".nrrd" and params.get("result_compress") is False:
        content = _unpacked(content)
    return Answer(name, content, found)


def multipart(params: Mapping[str, Any], answer: Answer) -> tuple[bytes, str]:
    """Return a form with the fields `params` and `image`, and its content type.

    OHIF looks for the parts by these very words, in this case of letters.
    """
    boundary = uuid.uuid4().hex
    lines = (
        f"--{boundary}",
        'Content-Disposition: form-data; name="params"',
        "Content-Type: application/json",
        "",
        json.dumps(params),
        f"--{boundary}",
        f'Content-Disposition: form-data; name="image"; filename="{answer.name}"',
        "Content-Type: application/octet-stream",
        "",
        "",
    )
    body = "\r\n".join(lines).encode() + answer.content + f"\r\n--{boundary}--\r\n".encode()
    return body, f"multipart/form-data; boundary={boundary}"


def _unpacked(nrrd: bytes) -> bytes:
    """Return a NRRD file with its voxels as they are: what OHIF reads takes no others."""
    head, end, body = nrrd.partition(b"\n\n")
    return head.replace(b"encoding: gzip", b"encoding: raw") + end + gzip.decompress(body)


def _unknown(what: str, known: tuple[str, ...]) -> RefusalError:
    return RefusalError(f"params: unknown {what}. Known are {', '.join(known)}.", code="invalid", status=422)
