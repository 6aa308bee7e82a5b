"""HTTP to one service: the key, the error shape, and going on after a dropped connection.

A request that only asks is repeated while the patience lasts. One that makes something carries a key of its own
(`Idempotency-Key`), so that repeating it makes nothing twice.
"""

from __future__ import annotations

import http.client
import json
import ssl
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from urllib.parse import SplitResult, urlsplit

from sagittal.errors import BundleError, DataError, PlanError, ResourceError, SagittalError, TrainingError

PIECE_BYTES = 1 << 20
_BUSY = frozenset({429, 502, 503, 504})
"""Answers after which asking again may help."""
_KINDS = {kind.__name__: kind for kind in (BundleError, DataError, PlanError, ResourceError, TrainingError)}
_FIRST_PAUSE_S = 0.25
_LONGEST_PAUSE_S = 10.0
_DROPPED = (ConnectionError, TimeoutError, http.client.HTTPException, OSError)


@dataclass(frozen=True)
class Body:
    """What is sent: `pieces()` gives the same bytes each time it is called, `length` of them."""

    media_type: str
    length: int
    pieces: Callable[[], Iterator[bytes]]


class Connection:
    """Requests to one service.

    Args:
        url: of the service, with its base path: `http://host:8000`, `https://host/seg`.
        key: the API key, where the service asks for one.
        timeout_s: without a byte from the service.
        patience_s: how long a dropped connection or a busy service is tried again.

    Raises:
        DataError: not an address of a service.
    """

    def __init__(self, url: str, key: str | None, timeout_s: float, patience_s: float) -> None:
        self._url = _parsed(url)
        self._key, self._timeout_s, self._patience_s = key, timeout_s, patience_s

    def ask(self, method: str, path: str, *, body: Body | None = None, headers: Mapping[str, str] | None = None) -> Any:
        """Return what the service answers, decoded from JSON; None where it answers with nothing.

        Raises:
            SagittalError: what the service refuses, in the kind that it names.
            ResourceError: it can't be reached, or stays busy, for longer than the patience; or something else answers.
        """

        def once() -> Any:
            with self._answer(method, path, body, headers) as response:
                content = response.read()
                return _decoded(content, response, self._shown()) if content else None

        return self._patiently(once)

    def fetch(self, path: str, write: Callable[[bytes], object], restart: Callable[[], object]) -> None:
        """Give the bytes at `path` to `write`, piece by piece; `restart` is called before each try.

        Raises:
            SagittalError: as `ask`.
        """

        def once() -> None:
            restart()
            with self._answer("GET", path, None, None) as response:
                expected, got = response.getheader("Content-Length"), 0
                while piece := response.read(PIECE_BYTES):
                    _written(piece, write)
                    got += len(piece)
                if expected is not None and got != int(expected):
                    raise ConnectionError(f"{got} of {expected} bytes arrived")

        self._patiently(once)

    def _patiently(self, once: Callable[[], Any]) -> Any:
        until, pause_s = time.monotonic() + self._patience_s, _FIRST_PAUSE_S
        while True:
            try:
                return once()
            except _BusyError as busy:
                refused: SagittalError = busy.error
                wait_s = max(pause_s, busy.after_s)
            except ssl.SSLCertVerificationError as error:
                raise ResourceError(
                    f"{self._shown()}: its certificate is not trusted ({error.verify_message}). Expected one that this "
                    "machine's authorities signed. Ask who runs the service.",
                    code="certificate",
                ) from None
            except _DROPPED as error:
                refused = ResourceError(
                    f"{self._shown()}: no answer ({error or type(error).__name__}), tried again for "
                    f"{self._patience_s:g} s. Expected a running 'sagittal serve' there. Check address and network.",
                    code="connection",
                )
                wait_s = pause_s
            if time.monotonic() + wait_s > until:
                raise refused from None
            time.sleep(wait_s)
            pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)

    @contextmanager
    def _answer(
        self, method: str, path: str, body: Body | None, headers: Mapping[str, str] | None
    ) -> Iterator[http.client.HTTPResponse]:
        kind = http.client.HTTPSConnection if self._url.scheme == "https" else http.client.HTTPConnection
        assert self._url.hostname is not None  # _parsed saw to it
        connection = kind(self._url.hostname, self._url.port, timeout=self._timeout_s)
        given = {"Accept": "*/*", **(headers or {})}
        if self._key is not None:
            given["X-API-Key"] = self._key
        if body is not None:
            given |= {"Content-Type": body.media_type, "Content-Length": str(body.length)}
        try:
            response = self._sent(connection, method, path, body, given)
            if response.status >= 300:
                raise _refusal(response, self._shown())
            yield response
        finally:
            connection.close()

    def _sent(
        self,
        connection: http.client.HTTPConnection,
        method: str,
        path: str,
        body: Body | None,
        headers: Mapping[str, str],
    ) -> http.client.HTTPResponse:
        try:
            connection.request(method, self._url.path + path, None if body is None else body.pieces(), dict(headers))
        except (BrokenPipeError, ConnectionResetError):
            # A service that refuses an upload answers and closes before it has taken all of it: hear what it said.
            try:
                return connection.getresponse()
            except _DROPPED:
                pass
            raise
        return connection.getresponse()

    def _shown(self) -> str:
        host = self._url.hostname or ""
        port = "" if self._url.port is None else f":{self._url.port}"
        return f"{self._url.scheme}://{host}{port}{self._url.path}"


class _BusyError(Exception):
    """The service asks to come back later."""

    def __init__(self, error: SagittalError, after_s: float) -> None:
        super().__init__(error.message)
        self.error, self.after_s = error, after_s


def error_of(told: Mapping[str, Any]) -> SagittalError:
    """Return the error that a service tells, `{"type", "code", "message"}`, in the kind that it names."""
    kind = _KINDS.get(str(told.get("type")), SagittalError)
    return kind(str(told.get("message") or "the service gives no reason"), code=str(told.get("code") or "service"))


def _refusal(response: http.client.HTTPResponse, where: str) -> Exception:
    content = response.read(PIECE_BYTES)
    try:
        told = json.loads(content)["error"]
    except (ValueError, KeyError, TypeError):
        told = _no_service(f"{where}: answers {response.status} {response.reason}")
    error = error_of(told)
    if response.status not in _BUSY:
        return error
    after = response.getheader("Retry-After", "")
    return _BusyError(error, float(after) if after.isdigit() else 0.0)


def _decoded(content: bytes, response: http.client.HTTPResponse, where: str) -> dict[str, Any]:
    """Return an answer of the API, all of which are objects; the page of a login before a service is none."""
    try:
        found = json.loads(content)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        kind = response.getheader("Content-Type", "no type").partition(";")[0]
        raise error_of(_no_service(f"{where}: answers {response.status} with no JSON object ({kind})"))
    return found


def _no_service(what: str) -> dict[str, str]:
    told = f"{what}. Expected a Sagittal service. Check the address, its base path included."
    return {"type": "ResourceError", "code": "service", "message": told}


def _written(piece: bytes, write: Callable[[bytes], object]) -> None:
    try:
        write(piece)
    except OSError as error:  # the disk's, not the network's: trying again would not help
        raise DataError(
            f"a result can't be written ({error.strerror}). Expected a folder with room. Choose another.",
            code="cannot_write",
        ) from None


def _parsed(url: str) -> SplitResult:
    try:
        parsed = urlsplit(url.rstrip("/"))
        is_service = parsed.scheme in ("http", "https") and bool(parsed.hostname) and parsed.port != 0
    except ValueError:
        is_service = False
    if not is_service or parsed.query or parsed.fragment or parsed.username:
        raise DataError(
            f"'{url}': not the address of a service. Expected http://HOST:PORT or https://HOST/BASE, without a user or "
            "a question mark.",
            code="bad_address",
        )
    return parsed
