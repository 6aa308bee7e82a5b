"""nnFormer's configuration, and the three that its paper names. Torch-free: `networks.build` makes a module of it."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from sagittal.plan.base import Triple
from sagittal.plan.network_base import NetworkBase

Four = tuple[int, int, int, int]
Patch = Literal[1, 2, 4]
Step = Literal[1, 2]
Stride = tuple[Step, Step, Step]


class NNFormerConfig(NetworkBase):
    """nnFormer (arXiv 2109.03201), four stages from fine to coarse; the decoder mirrors the first three."""

    kind: Literal["nnformer"] = "nnformer"
    embed_dim: int = 192
    """Width of the finest stage; it doubles at each of the three coarser ones."""
    depths: Four = (2, 2, 2, 2)
    num_heads: Four = (6, 12, 24, 48)
    patch_size: tuple[Patch, Patch, Patch] = (2, 4, 4)
    """Voxels of a token, D, H, W."""
    windows: tuple[Triple, Triple, Triple, Triple] = ((4, 4, 4), (4, 4, 4), (8, 8, 8), (4, 4, 4))
    """Tokens of a window, D, H, W, per stage."""
    strides: tuple[Stride, Stride, Stride] = ((2, 2, 2), (2, 2, 2), (2, 2, 2))
    """D, H, W, between one stage and the next."""
    mlp_ratio: int = 4
    drop_path: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Chance to leave out a branch of the last block in training; the paper names none."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        lengths = [length for window in self.windows for length in window]
        if min(*self.depths, *self.num_heads, *lengths, self.mlp_ratio) < 1:
            raise ValueError("depths, heads, windows and mlp_ratio must be at least 1")
        if self.embed_dim < 2 or self.embed_dim % 2:
            raise ValueError("embed_dim must be even: the first convolutions have half of it")
        for stage, heads in enumerate(self.num_heads):
            if self.embed_dim * 2**stage % heads:
                raise ValueError(f"a width of {self.embed_dim * 2**stage} can't be split into {heads} heads")
        return self


NNFORMER: dict[str, NNFormerConfig] = {
    "nnformer-synapse": NNFormerConfig(),
    "nnformer-tumour": NNFormerConfig(embed_dim=96, num_heads=(3, 6, 12, 24), patch_size=(4, 4, 4)),
    # Thick slices: tokens are one slice deep and the first stride leaves the slices alone. At the paper's input of
    # 14x160x160 the last two windows span their grids, so that attention there is global.
    "nnformer-acdc": NNFormerConfig(
        embed_dim=96,
        num_heads=(3, 6, 12, 24),
        patch_size=(1, 4, 4),
        windows=((3, 5, 5), (3, 5, 5), (7, 10, 10), (4, 5, 5)),
        strides=((1, 2, 2), (2, 2, 2), (2, 2, 2)),
    ),
}
