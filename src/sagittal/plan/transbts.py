"""TransBTS's configuration. Torch-free: `networks.build` makes a module of it."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from sagittal.plan.base import Triple
from sagittal.plan.network_base import NetworkBase

_GROUPS = 8


class TransBTSConfig(NetworkBase):
    """TransBTS (arXiv 2103.04430): a U-Net of four levels whose coarsest is a transformer."""

    kind: Literal["transbts"] = "transbts"
    base_channels: int = 16
    """Width of the finest level; it doubles at each of the three coarser ones."""
    embed_dim: int = 512
    depth: int = 4
    num_heads: int = 8
    hidden_dim: int = 4096
    input_size: Triple = (128, 128, 128)
    """D, H, W in voxels that the position embeddings are made for; at other sizes they are interpolated."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Dropout in the transformer."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if min(self.embed_dim, self.depth, self.num_heads, self.hidden_dim, *self.input_size) < 1:
            raise ValueError("embed_dim, depth, num_heads, hidden_dim and input_size must be at least 1")
        if self.base_channels < 1 or self.base_channels % _GROUPS:
            raise ValueError(f"base_channels must be a multiple of {_GROUPS}, the groups of its GroupNorm")
        if self.embed_dim % self.num_heads:
            raise ValueError(f"a width of {self.embed_dim} can't be split into {self.num_heads} heads")
        return self
