"""One optimiser step, and the measured time of one."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

import torch

from sagittal.data.cache import Cache
from sagittal.data.label_index import LabelIndex, label_index
from sagittal.data.loader import Batch, TrainingBatches
from sagittal.errors import TrainingError
from sagittal.plan.plan import Plan
from sagittal.training.losses import segmentation_loss
from sagittal.training.optimizers import set_rate
from sagittal.training.precision import autocast
from sagittal.training.state import TrainState, new_state


@dataclass(frozen=True, slots=True)
class StepResult:
    """What one optimiser step tells."""

    loss: float
    gradient_norm: float


def train_on_batch(state: TrainState, batch: Batch, plan: Plan, *, rate_factor: float, index: LabelIndex) -> StepResult:
    """Do one optimiser step in place, at `rate_factor` times the optimiser's peak rate.

    Raises:
        TrainingError: the loss or its gradient is not finite; the weights are those from before the step.
    """
    device = next(state.network.parameters()).device
    images, targets = batch.images.to(device, non_blocking=True), batch.labels.to(device, non_blocking=True)
    set_rate(state.optimizer, rate_factor)
    state.optimizer.zero_grad(set_to_none=True)
    with autocast(plan.training.precision, device):
        output = state.network(images)
    outputs = output if isinstance(output, list) else [output]
    loss = segmentation_loss(outputs, targets, index, plan.training.loss)
    loss.backward()  # type: ignore[no-untyped-call]
    norm = torch.nn.utils.clip_grad_norm_(state.network.parameters(), plan.training.gradient_clip_norm)
    # Both at once: each reading makes the processor wait for an accelerator.
    value, norm_value = torch.stack((loss.detach(), norm)).tolist()
    if not (math.isfinite(value) and math.isfinite(norm_value)):
        raise TrainingError(
            f"step {batch.step}: the loss is {value} and the norm of its gradient {norm_value}, expected finite "
            f"numbers; cases in the batch: {', '.join(batch.cases)}. Look at these cases, or lower "
            "training.optimizer.learning_rate.",
            code="loss_not_finite",
        )
    state.optimizer.step()
    if state.average is not None:
        state.average.update(state.network, batch.step)
    return StepResult(loss=value, gradient_norm=norm_value)


def measure_step_s(plan: Plan, cache: Cache, cases: tuple[int, ...], device: torch.device, *, limit_s: float) -> float:
    """Return the seconds that a real training step takes: the shortest of a few, the first left out.

    The shortest, because a schedule can be shortened by the clock but not lengthened: on a machine that happens to be
    busy while this measures, the median would give away time.

    Args:
        limit_s: about how long the measurement may take; at least two steps are done.
    """
    state = new_state(plan, device)
    index = label_index(plan.dataset)
    seconds: list[float] = []
    began = time.monotonic()
    with TrainingBatches(cache, cases, plan, device=device) as batches:
        start = began
        for batch in batches:
            train_on_batch(state, batch, plan, rate_factor=1e-3, index=index)
            seconds.append(time.monotonic() - start)
            start = time.monotonic()
            if len(seconds) >= 2 and (len(seconds) >= 8 or time.monotonic() - began > limit_s):
                break
    return min(seconds[1:])
