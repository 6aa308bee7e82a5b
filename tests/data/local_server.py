"""A web server on this machine for tests: whole files or parts of them, and the faults that servers have."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@dataclass
class Served:
    """What the server does, and what it was asked."""

    content: bytes
    etag: str | None = '"one"'
    accepts_ranges: bool = True
    tells_length: bool = True
    cut_after: list[int] = field(default_factory=list)
    """Bytes after which one connection after the other is closed."""
    fail_with: list[int] = field(default_factory=list)
    """Statuses of the first answers."""
    redirect_to: str | None = None
    shift_ranges: int = 0
    requests: list[dict[str, str]] = field(default_factory=list)
    url: str = ""


@contextmanager
def serving(served: Served) -> Iterator[Served]:
    """Serve at `served.url` on 127.0.0.1."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            served.requests.append(dict(self.headers))
            if served.fail_with:
                self.send_error(served.fail_with.pop(0))
            elif served.redirect_to is not None and self.path != "/end":
                self.send_response(302)
                self.send_header("Location", served.redirect_to)
                self.end_headers()
            else:
                _answer(self, served)

        def log_message(self, format: str, *args: object) -> None:
            """Say nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    served.url = f"http://127.0.0.1:{server.server_port}/file.tar"
    try:
        yield served
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def _answer(handler: BaseHTTPRequestHandler, served: Served) -> None:
    content, start, status = served.content, 0, 200
    asked = re.fullmatch(r"bytes=(\d+)-", handler.headers.get("Range", ""))
    condition = handler.headers.get("If-Range")
    if asked and served.accepts_ranges and condition in (None, served.etag):
        start, status = int(asked[1]) - served.shift_ranges, 206
        if start >= len(content):
            handler.send_response(416)
            handler.send_header("Content-Range", f"bytes */{len(content)}")
            handler.send_header("Content-Length", "0")
            handler.end_headers()
            return
    body = content[start:]
    handler.send_response(status)
    if status == 206:
        handler.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
    if served.etag is not None:
        handler.send_header("ETag", served.etag)
    if served.tells_length:
        handler.send_header("Content-Length", str(len(body)))
    handler.end_headers()
    handler.wfile.write(body[: served.cut_after.pop(0)] if served.cut_after else body)
