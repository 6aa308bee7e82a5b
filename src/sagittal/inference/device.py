"""Which device computes."""

from __future__ import annotations

import re

import torch

from sagittal.errors import ResourceError, did_you_mean

_KINDS = ("auto", "cpu", "cuda", "mps")


def resolve_device(name: str | torch.device = "auto") -> torch.device:
    """Return the device called `name`; `auto` takes CUDA, else MPS, else the CPU.

    Raises:
        ResourceError: no such device, or this machine lacks it.
    """
    name = str(name).lower()
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "mps" if _has_mps() else "cpu")
    match = re.fullmatch(r"(cpu|cuda|mps)(?::(\d+))?", name)
    if match is None:
        hint = did_you_mean(name.partition(":")[0], _KINDS)
        raise ResourceError(f"'{name}' is not a device.{hint} A second GPU is 'cuda:1'.", code="unknown_device")
    kind, number = match[1], int(match[2] or 0)
    count = {"cpu": 1, "cuda": torch.cuda.device_count(), "mps": int(_has_mps())}[kind]
    if number >= count:
        found = f"{count} found" if count else "none found"
        raise ResourceError(
            f"device '{name}' is not there: {kind} devices on this machine: {found}. "
            "Choose another one, or 'auto' for the best there is.",
            code="unknown_device",
        )
    return torch.device(name)


def _has_mps() -> bool:
    return bool(torch.backends.mps.is_available())
