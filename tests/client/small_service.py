"""A service of a few lines, on a real socket, which drops connections and is busy as often as a test wants."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class Request:
    method: str
    path: str
    headers: dict[str, str]
    body: bytes


@dataclass
class SmallService:
    """What it answers, and what it was asked.

    `answers` maps "METHOD /path" to what is answered in turn, the last one for ever: (status, body, headers), or "drop"
    for a connection that ends without an answer, or "half" for a body that breaks off.
    """

    answers: dict[str, list[Any]]
    url: str = ""
    requests: list[Request] = field(default_factory=list)

    def next(self, what: str) -> Any:
        row = self.answers.get(what, [(404, error("DataError", "not_found", f"no {what}"), {})])
        return row.pop(0) if len(row) > 1 else row[0]


def error(kind: str, code: str, message: str) -> bytes:
    return json.dumps({"error": {"type": kind, "code": code, "message": message}}).encode()


def told(value: Any, status: int = 200) -> tuple[int, bytes, dict[str, str]]:
    return status, json.dumps(value).encode(), {}


@contextmanager
def running(answers: dict[str, list[Any]]) -> Iterator[SmallService]:
    service = SmallService(answers)

    class Handler(BaseHTTPRequestHandler):
        def _do(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            service.requests.append(Request(self.command, self.path, dict(self.headers), body))
            answer = service.next(f"{self.command} {self.path}")
            if answer == "drop":
                self.close_connection = True
                return
            status, content, headers = answer[1] if answer[0] == "half" else answer
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content[: len(content) // 2] if answer[0] == "half" else content)
            self.close_connection = True

        def log_message(self, format: str, *args: object) -> None:
            pass

    for method in ("GET", "POST", "DELETE"):
        setattr(Handler, f"do_{method}", Handler._do)
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    service.url = f"http://127.0.0.1:{server.server_port}/seg"
    try:
        yield service
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
