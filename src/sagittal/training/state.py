"""What a training step changes: the network, its optimiser, the running mean of its weights, the scale of its loss."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch

from sagittal.networks.build import build_network
from sagittal.plan.optimizers import Muon
from sagittal.plan.plan import Plan
from sagittal.training.average import WeightAverage, new_average
from sagittal.training.compiling import CompiledNetwork, CompileMode, compiled
from sagittal.training.initialization import ends_of
from sagittal.training.optimizers import new_optimizer
from sagittal.training.precision import LossScale, new_scale


@dataclass(frozen=True)
class TrainState:
    """The parts of a run that change with every step; a checkpoint holds all of them.

    Attributes:
        network: in training mode.
        optimizer: its parameter groups keep their rate at the schedule's peak as `peak`.
        average: the running mean of the weights where the plan has one.
        scaler: scales the loss of fp16, where gradients would vanish; None for other precisions.
        compiled: the network's forward pass in training where it is compiled; it has no state of its own.
    """

    network: torch.nn.Module
    optimizer: torch.optim.Optimizer
    average: WeightAverage | None
    scaler: LossScale | None
    compiled: CompiledNetwork | None = None

    @property
    def result(self) -> torch.nn.Module:
        """The network that is validated and becomes the result: the mean's, else the one that is trained.

        One of float64 is copied into float32, which prediction and bundles are made of.
        """
        network = self.network if self.average is None else self.average.network
        if next(network.parameters()).dtype == torch.float64:
            return copy.deepcopy(network).float()
        return network


def new_state(
    plan: Plan,
    device: torch.device,
    *,
    compile: CompileMode = "off",
    say: Callable[[str], None] = lambda line: None,
) -> TrainState:
    """Return the state before the first step.

    Args:
        plan: its network, seed, optimiser, precision and mean of weights.
        device: where the network is trained.
        compile: whether its forward pass is compiled; see `compiling.compiled`.
        say: receives a line where compiling is not possible.
    """
    network = new_network(plan, device).train()
    if plan.training.precision == "fp64":
        network.double()
    optimizer = plan.training.optimizer
    ends = ends_of(plan) if isinstance(optimizer, Muon) else None
    return TrainState(
        network=network,
        optimizer=new_optimizer(network, optimizer, ends=() if ends is None else {*ends.stems, *ends.heads}),
        average=new_average(network, plan.training.ema_decay),
        scaler=new_scale(plan.training.precision, device),
        compiled=compiled(network, compile, device, say),
    )


def new_network(plan: Plan, device: torch.device) -> torch.nn.Module:
    """Build the plan's network with weights drawn from the plan's seed; the same on every device."""
    torch.manual_seed(plan.training.seed)
    network = build_network(plan.network, len(plan.dataset.channel_names), plan.dataset.num_outputs)
    return network.to(device)
