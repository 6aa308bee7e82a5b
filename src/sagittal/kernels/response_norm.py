"""Global response normalisation of MedNeXt's expanded activation, by PyTorch's operators."""

from __future__ import annotations

import torch
from torch import Tensor

_EPS = 1e-6


def global_response_norm(x: Tensor, gamma: Tensor, beta: Tensor, *, by_sum: bool) -> Tensor:
    """Scale each channel by its share of the response: gamma * (x * n) + beta + x.

    n is the channel's L2 norm over space, divided by the mean of all channels' norms (MedNeXt v1's code, ConvNeXt-V2)
    or by their sum (`by_sum`, MedNeXt-v2, arXiv 2512.17774), plus 1e-6.

    Args:
        x: (N, C, ...).
        gamma: (1, C, 1, ...), like `beta`.
        beta: (1, C, 1, ...).
        by_sum: divide by the sum instead of the mean.
    """
    # A sum of squares over a whole volume overflows float16 and loses bits in bfloat16.
    dtype = torch.float32 if x.dtype in (torch.float16, torch.bfloat16) else x.dtype
    response = torch.linalg.vector_norm(x, dim=tuple(range(2, x.ndim)), keepdim=True, dtype=dtype)
    total = response.sum(dim=1, keepdim=True) if by_sum else response.mean(dim=1, keepdim=True)
    scale = 1 + gamma * (response / (total + _EPS))
    return torch.addcmul(beta.to(x.dtype), x, scale.to(x.dtype))
