"""Every number of a plan with its reason."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from sagittal.plan.base import EVERY_FIELD
from sagittal.plan.plan import Plan

UNKNOWN = "no reason recorded"


class Explained(NamedTuple):
    """A field of a plan: its dotted name, its value as JSON has it, and why it has it."""

    name: str
    value: Any
    reason: str


def explain(plan: Plan) -> tuple[Explained, ...]:
    """Return every field of a plan but its reasons, in the plan's order.

    Where a field has no reason of its own, that of the group it is in counts.
    """
    tree = plan.model_dump(mode="json", context=EVERY_FIELD)
    del tree["reasons"]
    return tuple(Explained(name, value, reason_of(plan, name)) for name, value in _leaves(tree, ""))


def reason_of(plan: Plan, name: str) -> str:
    """Return why a field has its value: its own reason, else that of the innermost group that has one."""
    while name:
        if name in plan.reasons:
            return plan.reasons[name]
        name = name.rpartition(".")[0]
    return UNKNOWN


def warnings_of(plan: Plan) -> tuple[str, ...]:
    """Return the reasons that hold a warning, each with its field."""
    return tuple(f"{name}: {reason}" for name, reason in plan.reasons.items() if "(warning: " in reason)


def _leaves(tree: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
