"""What the log says so far, at hand for the page, the table and the alarms: built from its records, as they come."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from sagittal.training.alarms import Alarm, find_alarms

SERIES = ("step", "loss", "learning_rate", "seconds", "step_s", "waited_s")
"""Numbers of every step; a run of 250 000 steps takes 12 MB of them."""


class History:
    """The steps, validations and alarms of a fold, over all attempts.

    Args:
        records: what the log holds already.
        steps: of the whole schedule.
    """

    def __init__(self, records: Iterable[Mapping[str, Any]] = (), *, steps: int) -> None:
        self._steps = steps
        self._series = {name: array("d") for name in SERIES}
        self.validations: list[Mapping[str, Any]] = []
        self.alarms: tuple[Alarm, ...] = ()
        for record in records:
            self.add(record)

    def add(self, record: Mapping[str, Any]) -> None:
        """Take in a record of the log."""
        if record["kind"] == "step":
            for name, values in self._series.items():
                value = record.get(name)
                values.append(np.nan if value is None else float(value))
        elif record["kind"] == "validation":
            self.validations.append(record)
            complete = [one for one in self.validations if "present" in one]
            self.alarms = find_alarms(complete, steps=self._steps)

    def series(self) -> dict[str, np.ndarray]:
        """Return the numbers of all steps by their names, NaN where a step overflowed or a log lacks them."""
        return {name: np.array(values) for name, values in self._series.items()}

    def recent(self, name: str, count: int = 50) -> float:
        """Return the mean of the last steps' numbers, NaN where there are none; steps without one are left out."""
        values = [value for value in self._series[name][-count:] if value == value]
        return float(np.mean(values)) if values else float("nan")

    def waited_share(self, count: int = 50) -> float:
        """Return which share of the last steps' time was spent waiting for data."""
        waited, whole = self._series["waited_s"][-count:], sum(self._series["step_s"][-count:])
        share = sum(waited) / whole if whole > 0 else 0.0
        return share if share == share else 0.0

    def best(self, label: str) -> tuple[float, int] | None:
        """Return the best Dice of a label and the step of it, None where it was never in any case."""
        known = [
            (dice, -int(record["step"]))
            for record in self.validations
            if (dice := record["dice"].get(label)) is not None
        ]
        if not known:
            return None
        dice, step = max(known)
        return dice, -step
