"""What becomes of a verb that is asked to end: by SIGTERM, as by Ctrl-C."""

from __future__ import annotations

import shlex
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

STOPPED = 75
"""Exit code after SIGTERM where the same command can go on, which has a job scheduler give it again."""
TERMINATED = 128 + int(signal.SIGTERM)
"""Exit code after SIGTERM where there is nothing to go on from: 143, as of a process that the signal ends."""


def command_to_tell(program: str = "sagittal", *, resume: bool | None = None) -> str:
    """Return this command as one types it again, without the passwords of its URLs.

    Args:
        program: what begins it.
        resume: whether it goes on by --resume; None leaves that as it was given.
    """
    from sagittal.plan.urls import words_without_secrets

    words = sys.argv[1:] if resume is None else [word for word in sys.argv[1:] if word != "--resume"]
    return f"{program} {shlex.join(words_without_secrets([*words, *(['--resume'] if resume else [])]))}"


@contextmanager
def sigterm_raises(stop: Callable[[], BaseException]) -> Iterator[None]:
    """Let SIGTERM unwind the block with what `stop` makes, as Ctrl-C does: processes end, no file is half written."""

    def end(number: int, frame: FrameType | None) -> None:
        raise stop()

    try:
        previous = signal.signal(signal.SIGTERM, end)
    except ValueError:  # not the main thread, which alone receives signals
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


@contextmanager
def ended_by_sigterm() -> Iterator[None]:
    """Let SIGTERM unwind a verb that can't go on later, and say so."""
    try:
        with sigterm_raises(lambda: SystemExit(TERMINATED)):
            yield
    except SystemExit as error:
        if error.code == TERMINATED:
            told = "stopped; no file is half written, and nothing is kept to go on from; begin again with"
            print(f"{told}: {command_to_tell()}", file=sys.stderr, flush=True)
        raise
