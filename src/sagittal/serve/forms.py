"""Requests as they arrive: forms and texts, written to the disk or read piece by piece, under limits.

No name that a client sends ever becomes a path, and none is kept.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Container
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from python_multipart.exceptions import MultipartParseError
from python_multipart.multipart import MultipartParser, parse_options_header
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request

from sagittal.serve.disk import without_path
from sagittal.serve.refusals import RefusalError
from sagittal.serve.settings import Limits

MAX_IMAGES = 64
"""Channels of a scan."""
MAX_JSON_BYTES = 1 << 20
PARTS = "parts"
_MAX_FIELD_BYTES = 1 << 16
_MAX_FIELDS = 16
_MAX_PART_HEADER_BYTES = 8 << 10
_LEAST_BYTES_PER_S = 1024
"""Of a request's body, on average: whoever is slower keeps a connection for the sake of keeping it."""
_PIECE_BYTES = 1 << 20


@dataclass
class Received:
    """A form as it came.

    Attributes:
        folder: that its images lie in.
        images: in the order that they were sent.
        fields: the texts beside them.
        size: bytes of the whole.
    """

    folder: Path
    images: list[Path] = field(default_factory=list)
    fields: dict[str, str] = field(default_factory=dict)
    size: int = 0


class _Form:
    """Takes the pieces of a multipart body and writes its images to the disk."""

    def __init__(self, boundary: bytes, received: Received, images: Container[str]) -> None:
        self._received, self._images = received, images
        self._disposition, self._header_name = b"", b""
        self._name: str | None = None
        self._file: BinaryIO | None = None
        self._text = bytearray()
        self.is_whole = False
        self._parser = MultipartParser(
            boundary,
            {
                "on_part_begin": self._begin,
                "on_header_field": self._on_header_name,
                "on_header_value": self._on_header_value,
                "on_header_end": self._on_header_end,
                "on_headers_finished": self._on_headers,
                "on_part_data": self._on_data,
                "on_part_end": self._on_part_end,
                "on_end": self._on_end,
            },
        )
        self._value = b""
        self._header_bytes = 0

    def take(self, piece: bytes) -> None:
        """Parse and write a piece.

        Raises:
            RefusalError: no valid form, or too many parts.
            OSError: the disk is full.
        """
        try:
            self._parser.write(piece)
        except MultipartParseError:
            raise _no_form("its parts can't be told apart") from None

    def close(self) -> None:
        """Let go of the file that was being written."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _begin(self) -> None:
        self._disposition, self._name, self._text = b"", None, bytearray()
        self._header_bytes = 0

    def _on_header_name(self, data: bytes, start: int, end: int) -> None:
        self._header_name += data[start:end]
        self._require_short(end - start)

    def _on_header_value(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]
        self._require_short(end - start)

    def _require_short(self, more: int) -> None:
        self._header_bytes += more
        if self._header_bytes > _MAX_PART_HEADER_BYTES:
            raise _no_form("a part of it begins with too many headers")

    def _on_header_end(self) -> None:
        if self._header_name.lower() == b"content-disposition":
            self._disposition = self._value
        self._header_name, self._value = b"", b""

    def _on_headers(self) -> None:
        kind, options = parse_options_header(self._disposition)
        if kind != b"form-data" or b"name" not in options:
            raise _no_form("a part of it has no name")
        received, self._name = self._received, options[b"name"].decode("utf-8", "replace")
        if self._name not in self._images:
            if len(received.fields) >= _MAX_FIELDS or self._name in received.fields:
                raise _no_form("a field comes twice, or there are too many")
            return
        if len(received.images) >= MAX_IMAGES:
            raise RefusalError(
                f"more than {MAX_IMAGES} images. Expected one per channel; send the slices of a series as a zip.",
                code="too_many_files",
                status=413,
            )
        path = received.folder / PARTS / str(len(received.images))
        self._file = path.open("xb")
        received.images.append(path)

    def _on_data(self, data: bytes, start: int, end: int) -> None:
        if self._file is not None:
            self._file.write(data[start:end])
            return
        self._text += data[start:end]
        if len(self._text) > _MAX_FIELD_BYTES:
            raise RefusalError("a field of the form is too long.", code="too_large", status=413)

    def _on_part_end(self) -> None:
        if self._file is not None:
            self.close()
        elif self._name is not None:
            try:
                self._received.fields[self._name] = self._text.decode()
            except UnicodeDecodeError:
                raise _no_form("a field of it is no text (UTF-8)") from None

    def _on_end(self) -> None:
        self.is_whole = True


async def receive(request: Request, folder: Path, limits: Limits, images: Container[str] = ("image",)) -> Received:
    """Write the images of a multipart request into `folder`, and return them with its fields.

    Args:
        request: whose body was not read yet.
        folder: that does not exist yet; the caller deletes it where this raises.
        limits: of the service.
        images: names of the parts that hold a scan.

    Raises:
        RefusalError: no form, too large (413), or too slow.
        ResourceError: the disk is full or can't be written.
    """
    kind, options = parse_options_header(request.headers.get("content-type", ""))
    boundary = options.get(b"boundary", b"")
    if kind != b"multipart/form-data" or not 0 < len(boundary) <= 200:
        raise RefusalError(
            "the request's body is no form. Expected multipart/form-data with the scan in parts called 'image'.",
            code="unknown_format",
            status=415,
        )
    require_declared(request, limits.upload_bytes)
    received = Received(folder)
    form = _Form(boundary, received, images)
    try:
        await run_in_threadpool((folder / PARTS).mkdir, parents=True)
        async for piece in body_of(request, limits.upload_bytes, limits.upload_idle_s):
            received.size += len(piece)
            await run_in_threadpool(form.take, piece)
    except OSError as error:
        raise without_path(error) from None
    finally:
        form.close()
    if not form.is_whole:
        raise _no_form("it is cut off")
    return received


async def read_small(request: Request, limits: Limits) -> bytes:
    """Return the body of a request that holds text.

    Raises:
        RefusalError: too large (413) or too slow.
    """
    require_declared(request, MAX_JSON_BYTES)
    return b"".join([piece async for piece in body_of(request, MAX_JSON_BYTES, limits.upload_idle_s)])


def require_declared(request: Request, most: int) -> None:
    """Refuse a body whose stated length is too much, before any of it is read.

    Raises:
        RefusalError: it is (413).
    """
    stated = request.headers.get("content-length", "0")
    if stated.isdigit() and int(stated) > most:
        raise _too_much(most)


async def body_of(request: Request, most: int, idle_s: float) -> AsyncIterator[bytes]:
    """Yield a body in pieces of about a megabyte.

    Raises:
        RefusalError: more than `most` bytes came (413), none for `idle_s`, or after that time far too few.
    """
    stream, held, total = request.stream(), bytearray(), 0
    began = time.monotonic()
    while True:
        try:
            piece = await asyncio.wait_for(anext(stream, None), idle_s)
        except TimeoutError:
            raise RefusalError(
                f"nothing came for {idle_s:g} s. Send the request again.", code="upload_stalled"
            ) from None
        if piece is None:
            break
        total += len(piece)
        if total < _LEAST_BYTES_PER_S * (time.monotonic() - began - idle_s):
            raise RefusalError(
                f"less than {_LEAST_BYTES_PER_S} bytes came a second. Send the request over a faster line.",
                code="upload_stalled",
            )
        if total > most:
            raise _too_much(most)
        held += piece
        if len(held) >= _PIECE_BYTES:
            yield bytes(held)
            held.clear()
    if held:
        yield bytes(held)


def _too_much(most: int) -> RefusalError:
    return RefusalError(
        f"the request is larger than {most} bytes, the most that this service takes.", code="too_large", status=413
    )


def _no_form(cause: str) -> RefusalError:
    return RefusalError(f"the form can't be read: {cause}. Send it again.", code="bad_form", status=400)
