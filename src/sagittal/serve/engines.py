"""Networks that stay loaded between jobs: the last ones that fit into the memory that they may take."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

from sagittal.bundle import Bundle
from sagittal.inference.engines.engine import Engine

Key: TypeAlias = tuple[str, bool]
"""Name of the model, and whether it is its second, faster one."""


@dataclass(frozen=True)
class Warm:
    """An engine and the memory that it takes while it waits."""

    engine: Engine
    size: int


class WarmEngines:
    """Loads engines and keeps those that were used last.

    Args:
        load: makes the engine of a bundle.
        most_bytes: that the engines may take while they wait; the one in use is kept whatever it takes. None: no limit.
    """

    def __init__(self, load: Callable[[Bundle], Engine], most_bytes: int | None) -> None:
        self._load, self._most = load, most_bytes
        self._kept: OrderedDict[Key, Warm] = OrderedDict()

    @property
    def size(self) -> int:
        """Bytes that all of them take."""
        return sum(warm.size for warm in self._kept.values())

    @property
    def keys(self) -> tuple[Key, ...]:
        """Those that are loaded, the one used last at the end."""
        return tuple(self._kept)

    def get(self, key: Key, bundle: Bundle) -> Engine:
        """Return the engine of a bundle, loaded now or before; others are let go of where they take too much."""
        if key not in self._kept:
            engine = self._load(bundle)
            memory = engine.memory(bundle.plan.patch.size)
            self._kept[key] = Warm(engine, memory.fixed_bytes)
        self._kept.move_to_end(key)
        while self._most is not None and self.size > self._most and len(self._kept) > 1:
            self._kept.popitem(last=False)
        return self._kept[key].engine

    def has_room(self, size: int) -> bool:
        """Whether an engine of about this size would fit beside the others."""
        return self._most is None or self.size + size <= self._most

    def others_bytes(self, key: Key) -> int:
        """Return what the engines other than `key` take."""
        return sum(warm.size for kept, warm in self._kept.items() if kept != key)

    def keep_only(self, key: Key) -> bool:
        """Let go of all others; False where there were none."""
        others = [kept for kept in self._kept if kept != key]
        for kept in others:
            del self._kept[kept]
        return bool(others)
