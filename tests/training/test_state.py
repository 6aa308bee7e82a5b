"""The state before the first step, by the plan."""

from __future__ import annotations

import pytest
import torch

from sagittal.plan.optimizers import Muon as MuonConfig
from sagittal.testing.plans import untrained_plan, untrained_spec
from sagittal.training.compiling import CompiledNetwork
from sagittal.training.muon import Muon
from sagittal.training.state import new_network, new_state

CPU = torch.device("cpu")
SMALL = {"network.channels": 4, "network.block_counts": [1] * 9}
PLAN = untrained_plan("mednext-s", untrained_spec(3), settings=SMALL)


def test_muon_leaves_stem_and_heads_to_adamw() -> None:
    muon = MuonConfig(learning_rate=0.01, weight_decay=0.0)
    state = new_state(PLAN.replace(training=PLAN.training.replace(optimizer=muon)), CPU)
    assert isinstance(state.optimizer, Muon)
    names = {id(parameter): name for name, parameter in state.network.named_parameters()}
    (group,) = (group for group in state.optimizer.param_groups if group["orthogonal"])
    matrices = {names[id(value)] for value in group["params"]}
    assert matrices
    assert not any(name.startswith(("stem", "out_")) for name in matrices)


def test_weights_do_not_depend_on_optimizer_mean_or_precision() -> None:
    muon = MuonConfig(learning_rate=0.01, weight_decay=0.0)
    plan = PLAN.replace(training=PLAN.training.replace(optimizer=muon, ema_decay=0.9, precision="fp64"))
    state, plain = new_state(plan, CPU), new_network(PLAN, CPU)
    drawn = torch.rand(3)
    new_state(PLAN, CPU)
    assert torch.equal(torch.rand(3), drawn), "what is drawn after it does not depend on them either"
    for name, value in plain.state_dict().items():
        assert torch.equal(state.network.state_dict()[name], value.double())


@pytest.mark.parametrize("ema_decay", [0.0, 0.9])
def test_the_result_is_the_mean_where_there_is_one_and_float32(ema_decay: float) -> None:
    for precision in ("fp32", "fp64"):
        plan = PLAN.replace(training=PLAN.training.replace(ema_decay=ema_decay, precision=precision))
        state = new_state(plan, CPU)
        with torch.no_grad():
            next(state.network.parameters()).fill_(3.0)
        first = next(state.result.parameters())
        assert first.dtype == torch.float32
        assert bool((first == 3.0).all()) == (ema_decay == 0.0)


def test_a_network_is_compiled_on_demand_under_its_plain_names() -> None:
    plain = new_state(PLAN, CPU)
    assert plain.compiled is None
    state = new_state(PLAN, CPU, compile="on")
    assert isinstance(state.compiled, CompiledNetwork)
    assert list(state.network.state_dict()) == list(plain.network.state_dict())
