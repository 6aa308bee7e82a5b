"""From a data set's fingerprint, a network and a memory budget to a Plan; every rule says why it chose its value."""

from sagittal.planning.explain import explain
from sagittal.planning.planner import make_plan
from sagittal.planning.presets import PRESETS

__all__ = ["PRESETS", "explain", "make_plan"]
