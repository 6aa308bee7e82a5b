"""Muon: momentum whose matrices are made orthogonal before they are applied, and AdamW for everything else.

After the description at kellerjordan.github.io/posts/muon; the size of the updates after arXiv 2502.16982, equation 4,
so that rate and weight decay of an AdamW recipe carry over.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Collection, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.optim.adamw import adamw

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Of the quintic that is applied five times: singular values from 0.002 to 1 come out between 0.68 and 1.13."""
_ITERATIONS = 5
_TINY = 1e-7
_ADAMW_RMS = 0.2
"""Root mean square of a typical update of AdamW at rate 1 (arXiv 2502.16982, section 2.2)."""


def matrices_of(network: nn.Module, ends: Collection[str] = ()) -> list[Tensor]:
    """Return the weights that act as matrices on features: those of linear layers and of ungrouped convolutions.

    A matrix of a single row or column is a vector and is left out, as are parameters that no such layer holds:
    embeddings, tables of positions, norms, biases. A transposed convolution is the adjoint of the convolution with the
    same weight, so both are (first axis, all others).

    Args:
        network: any.
        ends: names of the parameters of stem and heads, which are left out.
    """
    left_out = {id(value) for name, value in network.named_parameters(remove_duplicate=False) if name in ends}
    found: dict[int, Tensor] = {}
    for module in network.modules():
        if not isinstance(module, nn.Linear | _ConvNd) or getattr(module, "groups", 1) > 1:
            continue
        weight = module.weight
        if id(weight) not in left_out and min(weight.flatten(1).shape) > 1:
            found[id(weight)] = weight
    return list(found.values())


class Muon(torch.optim.Optimizer):
    """Muon for `matrices`, AdamW for `others`; both have one rate and one weight decay, decoupled from the gradient.

    Each update of a matrix has the root mean square of an AdamW update: orthogonal times 0.2 * sqrt(max(rows, columns))
    (arXiv 2502.16982). The Newton-Schulz products run in bf16 where the device has units for it, as the reference's do.

    Args:
        matrices: parameters that are taken as (first axis, all others).
        others: all other parameters.
        lr: rate.
        weight_decay: of all of them.
        momentum: of the matrices, Nesterov's.
        betas, eps: AdamW's.
    """

    def __init__(
        self,
        matrices: Iterable[Tensor],
        others: Iterable[Tensor],
        *,
        lr: float,
        weight_decay: float,
        momentum: float = 0.95,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
    ) -> None:
        groups = [
            {"params": list(parameters), "orthogonal": orthogonal}
            for parameters, orthogonal in ((matrices, True), (others, False))
        ]
        defaults = {"lr": lr, "weight_decay": weight_decay, "momentum": momentum, "betas": betas, "eps": eps}
        super().__init__([group for group in groups if group["params"]], defaults)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Apply one update by the gradients that are there; parameters without one stay as they are."""
        for group in self.param_groups:
            parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
            if parameters and group["orthogonal"]:
                self._step_matrices(parameters, group)
            elif parameters:
                self._step_others(parameters, group)

    def _step_matrices(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        gradients = [_gradient(parameter) for parameter in parameters]
        buffers = [self._held(parameter, "momentum_buffer") for parameter in parameters]
        torch._foreach_lerp_(buffers, gradients, 1 - group["momentum"])
        updates = torch._foreach_lerp(gradients, buffers, group["momentum"])
        torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
        for positions in _of_equal_shape(updates):
            matrices = orthogonalised([updates[position].flatten(1) for position in positions])
            scale = _ADAMW_RMS * math.sqrt(max(matrices.shape[1:]))
            changed = [parameters[position] for position in positions]
            changes = [matrix.view(parameter.shape) for matrix, parameter in zip(matrices, changed, strict=True)]
            torch._foreach_add_(changed, changes, alpha=-group["lr"] * scale)

    def _step_others(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        steps = []
        for parameter in parameters:
            state = self.state[parameter]
            if "step" not in state:
                state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
            steps.append(state["step"])
        adamw(
            list(parameters),
            [_gradient(parameter) for parameter in parameters],
            [self._held(parameter, "exp_avg") for parameter in parameters],
            [self._held(parameter, "exp_avg_sq") for parameter in parameters],
            [],
            steps,
            fused=True,
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )

    def _held(self, parameter: Tensor, name: str) -> Tensor:
        state = self.state[parameter]
        if name not in state:
            state[name] = torch.zeros_like(parameter)
        held: Tensor = state[name]
        return held


def orthogonalised(matrices: Sequence[Tensor]) -> Tensor:
    """Return matrices with the same singular vectors and singular values of nearly one, from 0.66 to 1.16.

    Newton-Schulz: an odd polynomial of a matrix is that polynomial of its singular values, so no decomposition is
    needed. Singular values below about 0.002 of the matrix's Frobenius norm come out smaller, zero as zero.

    Args:
        matrices: M of (R, C), floating-point.

    Returns:
        (M, R, C), of the inputs' type.
    """
    first = matrices[0]
    x = first.new_empty((len(matrices), *first.shape), dtype=_product_dtype(first))
    for place, matrix in zip(x, matrices, strict=True):
        place.copy_(matrix)
    norms = torch.stack(torch._foreach_norm(list(matrices)))
    x.mul_((1 / (norms + _TINY)).to(x.dtype).view(-1, 1, 1))
    tall = first.shape[0] > first.shape[1]
    a, b, c = _COEFFICIENTS
    for _ in range(_ITERATIONS):
        gram = x.mT @ x if tall else x @ x.mT
        factor = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, x, factor, beta=a) if tall else torch.baddbmm(x, factor, x, beta=a)
    return x.to(first.dtype)


def _of_equal_shape(tensors: Sequence[Tensor]) -> list[list[int]]:
    """Return the positions of the tensors that are matrices of the same shape, group by group."""
    groups: defaultdict[tuple[int, int], list[int]] = defaultdict(list)
    for position, tensor in enumerate(tensors):
        groups[tensor.shape[0], tensor[0].numel()].append(position)
    return list(groups.values())


def _gradient(parameter: Tensor) -> Tensor:
    assert parameter.grad is not None
    return parameter.grad


def _product_dtype(tensor: Tensor) -> torch.dtype:
    """Return the type of the Newton-Schulz products: bf16 where it is several times as fast, else the tensor's own."""
    if tensor.dtype != torch.float32:
        return tensor.dtype
    if tensor.is_cuda:
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    # torch has no public name for it. With AVX-512 alone bf16 is hardly faster than fp32.
    has_tiles = tensor.device.type == "cpu" and getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)()
    return torch.bfloat16 if has_tiles else torch.float32
