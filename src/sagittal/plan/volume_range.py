"""How large a label usually is: a few numbers over many cases, which name none of them."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Self

from pydantic import model_validator

from sagittal.plan.base import Frozen

QUANTILES = (0.0, 0.025, 0.5, 0.975, 1.0)
_TO_STD = 1.4826
"""The median absolute deviation of normal values times this is their standard deviation."""
_LEAST_SPREAD = 0.1
"""Of log volumes: where cases are nearly alike, a tenth more or less is still nothing unusual."""


class VolumeRange(Frozen):
    """The volumes of one label over the cases of a data set, or of a folder."""

    present: int
    """Cases that have the label."""
    absent: int
    """Cases that lack it."""
    quantiles_ml: tuple[float, float, float, float, float] | None
    """Smallest, 2.5 %, median, 97.5 % and largest over the cases that have it (linear between them), in mL; None where
    none has."""
    log_mad: float
    """Median absolute deviation of the natural logarithms of these volumes from their median; 0 where none has it."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if min(self.present, self.absent) < 0:
            raise ValueError(f"present and absent must not be negative, got {self.present} and {self.absent}")
        if (self.quantiles_ml is None) != (self.present == 0):
            raise ValueError("quantiles_ml belong to the cases that have the label: None where present is 0, else five")
        quantiles = self.quantiles_ml or (1.0,)
        if min(quantiles) <= 0 or list(quantiles) != sorted(quantiles):
            raise ValueError(f"quantiles_ml must be positive and ascending, got {list(quantiles)}")
        if self.log_mad < 0:
            raise ValueError(f"log_mad must not be negative, got {self.log_mad}")
        return self

    @classmethod
    def of(cls, volumes_ml: Sequence[float]) -> Self:
        """Describe the volumes of all cases; 0 stands for a case that lacks the label."""
        found = sorted(volume for volume in volumes_ml if volume > 0)
        absent = len(volumes_ml) - len(found)
        if not found:
            return cls(present=0, absent=absent, quantiles_ml=None, log_mad=0.0)
        logs = [math.log(volume) for volume in found]
        middle = statistics.median(logs)
        low, lower, median, upper, high = (_quantile(found, share) for share in QUANTILES)
        return cls(
            present=len(found),
            absent=absent,
            quantiles_ml=(low, lower, median, upper, high),
            log_mad=statistics.median(abs(value - middle) for value in logs),
        )

    @property
    def cases(self) -> int:
        """Number of cases, with the label or without."""
        return self.present + self.absent

    def robust_z(self, volume_ml: float) -> float | None:
        """Return how far a volume is from the median, in standard deviations that the MAD gives; all of logarithms.

        Iglewicz and Hoaglin's modified z-score (1993). The estimate is never below 0.1, for few cases can be alike by
        chance. Below 0: smaller than usual. None where no case has the label, or `volume_ml` is 0.
        """
        if self.quantiles_ml is None or volume_ml <= 0:
            return None
        spread = max(_TO_STD * self.log_mad, _LEAST_SPREAD)
        return (math.log(volume_ml) - math.log(self.quantiles_ml[2])) / spread


def _quantile(ascending: Sequence[float], share: float) -> float:
    place = share * (len(ascending) - 1)
    below = math.floor(place)
    above = min(below + 1, len(ascending) - 1)
    # Between its neighbours whatever the rounding, so that quantiles stay in order.
    value = ascending[below] + (ascending[above] - ascending[below]) * (place - below)
    return min(max(value, ascending[below]), ascending[above])
