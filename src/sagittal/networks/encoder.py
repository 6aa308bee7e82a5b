"""Which part of a network is its encoder, and how it is kept as it is while the rest learns.

A network tells by a class attribute, `encoder_prefixes`, how the names of its encoder's parameters begin:
`("stem.", "enc_block_", "down_", "bottleneck.")`.
"""

from __future__ import annotations

from torch import nn

from sagittal.errors import PlanError


def encoder_prefixes(network: nn.Module) -> tuple[str, ...]:
    """Return how the names of the encoder's parameters begin.

    Raises:
        PlanError: the network does not say which part is its encoder.
    """
    prefixes: object = getattr(network, "encoder_prefixes", None)
    if not isinstance(prefixes, tuple):
        raise PlanError(
            f"{type(network).__name__} does not say which of its parts is the encoder, so that can't be frozen. Leave "
            "--freeze-encoder out.",
            code="no_encoder",
        )
    unknown = [start for start in prefixes if not any(name.startswith(start) for name, _ in network.named_parameters())]
    assert not unknown, f"no parameter of {type(network).__name__} begins with {unknown}"
    return prefixes


def set_encoder_frozen(network: nn.Module, frozen: bool) -> None:
    """Freeze the encoder of a network in train mode, or let it learn again.

    A frozen encoder gets no gradient, and is in eval mode: the statistics of its BatchNorms stay as they are.

    Raises:
        PlanError: the network does not say which part is its encoder.
    """
    prefixes = encoder_prefixes(network)
    for name, parameter in network.named_parameters():
        if name.startswith(prefixes):
            parameter.requires_grad_(not frozen)
            if frozen:
                parameter.grad = None
    for name, module in network.named_modules():
        if f"{name}.".startswith(prefixes):
            module.training = not frozen
