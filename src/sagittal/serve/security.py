"""What stands before every route: who may call, from where, and what browsers are told; and a shape for every error.

Written as plain ASGI, so that bodies stream through. From the outside in: an error that nobody expected becomes a 500
with an id, headers are set, the Host header is looked at, the key is.
"""

from __future__ import annotations

import asyncio
import hmac
import logging
import traceback
import uuid
from collections.abc import Iterable
from contextlib import suppress
from pathlib import PurePath
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from sagittal.errors import SagittalError
from sagittal.serve.audit import Audit
from sagittal.serve.metrics import Metrics
from sagittal.serve.page_files import HEADERS
from sagittal.serve.refusals import RefusalError, status_of, without_paths
from sagittal.serve.settings import ApiKey, ServeSettings, hash_of_key, is_loopback

_log = logging.getLogger("sagittal.serve")

OPEN_PATHS = frozenset({"/", "/health", "/ready", "/openapi.json", "/favicon.ico"}) | frozenset(
    f"{prefix}/auth{ending}" for prefix in ("", "/monai") for ending in ("", "/", "/token")
)
OPEN_PREFIXES = ("/static/",)
"""What needs no key: the page's own files, whether the service is there, and the exchange of a password that is a key;
nothing of any job."""
_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS", "PATCH"})
_SAFE_METHODS = frozenset({"GET", "HEAD", "OPTIONS"})
_HEAR_OUT_BYTES, _HEAR_OUT_S = 64 << 20, 20.0
_LOOPBACK_NAMES = frozenset({"localhost", "127.0.0.1", "::1"})


def error_response(error: SagittalError) -> Response:
    """Return an error in the one shape, without paths of this machine, which the library's own messages begin with."""
    if isinstance(error, RefusalError):
        return JSONResponse(error.as_dict(), error.status, error.headers)
    told = type(error)(without_paths(error.message), code=error.code)
    return JSONResponse(told.as_dict(), status_of(error))


class Guard:
    """Stands before the application.

    Args:
        app: what answers where nothing is to be said against it.
        settings: keys, hosts and origins.
        audit: is told of requests that were refused here.
        metrics: counts all of them.
    """

    def __init__(self, app: ASGIApp, settings: ServeSettings, audit: Audit, metrics: Metrics) -> None:
        self._app, self._audit, self._metrics = app, audit, metrics
        self._base, self._keys = settings.base_url, settings.api_keys
        self._checks_host = settings.is_loopback
        self._hosts = _LOOPBACK_NAMES | {host.lower() for host in settings.allowed_hosts}
        self._origins = frozenset(settings.allowed_origins)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        # Not uvicorn's option of this name: that puts it in front of every path, also where a proxy left it there.
        scope["root_path"] = self._base
        answer = _Answer(Headers(scope=scope), receive, send)
        try:
            await self._answered(scope, answer)
        except ClientDisconnect:
            return
        except Exception as error:
            told = unexpected(error)
            if not answer.status:
                await error_response(told)(scope, answer.receive, answer.send)
        finally:
            # The pattern of the route, not the path: ids are no labels.
            route = getattr(scope.get("route"), "path", "none")
            method = scope["method"] if scope["method"] in _METHODS else "other"
            self._metrics.requests.labels(method, route, answer.status).inc()

    async def _answered(self, scope: Scope, answer: _Answer) -> None:
        try:
            owner = self._admitted(scope)
        except RefusalError as refusal:
            self._audit.write("refused", status=refusal.status)
            await error_response(refusal)(scope, answer.receive, answer.send)
            return
        if owner is not None:
            scope.setdefault("state", {})["owner"] = owner
        if self._base and scope["path"] == self._base:
            # Links of the page are relative to its folder.
            await RedirectResponse(f"{self._base}/")(scope, answer.receive, answer.send)
            return
        await self._app(scope, answer.receive, answer.send)

    def _admitted(self, scope: Scope) -> str | None:
        """Return the name of the request's key, None where there are none.

        Raises:
            RefusalError: another host or origin (403), or no valid key (401).
        """
        headers = Headers(scope=scope)
        if self._checks_host and _name_of(headers.get("host", "")) not in self._hosts:
            raise RefusalError(
                "the Host header names another machine. Expected localhost, or a name that --allow-host gives.",
                code="host",
                status=403,
            )
        path = route_path(scope)
        if self._keys:
            if (
                path == scope.get("root_path")
                or path in OPEN_PATHS
                or path.startswith(OPEN_PREFIXES)
                or scope["method"] == "OPTIONS"
            ):
                return None
            return self._key_of(headers).name
        if scope["method"] not in _SAFE_METHODS:
            self._require_same_origin(headers)
        return None

    def _key_of(self, headers: Headers) -> ApiKey:
        given = headers.get("x-api-key", "")
        scheme, _, token = headers.get("authorization", "").partition(" ")
        if not given and scheme.lower() == "bearer":
            given = token.strip()
        digest, found = hash_of_key(given), None
        for key in self._keys:
            # Every key is compared, so that the time tells nothing of which one was nearly right.
            if hmac.compare_digest(key.sha256, digest):
                found = key
        if found is None:
            raise RefusalError(
                "no valid API key. Send it as 'X-API-Key: KEY' or 'Authorization: Bearer KEY'.",
                code="api_key",
                status=401,
                headers={"WWW-Authenticate": "Bearer"},
            )
        return found

    def _require_same_origin(self, headers: Headers) -> None:
        """Refuse what a page of another site sends through the browser of somebody who reaches the service."""
        origin = headers.get("origin")
        if origin is None or origin in self._origins:
            return
        try:
            there = urlsplit(origin).netloc.lower()
        except ValueError:
            there = ""
        if there != headers.get("host", "").lower() and _name_of(there) not in self._hosts - _LOOPBACK_NAMES:
            raise RefusalError(
                "the request comes from a page of another site. Give its origin with --allow-origin if it may.",
                code="origin",
                status=403,
            )


class _Answer:
    """Sets the headers of an answer, notes its status, and hears a refused request out.

    Many clients listen only when they have sent everything: an answer in the middle of their body is lost on them.
    """

    def __init__(self, headers: Headers, receive: Receive, send: Send) -> None:
        self._headers, self._receive, self._send = headers, receive, send
        self._is_read = False
        self.status = 0

    async def receive(self) -> Message:
        message = await self._receive()
        if message["type"] != "http.request" or not message.get("more_body", False):
            self._is_read = True
        return message

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            headers = MutableHeaders(scope=message)
            for name, value in HEADERS.items():
                headers.setdefault(name, value)
            headers.setdefault("cache-control", "no-store")
            if self.status >= 400:
                with suppress(TimeoutError):
                    await asyncio.wait_for(self._hear_out(), _HEAR_OUT_S)
        await self._send(message)

    async def _hear_out(self) -> None:
        stated = self._headers.get("content-length", "0" if "transfer-encoding" not in self._headers else "1")
        if self._headers.get("expect") or not stated.isdigit() or int(stated[:18]) > _HEAR_OUT_BYTES:
            return
        left = _HEAR_OUT_BYTES if int(stated) else 0
        while left > 0 and not self._is_read:
            left -= len((await self.receive()).get("body", b""))


def unexpected(error: Exception) -> RefusalError:
    """Note an error that is ours and return what the caller is told: an id that the log has.

    The log gets where it was raised, not what it says: a message may hold a path or a value of a header.
    """
    number = uuid.uuid4().hex[:12]
    _log.error("error %s: %s at %s", number, type(error).__name__, where_raised(error))
    return RefusalError(f"an error in the service, noted in its log as {number}.", code="bug", status=500)


def where_raised(error: BaseException) -> str:
    """Return the last places of a traceback, without paths and values."""
    frames: Iterable[traceback.FrameSummary] = traceback.extract_tb(error.__traceback__)[-6:]
    return " < ".join(f"{PurePath(frame.filename).name}:{frame.lineno} {frame.name}" for frame in reversed([*frames]))


def route_path(scope: Scope) -> str:
    """Return the path below the base URL, whether a proxy has taken that away or not."""
    path, base = str(scope["path"]), str(scope.get("root_path", ""))
    return path.removeprefix(base) if base and path.startswith(f"{base}/") else path


def _name_of(host: str) -> str:
    """Return the name in a Host header without its port."""
    if host.startswith("["):
        return host[1:].partition("]")[0].lower()
    name = host.partition(":")[0].lower()
    return "127.0.0.1" if is_loopback(name) and name != "localhost" else name
