"""A service from its first to its last moment: one per folder, told to stop by SIGTERM or Ctrl-C.

Exit codes: 0 where it was stopped with no job left, 75 where jobs wait that the same command goes on with, 1 where it
could not start.
"""

from __future__ import annotations

import fcntl
import logging
import os
import resource
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import uvicorn

from sagittal.errors import ResourceError, SagittalError
from sagittal.serve.app import create_app
from sagittal.serve.connections import LimitedProtocol
from sagittal.serve.models import ServedModels
from sagittal.serve.service import Service
from sagittal.serve.settings import ServeSettings
from sagittal.serve.supervisor import Supervisor

DONE, FAILED, RESUMABLE = 0, 1, 75
LOCK = "serve.lock"
_LOOK_EVERY_S, _START_LOOK_S = 0.5, 0.02
_CLOSING_S = 5
"""For requests in progress, once the jobs have ended."""
_HEADER_BYTES = 32 << 10


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep other services out of a folder while the block runs.

    Raises:
        ResourceError: another one works there.
    """
    with (folder / LOCK).open("ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ResourceError(
                f"{folder}: another 'sagittal serve' works there. Stop it, or choose another folder.", code="in_use"
            ) from None
        yield


def run(settings: ServeSettings, models: ServedModels, say: Callable[[str], None]) -> int:
    """Serve until a signal comes, and return the exit code.

    The first signal lets jobs in progress end, for as long as the settings say; a second one puts them back at once.

    Args:
        settings: of the service.
        models: that it has.
        say: shows a line to whoever started it.

    Raises:
        ResourceError: the address can't be listened on, or no worker can be started.
    """
    with _listening(settings) as listener:
        app = create_app(settings, models)
        service: Service = app.state.service
        hopeless: list[SagittalError] = []
        stop = threading.Event()

        def give_up(error: SagittalError) -> None:
            hopeless.append(error)
            stop.set()

        if isinstance(service.supervisor, Supervisor):
            service.supervisor.on_hopeless = give_up
        server = uvicorn.Server(
            uvicorn.Config(
                app,
                log_config=None,
                access_log=False,
                server_header=False,
                date_header=True,
                proxy_headers=False,
                timeout_graceful_shutdown=_CLOSING_S,
                h11_max_incomplete_event_size=_HEADER_BYTES,
                ws="none",
                http=LimitedProtocol,
            )
        )
        # Not in the main thread, uvicorn leaves signals alone.
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, name="http")
        with _told_to_stop(stop, service, say), _logged(say, settings.debug):
            thread.start()
            while thread.is_alive() and not server.started:
                thread.join(_START_LOOK_S)
            host, port = listener.getsockname()[:2]
            shown = f"[{host}]" if ":" in host else host
            if server.started:
                say(f"serving {', '.join(models)} on http://{shown}:{port}{settings.base_url}/")
            while thread.is_alive() and not stop.wait(_LOOK_EVERY_S):
                pass
            # The API answers until the jobs in progress have ended.
            service.supervisor.stop(0.0 if hopeless else settings.limits.stop_s)
            left = sum(service.store.counts()[state] for state in ("queued", "running")) if thread.is_alive() else 0
            server.should_exit = True
            thread.join()
        if hopeless:
            raise hopeless[0]
        if not stop.is_set():
            say("the service could not start, or ended by itself")
            return FAILED
        if left:
            say(f"stopped; {left} jobs wait; the same command goes on with them")
        return RESUMABLE if left else DONE


def keep_private() -> None:
    """Let nobody else on this machine read what this process and its workers write, memory dumps included."""
    os.umask(0o077)
    resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))


@contextmanager
def _listening(settings: ServeSettings) -> Iterator[socket.socket]:
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((settings.host.strip("[]"), settings.port))
        except OSError as error:
            raise ResourceError(
                f"--host {settings.host} --port {settings.port}: can't be listened on ({error.strerror or error}). "
                "Choose another port, or an address of this machine.",
                code="address",
            ) from None
        yield listener


@contextmanager
def _told_to_stop(stop: threading.Event, service: Service, say: Callable[[str], None]) -> Iterator[None]:
    def on_signal(number: int, frame: FrameType | None) -> None:
        if stop.is_set():
            # A thread, since the interrupted one may hold the lock that this takes.
            threading.Thread(target=service.supervisor.stop, args=(0.0,), daemon=True).start()
        stop.set()

    previous = {number: signal.signal(number, on_signal) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


@contextmanager
def _logged(say: Callable[[str], None], debug: bool) -> Iterator[None]:
    """Show the service's own log; it names jobs, never files or patients."""

    class Shown(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            say(self.format(record))

    handler, log = Shown(), logging.getLogger("sagittal.serve")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    level, propagate = log.level, log.propagate
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    log.propagate = debug
    try:
        yield
    finally:
        log.removeHandler(handler)
        log.setLevel(level)
        log.propagate = propagate
