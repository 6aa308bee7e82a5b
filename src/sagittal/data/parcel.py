"""Numbers for the device, collected on the processor and sent there in one copy.

Each copy from processor to accelerator costs about as long as changing a whole patch there, and reading anything back
makes the processor wait. So everything that is drawn for a batch is put into one parcel before a voxel is touched.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor

Place: TypeAlias = tuple[slice, tuple[int, ...]]
"""Where something lies in a parcel, and its shape."""


class Parcel:
    """Collect with `put`, then `send` once, then take out on the device: views, no further copies."""

    def __init__(self) -> None:
        self._parts: list[np.ndarray] = []
        self._length = 0
        self._numbers: Tensor | None = None
        self._indices: Tensor | None = None

    def put(self, values: Sequence[int] | Sequence[float] | Sequence[np.ndarray] | np.ndarray) -> Place:
        """Add `values` and return the place where they will be found; whole numbers below 2**24 stay exact."""
        assert self._numbers is None, "the parcel has been sent"
        array = np.asarray(values, dtype=np.float32)
        self._parts.append(array.reshape(-1))
        first, self._length = self._length, self._length + array.size
        return slice(first, self._length), array.shape

    def send(self, device: torch.device) -> None:
        """Copy everything to `device`, without waiting for it where it is an accelerator."""
        whole = torch.from_numpy(np.concatenate([np.zeros(0, np.float32), *self._parts]))
        if device.type == "cuda":
            whole = whole.pin_memory()
        self._numbers = whole.to(device, non_blocking=True)
        self._indices = self._numbers.to(torch.int64)

    def numbers(self, place: Place) -> Tensor:
        """Return what was put at `place`, float32, on the device."""
        assert self._numbers is not None, "the parcel has not been sent"
        return self._numbers[place[0]].view(place[1])

    def indices(self, place: Place) -> Tensor:
        """Return what was put at `place` as whole numbers, int64, on the device."""
        assert self._indices is not None, "the parcel has not been sent"
        return self._indices[place[0]].view(place[1])
