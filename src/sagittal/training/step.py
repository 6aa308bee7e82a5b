"""One optimiser step, and the measured time of one."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

import torch
from torch import Tensor

from sagittal.data.cache import Cache
from sagittal.data.label_index import LabelIndex, label_index
from sagittal.data.loader import Batch, TrainingBatches
from sagittal.errors import TrainingError
from sagittal.plan.plan import Plan
from sagittal.training.compiling import CompileMode
from sagittal.training.distributed import ALONE, World, sum_gradients
from sagittal.training.losses import segmentation_loss
from sagittal.training.memory import told_of_memory
from sagittal.training.optimizers import set_rate
from sagittal.training.precision import MOST_SKIPPED, autocast
from sagittal.training.state import TrainState, new_state
from sagittal.training.synchronised_norms import synchronise_batch_norm


@dataclass(frozen=True, slots=True)
class StepResult:
    """What one optimiser step tells.

    Attributes:
        loss: of the whole batch, over all processes.
        gradient_norm: before clipping.
        skipped: whether the gradients overflowed in fp16, so that the weights stayed as they were.
        loss_scale: what fp16's loss is multiplied by from here on, where the step was skipped.
    """

    loss: float
    gradient_norm: float
    skipped: bool = False
    loss_scale: float | None = None


def train_on_batch(
    state: TrainState, batch: Batch, plan: Plan, *, rate_factor: float, index: LabelIndex, world: World = ALONE
) -> StepResult:
    """Do one optimiser step in place, at `rate_factor` times the optimiser's peak rate.

    The batch is computed in `plan.training.micro_batches` parts whose gradients add up to its own, up to rounding. Two
    things see a part only: BatchNorm, and the sums of a batch Dice.

    Args:
        state: what is trained.
        batch: this process's share of the batch.
        plan: loss, precision, parts, clipping.
        rate_factor: of this step.
        index: which output each label belongs to.
        world: the processes that hold the rest of the batch. Each calls this and does the same step.

    Raises:
        TrainingError: the loss or its gradient is not finite (in fp16: in many steps in a row); the weights are those
            from before the step.
    """
    parameter = next(state.network.parameters())
    images = batch.images.to(parameter.device, parameter.dtype, non_blocking=True)
    targets = batch.labels.to(parameter.device, non_blocking=True)
    set_rate(state.optimizer, rate_factor)
    # An overflow would stay in the running statistics of BatchNorm for good.
    buffers = [] if state.scaler is None else [buffer.clone() for buffer in state.network.buffers()]

    def gradients() -> Tensor:
        return _gradients(state, images, targets, plan, index, world)

    loss = gradients() if state.compiled is None else state.compiled.attempt(gradients)
    sum_gradients(state.network, world)
    if state.scaler is not None:
        state.scaler.unscale(state.optimizer)
    norm = torch.nn.utils.clip_grad_norm_(state.network.parameters(), plan.training.gradient_clip_norm)
    # Both at once: each reading makes the processor wait for an accelerator.
    value, norm_value = torch.stack((loss, norm)).tolist()
    finite = math.isfinite(value) and math.isfinite(norm_value)
    if state.scaler is not None:
        state.scaler.update(skipped=not finite)
    if not finite:
        _require_scale(state, batch, value, norm_value)
        assert state.scaler is not None
        for buffer, before in zip(state.network.buffers(), buffers, strict=True):
            buffer.copy_(before)
        return StepResult(value, norm_value, skipped=True, loss_scale=state.scaler.value)
    state.optimizer.step()
    if state.average is not None:
        state.average.update(state.network, batch.step)
    return StepResult(loss=value, gradient_norm=norm_value)


def _gradients(
    state: TrainState, images: Tensor, targets: Tensor, plan: Plan, index: LabelIndex, world: World
) -> Tensor:
    """Put the gradients of the batch's loss, scaled for fp16, into the network, and return the loss."""
    training = plan.training
    state.optimizer.zero_grad(set_to_none=True)
    forward = state.compiled or state.network
    total = torch.zeros((), device=images.device)
    for part in _parts(training.micro_batches, world.share(training.batch_size).start):
        image, target = images[part], targets[part]
        with autocast(training.precision, images.device):
            output = forward(image)
        loss = segmentation_loss(
            output if isinstance(output, list) else [output],
            target,
            index,
            training.loss,
            spacing_mm=plan.preprocessing.network_spacing_mm,
            whole=targets,
            world=world,
        )
        scaled = loss if state.scaler is None else state.scaler.scaled(loss)
        scaled.backward()  # type: ignore[no-untyped-call]
        total = total + loss.detach()
    return total


def _parts(count: int, first: int) -> list[slice]:
    """Return which of a process's samples, of which `first` is the number in the whole batch, are in each part.

    Every `count`-th sample of the batch: so a part has the same samples however many processes share it.
    """
    return [slice((part - first) % count, None, count) for part in range(count)]


def _require_scale(state: TrainState, batch: Batch, loss: float, norm: float) -> None:
    """Raise TrainingError after a step that is not finite, but for fp16's first ones, which a smaller scale mends."""
    cases = ", ".join(batch.cases)
    if state.scaler is None:
        raise TrainingError(
            f"step {batch.step}: the loss is {loss} and the norm of its gradient {norm}, expected finite "
            f"numbers; cases in the batch: {cases}. Look at these cases, or lower "
            "training.optimizer.learning_rate.",
            code="loss_not_finite",
        )
    if state.scaler.skipped_in_a_row >= MOST_SKIPPED:
        raise TrainingError(
            f"step {batch.step}: {MOST_SKIPPED} steps in a row overflowed in fp16 (loss {loss}, norm of its gradient "
            f"{norm}, loss scale down to {state.scaler.value:g}), expected finite numbers; cases in the last batch: "
            f"{cases}. Make the plan with --set training.precision=bf16 or fp32, look at these cases, or lower "
            "training.optimizer.learning_rate; AdamW in fp16 needs training.optimizer.eps of about 1e-4.",
            code="loss_not_finite",
        )


def measure_step_s(
    plan: Plan,
    cache: Cache,
    cases: tuple[int, ...],
    device: torch.device,
    *,
    limit_s: float,
    compile: CompileMode = "off",
    world: World = ALONE,
) -> float:
    """Return the seconds that a real training step takes: the shortest of a few, the first left out.

    The shortest, because a schedule can be shortened by the clock but not lengthened: on a machine that happens to be
    busy while this measures, the median would give away time.

    Args:
        limit_s: about how long the measurement may take; at least two steps are done.
        compile: as in training; the first step, which compiles, is left out with what it takes.
        world: the processes that share each batch; each of them must call this. The slowest one's time counts.
    """
    state = new_state(plan, device, compile=compile)
    synchronise_batch_norm(state.network, world)
    index = label_index(plan.dataset)
    seconds: list[float] = []
    began = time.monotonic()
    with (
        told_of_memory(plan, device, "measuring a step"),
        TrainingBatches(cache, cases, plan, device=device, rank=world.rank, world=world.size) as batches,
    ):
        start = began
        for batch in batches:
            train_on_batch(state, batch, plan, rate_factor=1e-3, index=index, world=world)
            seconds.append(time.monotonic() - start)
            start = time.monotonic()
            enough = len(seconds) >= 8 or start - began > limit_s
            if len(seconds) >= 2 and world.any_true(enough):
                break
    return max(world.gather_objects(min(seconds[1:])))
