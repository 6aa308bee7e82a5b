"""What a training step changes: the network, its optimiser, the running mean of its weights, the scale of its loss."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from sagittal.networks.build import build_network
from sagittal.plan.plan import Plan
from sagittal.training.average import WeightAverage, new_average
from sagittal.training.optimizers import new_optimizer
from sagittal.training.precision import new_scaler


@dataclass(frozen=True)
class TrainState:
    """The parts of a run that change with every step; a checkpoint holds all of them.

    Attributes:
        network: in training mode.
        optimizer: its parameter groups keep their rate at the schedule's peak as `peak`.
        average: the running mean of the weights where the plan has one.
        scaler: scales the loss of fp16, where gradients would vanish; None for other precisions.
    """

    network: torch.nn.Module
    optimizer: torch.optim.Optimizer
    average: WeightAverage | None
    scaler: torch.amp.GradScaler | None

    @property
    def result(self) -> torch.nn.Module:
        """The network that is validated and becomes the result: the mean's, else the one that is trained."""
        return self.network if self.average is None else self.average.network


def new_state(plan: Plan, device: torch.device) -> TrainState:
    """Return the state before the first step."""
    network = new_network(plan, device).train()
    return TrainState(
        network=network,
        optimizer=new_optimizer(network, plan.training.optimizer),
        average=new_average(network, plan.training.ema_decay),
        scaler=new_scaler(plan.training.precision, device),
    )


def new_network(plan: Plan, device: torch.device) -> torch.nn.Module:
    """Build the plan's network with weights drawn from the plan's seed; the same on every device."""
    torch.manual_seed(plan.training.seed)
    network = build_network(plan.network, len(plan.dataset.channel_names), plan.dataset.num_outputs)
    return network.to(device)
