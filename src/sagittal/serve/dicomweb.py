"""A PACS over DICOMweb: which series it has (QIDO-RS), their files (WADO-RS), and files for it (STOW-RS).

The standard library's HTTP: objects stream from and to the disk as they are, never through memory or a second encoding.
No redirect is followed, so that credentials reach nobody but the address that was given; no proxy of the environment is
used. Answers hold patients' data: of them only UIDs, modality, descriptions and counts are looked at.
"""

from __future__ import annotations

import base64
import http.client
import json
import ssl
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import urlencode, urlsplit

from python_multipart.exceptions import MultipartParseError
from python_multipart.multipart import MultipartParser, parse_options_header

from sagittal.errors import DataError, ResourceError
from sagittal.serve.arrivals import Arrival
from sagittal.serve.settings import Limits

TIMEOUT_S = 60.0
_PAGE = 500
_PIECE_BYTES = 1 << 20
_MAX_JSON_BYTES = 64 << 20
_JSON = "application/dicom+json"
_FILES = 'multipart/related; type="application/dicom"; transfer-syntax=*'
_STUDY, _SERIES, _MODALITY = "0020000D", "0020000E", "00080060"
_DESCRIPTION, _STUDY_DESCRIPTION, _BODY_PART, _COUNT = "0008103E", "00081030", "00180015", "00201209"
_FAILED, _REASON = "00081198", "00081197"
_UNREACHABLE = "pacs_unreachable"
_AWAY = frozenset({408, 429, 502, 503, 504})
"""Of a PACS that has no time, or of a proxy before one that is away: asking later may help."""
_DUPLICATE = 0x0111
"""The PACS has an object of this UID already."""


@dataclass(frozen=True)
class DicomWeb:
    """A DICOMweb service.

    Attributes:
        url: of its root: http://pacs:8042/dicom-web
        credentials: USER:PASSWORD, None where it asks for none.
        timeout_s: between two pieces of an answer.
    """

    url: str
    credentials: str | None = field(default=None, repr=False)
    timeout_s: float = TIMEOUT_S

    def series(self, modalities: Sequence[str], since: str | None = None) -> tuple[Arrival, ...]:
        """Return the series of some modalities that it has.

        Args:
            modalities: CT, MR and so on.
            since: first day of the studies, YYYYMMDD.

        Raises:
            ResourceError: it can't be reached, refuses, or answers something else.
        """
        days = [("StudyDate", f"{since}-")] if since else []
        found: list[Arrival] = []
        for modality in modalities:
            found += self._searched([("Modality", modality), *days])
        return tuple(found)

    def one_series(self, series_uid: str) -> Arrival | None:
        """Return a series by its UID, None where it has none.

        Raises:
            ResourceError: see `series`.
        """
        found = self._searched([("SeriesInstanceUID", series_uid)])
        return next((each for each in found if each.series_uid == series_uid), None)

    def fetch(self, study_uid: str, series_uid: str, folder: Path, limits: Limits) -> int:
        """Write the files of a series into a folder, as the PACS keeps them, and return how many there are.

        Args:
            study_uid, series_uid: of the series.
            folder: that is there; files are called 000000.dcm and on.
            limits: of files and bytes.

        Raises:
            ResourceError: see `series`; or the answer ends too early.
            DataError: more than the limits.
            OSError: the disk is full.
        """
        path = f"/studies/{study_uid}/series/{series_uid}"
        with self._asked("GET", path, {"Accept": _FILES}) as answer:
            kind, options = parse_options_header(answer.getheader("content-type", ""))
            boundary = options.get(b"boundary", b"")
            if kind != b"multipart/related" or not boundary:
                raise self._refused("answered a series in another form than multipart/related")
            parts = _Parts(boundary, folder, limits)
            try:
                while piece := self._read(answer, _PIECE_BYTES):
                    parts.take(piece)
            except MultipartParseError:
                raise self._refused("answered a series whose parts can't be told apart") from None
            finally:
                parts.close()
        if not parts.is_whole:
            raise self._refused("ended its answer in the middle of a series")
        return parts.count

    def store(self, study_uid: str, files: Sequence[Path]) -> None:
        """Give it files of one study; those that it has already stay as they are.

        Raises:
            ResourceError: see `series`; or it keeps one of them not.
            OSError: a file can't be read.
        """
        boundary = uuid.uuid4().hex
        head = f"--{boundary}\r\nContent-Type: application/dicom\r\n\r\n".encode()
        end = f"--{boundary}--\r\n".encode()
        size = sum(len(head) + file.stat().st_size + 2 for file in files) + len(end)
        headers = {
            "Content-Type": f'multipart/related; type="application/dicom"; boundary={boundary}',
            "Content-Length": str(size),
            "Accept": _JSON,
        }
        with self._asked("POST", f"/studies/{study_uid}", headers, _body(files, head, end), (200, 202, 409)) as answer:
            told = self._json(answer)
            status = answer.status
        failed = _values(told if isinstance(told, dict) else {}, _FAILED)
        reasons = [_number(each, _REASON) for each in failed if isinstance(each, dict)]
        if any(reason != _DUPLICATE for reason in reasons) or (status == 409 and not reasons):
            raise self._refused(
                f"did not keep what it was given (failure reasons {sorted(set(reasons))})", "pacs_store"
            )

    def _searched(self, terms: Sequence[tuple[str, str]]) -> list[Arrival]:
        fields = [("includefield", tag) for tag in (_DESCRIPTION, _STUDY_DESCRIPTION, _BODY_PART, _COUNT)]
        found: dict[str, Arrival] = {}
        while True:
            page = [("limit", str(_PAGE)), ("offset", str(len(found)))]
            with self._asked("GET", f"/series?{urlencode([*terms, *fields, *page])}", {"Accept": _JSON}) as answer:
                # Nothing found is 204 for some.
                told = [] if answer.status == 204 else self._json(answer)
            if not isinstance(told, list):
                raise self._refused("answered a search with something else than a list")
            before = len(found)
            for each in told:
                if isinstance(each, dict) and (arrival := _arrival(each)) is not None:
                    found[arrival.series_uid] = arrival
            # A server that knows no offset answers the same page for ever.
            if len(told) < _PAGE or len(found) == before:
                return list(found.values())

    def _json(self, answer: http.client.HTTPResponse) -> Any:
        content = self._read(answer, _MAX_JSON_BYTES + 1)
        if answer.length and len(content) <= _MAX_JSON_BYTES:
            # Python tells of what is missing only where all of an answer is read at once.
            raise self._refused("ended its answer too early", _UNREACHABLE)
        if len(content) > _MAX_JSON_BYTES:
            raise self._refused("answered more than can be looked at")
        try:
            return json.loads(content) if content.strip() else []
        except (ValueError, RecursionError):
            raise self._refused("answered no JSON") from None

    def _read(self, answer: http.client.HTTPResponse, size: int) -> bytes:
        with self._talking():
            return answer.read(size)

    @contextmanager
    def _talking(self) -> Iterator[None]:
        """Tell errors of the network as such; those of the disk, which name a file, stay what they are."""
        try:
            yield
        except (http.client.HTTPException, TimeoutError, ConnectionError, ssl.SSLError) as error:
            raise self._refused(f"can't be reached, or broke off ({type(error).__name__})", _UNREACHABLE) from None
        except OSError as error:
            if error.filename is not None:
                raise
            raise self._refused(f"can't be reached ({error.strerror})", _UNREACHABLE) from None

    @contextmanager
    def _asked(
        self,
        method: str,
        path: str,
        headers: dict[str, str],
        body: Iterator[bytes] | None = None,
        expected: tuple[int, ...] = (200, 204, 206),
    ) -> Iterator[http.client.HTTPResponse]:
        where = urlsplit(self.url)
        host, port = where.hostname or "", where.port
        connection = (
            http.client.HTTPSConnection(host, port, timeout=self.timeout_s, context=ssl.create_default_context())
            if where.scheme == "https"
            else http.client.HTTPConnection(host, port, timeout=self.timeout_s)
        )
        if self.credentials is not None:
            headers = headers | {"Authorization": f"Basic {base64.b64encode(self.credentials.encode()).decode()}"}
        answer = None
        try:
            with self._talking():
                connection.request(method, where.path.rstrip("/") + path, body, headers)
                answer = connection.getresponse()
            if answer.status in (401, 403):
                raise self._refused(f"refuses the credentials (status {answer.status})", "pacs_credentials")
            if answer.status == 404 and method == "GET":
                raise self._refused("has no such address or series (status 404)", "pacs_not_found")
            if answer.status in _AWAY:
                raise self._refused(f"has no time, or is away (status {answer.status})", _UNREACHABLE)
            if answer.status not in expected:
                raise self._refused(f"answered with status {answer.status}")
            yield answer
        finally:
            if answer is not None:
                answer.close()
            connection.close()

    def _refused(self, what: str, code: str = "pacs") -> ResourceError:
        return ResourceError(
            f"the PACS at {urlsplit(self.url).hostname} {what}. Check --watch-dicomweb and the PACS.", code=code
        )


class _Parts:
    """Writes the parts of an answer as files, under limits."""

    def __init__(self, boundary: bytes, folder: Path, limits: Limits) -> None:
        self._folder, self._limits = folder, limits
        self._file: BinaryIO | None = None
        self._left = limits.unpacked_bytes
        self.count, self.is_whole = 0, False
        self._parser = MultipartParser(
            boundary,
            {
                "on_headers_finished": self._begin,
                "on_part_data": self._on_data,
                "on_part_end": self.close,
                "on_end": self._on_end,
            },
        )

    def take(self, piece: bytes) -> None:
        self._parser.write(piece)

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def _begin(self) -> None:
        if self.count >= self._limits.files:
            raise _too_much(f"{self._limits.files} files")
        self._file = (self._folder / f"{self.count:06d}.dcm").open("xb")
        self.count += 1

    def _on_data(self, data: bytes, start: int, end: int) -> None:
        self._left -= end - start
        if self._left < 0:
            raise _too_much(f"{self._limits.unpacked_bytes} bytes")
        assert self._file is not None
        self._file.write(data[start:end])

    def _on_end(self) -> None:
        self.is_whole = True


def _too_much(what: str) -> DataError:
    return DataError(f"a series of the PACS: more than {what}, the most that this service takes.", code="too_large")


def _body(files: Sequence[Path], head: bytes, end: bytes) -> Iterator[bytes]:
    for path in files:
        yield head
        with path.open("rb") as file:
            while piece := file.read(_PIECE_BYTES):
                yield piece
        yield b"\r\n"
    yield end


def _arrival(entry: dict[str, Any]) -> Arrival | None:
    series = _text(entry, _SERIES)
    if not series:
        return None
    return Arrival(
        series_uid=series,
        study_uid=_text(entry, _STUDY),
        modality=_text(entry, _MODALITY),
        description=_text(entry, _DESCRIPTION),
        study_description=_text(entry, _STUDY_DESCRIPTION),
        body_part=_text(entry, _BODY_PART),
        instances=_number(entry, _COUNT),
    )


def _values(entry: dict[str, Any], tag: str) -> list[Any]:
    found = entry.get(tag)
    values = found.get("Value") if isinstance(found, dict) else None
    return values if isinstance(values, list) else []


def _text(entry: dict[str, Any], tag: str) -> str:
    values = _values(entry, tag)
    return values[0].strip() if values and isinstance(values[0], str) else ""


def _number(entry: dict[str, Any], tag: str) -> int:
    values = _values(entry, tag)
    try:
        return int(values[0]) if values else 0
    except (TypeError, ValueError):
        return 0
