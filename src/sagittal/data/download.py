"""Fetch a file over HTTP: it can be stopped and goes on where it was, and appears whole and checked or not at all.

Standard library only. The part lies in NAME.part, and what the server said of the file in NAME.part.json, so that a
file that changed in between is begun again. Nothing but what was asked for is sent: no account, no machine, no version.
"""

from __future__ import annotations

import hashlib
import http.client
import json
import shutil
import ssl
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from email.message import Message
from pathlib import Path
from typing import IO, Any
from urllib.parse import urlsplit

from sagittal.errors import DataError, ResourceError
from sagittal.plan.base import cannot_write, write_atomically

TIMEOUT_S = 60.0
ATTEMPTS = 4
"""Tries in a row that bring no byte before a download is given up."""
PAUSE_S = 2.0
_PIECE = 1 << 20
_NETWORK = (ConnectionError, TimeoutError, ssl.SSLError)

Progress = Callable[[int, int | None], None]
"""Called with the bytes that are there and the bytes in all, None where the server does not say."""


@dataclass(frozen=True)
class Downloaded:
    """A file that was fetched.

    Attributes:
        path: where it is.
        size: bytes.
        sha256: of its content.
        resumed: whether a part was there before.
    """

    path: Path
    size: int
    sha256: str
    resumed: bool


def download(
    url: str,
    target: Path,
    *,
    md5: str | None = None,
    on_progress: Progress | None = None,
    pause_s: float = PAUSE_S,
) -> Downloaded:
    """Fetch `url` into `target`, going on with a part that an earlier call left.

    Args:
        url: http or https; it may redirect, but not from https to http.
        target: the file to make; it must not exist.
        md5: what its checksum has to be.
        on_progress: called as bytes arrive.
        pause_s: seconds between tries.

    Raises:
        DataError: the address is no web address, the target exists, the server refuses, or the checksum is another.
        ResourceError: the connection fails, or the disk is full; the part stays, and the next call goes on with it.
    """
    if urlsplit(url).scheme not in ("http", "https"):
        raise DataError(f"{url}: expected an address that begins with https:// or http://.", code="bad_address")
    if target.exists():
        raise DataError(
            f"{target}: exists, and is never overwritten. Remove it, or choose another folder.", code="exists"
        )
    part = target.with_name(target.name + ".part")
    resumed = part.is_file() and part.stat().st_size > 0
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _fetch(url, part, on_progress, pause_s)
        sha256, found_md5 = _digests(part)
        if md5 is not None and found_md5 != md5:
            _forget(part)
            raise DataError(
                f"{url}: the MD5 of what came is {found_md5}, expected {md5}. The download was damaged, or the file "
                "was changed; it has been removed. Fetch it again; if it stays so, ask the publisher.",
                code="wrong_checksum",
            )
        size = part.stat().st_size
        part.replace(target)
        _forget(part)
    except OSError as error:
        raise cannot_write(target, error, note="What came so far is kept.", code="disk") from None
    return Downloaded(target, size, sha256, resumed)


def _fetch(url: str, part: Path, on_progress: Progress | None, pause_s: float) -> None:
    """Fill `part` to its end, trying again as long as bytes arrive."""
    fruitless = 0
    while True:
        before = part.stat().st_size if part.is_file() else 0
        try:
            cause = _fetch_some(url, part, on_progress)
        except urllib.error.HTTPError as error:
            if error.code < 500 and error.code not in (408, 429):
                raise DataError(
                    f"{url}: the server says {error.code} {error.reason}. Check the address; the publisher may have "
                    "moved the file.",
                    code="refused",
                ) from None
            cause = f"the server says {error.code} {error.reason}"
        except (urllib.error.URLError, http.client.HTTPException, *_NETWORK) as error:
            cause = str(getattr(error, "reason", error)) or type(error).__name__
        if cause is None:
            return
        now = part.stat().st_size if part.is_file() else 0
        fruitless = 0 if now > before else fruitless + 1
        if fruitless >= ATTEMPTS:
            raise ResourceError(
                f"{url}: {cause}; {now} bytes are there. Check the network, and give the same command again: it goes "
                "on where it was.",
                code="network",
            )
        time.sleep(pause_s)


def _fetch_some(url: str, part: Path, on_progress: Progress | None) -> str | None:
    """Fetch what is missing in one connection; return None at the end of the file, else why it is not there."""
    offset = part.stat().st_size if part.is_file() else 0
    known = _known(part, url)
    if known is None:
        offset = 0
    headers = {"User-Agent": "sagittal", "Accept-Encoding": "identity"}
    if offset:
        headers["Range"] = f"bytes={offset}-"
        if known and known.get("validator"):
            headers["If-Range"] = known["validator"]
    request = urllib.request.Request(url, headers=headers)
    try:
        answer = _OPENER.open(request, timeout=TIMEOUT_S)
    except urllib.error.HTTPError as error:
        with error:
            if error.code == 416 and offset:
                return _after_416(error.headers.get("Content-Range"), part, offset)
            raise
    with answer:
        goes_on = answer.status == 206
        if goes_on and not _starts_at(answer.headers.get("Content-Range"), offset):
            _forget(part)
            return "the server sent another part than was asked for"
        offset = offset if goes_on else 0
        length = answer.headers.get("Content-Length")
        total = offset + int(length) if length is not None and length.isdigit() else None
        _require_room(part, total, offset)
        _remember(part, url, answer.headers)
        with part.open("ab" if goes_on else "wb") as file:
            got = _copy(answer, file, offset, total, on_progress)
    if total is not None and got < total:
        return f"the connection ended at byte {got} of {total}"
    return None


def _copy(answer: Any, file: IO[bytes], offset: int, total: int | None, on_progress: Progress | None) -> int:
    got = offset
    while piece := answer.read(_PIECE):
        file.write(piece)
        got += len(piece)
        if on_progress is not None:
            on_progress(got, total)
    return got


def _after_416(content_range: str | None, part: Path, offset: int) -> str | None:
    """Return None where the part is the whole file already; else it is of another file, and begun again."""
    if content_range == f"bytes */{offset}":
        return None
    _forget(part)
    return "the part that was there is not of this file"


def _starts_at(content_range: str | None, offset: int) -> bool:
    return content_range is not None and content_range.startswith(f"bytes {offset}-")


def _require_room(part: Path, total: int | None, offset: int) -> None:
    free = shutil.disk_usage(part.parent).free
    if total is not None and total - offset > free:
        raise ResourceError(
            f"{part.parent}: {total - offset} bytes are still to come, {free} are free. Free space or choose another "
            "folder.",
            code="disk",
        )


def _known(part: Path, url: str) -> dict[str, str] | None:
    """Return what the server said when the part was begun; None where that is unknown or of another address."""
    try:
        notes = json.loads(_notes(part).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return notes if isinstance(notes, dict) and notes.get("url") == url else None


def _remember(part: Path, url: str, headers: Message) -> None:
    tag = headers.get("ETag") or ""
    # A weak tag says that the content is alike, not that its bytes are the same.
    validator = tag if tag and not tag.startswith("W/") else headers.get("Last-Modified") or ""
    write_atomically(_notes(part), json.dumps({"url": url, "validator": validator}).encode())


def _forget(part: Path) -> None:
    _notes(part).unlink(missing_ok=True)
    part.unlink(missing_ok=True)


def _notes(part: Path) -> Path:
    return part.with_name(part.name + ".json")


def _digests(path: Path) -> tuple[str, str]:
    """Return SHA-256 and MD5 in one pass; MD5 is what the hosts publish, and only tells a damaged file."""
    sha256, md5 = hashlib.sha256(), hashlib.md5(usedforsecurity=False)
    with path.open("rb") as file:
        while piece := file.read(_PIECE):
            sha256.update(piece)
            md5.update(piece)
    return sha256.hexdigest(), md5.hexdigest()


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file, read piece by piece."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class _SafeRedirects(urllib.request.HTTPRedirectHandler):
    """Follow redirects to web addresses only, and never from an encrypted connection to an open one."""

    def redirect_request(
        self, req: urllib.request.Request, fp: Any, code: int, msg: str, headers: Any, newurl: str
    ) -> urllib.request.Request | None:
        allowed = ("https",) if urlsplit(req.full_url).scheme == "https" else ("http", "https")
        if urlsplit(newurl).scheme not in allowed:
            fp.close()
            raise DataError(
                f"{req.full_url}: redirects to {newurl}. Expected an address that begins with {allowed[-1]}://.",
                code="bad_address",
            )
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _opener() -> urllib.request.OpenerDirector:
    """Return an opener that knows HTTP and HTTPS and nothing else: no file://, no ftp://, no data:."""
    opener = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.ProxyHandler(),
        urllib.request.HTTPHandler(),
        urllib.request.HTTPSHandler(),
        urllib.request.HTTPDefaultErrorHandler(),
        urllib.request.HTTPErrorProcessor(),
        _SafeRedirects(),
    ):
        opener.add_handler(handler)
    return opener


_OPENER = _opener()
