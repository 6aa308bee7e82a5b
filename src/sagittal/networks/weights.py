"""Official weights into our networks: every tensor is accounted for, nothing is copied before all checks passed."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from sagittal.errors import PlanError

Naming = Literal["official", "monai"]

WORKAROUND = "dummy_tensor"
"""A scalar that every official MedNeXt carries because of how it checkpoints activations; it has no use."""
COARSE_HEAD = re.compile(r"out_[1-9]\d*\.conv_out\.(weight|bias)")
"""Heads of deep supervision at the coarse scales of MedNeXt: training aids that prediction does without."""

_WRAPPERS = ("state_dict", "model_state_dict", "network_weights", "model", "network", "net")
"""Keys under which programs keep the tensors in a checkpoint: nnU-Net v1 and Lightning, many, nnU-Net v2, ..."""
_PREFIXES = ("module.", "_orig_mod.", "model.", "network.", "net.")
_LEVELS = 4
_SHOWN = 8


@dataclass(frozen=True)
class LoadReport:
    """What `load_official_weights` left out.

    Attributes:
        dropped: names in the state dict that the network has no use for.
        fresh: names in the network that the state dict lacks; they keep their initial values.
        naming: whose names the state dict bore; MONAI's MedNeXt calls the same tensors otherwise.
    """

    dropped: tuple[str, ...]
    fresh: tuple[str, ...]
    naming: Naming = "official"


def load_official_weights(network: nn.Module, state_dict: Mapping[str, Any]) -> LoadReport:
    """Copy official weights of MedNeXt or SegFormer3D into `network`, which keeps its device and dtype.

    A whole checkpoint is taken as well as a bare state dict, and MONAI's names of MedNeXt's tensors as well as the
    official ones. Official MedNeXt files carry a scalar `dummy_tensor`, which is dropped. Deep-supervision heads at the
    coarse scales may be absent (the network's stay fresh) or superfluous (the file's are dropped). Prefixes that
    wrappers add to all names (`module.`, `_orig_mod.`, `model.`, ...) are removed.

    MONAI's S is the official network. Its B, M and L are not: their down blocks have other shapes, so they are refused.

    Args:
        network: a network of the same configuration.
        state_dict: tensors by name, or a checkpoint that holds them under `state_dict`, `model_state_dict`, ...

    Raises:
        PlanError: a tensor is missing, unexpected, or of another shape; the message names it and the network is
            unchanged.
    """
    wanted = network.state_dict()
    given, naming = official_tensors(state_dict, wanted)
    dropped = tuple(
        name for name in given if name == WORKAROUND or (name not in wanted and COARSE_HEAD.fullmatch(name))
    )
    fresh = tuple(name for name in wanted if name not in given and COARSE_HEAD.fullmatch(name))
    missing = [name for name in wanted if name not in given and name not in fresh]
    unexpected = [name for name in given if name not in wanted and name not in dropped]
    misshapen = {
        name: (tuple(given[name].shape), tuple(tensor.shape))
        for name, tensor in wanted.items()
        if name in given and given[name].shape != tensor.shape
    }
    if missing or unexpected or misshapen:
        advice = _monai_advice(misshapen) if naming == "monai" and not missing and not unexpected else None
        raise misfit(
            f"these weights do not fit {type(network).__name__}", missing, unexpected, misshapen, advice=advice
        )
    with torch.no_grad():
        for name, tensor in wanted.items():
            if name in given:
                tensor.copy_(given[name])
    return LoadReport(dropped=dropped, fresh=fresh, naming=naming)


def official_tensors(
    state_dict: Mapping[str, Any], wanted: Mapping[str, Any] | Sequence[str] = ()
) -> tuple[dict[str, Tensor], Naming]:
    """Return the tensors of a state dict or checkpoint by their official names, and whose names they bore.

    Args:
        state_dict: tensors by name, or a checkpoint that holds such a dict.
        wanted: names of the network that they are for: a prefix that these bear too is kept.

    Raises:
        PlanError: something else than tensors.
    """
    tensors = _strip_prefixes(_checked_tensors(_unwrapped(state_dict)), frozenset(wanted))
    if not any(name.startswith("enc_stages.") for name in tensors):
        return tensors, "official"
    return {_from_monai(name): tensor for name, tensor in tensors.items()}, "monai"


def misfit(
    what: str,
    missing: Sequence[str],
    unexpected: Sequence[str],
    misshapen: Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]],
    *,
    advice: str | None = None,
) -> PlanError:
    """Return the error that names every tensor that does not fit.

    Args:
        what: what does not fit what.
        missing: names that the network has and the weights lack.
        unexpected: names that the weights have and the network lacks.
        misshapen: by name, the shape in the weights and in the network.
        advice: what to do; by default it follows from the other arguments.
    """
    shapes = [f"{name} {given} where the network has {own}" for name, (given, own) in misshapen.items()]
    problems = [
        f"{len(names)} {kind}: {shortened(names)}"
        for kind, names in (("missing", missing), ("unexpected", unexpected), ("of another shape", shapes))
        if names
    ]
    return PlanError(
        f"{what}: {'; '.join(problems)}. Expected the network's own tensors. "
        f"{advice or _advice(bool(missing), bool(unexpected), bool(misshapen))} Nothing was copied.",
        code="weights_mismatch",
    )


def shortened(names: Sequence[str]) -> str:
    """Return the first names and how many more there are."""
    rest = len(names) - _SHOWN
    return ", ".join(names[:_SHOWN]) + (f" and {rest} more" if rest > 0 else "")


def _unwrapped(state_dict: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the dict of tensors inside a checkpoint, or the given one where it is no checkpoint."""
    if all(isinstance(value, Tensor) for value in state_dict.values()):
        return state_dict
    for key in _WRAPPERS:
        inner = state_dict.get(key)
        if isinstance(inner, Mapping) and any(isinstance(value, Tensor) for value in inner.values()):
            return inner
    return state_dict


def _checked_tensors(state_dict: Mapping[str, Any]) -> dict[str, Tensor]:
    for name, value in state_dict.items():
        if not isinstance(value, Tensor):
            raise PlanError(
                f"the entry '{name}' of the state dict is of type {type(value).__name__}. Expected tensors under their "
                f"official names, or a checkpoint that holds such a dict under one of {', '.join(_WRAPPERS)}.",
                code="weights_not_tensors",
            )
    return dict(state_dict)


def _strip_prefixes(tensors: dict[str, Tensor], wanted: frozenset[str]) -> dict[str, Tensor]:
    while tensors and not wanted & tensors.keys():
        prefix = next((start for start in _PREFIXES if all(name.startswith(start) for name in tensors)), None)
        if prefix is None:
            break
        tensors = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
    return tensors


def _from_monai(name: str) -> str:
    """Return the official name of a tensor of MONAI's MedNeXt, which counts its decoder from the bottleneck on."""
    head, _, rest = name.partition(".")
    number, _, tail = rest.partition(".")
    if number.isdecimal():
        level = int(number)
        renamed = {
            "enc_stages": f"enc_block_{level}",
            "down_blocks": f"down_{level}",
            "up_blocks": f"up_{_LEVELS - 1 - level}",
            "dec_stages": f"dec_block_{_LEVELS - 1 - level}",
            "out_blocks": f"out_{_LEVELS - level}",
        }
        if head in renamed:
            name = f"{renamed[head]}.{tail}"
    return name.replace("global_resp_", "grn_")


def _monai_advice(misshapen: Mapping[str, object]) -> str | None:
    if not all(name.startswith("down_") for name in misshapen):
        return None
    return (
        "These are MONAI's weights: its down blocks take the expansion ratio of the stage before them, the official "
        "network's that of the stage they lead to, so MONAI's B, M and L are networks of their own (its S fits). Train "
        "the official network, or predict with MONAI."
    )


def _advice(missing: bool, unexpected: bool, misshapen: bool) -> str:
    if missing and unexpected:
        return "The names differ: is this another architecture, or another number of blocks?"
    if misshapen:
        return "Build the network with the widths, kernel size, channels and classes of the weights."
    if missing:
        return "The file is incomplete, or the network has more blocks."
    return "The network has fewer blocks or options than the weights were trained with."
