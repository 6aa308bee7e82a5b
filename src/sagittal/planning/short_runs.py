"""How a network is trained when there is time for few steps: faster than its paper's recipe of a quarter million."""

from __future__ import annotations

from collections.abc import Collection

from sagittal.plan.networks import MedNeXtConfig, NetworkConfig, SegFormer3DConfig
from sagittal.plan.optimizers import AdamW, Muon
from sagittal.plan.plan import Plan

SHORT_STEPS = 10_000
"""Schedules of fewer steps are short; what was measured of them had 300 to 800."""
WARMUP_FRACTION = 0.05
DEAREST_STEP = 1.6
"""A step may take this many times as long as by the paper's recipe; where it takes longer, that recipe stays."""


def short_run(plan: Plan, *, steps: float, decided: Collection[str], budget_s: float) -> Plan:
    """Return the plan with Muon, its rate and a warm-up, where a short schedule learns more by them.

    Args:
        plan: as its network's recipe has it.
        steps: about how many there is time for.
        decided: dotted names of what the user or a preset chose; it stays.
        budget_s: the time that the user stated.
    """
    rate = _rate(plan.network)
    chosen = any(name.startswith("training.optimizer") for name in decided)
    if rate is None or chosen or steps >= SHORT_STEPS or not isinstance(plan.training.optimizer, AdamW):
        return plan
    given = plan.training.optimizer
    optimizer = Muon(learning_rate=rate, weight_decay=given.weight_decay, eps=given.eps, betas=given.betas)
    why = f"--budget {budget_s:.0f} s: fewer than {SHORT_STEPS} steps, which teach more with it (docs/lab-log.md)"
    kept = {name: reason for name, reason in plan.reasons.items() if not name.startswith("training.optimizer")}
    reasons = {**kept, "training.optimizer": why}
    schedule = plan.schedule
    if "schedule.warmup_fraction" not in decided:
        schedule = schedule.replace(warmup_fraction=max(WARMUP_FRACTION, schedule.warmup_fraction))
        reasons["schedule.warmup_fraction"] = why
    return plan.replace(training=plan.training.replace(optimizer=optimizer), schedule=schedule, reasons=reasons)


def _rate(network: NetworkConfig) -> float | None:
    """Return the peak rate of Muon for a network, None where it was not tried."""
    match network:
        case MedNeXtConfig():
            return 3e-3
        case SegFormer3DConfig():
            return 4e-3
        case _:
            return None
