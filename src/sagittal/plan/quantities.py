"""Types of numbers that plans are made of."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

Positive = Annotated[float, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]
Probability = Annotated[float, Field(ge=0, le=1)]
KeptShare = Annotated[float, Field(ge=0, lt=1)]
"""Of what was before that a running mean keeps: of all of it, it would never change."""
Count = Annotated[int, Field(ge=1)]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
