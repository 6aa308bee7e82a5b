"""One optimiser step: parts of a batch, fp16 that overflows, fp64, and steps that are refused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from sagittal.data.label_index import label_index
from sagittal.data.loader import Batch
from sagittal.errors import TrainingError
from sagittal.plan.optimizers import SGD
from sagittal.plan.plan import Plan
from sagittal.testing.plans import untrained_plan, untrained_spec
from sagittal.training.precision import MOST_SKIPPED, LossScale
from sagittal.training.state import TrainState, new_state
from sagittal.training.step import StepResult, train_on_batch

CPU = torch.device("cpu")
SMALL = {"network.channels": 4, "network.block_counts": [1] * 9}
SHAPE = (16, 18, 20)


def _plan(**changes: Any) -> Plan:
    plan = untrained_plan("mednext-s", untrained_spec(3), settings=SMALL)
    return plan.replace(training=plan.training.replace(**{"batch_size": 4, "precision": "fp64", **changes}))


def _batch(step: int = 0, samples: int = 4) -> Batch:
    generator = torch.Generator().manual_seed(step)
    images = torch.randn(samples, 1, *SHAPE, generator=generator)
    labels = torch.randint(3, (samples, *SHAPE), generator=generator)
    return Batch(step, images, labels, tuple(f"case_{number}" for number in range(samples)))


def _step(state: TrainState, plan: Plan, batch: Batch) -> StepResult:
    return train_on_batch(state, batch, plan, rate_factor=0.5, index=label_index(plan.dataset))


@pytest.mark.parametrize("parts", [2, 4])
def test_parts_of_a_batch_give_the_step_of_the_batch(parts: int) -> None:
    whole, cut = (_plan(micro_batches=count) for count in (1, parts))
    states = [new_state(plan, CPU) for plan in (whole, cut)]
    assert next(states[0].network.parameters()).dtype == torch.float64
    for step in range(2):
        results = [_step(state, plan, _batch(step)) for state, plan in zip(states, (whole, cut), strict=True)]
        assert results[0].loss == pytest.approx(results[1].loss, rel=1e-12)
        assert results[0].gradient_norm == pytest.approx(results[1].gradient_norm, rel=1e-10)
        for one, other in zip(*(state.network.parameters() for state in states), strict=True):
            torch.testing.assert_close(one.grad, other.grad, rtol=1e-9, atol=1e-13)
    for one, other in zip(*(state.network.parameters() for state in states), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-10)


def test_a_part_sees_its_samples_only() -> None:
    plan = _plan(micro_batches=2)
    state, seen = new_state(plan, CPU), []
    state.network.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    batch = _batch()
    _step(state, plan, batch)
    images = batch.images.double()
    assert len(seen) == 2
    assert all(torch.equal(part, images[first::2]) for first, part in enumerate(seen))


def test_clipping_bounds_the_step() -> None:
    config = SGD(learning_rate=1.0, weight_decay=0.0, momentum=0.0)
    plan = _plan(optimizer=config, gradient_clip_norm=1e-3)
    state = new_state(plan, CPU)
    before = [parameter.detach().clone() for parameter in state.network.parameters()]
    result = _step(state, plan, _batch())
    moved = [now.detach() - then for now, then in zip(state.network.parameters(), before, strict=True)]
    size = float(torch.cat([change.flatten() for change in moved]).norm())
    assert result.gradient_norm > 1e-2
    assert size == pytest.approx(0.5 * 1e-3, rel=1e-4)


class _Overflow:
    """Makes gradients infinite in chosen steps, as fp16's do where the scale is too large."""

    def __init__(self, parameter: torch.nn.Parameter, scale: LossScale, limit: Callable[[float], bool]) -> None:
        self._scale, self._limit = scale, limit
        parameter.register_hook(self)

    def __call__(self, grad: Tensor) -> Tensor:
        return grad * float("inf") if self._limit(self._scale.value) else grad


def _in_fp16(limit: Callable[[float], bool]) -> tuple[TrainState, Plan]:
    plan = _plan(precision="fp32", ema_decay=0.9)
    scale = LossScale(CPU)
    state = replace(new_state(plan, CPU), scaler=scale)
    _Overflow(next(state.network.parameters()), scale, limit)
    return state, plan


def test_steps_that_overflow_in_fp16_are_skipped_until_the_scale_fits() -> None:
    state, plan = _in_fp16(lambda scale: scale > 2**14)
    before = {name: value.clone() for name, value in state.network.state_dict().items()}
    results = [_step(state, plan, _batch(step)) for step in range(2)]
    assert [result.skipped for result in results] == [True, True]
    assert [result.loss_scale for result in results] == [2**15, 2**14]
    for name, value in state.network.state_dict().items():
        assert torch.equal(value, before[name])
    assert not state.optimizer.state
    assert state.scaler is not None
    assert state.scaler.skipped_in_a_row == 2
    result = _step(state, plan, _batch(2))
    assert not result.skipped
    assert state.scaler.skipped_in_a_row == 0
    reference = new_state(plan, CPU)
    unscaled = _step(reference, plan, _batch(2))
    assert result.loss == unscaled.loss
    assert result.gradient_norm == pytest.approx(unscaled.gradient_norm, rel=1e-4)
    for one, other in zip(state.network.parameters(), reference.network.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_fp16_that_overflows_at_any_scale_ends_with_step_cases_and_advice() -> None:
    state, plan = _in_fp16(lambda scale: True)
    before = [parameter.detach().clone() for parameter in state.network.parameters()]
    batch = _batch(7)
    for _ in range(MOST_SKIPPED - 1):
        assert _step(state, plan, batch).skipped
    with pytest.raises(TrainingError, match=r"step 7: 20 steps in a row.*case_0, case_1.*precision=bf16") as caught:
        _step(state, plan, batch)
    assert caught.value.code == "loss_not_finite"
    for parameter, value in zip(state.network.parameters(), before, strict=True):
        assert torch.equal(parameter, value)


def test_a_step_that_overflows_in_fp16_leaves_the_statistics_of_batch_norm_as_they_were() -> None:
    plan = untrained_plan("segformer3d", untrained_spec(3))
    plan = plan.replace(training=plan.training.replace(batch_size=1))
    state = replace(new_state(plan, CPU), scaler=LossScale(CPU))
    before = {name: buffer.clone() for name, buffer in state.network.named_buffers()}
    assert any(name.endswith("running_mean") for name in before)
    generator = torch.Generator().manual_seed(0)
    size = plan.patch.size
    labels = torch.randint(3, (1, *size), generator=generator)
    result = _step(state, plan, Batch(0, torch.full((1, 1, *size), float("inf")), labels, ("case_0",)))
    assert result.skipped
    for name, buffer in state.network.named_buffers():
        assert torch.equal(buffer, before[name])


def test_a_loss_that_is_not_finite_changes_neither_weights_nor_their_mean() -> None:
    plan = _plan(precision="fp32", ema_decay=0.9)
    state = new_state(plan, CPU)
    _step(state, plan, _batch(0))
    assert state.average is not None
    held = [value.clone() for network in (state.network, state.average.network) for value in network.parameters()]
    batch = _batch(1)
    batch.images[1] = float("nan")
    with pytest.raises(TrainingError, match=r"step 1: the loss is nan.*case_1"):
        _step(state, plan, batch)
    now = [value for network in (state.network, state.average.network) for value in network.parameters()]
    assert all(torch.equal(one, other) for one, other in zip(now, held, strict=True))
