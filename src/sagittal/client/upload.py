"""Scans as the body of a request, read piece by piece; a folder of DICOM slices travels as one archive.

Names of files and folders often hold a patient's name: none is sent. What a file is, the service finds by its bytes.
"""

from __future__ import annotations

import json
import secrets
import tempfile
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from sagittal.client.connection import PIECE_BYTES, Body
from sagittal.errors import DataError


@contextmanager
def multipart(images: Sequence[Path], fields: dict[str, Any]) -> Iterator[Body]:
    """Yield the body of a form: the fields (text as it is, else JSON), then an `image` for each scan.

    Args:
        images: files, or folders of DICOM slices; these are packed in a temporary file that goes at the end.
        fields: those that are None are left out.

    Raises:
        DataError: no such file, or a folder without files.
    """
    with ExitStack() as stack:
        files = [stack.enter_context(_packed(path)) if path.is_dir() else _existing(path) for path in images]
        boundary = secrets.token_hex(16)
        texts = [
            _part(boundary, name, value if isinstance(value, str) else json.dumps(value))
            for name, value in fields.items()
            if value is not None
        ]
        heads = [_file_head(boundary, number) for number in range(len(files))]
        end = f"--{boundary}--\r\n".encode()
        sizes = [file.stat().st_size for file in files]
        length = sum(map(len, texts)) + sum(map(len, heads)) + sum(sizes) + 2 * len(files) + len(end)

        def pieces() -> Iterator[bytes]:
            yield from texts
            for head, file, size in zip(heads, files, sizes, strict=True):
                yield head
                yield from _content(file, size)
                yield b"\r\n"
            yield end

        yield Body(f"multipart/form-data; boundary={boundary}", length, pieces)


def _part(boundary: str, name: str, text: str) -> bytes:
    return f'--{boundary}\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n{text}\r\n'.encode()


def _file_head(boundary: str, number: int) -> bytes:
    return (
        f'--{boundary}\r\nContent-Disposition: form-data; name="image"; filename="image_{number:04d}"\r\n'
        "Content-Type: application/octet-stream\r\n\r\n"
    ).encode()


def _content(file: Path, size: int) -> Iterator[bytes]:
    left = size
    while left:
        piece = _piece(file, size - left, min(PIECE_BYTES, left))
        if not piece:
            raise DataError(f"{file}: became shorter while it was sent. Send it again when it is whole.")
        left -= len(piece)
        yield piece


def _piece(file: Path, start: int, length: int) -> bytes:
    try:
        with file.open("rb") as stream:
            stream.seek(start)
            return stream.read(length)
    except OSError as error:
        raise DataError(f"{file}: can't be read ({error.strerror}). Expected it to stay while it is sent.") from None


def _existing(path: Path) -> Path:
    if not path.is_file():
        raise DataError(f"{path}: no such file. Expected a scan, or a folder of DICOM slices. Check the path.")
    return path


@contextmanager
def _packed(folder: Path) -> Iterator[Path]:
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and _is_wanted(path)]
    if not files:
        raise DataError(f"{folder}: no file in it. Expected DICOM slices. Check the path.")
    with tempfile.TemporaryDirectory(prefix="sagittal-") as temporary:
        packed = Path(temporary) / "series.zip"
        # Stored, not deflated: pixel data shrinks little, and packing would take longer than sending.
        with zipfile.ZipFile(packed, "w", zipfile.ZIP_STORED) as archive:
            for number, file in enumerate(files):
                archive.write(file, f"{number:06d}")
        yield packed


def _is_wanted(path: Path) -> bool:
    return not path.name.startswith(".") and path.name.upper() != "DICOMDIR"
