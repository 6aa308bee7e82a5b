"""The numbers that the forward pass computes in, and what fp16 needs so that gradients do not vanish."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch

from sagittal.errors import PlanError
from sagittal.plan.plan import Plan


def require_precision(plan: Plan, device: torch.device) -> None:
    """Refuse what a device can't compute in.

    Raises:
        PlanError: the plan wants bf16 or fp16 and the device is the CPU.
    """
    if plan.training.precision in ("bf16", "fp16") and device.type == "cpu":
        raise PlanError(
            f"training.precision is {plan.training.precision}, which is for GPUs: on a CPU it is slower than fp32 and "
            "its gradients can be wrong. Choose --device cuda, or make the plan with --set training.precision=fp32.",
            code="bf16_on_cpu",
        )


def autocast(precision: str, device: torch.device) -> AbstractContextManager[None]:
    """Return the context of a forward pass in `precision`."""
    match precision:
        case "bf16":
            return torch.autocast(device.type, torch.bfloat16)
        case "fp16":
            return torch.autocast(device.type, torch.float16)
        case _:
            return nullcontext()


def new_scaler(precision: str, device: torch.device) -> torch.amp.GradScaler | None:
    """Return what scales the loss of fp16, None for other precisions."""
    return torch.amp.GradScaler(device.type) if precision == "fp16" else None
