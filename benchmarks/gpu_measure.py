"""What benchmarks/gpu.py measures with: a clock with an end, timers, poison, and a report of partial results."""

import gc
import json
import signal
import statistics
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

MIB = 2**20


class OutOfTimeError(BaseException):
    """A part took longer than it was given; no library's `except Exception` may keep it to itself."""


class Report:
    """Prints with the seconds since the start, keeps rows, and writes each at once as a line of JSON.

    Args:
        path: file that receives the lines, or None.
        limit_s: seconds after which nothing new is begun.
    """

    def __init__(self, path: Path | None, limit_s: float) -> None:
        self._began = time.monotonic()
        self._path = path
        self._ends = [self._began + limit_s]
        self.rows: list[dict[str, Any]] = []
        self.failures: list[str] = []
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("")

    @property
    def left_s(self) -> float:
        """Seconds until the limit of the part that is being done, or of everything."""
        return self._ends[-1] - time.monotonic()

    def say(self, line: str) -> None:
        """Print a line."""
        print(f"[{time.monotonic() - self._began:6.1f} s] {line}", flush=True)

    def add(self, section: str, **values: Any) -> None:
        """Keep a row, print it and write it."""
        row = {"section": section, **values}
        self.rows.append(row)
        self.say(f"{section}: " + ", ".join(f"{key} {_shown(value)}" for key, value in values.items()))
        if self._path is not None:
            with self._path.open("a") as file:
                file.write(json.dumps(row) + "\n")

    @contextmanager
    def part(self, name: str, limit_s: float | None = None) -> Iterator[None]:
        """Do a part: what goes wrong in it is printed and kept, and the next part begins.

        Args:
            name: for the messages.
            limit_s: seconds that it may take; by itself what is left in all.
        """
        seconds = min(self.left_s, limit_s if limit_s is not None else self.left_s)
        if seconds <= 1:
            self.say(f"{name}: left out, no time is left")
            self.failures.append(f"{name}: no time")
            return
        self._ends.append(time.monotonic() + seconds)
        try:
            with _alarm(seconds):
                yield
        except OutOfTimeError:
            self.say(f"{name}: stopped after {seconds:.0f} s")
            self.failures.append(f"{name}: stopped after {seconds:.0f} s")
        except Exception as error:  # a GPU is rare: one part that fails must not cost the rest its time
            traceback.print_exc()
            first = str(error).strip().splitlines()[:1] or [""]
            self.say(f"{name}: FAILED, {type(error).__name__}: {first[0][:300]}")
            self.failures.append(f"{name}: {type(error).__name__}: {first[0][:300]}")
        finally:
            self._ends.pop()
            release()


@contextmanager
def _alarm(seconds: float) -> Iterator[None]:
    def ring(number: int, frame: object) -> None:
        raise OutOfTimeError

    before = signal.signal(signal.SIGALRM, ring)
    began = time.monotonic()
    outer_s, _ = signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        if outer_s > 0:
            signal.setitimer(signal.ITIMER_REAL, max(outer_s - (time.monotonic() - began), 0.01))


def _shown(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def release() -> None:
    """Give memory back that nothing holds any more."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def synchronize(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def median_ms(run: Callable[[], object], device: torch.device, *, warm: int = 3, runs: int = 10) -> float:
    """Return the median milliseconds of a run: by events on a GPU, where runs follow each other without a wait."""
    for _ in range(warm):
        run()
    synchronize(device)
    times = []
    if device.type != "cuda":
        for _ in range(runs):
            began = time.perf_counter()
            run()
            times.append(1e3 * (time.perf_counter() - began))
        return statistics.median(times)
    events = [torch.cuda.Event(enable_timing=True) for _ in range(runs + 1)]
    events[0].record()
    for event in events[1:]:
        run()
        event.record()
    torch.cuda.synchronize(device)
    return statistics.median(a.elapsed_time(b) for a, b in pairwise(events))


def steady_ms(run: Callable[[], object], device: torch.device, *, seconds: float, warm: int = 3) -> float:
    """Return `median_ms` of as many runs as fit into some seconds, three at the least and thirty at the most.

    No seconds at all mean a single run, where only the script is tried.
    """
    if seconds == 0:
        return median_ms(run, device, warm=0, runs=1)
    for _ in range(warm):
        run()
    synchronize(device)
    began = time.perf_counter()
    run()
    synchronize(device)
    one = max(time.perf_counter() - began, 1e-5)
    return median_ms(run, device, warm=0, runs=min(30, max(3, int(seconds / one))))


def peak_mib(run: Callable[[], object], device: torch.device) -> float:
    """Return the peak of memory allocated during a run in MiB, what lay there before included; 0 on a CPU."""
    if device.type != "cuda":
        run()
        return 0.0
    release()
    torch.cuda.reset_peak_memory_stats(device)
    run()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) / MIB


@contextmanager
def poisoned() -> Iterator[None]:
    """Fill each new tensor that nobody has written to with NaN, so that what a kernel leaves out is seen."""

    def filling(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def made(*arguments: Any, **options: Any) -> Tensor:
            tensor = make(*arguments, **options)
            return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

        return made

    with (
        mock.patch.object(torch, "empty", filling(torch.empty)),
        mock.patch.object(torch, "empty_like", filling(torch.empty_like)),
        mock.patch.object(torch, "empty_strided", filling(torch.empty_strided)),
        mock.patch.object(Tensor, "new_empty", filling(Tensor.new_empty)),
        mock.patch.object(Tensor, "new_empty_strided", filling(Tensor.new_empty_strided)),
    ):
        yield


def copy_rate(device: torch.device, mib: int) -> float:
    """Return the bytes per second, read and written, of copying a tensor of so many MiB."""
    source = torch.ones(mib * MIB // 4, device=device)
    target = torch.empty_like(source)
    milliseconds = median_ms(lambda: target.copy_(source), device, runs=20)
    return 2 * mib * MIB / (1e-3 * milliseconds)


def table(rows: Sequence[Sequence[str]]) -> str:
    """Return rows, the first one a heading, as a Markdown table."""
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]])
