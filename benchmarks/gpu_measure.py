"""What benchmarks/gpu.py measures with: parts with an end, timers, poison, and rows that are written at once."""

import gc
import json
import signal
import statistics
import time
import traceback
from collections.abc import Callable, Iterator
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
    """Does parts one after the other, each with an end; prints with the seconds, and writes each row as it is found.

    Args:
        path: file that receives the rows as lines of JSON, behind those that are there.
        limit_s: seconds after which nothing new is begun.
        after: the parts up to and with this one are left out; empty for none.
    """

    def __init__(self, path: Path, limit_s: float, after: str = "") -> None:
        self._began = time.monotonic()
        self._end = self._began + limit_s
        self._path = path
        self._after = after
        path.parent.mkdir(parents=True, exist_ok=True)

    def say(self, line: str) -> None:
        """Print a line."""
        print(f"[{time.monotonic() - self._began:6.1f} s] {line}", flush=True)

    def add(self, section: str, **values: Any) -> None:
        """Print a row and write it."""
        self.say(f"{section}: " + ", ".join(f"{key} {_shown(value)}" for key, value in values.items()))
        self._write(section, values)

    def do(self, part: str, limit_s: float, work: Callable[[], object]) -> None:
        """Do a part: what goes wrong in it is printed and kept, and the next part can begin.

        Args:
            part: its name.
            limit_s: seconds that it may take.
            work: the part itself.

        Raises:
            SystemExit: the GPU can't be used from this process any more.
        """
        if self._after:
            self._after = "" if part == self._after else self._after
            return
        seconds = min(self._end - time.monotonic(), limit_s)
        if seconds <= 1:
            self._fail(part, "no time was left")
            return
        self._write("begin", {"part": part, "limit_s": seconds})
        try:
            with _alarm(seconds):
                work()
        except OutOfTimeError:
            self._fail(part, f"stopped after {seconds:.0f} s")
        except Exception as error:  # a GPU is rare: one part that fails must not cost the rest its time
            traceback.print_exc()
            first = str(error).strip().splitlines()[:1] or [""]
            self._fail(part, f"{type(error).__name__}: {first[0][:300]}")
        if not _gpu_answers():
            self.say("the GPU no longer answers this process")
            raise SystemExit(3)

    def _fail(self, part: str, why: str) -> None:
        self.say(f"{part}: FAILED, {why}")
        self._write("failure", {"part": part, "why": why})

    def _write(self, section: str, values: dict[str, Any]) -> None:
        with self._path.open("a") as file:
            file.write(json.dumps({"section": section, **values}) + "\n")


def _gpu_answers() -> bool:
    """Give memory back that nothing holds any more; return whether the device still can."""
    try:
        release()
        if torch.cuda.is_available() and torch.cuda.is_initialized():
            torch.cuda.synchronize()
    except RuntimeError:
        return False
    return True


@contextmanager
def _alarm(seconds: float) -> Iterator[None]:
    def ring(number: int, frame: object) -> None:
        raise OutOfTimeError

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


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
