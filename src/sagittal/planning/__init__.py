"""From a data set's fingerprint, a network and a memory budget to a Plan; every rule says why it chose its value."""

from sagittal.planning.planner import make_plan

__all__ = ["make_plan"]
