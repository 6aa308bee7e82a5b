"""How long training lasts, at which rates, and when it is validated."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from sagittal.plan.base import Frozen
from sagittal.plan.quantities import Count, NonNegative, Probability


class Schedule(Frozen):
    """How long training lasts, and its learning rate: linear warm-up, then (1 - t)^power down to `final_factor`."""

    steps: Count
    """Optimiser steps in all."""
    warmup_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of the steps in which the rate rises linearly to its peak."""
    warmup_start_factor: Probability = 0.0
    power: NonNegative = 0.9
    final_factor: Probability = 0.0
    """The rate never falls below this share of its peak."""
    validations: Annotated[int, Field(ge=0)] = 20
    """Whole-case validations, evenly spread; the one at the end is made in any case, so 0 and 1 mean that one alone."""
    validation_cases: Count = 20
    """Cases predicted whole at each validation but the last, which takes them all where the time allows."""

    early_stop_validations: Annotated[int, Field(ge=0)] = 0
    """Validations in a row without a better mean Dice after which training ends; 0 for never."""
    keep: Literal["last", "best"] = "last"
    """Which weights become the result: those of the end, or those of the best validation."""

    later_fields: ClassVar[tuple[str, ...]] = ("early_stop_validations", "keep")

    @property
    def warmup_steps(self) -> int:
        """Steps of the warm-up."""
        return int(self.warmup_fraction * self.steps)
