"""The optimisers of a plan."""

from __future__ import annotations

from collections.abc import Collection

import torch

from sagittal.plan.optimizers import SGD, AdamW, Optimizer
from sagittal.plan.optimizers import Muon as MuonConfig
from sagittal.training.muon import Muon, matrices_of


def new_optimizer(network: torch.nn.Module, config: Optimizer, *, ends: Collection[str] = ()) -> torch.optim.Optimizer:
    """Make the optimiser of the plan; each of its groups keeps the rate of the schedule's peak as `peak`.

    One fused pass over each tensor: on a CPU AdamW takes a quarter of the time of torch's default, and the bits are
    the same each time.

    Args:
        network: its parameters are optimised.
        config: which optimiser, and its settings.
        ends: names of the parameters of stem and heads, which Muon leaves to AdamW.
    """
    optimizer: torch.optim.Optimizer
    match config:
        case AdamW():
            optimizer = torch.optim.AdamW(
                network.parameters(),
                lr=config.learning_rate,
                betas=config.betas,
                eps=config.eps,
                weight_decay=config.weight_decay,
                fused=True,
            )
        case SGD():
            optimizer = torch.optim.SGD(
                network.parameters(),
                lr=config.learning_rate,
                momentum=config.momentum,
                nesterov=config.momentum > 0,
                weight_decay=config.weight_decay,
                fused=True,
            )
        case MuonConfig():
            matrices = matrices_of(network, ends)
            known = {id(matrix) for matrix in matrices}
            optimizer = Muon(
                matrices,
                [parameter for parameter in network.parameters() if id(parameter) not in known],
                lr=config.learning_rate,
                weight_decay=config.weight_decay,
                momentum=config.momentum,
                betas=config.betas,
                eps=config.eps,
            )
    for group in optimizer.param_groups:
        group["peak"] = group["lr"]
    return optimizer


def set_rate(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Set every group's rate to `factor` times its peak."""
    for group in optimizer.param_groups:
        group["lr"] = group["peak"] * factor
