"""Random numbers for augmentation: plain values drawn one by one from a seeded generator on the CPU.

Parameters of a random change are drawn here, before any voxel is touched, so that they can be printed, replayed from
their seed and used to decide how much of a case has to be read. The same seed gives the same values on every device.
"""

from __future__ import annotations

import torch


def seeded(seed: int) -> torch.Generator:
    """Return a generator on the CPU that gives the same numbers for the same `seed` (0 <= seed < 2**63)."""
    return torch.Generator().manual_seed(seed)


def happens(generator: torch.Generator, probability: float) -> bool:
    """Return true with `probability`; one number is drawn whatever the probability."""
    return bool(torch.rand((), generator=generator, dtype=torch.float64).item() < probability)


def uniform(generator: torch.Generator, lower: float, upper: float) -> float:
    """Return a number between `lower` and `upper`."""
    return lower + (upper - lower) * float(torch.rand((), generator=generator, dtype=torch.float64).item())


def balanced_ratio(generator: torch.Generator, lower: float, upper: float) -> float:
    """Return a factor below and above 1 equally often where the range holds 1 (nnU-Net's rule), else a uniform one."""
    below = happens(generator, 0.5)
    if lower < 1.0 < upper:
        return uniform(generator, lower, 1.0) if below else uniform(generator, 1.0, upper)
    return uniform(generator, lower, upper)


def new_seed(generator: torch.Generator) -> int:
    """Return a seed for a generator of its own, for example one on another device."""
    return int(torch.randint(2**62, (), generator=generator).item())
