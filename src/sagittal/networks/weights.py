"""Official weights into our networks: every tensor is accounted for, nothing is copied before all checks passed."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sagittal.errors import PlanError

_PREFIXES = ("module.", "_orig_mod.")
_WORKAROUND = "dummy_tensor"
# Heads of deep supervision at the coarse scales of MedNeXt: training aids that prediction does without.
_COARSE_HEAD = re.compile(r"out_[1-9]\d*\.conv_out\.(weight|bias)")
_SHOWN = 8


@dataclass(frozen=True)
class LoadReport:
    """What `load_official_weights` left out.

    Attributes:
        dropped: names in the state dict that the network has no use for.
        fresh: names in the network that the state dict lacks; they keep their initial values.
    """

    dropped: tuple[str, ...]
    fresh: tuple[str, ...]


def load_official_weights(network: nn.Module, state_dict: Mapping[str, Tensor]) -> LoadReport:
    """Copy official weights of MedNeXt or SegFormer3D into `network`, which keeps its device and dtype.

    Official MedNeXt files carry a scalar `dummy_tensor`, which is dropped. Deep-supervision heads at the coarse scales
    may be absent (the network's stay fresh) or superfluous (the file's are dropped). Prefixes that wrappers add to all
    names (`module.`, `_orig_mod.`) are removed.

    Args:
        network: a network of the same configuration.
        state_dict: tensors under their official names.

    Raises:
        PlanError: a tensor is missing, unexpected, or of another shape; the message names it and the network is
            unchanged.
    """
    given = _strip_prefixes(_checked_tensors(state_dict))
    wanted = network.state_dict()
    dropped = tuple(
        name for name in given if name == _WORKAROUND or (name not in wanted and _COARSE_HEAD.fullmatch(name))
    )
    fresh = tuple(name for name in wanted if name not in given and _COARSE_HEAD.fullmatch(name))
    missing = [name for name in wanted if name not in given and name not in fresh]
    unexpected = [name for name in given if name not in wanted and name not in dropped]
    misshapen = [
        f"{name} {tuple(given[name].shape)} where the network has {tuple(tensor.shape)}"
        for name, tensor in wanted.items()
        if name in given and given[name].shape != tensor.shape
    ]
    if missing or unexpected or misshapen:
        problems = [
            f"{len(names)} {what}: {_shortened(names)}"
            for what, names in (("missing", missing), ("unexpected", unexpected), ("of another shape", misshapen))
            if names
        ]
        raise PlanError(
            f"these weights do not fit {type(network).__name__}: {'; '.join(problems)}. "
            f"Expected the network's own tensors. {_advice(missing, unexpected, misshapen)} Nothing was copied.",
            code="weights_mismatch",
        )
    with torch.no_grad():
        for name, tensor in wanted.items():
            if name in given:
                tensor.copy_(given[name])
    return LoadReport(dropped=dropped, fresh=fresh)


def _checked_tensors(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    for name, value in state_dict.items():
        if not isinstance(value, Tensor):
            raise PlanError(
                f"the entry '{name}' of the state dict is of type {type(value).__name__}. Expected tensors "
                "under their official names; a checkpoint often holds them in checkpoint['state_dict'].",
                code="weights_not_tensors",
            )
    return dict(state_dict)


def _strip_prefixes(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    for prefix in _PREFIXES * 2:
        if tensors and all(name.startswith(prefix) for name in tensors):
            tensors = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
    return tensors


def _shortened(names: list[str]) -> str:
    rest = len(names) - _SHOWN
    return ", ".join(names[:_SHOWN]) + (f" and {rest} more" if rest > 0 else "")


def _advice(missing: list[str], unexpected: list[str], misshapen: list[str]) -> str:
    if missing and unexpected:
        return "The names differ: is this another architecture, or another number of blocks?"
    if misshapen:
        return "Build the network with the widths, kernel size, channels and classes of the weights."
    if missing:
        return "The file is incomplete, or the network has more blocks."
    return "The network has fewer blocks or options than the weights were trained with."
