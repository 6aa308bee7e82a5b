"""What a device may compute in, and the scale of fp16's loss."""

from __future__ import annotations

import pytest
import torch

from sagittal.errors import PlanError
from sagittal.plan.plan import Plan
from sagittal.testing.plans import untrained_plan, untrained_spec
from sagittal.training import precision as precision_module
from sagittal.training.precision import LossScale, autocast, faster_precision, new_scale, require_precision

CPU = torch.device("cpu")


def _plan(precision: str, network: str = "mednext-s") -> Plan:
    plan = untrained_plan(network, untrained_spec(3))
    return plan.replace(training=plan.training.replace(precision=precision))


@pytest.mark.parametrize("network", ["mednext-s", "segformer3d"])
def test_a_cpu_refuses_fp16_and_a_gpu_takes_all(network: str) -> None:
    with pytest.raises(PlanError, match=r"precision is fp16, which is for GPUs.*precision=fp32"):
        require_precision(_plan("fp16", network), CPU)
    for precision in ("fp32", "bf16", "fp16", "fp64"):
        require_precision(_plan(precision, network), torch.device("cuda"))
    for precision in ("fp32", "fp64"):
        require_precision(_plan(precision, network), CPU)


def test_a_cpu_takes_bf16_for_mednext_where_it_has_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision_module, "cpu_bf16_reason", lambda: "it has no unit for it")
    with pytest.raises(PlanError, match=r"bf16.*for GPUs: it has no unit for it"):
        require_precision(_plan("bf16"), CPU)
    monkeypatch.setattr(precision_module, "cpu_bf16_reason", lambda: None)
    require_precision(_plan("bf16"), CPU)
    with pytest.raises(PlanError, match=r"only MedNeXt has kernels.*segformer3d"):
        require_precision(_plan("bf16", "segformer3d"), CPU)


def test_fp64_is_refused_where_the_device_lacks_it() -> None:
    with pytest.raises(PlanError, match="fp64, which device mps does not have"):
        require_precision(_plan("fp64"), torch.device("mps"))


@pytest.mark.parametrize(("precision", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16), ("fp32", None)])
def test_autocast_computes_in_the_plans_numbers(precision: str, dtype: torch.dtype | None) -> None:
    with autocast(precision, CPU):
        assert torch.is_autocast_enabled("cpu") == (dtype is not None)
        made = torch.nn.functional.linear(torch.ones(2, 3), torch.ones(4, 3))
    assert made.dtype == (dtype or torch.float32)


def test_only_fp16_has_a_scale() -> None:
    assert [new_scale(precision, CPU) is not None for precision in ("fp32", "bf16", "fp16", "fp64")] == [
        *(False, False, True, False)
    ]


def _overflow(scale: LossScale, parameter: torch.nn.Parameter, optimizer: torch.optim.Optimizer) -> None:
    scale.scaled(parameter.sum()).backward()
    assert parameter.grad is not None
    parameter.grad.fill_(float("inf"))
    scale.unscale(optimizer)
    scale.update(skipped=True)


def test_the_scale_is_halved_by_overflows_and_goes_on_where_it_was() -> None:
    parameter = torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([parameter])
    scale = LossScale(CPU)
    assert scale.value == 2**16
    for number in (1, 2):
        _overflow(scale, parameter, optimizer)
        assert (scale.value, scale.skipped_in_a_row) == (2 ** (16 - number), number)
    other = LossScale(CPU)
    other.restore(scale.state())
    assert (other.value, other.skipped_in_a_row) == (2**14, 2)
    parameter.grad = None
    other.scaled(parameter.sum()).backward()
    assert torch.equal(parameter.grad, torch.full((2,), 2.0**14))  # type: ignore[arg-type]
    other.unscale(optimizer)
    assert torch.equal(parameter.grad, torch.ones(2))  # type: ignore[arg-type]
    other.update(skipped=False)
    assert other.skipped_in_a_row == 0
    assert int(other.state()["growth_tracker"]) == 1


def test_a_budget_on_a_cpu_computes_in_bf16_where_that_is_faster_and_left_open(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision_module, "cpu_bf16_reason", lambda: None)
    plan = _plan("fp32")
    faster = faster_precision(plan, CPU, decided=())
    assert faster.training.precision == "bf16"
    assert "matrices in bf16" in faster.reasons["training.precision"]
    assert faster_precision(plan, CPU, decided={"training.precision"}) == plan
    assert faster_precision(plan, torch.device("cuda"), decided=()) == plan
    assert faster_precision(_plan("fp64"), CPU, decided=()) == _plan("fp64")
    assert faster_precision(_plan("fp32", "segformer3d"), CPU, decided=()).training.precision == "fp32"
    monkeypatch.setattr(precision_module, "cpu_bf16_reason", lambda: "none here")
    assert faster_precision(plan, CPU, decided=()) == plan
