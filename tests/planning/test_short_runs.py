from __future__ import annotations

import pytest
from fingerprints import fingerprint_of, spec_of

from sagittal.plan.optimizers import AdamW, Muon
from sagittal.plan.overrides import override
from sagittal.planning.planner import make_plan
from sagittal.planning.short_runs import SHORT_STEPS, short_run

SMALL = fingerprint_of(*[(20, 24, 18)] * 9)


@pytest.mark.parametrize("network", ["mednext-s", "segformer3d"])
def test_a_short_schedule_gets_muon_a_warm_up_and_the_reasons(network):
    plan = make_plan(SMALL, spec_of("lobe"), network)
    short = short_run(plan, steps=400.0, decided=(), budget_s=900.0)
    assert isinstance(plan.training.optimizer, AdamW) and isinstance(short.training.optimizer, Muon)
    assert short.training.optimizer.weight_decay == plan.training.optimizer.weight_decay
    assert short.schedule.warmup_fraction == 0.05
    changed = {name for name in short.reasons if short.reasons[name] != plan.reasons.get(name)}
    assert changed == {"training.optimizer", "schedule.warmup_fraction"}
    assert not any(name.startswith("training.optimizer.") for name in short.reasons)
    assert short.reasons["training.optimizer"].startswith("--budget 900 s")


def test_a_long_schedule_another_network_and_what_was_chosen_stay():
    plan = make_plan(SMALL, spec_of("lobe"), "segformer3d")
    assert short_run(plan, steps=float(SHORT_STEPS), decided=(), budget_s=900.0) == plan
    for name in ("training.optimizer", "training.optimizer.learning_rate"):
        assert short_run(plan, steps=400.0, decided={name}, budget_s=900.0) == plan
    unet = make_plan(SMALL, spec_of("lobe"), "unetr", settings={"patch.size": [32, 32, 32]})
    assert short_run(unet, steps=400.0, decided=(), budget_s=900.0) == unet
    warm = override(plan, {"schedule.warmup_fraction": 0.3}, origin="test")
    short = short_run(warm, steps=400.0, decided={"schedule.warmup_fraction"}, budget_s=900.0)
    assert short.schedule == warm.schedule and isinstance(short.training.optimizer, Muon)
