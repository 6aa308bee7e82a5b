"""Windows of one shape through a network on a GPU, recorded once and replayed: CUDA graphs.

A prediction asks for the same shape hundreds of times, and starting the few hundred kernels of a network one by one
takes a CPU longer than a GPU needs to run small ones. The first call of a shape runs as ever (kernels are compiled,
tried and chosen then), the second one is recorded, the later ones are replayed. All recordings share one pool of
memory, since a result is copied to the host before the next one begins.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Hashable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

MOST_RECORDINGS = 4
"""A prediction has one or two sizes of a batch, for one or two purposes; what comes after these runs as ever."""


class _Recording(NamedTuple):
    graph: torch.cuda.CUDAGraph
    given: Tensor
    result: Tensor


class WindowGraphs:
    """Recorded calls on one CUDA device; safe to use from several threads, which then wait for each other.

    Args:
        device: a CUDA device.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._lock = threading.Lock()
        self._seen: set[Hashable] = set()
        self._recordings: dict[Hashable, _Recording] = {}
        self._pool: Any = None  # a type that only PyTorch knows
        self._is_refused = False

    def call(
        self, what: Hashable, network: Callable[[Tensor], Tensor], windows: Tensor, weights: Iterable[Tensor]
    ) -> Tensor:
        """Return network(windows) on the host.

        Args:
            what: tells apart everything that may compute something else on windows of the same shape.
            network: takes windows on the device, and gives a tensor there; the same one whenever `what` is.
            windows: (N, C, D, H, W) on the host.
            weights: what the network reads; a recording is of no use once one of them lies elsewhere.

        Raises:
            torch.OutOfMemoryError: the device's memory does not suffice, even without recordings.
        """
        key = (what, windows.shape, windows.dtype, tuple(weight.data_ptr() for weight in weights))
        with self._lock:
            recording = self._recordings.get(key)
            if recording is None and key in self._seen and self._may_record():
                recording = self._recorded(key, network, windows)
            self._seen.add(key)
            if recording is None:
                return self._run(network, windows)
            recording.given.copy_(windows)
            recording.graph.replay()
            return recording.result.cpu()

    def release(self) -> None:
        """Give up all recordings, and the memory that they hold on the device."""
        self._recordings.clear()
        self._pool = None
        torch.cuda.empty_cache()

    def _may_record(self) -> bool:
        return not self._is_refused and len(self._recordings) < MOST_RECORDINGS

    def _run(self, network: Callable[[Tensor], Tensor], windows: Tensor) -> Tensor:
        try:
            return network(windows.to(self._device)).cpu()
        except torch.OutOfMemoryError:
            if not self._recordings:
                raise
        # What earlier shapes were recorded with may be what is missing.
        self._is_refused = True
        self.release()
        return network(windows.to(self._device)).cpu()

    def _recorded(self, key: Hashable, network: Callable[[Tensor], Tensor], windows: Tensor) -> _Recording | None:
        """Record a call, or tell why that can't be done and never try again."""
        try:
            with torch.cuda.device(self._device):
                if self._pool is None:
                    self._pool = torch.cuda.graph_pool_handle()
                given = windows.to(self._device)
                torch.cuda.synchronize(self._device)
                graph = torch.cuda.CUDAGraph()
                # Threads that load the next case may go on allocating: only this one must keep to the recording.
                with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                    result = network(given)
        except Exception as error:  # an operator that can't be recorded has many ways to say so
            self._is_refused = True
            self.release()
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
            warnings.warn(
                f"windows of {tuple(windows.shape)} can't be recorded as a CUDA graph on {self._device} ({reason}): "
                "they run kernel by kernel, with the same results and more slowly where windows are small",
                RuntimeWarning,
                stacklevel=2,
            )
            return None
        self._recordings[key] = _Recording(graph, given, result)
        return self._recordings[key]
