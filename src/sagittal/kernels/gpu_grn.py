"""Global response normalisation inside the fused tail of a MedNeXt block on a GPU (arXiv 2301.00808, 2512.17774).

GRN scales a hidden channel by its L2 norm over the whole volume, so the hidden activation is computed twice: once for
its sums of squares, once for the result; and in the backward pass once more, for the sums of its products with the
gradient. That costs arithmetic and reads h (and grad_y) again; storing the hidden activation would take R / C times as
many passes. Letters as in `gpu_block`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from sagittal.kernels import gpu_block
from sagittal.kernels.gpu_block import Gradients, Tail, Tiles

EPS = 1e-6


class Responses(NamedTuple):
    """GRN of a block: gamma and beta, R numbers each in any shape; `by_sum` divides by the norms' sum, not their mean.

    MedNeXt v1's code and ConvNeXt-V2 take the mean, MedNeXt-v2 the sum.
    """

    gamma: Tensor
    beta: Tensor
    by_sum: bool


def response_norms(h: Tensor, tail: Tail, *, tiles: Tiles | None = None) -> Tensor:
    """Return the L2 norm over voxels of each case's hidden channels, GELU(expand(norm(h))): (N, R) float32."""
    return gpu_block.hidden_sums(h, None, tail, tiles=tiles).sqrt_()


def with_responses(tail: Tail, norms: Tensor, grn: Responses) -> Tail:
    """Return `tail` with GRN's factor and shift, given `response_norms`."""
    share = norms / (_total(norms, grn.by_sum) + EPS)
    gain = torch.addcmul(torch.ones_like(norms), share, grn.gamma.flatten().float())
    return tail._replace(gain=gain, offset=grn.beta)


def forward(h: Tensor, residual: Tensor | None, tail: Tail, grn: Responses) -> tuple[Tensor, Tensor]:
    """Return residual + contract(GRN(GELU(expand(norm(h))))) and the response norms, for the backward pass.

    Arguments as in `gpu_block.forward`; passes over activations: h twice, the residual, the result.
    """
    norms = response_norms(h, tail)
    return gpu_block.forward(h, residual, with_responses(tail, norms, grn)), norms


def backward(
    h: Tensor, grad_y: Tensor, tail: Tail, grn: Responses, norms: Tensor
) -> tuple[Gradients, tuple[Tensor, Tensor]]:
    """Return the gradients at h and the six weights, and those at gamma and beta, (R,) float32.

    Arguments as in `gpu_block.backward`, without `gain`; norms: what `forward` returned.
    """
    responding = with_responses(tail, norms, grn)
    by_gain = gpu_block.hidden_sums(h, grad_y, tail)
    total = _total(norms, grn.by_sum) + EPS
    by_share = by_gain * grn.gamma.flatten()
    through_total = (by_share * norms).sum(1, keepdim=True) / total
    if not grn.by_sum:
        through_total = through_total / norms.shape[1]
    by_norm = (by_share - through_total) / total
    # A channel that is zero everywhere has no direction: its norm's gradient is taken as zero, as PyTorch does.
    pull = torch.where(norms > 0, by_norm / norms.clamp_min(torch.finfo(torch.float32).tiny), 0.0)
    gradients = gpu_block.backward(h, grad_y, responding, pull=pull)
    # The shift stands in front of the contraction: its gradient is grad_y's sum, taken back through the matrix.
    by_beta = gradients.weights[5] @ tail.weights[4].flatten(1).float()
    return gradients, ((by_gain * norms / total).sum(0), by_beta)


def _total(norms: Tensor, by_sum: bool) -> Tensor:
    return norms.sum(1, keepdim=True) if by_sum else norms.mean(1, keepdim=True)
