"""What every network's configuration has."""

from __future__ import annotations

from typing import Self

from sagittal.plan.base import Frozen


class NetworkBase(Frozen):
    """A network's configuration: a `kind` that tells it from the others, and the arguments of its module."""

    @property
    def scales(self) -> int:
        """Logits that the network gives in training, from fine to coarse: more than one with deep supervision."""
        return 1

    def single_scale(self) -> Self:
        """Return the configuration without deep supervision."""
        return self

    @property
    def dims(self) -> int:
        """Spatial axes of an image: 3, or 2 where the network sees slices."""
        return 3

    @property
    def output_stride_vox(self) -> int:
        """Edge of the cells that the network decides on, in voxels; what it gives is interpolated between them."""
        return 1

    def for_slices(self) -> Self | None:
        """Return the same network for images of two axes, None where it has no such form."""
        return None
