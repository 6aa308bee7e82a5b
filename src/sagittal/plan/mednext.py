"""MedNeXt's configuration, and the sizes that the papers name. Torch-free: `networks.build` makes a module of it."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import model_validator

from sagittal.plan.network_base import NetworkBase

Nine = tuple[int, int, int, int, int, int, int, int, int]


class MedNeXtConfig(NetworkBase):
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

    @property
    def scales(self) -> int:
        """Five with deep supervision, else one."""
        return 5 if self.deep_supervision else 1

    def single_scale(self) -> Self:
        """Return the configuration without the heads of deep supervision."""
        return self.replace(deep_supervision=False)

    @model_validator(mode="after")
    def _check(self) -> Self:
        ratios = (self.expansion_ratio,) if isinstance(self.expansion_ratio, int) else self.expansion_ratio
        if min(self.channels, *ratios, *self.block_counts) < 1:
            raise ValueError("channels, expansion ratios and block counts must be at least 1")
        return self


_B_RATIO: Nine = (2, 3, 4, 4, 4, 4, 4, 3, 2)
_L_RATIO: Nine = (3, 4, 8, 8, 8, 8, 8, 4, 3)
_M_BLOCKS: Nine = (3, 4, 4, 4, 4, 4, 4, 4, 3)
_L_BLOCKS: Nine = (3, 4, 8, 8, 8, 8, 8, 4, 3)

_PUBLISHED: dict[str, MedNeXtConfig] = {
    "mednext-s": MedNeXtConfig(),
    "mednext-b": MedNeXtConfig(expansion_ratio=_B_RATIO),
    "mednext-m": MedNeXtConfig(expansion_ratio=_B_RATIO, block_counts=_M_BLOCKS, checkpointing=True),
    "mednext-l": MedNeXtConfig(expansion_ratio=_L_RATIO, block_counts=_L_BLOCKS, checkpointing=True),
}

MEDNEXT: dict[str, MedNeXtConfig] = {
    **_PUBLISHED,
    **{f"{name}-k5": config.replace(kernel_size=5) for name, config in _PUBLISHED.items()},
    **{f"{name}-k7": config.replace(kernel_size=7) for name, config in _PUBLISHED.items()},
    "mednext-v2-base": MedNeXtConfig(expansion_ratio=_L_RATIO, block_counts=_L_BLOCKS, grn="v2", checkpointing=True),
    "mednext-v2-wide": MedNeXtConfig(
        channels=64, expansion_ratio=_L_RATIO, block_counts=_L_BLOCKS, grn="v2", checkpointing=True
    ),
}
