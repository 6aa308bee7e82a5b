"""What is shown while something takes long: bytes that arrive, scans that are predicted."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

EVERY_S = 10.0
"""How often a run that takes long says how far it is."""


class ProgressLines:
    """Says now and then how far a prediction is: plain lines, which a log file and a terminal show alike.

    Args:
        cases: to be predicted in this run.
        say: prints a line.
        every_s: seconds between two lines at the least.
    """

    def __init__(self, cases: int, say: Callable[[str], None], every_s: float = EVERY_S) -> None:
        self._cases, self._say, self._every_s = cases, say, every_s
        self._done = 0
        self._began = self._said_at = time.monotonic()
        self._lock = threading.Lock()

    def case(self) -> None:
        """Note that one more case is done, or failed."""
        with self._lock:
            self._done += 1

    def window(self, case: str, done: int, of: int) -> None:
        """Note how far a case is; say so where it is time for it."""
        with self._lock:
            now = time.monotonic()
            if now - self._said_at < self._every_s:
                return
            self._said_at = now
            elapsed = time_in_words(now - self._began)
            self._say(f"{case}: window {done} of {of}; {self._done} of {self._cases} cases done; {elapsed}")


class CountLines:
    """Says now and then how many cases are done: plain lines on stderr, beside results that may be piped.

    Args:
        what: was done with them, for example "scored".
        every_s: seconds between two lines at the least.
    """

    def __init__(self, what: str, every_s: float = EVERY_S) -> None:
        self._what, self._every_s = what, every_s
        self._began = self._said_at = time.monotonic()
        self._lock = threading.Lock()

    def __call__(self, done: int, of: int, where: str = "") -> None:
        """Say that `done` of `of` cases are done, where it is time for it; from any thread."""
        with self._lock:
            now = time.monotonic()
            if now - self._said_at < self._every_s:
                return
            self._said_at = now
            before = f"{where}: " if where else ""
            told = f"{before}{done} of {of} cases {self._what}; {time_in_words(now - self._began)}"
            print(told, file=sys.stderr, flush=True)


def time_in_words(seconds: float) -> str:
    """Return `0:00:12` or `27:46:40`."""
    minutes, rest = divmod(int(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"


@contextmanager
def download_bar() -> Iterator[Callable[[int, int | None], None]]:
    """Show a bar on a terminal, elsewhere a line at every tenth of the file; yield what is told of each piece."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn

    console = Console(stderr=True)
    if not console.is_terminal:
        told = -1

        def tell(got: int, total: int | None) -> None:
            nonlocal told
            if total and 10 * got // total != told:
                told = 10 * got // total
                console.print(f"{got} of {total} bytes", highlight=False)

        yield tell
        return
    with Progress(BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn(), console=console) as bars:
        task = bars.add_task("", total=None)
        yield lambda got, total: bars.update(task, completed=got, total=total)
