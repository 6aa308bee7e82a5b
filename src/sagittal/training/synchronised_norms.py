"""BatchNorm with the statistics of the batches of all processes, on any device (torch's refuses tensors on a CPU).

A share may have any size. Results are those of one process with the whole batch, up to rounding.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from sagittal.training.distributed import World, all_reduce


def synchronise_batch_norm(network: nn.Module, world: World) -> None:
    """Make the BatchNorms of `network` share their statistics from now on, in place; nothing for one process.

    Names, weights and state stay as they are, and so does what happens in eval mode, where nothing is exchanged.
    Every process must run the network, and its backward pass, as often as the others.
    """
    if world.size == 1:
        return
    for module in network.modules():
        if isinstance(module, _BatchNorm):
            # The same module with another forward pass: others may hold references to it.
            module.__class__ = SynchronisedBatchNorm
            module.__dict__.update(world=world)


class SynchronisedBatchNorm(_BatchNorm):
    """A BatchNorm over all processes; `synchronise_batch_norm` makes it of another one.

    Attributes:
        world: the processes.
    """

    world: World

    def _check_input_dim(self, input: Tensor) -> None:
        pass

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def forward(self, input: Tensor) -> Tensor:
        """Normalise (N, C, ...) in training by the mean and variance of all processes' inputs, else as BatchNorm.

        Where all of them together have one value for each channel, the running statistics are used, as
        `networks.norms.normalise` does.
        """
        if not self.training:
            return super().forward(input)
        own = input.numel() // input.shape[1]
        count, mean, var = _statistics(input, own, self.world)
        # Where this process alone has a variance there is one; so an accelerator is rarely waited for.
        if own <= 1 and int(count) <= 1 and self.running_mean is not None:
            return F.batch_norm(
                input, self.running_mean, self.running_var, self.weight, self.bias, training=False, eps=self.eps
            )
        self._update(count, mean, var)
        result: Tensor = _Normalise.apply(  # type: ignore[no-untyped-call]
            input, self.weight, self.bias, mean, torch.rsqrt(var + self.eps), count, self.world
        )
        return result

    @torch.no_grad()
    def _update(self, count: Tensor, mean: Tensor, var: Tensor) -> None:
        """Update the running statistics as torch does, with the unbiased variance."""
        if self.running_mean is None or self.running_var is None or self.num_batches_tracked is None:
            return
        self.num_batches_tracked.add_(1)
        share = 1.0 / int(self.num_batches_tracked) if self.momentum is None else self.momentum
        for running, new in ((self.running_mean, mean), (self.running_var, var * (count / (count - 1)))):
            running.mul_(1 - share).add_(new.to(running.dtype), alpha=share)


@torch.no_grad()
def _statistics(x: Tensor, own: int, world: World) -> tuple[Tensor, Tensor, Tensor]:
    """Return the number of values for each channel, (), their mean and variance (biased), (C,), of all; float64.

    Each process sends count, mean and sum of squared deviations, which add up without cancellation (Chan, Golub and
    LeVeque, 1983). `own` is the count of this process.
    """
    channels = x.shape[1]
    table = torch.zeros(world.size, 2 * channels + 1, dtype=torch.float64, device=x.device)
    if own:
        var, mean = torch.var_mean(_at_least_fp32(x), [0, *range(2, x.ndim)], correction=0)
        table[world.rank, :channels] = mean
        table[world.rank, channels:-1] = var.double() * own
        table[world.rank, -1] = own
    everyone = all_reduce(table, world)
    counts, means = everyone[:, -1:], everyone[:, :channels]
    total = counts.sum()
    mean = (counts * means).sum(0) / total
    squares = everyone[:, channels:-1].sum(0) + (counts * (means - mean).square()).sum(0)
    return total, mean, squares / total


def _at_least_fp32(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _shaped(values: Tensor, like: Tensor) -> Tensor:
    return values.to(like.dtype).view(1, -1, *[1] * (like.ndim - 2))


class _Normalise(torch.autograd.Function):
    """(x - mean) * rstd * weight + bias, where mean and rstd depend on the x of every process."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        mean: Tensor,
        rstd: Tensor,
        count: Tensor,
        world: World,
    ) -> Tensor:
        ctx.save_for_backward(x, weight, mean, rstd, count)
        ctx.world = world
        wide = _at_least_fp32(x)
        scale = rstd if weight is None else rstd * weight.double()
        result = (wide - _shaped(mean, wide)) * _shaped(scale, wide)
        if bias is not None:
            result += _shaped(bias, wide)
        return result.to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, rstd, count = ctx.saved_tensors
        wide, grad = _at_least_fp32(x), _at_least_fp32(grads[0])
        centred = wide - _shaped(mean, wide)
        axes = [0, *range(2, x.ndim)]
        own = torch.stack([grad.sum(axes), (grad * centred).sum(axes)]).double()
        sums = all_reduce(own, ctx.world) / count
        scale = rstd if weight is None else rstd * weight.double()
        result = (grad - _shaped(sums[0], wide) - centred * _shaped(sums[1] * rstd.square(), wide)) * _shaped(
            scale, wide
        )
        of_weight = None if weight is None else (own[1] * rstd).to(weight.dtype)
        of_bias = None if weight is None else own[0].to(weight.dtype)
        return result.to(x.dtype), of_weight, of_bias, None, None, None, None
