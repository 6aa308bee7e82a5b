"""Whoever sends slowly, or opens connections by the hundred, keeps nobody else out."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from itertools import count
from types import SimpleNamespace

import httpx
import pytest
import uvicorn
from serving import PATIENCE_S, TestClient, error_of, service

from sagittal.serve import connections, forms
from sagittal.serve.connections import LimitedProtocol
from sagittal.serve.refusals import RefusalError
from sagittal.serve.settings import Limits

HEAD_S = 0.4


@pytest.fixture
def port(monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    monkeypatch.setattr(connections, "HEAD_S", HEAD_S)

    async def app(scope: object, receive: object, send: Callable[..., object]) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})  # type: ignore[misc]
        await send({"type": "http.response.body", "body": b"ok"})  # type: ignore[misc]

    config = uvicorn.Config(
        app, http=LimitedProtocol, lifespan="off", log_config=None, ws="none", timeout_keep_alive=600
    )
    server = uvicorn.Server(config)
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        while not server.started:
            time.sleep(0.01)
        yield listener.getsockname()[1]
        server.should_exit = True
        thread.join()


def _is_closed(connection: socket.socket) -> bool:
    """Send a letter at a time until the other side hangs up; whether it did."""
    end = time.monotonic() + PATIENCE_S
    connection.settimeout(0.05)
    letters = iter(b"GET / HTTP/1.1\r\nX-Slow: " + b"a" * 10_000)
    while time.monotonic() < end:
        try:
            connection.send(bytes([next(letters)]))
            if connection.recv(100) == b"":
                return True
        except TimeoutError:
            continue
        except OSError:
            return True
    return False


def test_a_head_that_comes_letter_by_letter_is_not_waited_for(port: int) -> None:
    # Before it is connected: from then on the service counts, and this thread may be halted.
    began = time.monotonic()
    with socket.create_connection(("127.0.0.1", port)) as slow:
        assert _is_closed(slow)
    assert time.monotonic() - began > HEAD_S * 0.8


def test_a_connection_is_kept_between_requests_but_a_slow_second_head_is_not_waited_for(
    port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Of the first head nothing is to be seen here, however late it comes.
    monkeypatch.setattr(connections, "HEAD_S", 600.0)
    with socket.create_connection(("127.0.0.1", port)) as kept:
        kept.settimeout(PATIENCE_S)
        for number in range(3):
            kept.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
            answer = b""
            while not answer.endswith(b"ok"):
                answer += (piece := kept.recv(1000))
                assert piece, "it was closed"
            if number == 0:
                monkeypatch.setattr(connections, "HEAD_S", HEAD_S)
            else:
                time.sleep(1.5 * HEAD_S)
        assert _is_closed(kept)


def test_more_connections_than_the_service_takes_are_closed_at_once(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "MOST_CONNECTIONS", 2)
    # None is closed for its head, neither one of the first two before the third comes nor the third itself.
    monkeypatch.setattr(connections, "HEAD_S", 600.0)
    held = [socket.create_connection(("127.0.0.1", port)) for _ in range(3)]
    held[-1].settimeout(PATIENCE_S)
    try:
        ended = held[-1].recv(1)
    except ConnectionResetError:
        ended = b""
    assert ended == b""
    for each in held:
        each.close()
    monkeypatch.undo()
    assert httpx.get(f"http://127.0.0.1:{port}/", timeout=PATIENCE_S).status_code == 200


class _Drip:
    """A request whose body comes a letter at a time."""

    async def stream(self) -> AsyncIterator[bytes]:
        while True:
            await asyncio.sleep(0.01)
            yield b"a"


def test_a_body_that_drips_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    async def read() -> None:
        async for _ in forms.body_of(_Drip(), 1 << 20, 600):  # type: ignore[arg-type]
            pass

    # A minute for each letter: on a real clock a halt would count as a body that does not come at all.
    minutes = count()
    monkeypatch.setattr(forms, "time", SimpleNamespace(monotonic=lambda: 60.0 * next(minutes)))
    with pytest.raises(RefusalError, match="bytes came a second") as caught:
        asyncio.run(read())
    assert caught.value.code == "upload_stalled" and 10 <= next(minutes) < 20


def test_headers_of_a_part_have_an_end(served: Callable[..., TestClient]) -> None:
    client = served(limits=Limits(upload_bytes=8 << 20, free_bytes=0))
    head = b'--x\r\nContent-Disposition: form-data; name="image"\r\n'
    for lines in (b"X-Long: " + b"a" * (4 << 20), b"".join(b"X-%d: a\r\n" % number for number in range(100_000))):
        sent = client.post(
            "/api/v1/jobs",
            content=head + lines + b"\r\n\r\nabc\r\n--x--",
            headers={"Content-Type": "multipart/form-data; boundary=x"},
        )
        error_of(sent, 400, "bad_form")
    assert list(service(client).settings.uploads_folder.iterdir()) == []
