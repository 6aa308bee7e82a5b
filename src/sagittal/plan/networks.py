"""The networks by the names under which users know them."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from sagittal.errors import PlanError, did_you_mean
from sagittal.plan.mednext import MEDNEXT, MedNeXtConfig
from sagittal.plan.segformer3d import SegFormer3DConfig

__all__ = ["NETWORKS", "MedNeXtConfig", "NetworkConfig", "SegFormer3DConfig", "network_config"]

NetworkConfig = Annotated[MedNeXtConfig | SegFormer3DConfig, Field(discriminator="kind")]

NETWORKS: dict[str, MedNeXtConfig | SegFormer3DConfig] = {
    **MEDNEXT,
    "segformer3d": SegFormer3DConfig(),
}


def network_config(name: str) -> MedNeXtConfig | SegFormer3DConfig:
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
