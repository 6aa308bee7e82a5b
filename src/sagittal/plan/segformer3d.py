"""SegFormer3D's configuration. Torch-free: `networks.build` makes a module of it."""

from __future__ import annotations

from typing import ClassVar, Literal, Self

from pydantic import model_validator

from sagittal.plan.network_base import NetworkBase

Four = tuple[int, int, int, int]


class SegFormer3DConfig(NetworkBase):
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
    norm: Literal["batch", "group"] = "batch"
    """In the Mix-FFN and the decoder: BatchNorm as published, or GroupNorm for small batches."""
    spatial_dims: Literal[2, 3] = 3

    later_fields: ClassVar[tuple[str, ...]] = ("norm", "spatial_dims")

    @property
    def dims(self) -> int:
        """Spatial axes of an image."""
        return self.spatial_dims

    @property
    def output_stride_vox(self) -> int:
        """Edge of a token of the finest stage, in voxels."""
        return 4

    def for_slices(self) -> Self | None:
        """Return the same network for images of two axes."""
        return self.replace(spatial_dims=2)

    @model_validator(mode="after")
    def _check(self) -> Self:
        every = (*self.embed_dims, *self.num_heads, *self.depths, *self.sr_ratios, *self.mlp_ratios, self.decoder_dim)
        if min(every) < 1:
            raise ValueError("widths, heads, depths and ratios must be at least 1")
        for width, heads in zip(self.embed_dims, self.num_heads, strict=True):
            if width % heads:
                raise ValueError(f"a width of {width} can't be split into {heads} heads")
        return self
