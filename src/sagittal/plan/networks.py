"""Configurations of the networks, and the names under which users know them.

Torch-free: `networks.build` makes modules of them.
"""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from sagittal.errors import PlanError, did_you_mean
from sagittal.plan.base import Frozen

Nine = tuple[int, int, int, int, int, int, int, int, int]
Four = tuple[int, int, int, int]


class MedNeXtConfig(Frozen):
    """MedNeXt (arXiv 2303.09975) and MedNeXt-v2 (arXiv 2512.17774); stages are encoder 0-3, bottleneck, decoder 3-0."""

    kind: Literal["mednext"] = "mednext"
    channels: int = 32
    """Width of the finest level; it doubles at each of the four coarser ones."""
    expansion_ratio: int | Nine = 2
    kernel_size: Literal[3, 5, 7] = 3
    block_counts: Nine = (2, 2, 2, 2, 2, 2, 2, 2, 2)
    deep_supervision: bool = True
    norm: Literal["group", "layer"] = "group"
    grn: Literal["v2"] | bool = False
    spatial_dims: Literal[3] = 3
    checkpointing: bool = False
    """Recompute each block's activations in the backward pass: less memory, about a third more time."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        ratios = (self.expansion_ratio,) if isinstance(self.expansion_ratio, int) else self.expansion_ratio
        if min(self.channels, *ratios, *self.block_counts) < 1:
            raise ValueError("channels, expansion ratios and block counts must be at least 1")
        return self


class SegFormer3DConfig(Frozen):
    """SegFormer3D (arXiv 2404.10156), four stages from fine to coarse."""

    kind: Literal["segformer3d"] = "segformer3d"
    embed_dims: Four = (32, 64, 160, 256)
    num_heads: Four = (1, 2, 5, 8)
    depths: Four = (2, 2, 2, 2)
    sr_ratios: Four = (4, 2, 1, 1)
    mlp_ratios: Four = (4, 4, 4, 4)
    decoder_dim: int = 256
    attention_scale: Literal["head_dim", "paper"] = "head_dim"
    """Divisor of q.k: the root of the head's width, or of the number of heads (the paper and its released weights)."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        every = (*self.embed_dims, *self.num_heads, *self.depths, *self.sr_ratios, *self.mlp_ratios, self.decoder_dim)
        if min(every) < 1:
            raise ValueError("widths, heads, depths and ratios must be at least 1")
        for width, heads in zip(self.embed_dims, self.num_heads, strict=True):
            if width % heads:
                raise ValueError(f"a width of {width} can't be split into {heads} heads")
        return self


NetworkConfig = Annotated[MedNeXtConfig | SegFormer3DConfig, Field(discriminator="kind")]

_B_RATIO: Nine = (2, 3, 4, 4, 4, 4, 4, 3, 2)
_L_RATIO: Nine = (3, 4, 8, 8, 8, 8, 8, 4, 3)
_M_BLOCKS: Nine = (3, 4, 4, 4, 4, 4, 4, 4, 3)
_L_BLOCKS: Nine = (3, 4, 8, 8, 8, 8, 8, 4, 3)

_MEDNEXT: dict[str, MedNeXtConfig] = {
    "mednext-s": MedNeXtConfig(),
    "mednext-b": MedNeXtConfig(expansion_ratio=_B_RATIO),
    "mednext-m": MedNeXtConfig(expansion_ratio=_B_RATIO, block_counts=_M_BLOCKS, checkpointing=True),
    "mednext-l": MedNeXtConfig(expansion_ratio=_L_RATIO, block_counts=_L_BLOCKS, checkpointing=True),
}

NETWORKS: dict[str, MedNeXtConfig | SegFormer3DConfig] = {
    **_MEDNEXT,
    **{f"{name}-k5": config.replace(kernel_size=5) for name, config in _MEDNEXT.items()},
    **{f"{name}-k7": config.replace(kernel_size=7) for name, config in _MEDNEXT.items()},
    "mednext-v2-base": MedNeXtConfig(expansion_ratio=_L_RATIO, block_counts=_L_BLOCKS, grn="v2", checkpointing=True),
    "mednext-v2-wide": MedNeXtConfig(
        channels=64, expansion_ratio=_L_RATIO, block_counts=_L_BLOCKS, grn="v2", checkpointing=True
    ),
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
