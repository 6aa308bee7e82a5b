"""Axes of the page's plots: a range, round ticks, and where on it a value lies."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float64


@dataclass(frozen=True)
class Axis:
    """A linear axis from `low` to `high`."""

    low: float
    high: float
    ticks: tuple[float, ...]

    def percent(self, value: float) -> float:
        """Return where `value` lies between `low` (0) and `high` (100); beyond the range it stays at the end."""
        share = (value - self.low) / (self.high - self.low)
        return 100.0 * min(1.0, max(0.0, share))

    def percents(self, values: Float64[np.ndarray, " values"]) -> Float64[np.ndarray, " values"]:
        """Return `percent` of every value."""
        shares: np.ndarray = 100.0 * np.clip((values - self.low) / (self.high - self.low), 0.0, 1.0)
        return shares

    def holds(self, value: float) -> bool:
        """Return whether `value` lies on the axis."""
        return self.low <= value <= self.high

    def label(self, tick: float) -> str:
        """Return a tick's number, short: 0.5, 200, 1.5k, 2e-4."""
        if tick == 0:
            return "0"
        if abs(tick) >= 10_000:
            return f"{tick / 1000:g}k"
        if abs(tick) < 0.001:
            mantissa, exponent = f"{tick:.1e}".split("e")
            return f"{float(mantissa):g}e{int(exponent)}"
        return f"{tick:g}"


def linear_axis(low: float, high: float, *, intervals: int = 4) -> Axis:
    """Return an axis that holds `low` and `high`, with round ends and about `intervals` round steps between them."""
    if not high > low:
        low, high = (low - 0.5, high + 0.5) if low else (0.0, 1.0)
    rough = (high - low) / intervals
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1.0, 2.0, 2.5, 5.0, 10.0) if factor * power >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    # Rounding keeps 0.30000000000000004 out of the labels.
    ticks = tuple(round(number * step, 12 - math.floor(math.log10(step))) for number in range(first, last + 1))
    return Axis(ticks[0], ticks[-1], ticks)
