"""Network, patch and batch together: each depends on the others and on the memory of a real step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod
from typing import NamedTuple

from sagittal.errors import ResourceError
from sagittal.plan.base import Triple
from sagittal.plan.networks import MedNeXtConfig, NetworkConfig
from sagittal.planning.grid import Grid
from sagittal.planning.memory import GIB, TrainingStep
from sagittal.planning.patch import fit_batch, fit_patch, patch_rule, patch_sizes
from sagittal.planning.topology import FittedStep, Fixed, network_for_patch
from sagittal.planning.wishes import Wishes

MUCH_SMALLER = 0.5
"""Checkpointing is tried where the patch has less than this share of the voxels that it would have."""
WORTH = 1.5
"""It is taken where the patch then has this many times the voxels."""


@dataclass(frozen=True)
class Fit:
    """What was fitted, with the reasons by dotted name."""

    network: NetworkConfig
    patch_size: Triple
    batch_size: int
    reasons: Mapping[str, str]


class PatchFit(NamedTuple):
    """A patch, the step that was measured on it, and the reasons by dotted name."""

    step: FittedStep
    size: Triple
    reasons: dict[str, str]


@dataclass(frozen=True)
class Fitter:
    """Fits a network, as named and as the user changed it, to a grid and a memory; what it measured it keeps.

    Attributes:
        named: the network before it is fitted to a patch.
        fixed: what was asked of the fields that would be fitted.
        in_channels, num_outputs: of the task.
        wishes: for the patch and the batch.
        memory_gib: memory that the tensors of a training step may take.
    """

    named: NetworkConfig
    fixed: Fixed
    in_channels: int
    num_outputs: int
    wishes: Wishes
    memory_gib: float
    _steps: dict[NetworkConfig, TrainingStep] = field(default_factory=dict, repr=False, compare=False)

    def fit(self, grid: Grid) -> Fit:
        """Return network, patch and batch for a grid.

        Raises:
            ResourceError: even the smallest patch does not fit into the memory.
            PlanError: fields of the network that the user chose do not go with the patch.
        """
        step, size, reasons = self.patch(grid)
        network, why = network_for_patch(step.named, step.spacing_mm, size, self.fixed)
        asked = self.wishes.batch_size
        if asked is None:
            rule = patch_rule(network)
            batch, why_batch = fit_batch(step.for_patch(size), size, grid.dataset_voxels, rule, self.memory_gib)
        else:
            batch, why_batch = asked
        return Fit(
            network,
            size,
            batch,
            {**reasons, **{f"network.{name}": told for name, told in why.items()}, "training.batch_size": why_batch},
        )

    def patch(self, grid: Grid) -> PatchFit:
        """Return the patch for a grid: the one asked for, or the largest that fits; with checkpointing where it helps.

        Raises:
            ResourceError: even the smallest patch does not fit into the memory.
            PlanError: fields of the network that the user chose do not go with the patch.
        """
        plain = self._step(self.named, grid)
        lean = self._leaner()
        if self.wishes.patch_size is not None:
            leaner_step = None if lean is None else self._step(lean, grid)
            return self._patch_asked_for(plain, leaner_step, *self.wishes.patch_size)
        rule, batch = patch_rule(self.named), self._smallest_batch
        sizes = patch_sizes(grid.network_spacing_mm, grid.median_shape, rule, plain.multiples)
        found: PatchFit | None = None
        try:
            found = self._largest(plain, sizes, grid)
        except ResourceError:
            if lean is None:
                raise
        if lean is None or (found and prod(found.size) >= MUCH_SMALLER * prod(sizes[0])):
            assert found is not None
            return found
        leaner = self._largest(self._step(lean, grid), sizes, grid)
        if found and prod(leaner.size) < WORTH * prod(found.size):
            return found
        instead = "where else none would fit" if found is None else f"in place of {_shown(found.size)}"
        why = (
            "expanded activations are computed again in the backward pass, as the fused CPU kernels do in any case, so "
            f"that a patch of {_shown(leaner.size)} fits with batch {batch}, {instead}"
        )
        return leaner._replace(reasons={**leaner.reasons, "network.checkpointing": why})

    @property
    def _smallest_batch(self) -> int:
        asked = self.wishes.batch_size
        return patch_rule(self.named).smallest_batch if asked is None else asked[0]

    def _largest(self, step: FittedStep, sizes: tuple[Triple, ...], grid: Grid) -> PatchFit:
        batch = self._smallest_batch
        size, why = fit_patch(
            sizes,
            lambda size: step.memory_bytes(size, batch),
            grid.median_shape,
            batch=batch,
            memory_gib=self.memory_gib,
        )
        return PatchFit(step, size, {"patch.size": why})

    def _patch_asked_for(self, plain: FittedStep, lean: FittedStep | None, size: Triple, origin: str) -> PatchFit:
        batch, limit = self._smallest_batch, int(self.memory_gib * GIB)
        used, step, reasons = plain.memory_bytes(size, batch), plain, {}
        if used > limit and lean is not None and (less := lean.memory_bytes(size, batch)) < used:
            reasons["network.checkpointing"] = (
                "expanded activations are computed again in the backward pass: a step of the patch asked for takes "
                f"{less / GIB:.2f} GiB in place of {used / GIB:.2f}"
            )
            used, step = less, lean
        why = f"{origin}; a step of {batch} was measured at {used / GIB:.2f} of {self.memory_gib:g} GiB"
        if used > limit:
            why += (
                " (warning: more than is allowed; it is kept because it was asked for. Allow more with --memory-gib, "
                "or set patch.size or training.batch_size)"
            )
        return PatchFit(step, size, {"patch.size": why, **reasons})

    def _step(self, named: NetworkConfig, grid: Grid) -> FittedStep:
        return FittedStep(
            named, grid.network_spacing_mm, self.in_channels, self.num_outputs, self.fixed, _steps=self._steps
        )

    def _leaner(self) -> NetworkConfig | None:
        """Return the network with checkpointing, where that is left open and has something to save."""
        named = self.named
        if not isinstance(named, MedNeXtConfig) or self.wishes.get("network.checkpointing") is not None:
            return None
        return named.replace(checkpointing="expansion") if named.checkpointing in (False, "none") else None


def _shown(size: Triple) -> str:
    return "x".join(map(str, size))
