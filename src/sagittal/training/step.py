"""One optimiser step, and what it needs: the optimiser, the device, the measured time of a step."""

from __future__ import annotations

import math
import time
from contextlib import nullcontext

import torch

from sagittal.data.cache import Cache
from sagittal.data.label_index import LabelIndex, label_index
from sagittal.data.loader import Batch, TrainingBatches
from sagittal.errors import PlanError, TrainingError
from sagittal.networks.build import build_network
from sagittal.plan.optimizers import SGD, AdamW, Muon, Optimizer
from sagittal.plan.plan import Plan
from sagittal.training.losses import segmentation_loss


def require_precision(plan: Plan, device: torch.device) -> None:
    """Refuse bf16 on a CPU: where a grid has one or two voxels, oneDNN's weight gradients hold memory never written.

    Raises:
        PlanError: the plan wants bf16 and the device is the CPU.
    """
    if plan.training.precision == "bf16" and device.type == "cpu":
        raise PlanError(
            "training.precision is bf16, which is for GPUs: on a CPU it is slower than fp32 and its gradients can be "
            "wrong. Choose --device cuda, or make the plan with --set training.precision=fp32.",
            code="bf16_on_cpu",
        )


def new_network(plan: Plan, device: torch.device) -> torch.nn.Module:
    """Build the plan's network with weights drawn from the plan's seed; the same on every device."""
    torch.manual_seed(plan.training.seed)
    network = build_network(plan.network, len(plan.dataset.channel_names), plan.dataset.num_outputs)
    return network.to(device)


def new_optimizer(network: torch.nn.Module, config: Optimizer) -> torch.optim.Optimizer:
    """Make the optimiser of the plan."""
    match config:
        case AdamW():
            return torch.optim.AdamW(
                network.parameters(),
                lr=config.learning_rate,
                betas=config.betas,
                eps=config.eps,
                weight_decay=config.weight_decay,
            )
        case Muon():
            raise NotImplementedError
        case SGD():
            return torch.optim.SGD(
                network.parameters(),
                lr=config.learning_rate,
                momentum=config.momentum,
                nesterov=config.momentum > 0,
                weight_decay=config.weight_decay,
            )


def train_on_batch(
    network: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    batch: Batch,
    plan: Plan,
    *,
    learning_rate: float,
    index: LabelIndex,
) -> float:
    """Do one optimiser step in place and return its loss.

    Raises:
        TrainingError: the loss or its gradient is not finite; the weights are those from before the step.
    """
    device = next(network.parameters()).device
    images, targets = batch.images.to(device, non_blocking=True), batch.labels.to(device, non_blocking=True)
    autocast = torch.autocast(device.type, torch.bfloat16) if plan.training.precision == "bf16" else nullcontext()
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
    optimizer.zero_grad(set_to_none=True)
    with autocast:
        output = network(images)
    outputs = output if isinstance(output, list) else [output]
    loss = segmentation_loss(outputs, targets, index, plan.training.loss)
    loss.backward()  # type: ignore[no-untyped-call]
    norm = torch.nn.utils.clip_grad_norm_(network.parameters(), plan.training.gradient_clip_norm)
    # Both at once: each reading makes the processor wait for an accelerator.
    value, norm_value = torch.stack((loss.detach(), norm)).tolist()
    if not (math.isfinite(value) and math.isfinite(norm_value)):
        raise TrainingError(
            f"step {batch.step}: the loss is {value} and the norm of its gradient {norm_value}, expected finite "
            f"numbers; cases in the batch: {', '.join(batch.cases)}. Look at these cases, or lower "
            "training.optimizer.learning_rate.",
            code="loss_not_finite",
        )
    optimizer.step()
    return float(value)


def measure_step_s(plan: Plan, cache: Cache, cases: tuple[int, ...], device: torch.device, *, limit_s: float) -> float:
    """Return the seconds that a real training step takes: the shortest of a few, the first left out.

    The shortest, because a schedule can be shortened by the clock but not lengthened: on a machine that happens to be
    busy while this measures, the median would give away time.

    Args:
        limit_s: about how long the measurement may take; at least two steps are done.
    """
    network = new_network(plan, device).train()
    optimizer = new_optimizer(network, plan.training.optimizer)
    index = label_index(plan.dataset)
    seconds: list[float] = []
    began = time.monotonic()
    with TrainingBatches(cache, cases, plan, device=device) as batches:
        start = began
        for batch in batches:
            train_on_batch(network, optimizer, batch, plan, learning_rate=1e-6, index=index)
            seconds.append(time.monotonic() - start)
            start = time.monotonic()
            if len(seconds) >= 2 and (len(seconds) >= 8 or time.monotonic() - began > limit_s):
                break
    return min(seconds[1:])
