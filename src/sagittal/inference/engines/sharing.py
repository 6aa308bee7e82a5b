"""Several devices at one scan: each has the networks, and the windows of a call are dealt out among them.

What they answer is put together in the order of the windows, so that the result does not depend on who was faster.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Literal

import numpy as np
from jaxtyping import Float32

from sagittal.errors import ResourceError, SagittalError
from sagittal.inference.engines.engine import (
    CoarseEngine,
    Engine,
    LinearHead,
    MemberEngine,
    NetworkMemory,
    Precision,
    members_of,
)
from sagittal.plan.base import Triple

Windows = Float32[np.ndarray, "N ..."]
Ask = Callable[[Engine, np.ndarray], np.ndarray]


class SharedEngine:
    """One engine made of several with the same networks; a thread for each.

    `answers` is what a prediction calls; the methods of a single engine join its arrays.

    Args:
        engines: at least two.
    """

    def __init__(self, engines: Sequence[Engine]) -> None:
        assert len(engines) > 1 and len({engine.num_outputs for engine in engines}) == 1, "engines of the same networks"
        self.engines = tuple(engines)
        self._threads = [ThreadPoolExecutor(1, thread_name_prefix=f"network-{engine.device}") for engine in engines]

    @property
    def name(self) -> Literal["torch", "openvino"]:
        """What computes; `torch` where one of them does, which takes more memory."""
        return "torch" if any(engine.name == "torch" for engine in self.engines) else "openvino"

    @property
    def device(self) -> str:
        """All devices, with commas."""
        return ",".join(engine.device for engine in self.engines)

    @property
    def precision(self) -> Precision:
        """That of the first."""
        return self.engines[0].precision

    @property
    def num_outputs(self) -> int:
        """K, the channels of the logits."""
        return self.engines[0].num_outputs

    @property
    def head(self) -> LinearHead | None:
        """The linear last layer, or None where one of them has none."""
        heads = [engine.head for engine in self.engines]
        return None if None in heads else heads[0]

    def answers(self, ask: Ask, windows: Windows) -> list[np.ndarray]:
        """Return what is asked for each window, in order.

        Args:
            ask: from an engine and some of the windows to their results.
            windows: dealt out in equal parts, the first ones to the first engine.

        Raises:
            SagittalError: an engine's own, with its device; all have ended then.
        """
        parts = np.array_split(windows, len(self.engines))
        futures: list[Future[np.ndarray] | None] = [
            thread.submit(ask, engine, part) if len(part) else None
            for thread, engine, part in zip(self._threads, self.engines, parts, strict=True)
        ]
        errors = [None if future is None else future.exception() for future in futures]
        for engine, error in zip(self.engines, errors, strict=True):
            if error is not None:
                raise _named(engine, error)
        return [answer for future in futures if future is not None for answer in future.result()]

    def logits(self, windows: Windows) -> Windows:
        """Return the logits of windows; several folds' mean."""
        return np.stack(self.answers(lambda engine, part: engine.logits(part), windows))

    def features(self, windows: Windows) -> Windows:
        """Return what `head` is applied to."""
        return np.stack(self.answers(lambda engine, part: engine.features(part), windows))

    def coarse_stride(self, window: Triple) -> int:
        """Return the stride that all of them have, else 1."""
        strides = {engine.coarse_stride(window) if isinstance(engine, CoarseEngine) else 1 for engine in self.engines}
        return strides.pop() if len(strides) == 1 else 1

    def coarse_logits(self, windows: Windows) -> Windows:
        """Return the logits before the interpolation."""

        def ask(engine: Engine, part: np.ndarray) -> np.ndarray:
            assert isinstance(engine, CoarseEngine)
            return engine.coarse_logits(part)

        return np.stack(self.answers(ask, windows))

    @property
    def num_members(self) -> int:
        """How many folds all of them can tell apart."""
        return min(members_of(engine) for engine in self.engines)

    @property
    def member_heads(self) -> tuple[LinearHead, ...] | None:
        """Each fold's head; None where `head` is None."""
        first = self.engines[0]
        return first.member_heads if self.head is not None and isinstance(first, MemberEngine) else None

    def member_logits(self, windows: Windows, *, coarse: bool = False) -> Windows:
        """Return the logits of each fold."""

        def ask(engine: Engine, part: np.ndarray) -> np.ndarray:
            assert isinstance(engine, MemberEngine)
            return engine.member_logits(part, coarse=coarse)

        return np.stack(self.answers(ask, windows))

    def memory(self, window: Triple) -> NetworkMemory:
        """Return what all take together, and what the neediest takes for each window of a call."""
        each = [engine.memory(window) for engine in self.engines]
        fixed, per_window = (memory.fixed_bytes for memory in each), (memory.per_window_bytes for memory in each)
        return NetworkMemory(sum(fixed), max(per_window))


def engines_in(engine: Engine) -> int:
    """Return how many windows have to be asked for at once so that no device is idle."""
    return len(engine.engines) if isinstance(engine, SharedEngine) else 1


def threads_each(count: int, threads: int | None = None) -> int:
    """Return how many threads each of `count` has: they share `threads`, or else the processors that there are."""
    if threads is None:
        threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, threads // count)


def _named(engine: Engine, error: BaseException) -> BaseException:
    """Return an engine's error with its device."""
    if isinstance(error, SagittalError):
        named: BaseException = type(error)(f"{engine.device}: {error.message}", code=error.code)
    elif isinstance(error, MemoryError):
        named = ResourceError(
            f"{engine.device}: the memory does not suffice. Give --memory-gib, or fewer devices.", code="memory"
        )
    else:
        said = " ".join(str(error).split())[:300]
        named = ResourceError(
            f"{engine.device}: its network failed ({type(error).__name__}: {said}). Leave this device out of --device.",
            code="device",
        )
    named.__cause__ = error
    return named
