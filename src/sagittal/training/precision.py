"""The numbers that the forward pass computes in, and what fp16 needs so that gradients do not vanish."""

from __future__ import annotations

from collections.abc import Collection
from contextlib import AbstractContextManager, nullcontext

import torch

from sagittal.errors import PlanError
from sagittal.kernels import cpu_bf16_reason
from sagittal.plan.networks import MedNeXtConfig
from sagittal.plan.plan import Plan

MOST_SKIPPED = 20
"""Steps in a row that fp16 may skip. The scale starts at 2^16, and halving it as often leaves 2^-4: no gradient
overflows because of that."""


def require_precision(plan: Plan, device: torch.device) -> None:
    """Refuse what a device can't compute in.

    Raises:
        PlanError: the plan wants fp16 on a CPU, bf16 on one that has no fast and safe kernels for it, or fp64 on a
            device that lacks it.
    """
    precision = plan.training.precision
    reason = _reason_on_cpu(plan) if device.type == "cpu" else None
    if reason is not None:
        raise PlanError(
            f"training.precision is {precision}, which is for GPUs: {reason}. Choose --device cuda, or make the plan "
            "with --set training.precision=fp32.",
            code="bf16_on_cpu",
        )
    if device.type == "mps" and precision == "fp64":
        raise PlanError(
            f"training.precision is fp64, which device {device} does not have. Choose --device cpu, or make the plan "
            "with --set training.precision=fp32.",
            code="fp64_on_mps",
        )


def _reason_on_cpu(plan: Plan) -> str | None:
    match plan.training.precision:
        case "fp16":
            return "on a CPU it is far slower than fp32"
        case "bf16" if not isinstance(plan.network, MedNeXtConfig):
            return f"on a CPU, of all networks only MedNeXt has kernels for it, and {plan.network_name} is another one"
        case "bf16":
            return cpu_bf16_reason()
        case _:
            return None


def faster_precision(plan: Plan, device: torch.device, *, decided: Collection[str]) -> Plan:
    """Return the plan in bf16 where a CPU multiplies matrices faster in it and nobody chose a precision."""
    on_cpu = device.type == "cpu" and isinstance(plan.network, MedNeXtConfig)
    if not on_cpu or plan.training.precision != "fp32" or "training.precision" in decided or cpu_bf16_reason():
        return plan
    why = "--budget: this processor multiplies matrices in bf16: a step is a third shorter; all else stays in fp32"
    training = plan.training.replace(precision="bf16")
    return plan.replace(training=training, reasons={**plan.reasons, "training.precision": why})


def autocast(precision: str, device: torch.device) -> AbstractContextManager[None]:
    """Return the context of a forward pass in `precision`."""
    match precision:
        case "bf16":
            return torch.autocast(device.type, torch.bfloat16)
        case "fp16":
            return torch.autocast(device.type, torch.float16)
        case _:
            return nullcontext()


class LossScale:
    """The factor that fp16's loss is multiplied by, so that small gradients do not vanish.

    It is halved after each step whose gradients overflow, which is skipped, and doubled after 2000 others in a row.

    Attributes:
        skipped_in_a_row: steps skipped up to now without one that was not.
    """

    def __init__(self, device: torch.device) -> None:
        self._scaler = torch.amp.GradScaler(device.type)
        self.skipped_in_a_row = 0

    @property
    def value(self) -> float:
        """The factor; reading it makes the processor wait for an accelerator."""
        return float(self._scaler.get_scale())

    def scaled(self, loss: torch.Tensor) -> torch.Tensor:
        """Return the loss times the factor, for its backward pass."""
        return self._scaler.scale(loss)

    def unscale(self, optimizer: torch.optim.Optimizer) -> None:
        """Divide the gradients by the factor, in place, and remember whether they overflowed."""
        self._scaler.unscale_(optimizer)

    def update(self, *, skipped: bool) -> None:
        """Adapt the factor after a step; `skipped` where its gradients were not finite."""
        self._scaler.update()
        self.skipped_in_a_row = self.skipped_in_a_row + 1 if skipped else 0

    def state(self) -> dict[str, torch.Tensor]:
        """Return what an exact resume needs."""
        held = self._scaler.state_dict()
        return {
            "scale": torch.tensor(held["scale"], dtype=torch.float64),
            "growth_tracker": torch.tensor(held["_growth_tracker"]),
            "skipped_in_a_row": torch.tensor(self.skipped_in_a_row),
        }

    def restore(self, state: dict[str, torch.Tensor]) -> None:
        """Go on from what `state` returned."""
        self._scaler.load_state_dict(
            {
                **self._scaler.state_dict(),
                "scale": float(state["scale"]),
                "_growth_tracker": int(state["growth_tracker"]),
            }
        )
        self.skipped_in_a_row = int(state["skipped_in_a_row"])


def new_scale(precision: str, device: torch.device) -> LossScale | None:
    """Return what scales the loss of fp16, None for other precisions."""
    return LossScale(device) if precision == "fp16" else None
