"""The networks by the names under which users know them."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from sagittal.errors import PlanError, did_you_mean
from sagittal.plan.baselines import (
    BASELINES,
    PlainConvUNetConfig,
    ResEncUNetConfig,
    SwinUNETRConfig,
    UNETRConfig,
    UXNetConfig,
)
from sagittal.plan.mednext import MEDNEXT, MedNeXtConfig
from sagittal.plan.nnformer import NNFORMER, NNFormerConfig
from sagittal.plan.segformer3d import SegFormer3DConfig
from sagittal.plan.transbts import TransBTSConfig

__all__ = [
    "NETWORKS",
    "MedNeXtConfig",
    "NNFormerConfig",
    "NetworkConfig",
    "PlainConvUNetConfig",
    "ResEncUNetConfig",
    "SegFormer3DConfig",
    "SwinUNETRConfig",
    "TransBTSConfig",
    "UNETRConfig",
    "UXNetConfig",
    "network_config",
]

NetworkConfig = Annotated[
    MedNeXtConfig
    | SegFormer3DConfig
    | PlainConvUNetConfig
    | ResEncUNetConfig
    | UNETRConfig
    | SwinUNETRConfig
    | UXNetConfig
    | NNFormerConfig
    | TransBTSConfig,
    Field(discriminator="kind"),
]

NETWORKS: dict[str, NetworkConfig] = {
    **MEDNEXT,
    "segformer3d": SegFormer3DConfig(),
    **BASELINES,
    **NNFORMER,
    "transbts": TransBTSConfig(),
}


def network_config(name: str) -> NetworkConfig:
    """Return the configuration that users call `name`, for example `mednext-b-k5`.

    Raises:
        PlanError: no network has this name; the message suggests one.
    """
    try:
        return NETWORKS[name.lower()]
    except KeyError:
        raise PlanError(
            f"'{name}' is not a network.{did_you_mean(name.lower(), NETWORKS)}", code="unknown_network"
        ) from None
