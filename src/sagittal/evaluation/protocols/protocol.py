"""What a protocol is made of."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from sagittal.evaluation.pair import Metric


@dataclass(frozen=True)
class Protocol:
    """How one tool or challenge scores."""

    name: str
    metrics: Mapping[str, Metric]
    """Its metrics by key, in the order of its own table."""
    source: str
