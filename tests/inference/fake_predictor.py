"""A predictor without a network: what a folder run needs of one, at once, and with a known result."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sagittal.data.preprocessing import frame_of
from sagittal.errors import DataError
from sagittal.inference.timings import Timings
from sagittal.plan.plan import Plan
from sagittal.volumes import Volume, read_volume


def logits_of(image: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Class 1 where the image exceeds one half, class 2 where it exceeds two."""
    first = image.astype(np.float32)
    return np.stack([0.5 - first, 1.5 - abs(first - 1.5) * 0.5, 1.5 * (first - 1)]).astype(np.float32)


class FakePredictor:
    """Thresholds the first channel; gives consumers slabs of three rows, as the real one does."""

    def __init__(self, plan: Plan, on_case: Callable[[int], None] = lambda count: None) -> None:
        self.plan = plan
        self.calls: list[dict[str, Any]] = []
        self._on_case = on_case
        self.last_timings: Timings | None = None

    def predict(
        self,
        scan: Sequence[Path] | Sequence[Volume],
        *,
        mirror: bool = True,
        step: float | None = None,
        memory_gib: float | None = None,
        on_window: Callable[[int, int], None] | None = None,
        consumers: Sequence[Any] = (),
        disagreement: Any = None,
    ) -> Volume:
        self.calls.append({"mirror": mirror, "step": step, "memory_gib": memory_gib, "held": _is_held(scan)})
        self._on_case(len(self.calls))
        self.last_timings = Timings()
        with self.last_timings.phase("network"):
            pass
        volumes = [item if isinstance(item, Volume) else read_volume(item) for item in scan]
        if not all(np.isfinite(volume.array).all() for volume in volumes):
            raise DataError("holds NaN", code="not_finite")
        frame = frame_of(volumes, self.plan.preprocessing)
        logits = logits_of(frame.crop(volumes[0].array[0]))
        for start in range(0, logits.shape[1], 3):
            rows = slice(start, min(start + 3, logits.shape[1]))
            for consumer in consumers:
                consumer(rows, np.ascontiguousarray(logits[:, rows]))
        if disagreement is not None:
            members = np.stack([logits, np.roll(logits, 1, axis=1)])
            disagreement.look(members, np.ones(logits.shape[1:], np.float32))
        if on_window is not None:
            on_window(1, 1)
        labels = logits.argmax(axis=0).astype(np.uint8)
        return Volume.on(volumes[0].geometry, frame.uncrop_and_unorient(labels))


def expected_labels(scan: Volume) -> np.ndarray[Any, Any]:
    labels: np.ndarray[Any, Any] = logits_of(scan.array[0]).argmax(axis=0)
    return labels


def _is_held(scan: Any) -> bool:
    return all(isinstance(item, Volume) for item in scan)
