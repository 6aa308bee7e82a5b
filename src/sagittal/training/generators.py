"""The states of torch's random generators, which some networks draw from while they train.

Nothing else has a state: patches and their augmentation are drawn from generators of their own, seeded by the plan and
the step, and Python's and NumPy's global generators are not used.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


def generator_states(device: torch.device) -> dict[str, Tensor]:
    """Return the states of the CPU's generator (`torch`) and, for a CUDA device, of all of CUDA's (`cuda.0`, ...)."""
    states = {"torch": torch.get_rng_state()}
    if device.type == "cuda":
        states |= {f"cuda.{number}": state for number, state in enumerate(torch.cuda.get_rng_state_all())}
    elif device.type == "mps":
        states["mps"] = torch.mps.get_rng_state()
    return states


def restore_generators(states: Mapping[str, Tensor], device: torch.device) -> None:
    """Go on from what `generator_states` returned; what this machine has no device for is passed over."""
    torch.set_rng_state(states["torch"])
    if device.type == "cuda":
        for number in range(torch.cuda.device_count()):
            if f"cuda.{number}" in states:
                torch.cuda.set_rng_state(states[f"cuda.{number}"], number)
    elif device.type == "mps" and "mps" in states:
        torch.mps.set_rng_state(states["mps"])
