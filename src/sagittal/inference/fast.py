"""What `sagittal predict --fast` does with a bundle: its second model where it has one, else fewer windows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sagittal.bundle import Bundle

FAST_STEP = 0.75
"""From one window to the next, as a share of the window, where there is no second model."""


@dataclass(frozen=True)
class Fast:
    """How a bundle predicts fast.

    Attributes:
        bundle: what engines load: the bundle, or its second model.
        mirror: never.
        step: for `Predictor.predict`; None is the plan's.
        sentence: which it is, and what it costs in Dice.
    """

    bundle: Bundle
    mirror: bool
    step: float | None
    sentence: str


def fast_settings(bundle: Bundle, *, low: bool = True) -> Fast:
    """Return how a bundle predicts fast, in a way that was measured where its training held out cases.

    Args:
        bundle: verified.
        low: whether its second model may be taken, where it has one.
    """
    return _fast(bundle, bundle.low if low else None)


def fast_settings_of(bundles: Sequence[Bundle]) -> tuple[Fast, ...]:
    """Return how bundles whose mean is predicted do so fast: by their second models if each has one, else none does.

    All of them have the same step then.
    """
    every = all(bundle.low is not None for bundle in bundles)
    return tuple(fast_settings(bundle, low=every) for bundle in bundles)


def _fast(bundle: Bundle, low: Bundle | None) -> Fast:
    how = "step" if low is None else "low"
    told = f"no mirroring, step {FAST_STEP:g}"
    if low is not None:
        spacing = " x ".join(f"{value:.3g}" for value in low.plan.preprocessing.spacing_mm)
        told = f"the bundle's second model, which sees {spacing} mm (D, H, W), no mirroring"
    return Fast(
        bundle=bundle if low is None else low,
        mirror=False,
        step=FAST_STEP if low is None else None,
        sentence=f"fast: {told}; {cost_in_words(bundle.metrics, how)}",
    )


def cost_in_words(metrics: Mapping[str, Any], how: str) -> str:
    """Return what predicting fast costs, from a bundle's metrics."""
    found = metrics.get("fast")
    if not isinstance(found, Mapping) or found.get("how") != how or found.get("mean_cost") is None:
        return "what it costs was not measured"
    cost, cases = found["mean_cost"], found["cases"]
    word = "lower" if cost >= 0 else "higher"
    return f"Dice {abs(cost):.4f} {word} on {cases} held-out cases than the whole model, not mirrored either"
