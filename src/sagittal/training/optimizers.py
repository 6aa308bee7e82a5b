"""The optimisers of a plan."""

from __future__ import annotations

import torch

from sagittal.plan.optimizers import SGD, AdamW, Muon, Optimizer


def new_optimizer(network: torch.nn.Module, config: Optimizer) -> torch.optim.Optimizer:
    """Make the optimiser of the plan; each of its groups keeps the rate of the schedule's peak as `peak`."""
    optimizer: torch.optim.Optimizer
    match config:
        case AdamW():
            optimizer = torch.optim.AdamW(
                network.parameters(),
                lr=config.learning_rate,
                betas=config.betas,
                eps=config.eps,
                weight_decay=config.weight_decay,
            )
        case SGD():
            optimizer = torch.optim.SGD(
                network.parameters(),
                lr=config.learning_rate,
                momentum=config.momentum,
                nesterov=config.momentum > 0,
                weight_decay=config.weight_decay,
            )
        case Muon():
            raise NotImplementedError
    for group in optimizer.param_groups:
        group["peak"] = group["lr"]
    return optimizer


def set_rate(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Set every group's rate to `factor` times its peak."""
    for group in optimizer.param_groups:
        group["lr"] = group["peak"] * factor
