"""What a prediction asks of whatever computes the network."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float32

from sagittal.plan.base import Triple

KernelMode = Literal["auto", "on", "off"]
"""Whether PyTorch takes this project's kernels: see `sagittal.kernels.choice`, which can't be read without PyTorch."""

Precision = Literal["fp32", "bf16", "fp16", "int8"]
"""What the products are computed in; `engines.choice` tells who has which."""


@dataclass(frozen=True, eq=False)
class LinearHead:
    """The last layer of a network where it is linear in each voxel: logits = weight @ features + bias.

    Blending windows and interpolation are linear too, and their weights sum to one, so features can be blended and
    interpolated, and the head applied last: its result is the same except for rounding.
    """

    weight: Float32[np.ndarray, "K F"]
    bias: Float32[np.ndarray, " K"]


@dataclass(frozen=True)
class NetworkMemory:
    """What one call of the network takes: `fixed_bytes` for its weights, the rest for each window of the batch."""

    fixed_bytes: int
    per_window_bytes: int


@runtime_checkable
class Engine(Protocol):
    """Networks of a bundle, ready to run on windows; several folds are averaged.

    Arrays are numpy's on the host, whatever computes; an engine on a GPU copies them there and back.
    """

    @property
    def name(self) -> Literal["torch", "openvino"]:
        """What computes."""
        ...

    @property
    def device(self) -> str:
        """Where: cpu, cuda:0, mps."""
        ...

    @property
    def precision(self) -> Precision:
        """In what the products are computed."""
        ...

    @property
    def num_outputs(self) -> int:
        """K, the channels of the logits."""
        ...

    @property
    def head(self) -> LinearHead | None:
        """The linear last layer, or None where the network has none."""
        ...

    def logits(self, windows: Float32[np.ndarray, "N C D H W"]) -> Float32[np.ndarray, "N K D H W"]:
        """Return the logits of windows; several folds' mean."""
        ...

    def features(self, windows: Float32[np.ndarray, "N C D H W"]) -> Float32[np.ndarray, "N F D H W"]:
        """Return what `head` is applied to; only where there is one. Several folds' features one after the other."""
        ...

    def memory(self, window: Triple) -> NetworkMemory:
        """Return what a call on windows of this shape takes of the host's memory."""
        ...


@runtime_checkable
class CoarseEngine(Engine, Protocol):
    """An engine that can stop before a last linear interpolation to the window's grid, as SegFormer3D's.

    logits = interpolate(coarse_logits, scale_factor=stride, linear, corners not aligned).
    """

    def coarse_stride(self, window: Triple) -> int:
        """Return by how much `coarse_logits` are coarser than a window of this shape; 1 where there are none.

        It divides the window's sides, so that the interpolation is symmetric and nothing is cropped.
        """
        ...

    def coarse_logits(self, windows: Float32[np.ndarray, "N C D H W"]) -> Float32[np.ndarray, "N K d h w"]:
        """Return the logits before the interpolation; several folds' mean."""
        ...


@runtime_checkable
class MemberEngine(Engine, Protocol):
    """An engine that tells its folds apart, so that what each of them says can be compared."""

    @property
    def num_members(self) -> int:
        """M, how many folds are averaged."""
        ...

    @property
    def member_heads(self) -> tuple[LinearHead, ...] | None:
        """Each fold's head, for its own part of `features`; None where `head` is None."""
        ...

    def member_logits(
        self, windows: Float32[np.ndarray, "N C D H W"], *, coarse: bool = False
    ) -> Float32[np.ndarray, "N M K d h w"]:
        """Return the logits of each fold, or what `CoarseEngine.coarse_logits` is the mean of."""
        ...


def members_of(engine: Engine) -> int:
    """Return how many folds can be told apart; 1 where the engine does not tell."""
    return engine.num_members if isinstance(engine, MemberEngine) else 1
