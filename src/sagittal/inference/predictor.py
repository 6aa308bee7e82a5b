"""From a scan to its label map, with the networks of a bundle."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import TypeAlias

import numpy as np
import torch
from jaxtyping import Integer
from torch import nn

from sagittal.bundle import Bundle, read_bundle
from sagittal.data.label_index import LabelIndex, label_index
from sagittal.data.mirroring import output_swaps
from sagittal.data.preprocessing import Prepared, prepare
from sagittal.errors import BundleError, DataError, ResourceError
from sagittal.inference.device import resolve_device
from sagittal.inference.ensemble import Ensemble
from sagittal.inference.memory import MAX_SLAB_BYTES, Choice, NetworkMemory, Workload, budget_bytes, choose
from sagittal.inference.restore import labels_on_grid, plane_bytes
from sagittal.inference.sliding_window import predict_logits
from sagittal.inference.windows import tile
from sagittal.networks.build import build_network
from sagittal.networks.cost import step_memory_bytes
from sagittal.plan import Plan
from sagittal.volumes import Volume, read_volume
from sagittal.volumes.volume import require_same_grid

__all__ = ["Predictor", "load", "resolve_device"]

Scan: TypeAlias = str | os.PathLike[str] | Volume
Progress: TypeAlias = Callable[[int, int], None]

_WINDOW_VOXELS_PER_CALL = {"cpu": 64**3, "cuda": 160**3, "mps": 128**3}
_MAX_BATCH = 16
_SHARE_FOR_LOGITS = 0.5
"""Of a GPU's free memory; the network's activations need the rest."""


class Predictor:
    """Networks with their plan, ready to predict. Make one with `load`.

    Args:
        plan: what the networks were trained with.
        networks: one per set of weights, on `device`; their mean is predicted.
        device: where they are.
    """

    def __init__(self, plan: Plan, networks: Sequence[nn.Module], device: torch.device | str) -> None:
        self.plan = plan
        self.device = torch.device(device)
        self._network = networks[0] if len(networks) == 1 else Ensemble(networks)
        self._labels: LabelIndex = label_index(plan.dataset)

    def predict(
        self,
        scan: Scan | Sequence[Scan],
        *,
        mirror: bool = True,
        memory_gib: float | None = None,
        on_window: Progress | None = None,
    ) -> Volume:
        """Return the label map of a scan, (1, D, H, W), on exactly the scan's grid.

        It is uint8 or uint16; int32 or int64 where the data set's own label values need that (`DatasetSpec.label_map`).

        Args:
            scan: a file or a Volume; several of them where the data set has several channels, in its order.
            mirror: average over the mirrored copies that the plan names.
            memory_gib: main memory that may be used; on a GPU, the rest of the work counts, not the GPU's own memory.
            on_window: called with the number of windows done and in all.

        Raises:
            DataError: a scan that can't be read, another number of channels, grids that differ, or values that are not
                finite.
            ResourceError: the memory does not suffice; known before the network starts where `memory_gib` is given.
        """
        images = [scan] if isinstance(scan, str | os.PathLike | Volume) else list(scan)
        volumes = [image if isinstance(image, Volume) else read_volume(image) for image in images]
        self._check(volumes)
        geometry = volumes[0].geometry
        keeps_scan = any(isinstance(image, Volume) for image in images)
        prepared = prepare(volumes, self.plan.preprocessing)
        # Files can be read again: their voxels need not stay while the network works.
        del volumes
        with _explained_out_of_memory(self.device):
            choice = self._choose(prepared, keeps_scan, memory_gib)
            labels = self._labels_of(prepared, choice, mirror, on_window)
        return Volume.on(geometry, prepared.frame.uncrop_and_unorient(labels))

    def _labels_of(
        self, prepared: Prepared, choice: Choice, mirror: bool, on_window: Progress | None
    ) -> Integer[np.ndarray, "D H W"]:
        """Return label values on the cropped grid."""
        image = torch.from_numpy(prepared.image).to(self._home_of(prepared))
        with _evaluating(self._network):
            logits = predict_logits(
                self._network,
                image,
                patch_size=self.plan.patch.size,
                overlap=self.plan.inference.overlap,
                mirror_axes=self.plan.inference.mirror_axes if mirror else (),
                num_outputs=self.plan.dataset.num_outputs,
                mirror_swaps=output_swaps(self.plan.dataset, self.plan.training.augmentation),
                window_batch=choice.window_batch,
                on_window=on_window,
            )
        return labels_on_grid(logits, prepared.frame.cropped_shape, self._labels, slab_bytes=choice.slab_bytes)

    def _check(self, volumes: Sequence[Volume]) -> None:
        expected = self.plan.dataset.channel_names
        given = sum(volume.array.shape[0] for volume in volumes)
        if given != len(expected):
            raise DataError(
                f"{given} channel{'' if given == 1 else 's'} given, but the model takes {len(expected)}: "
                f"{', '.join(expected)}. Give one image per channel, in this order.",
                code="channel_count",
            )
        for number, volume in enumerate(volumes):
            require_same_grid(volumes[0].geometry, volume.geometry, f"channels {expected[0]} and {expected[number]}")
            # NaN and infinity both reach the sum of extremes; no mask of the volume's size is made.
            if not np.isfinite(float(volume.array.min()) + float(volume.array.max())):
                raise DataError(
                    f"channel {expected[number]}: holds NaN or infinite voxels. Expected numbers everywhere. "
                    "Repair the scan; 'sagittal doctor' finds such files in a data set.",
                    code="not_finite",
                )

    def _choose(self, prepared: Prepared, keeps_scan: bool, memory_gib: float | None) -> Choice:
        window = math.prod(self.plan.patch.size)
        preferred = max(1, min(_MAX_BATCH, _WINDOW_VOXELS_PER_CALL[self.device.type] // window))
        if memory_gib is None:
            return Choice(preferred, MAX_SLAB_BYTES)
        outputs, frame = self.plan.dataset.num_outputs, prepared.frame
        tiling = tile(frame.prepared_shape, self.plan.patch.size, self.plan.inference.overlap)
        padded = [max(n, size) for n, size in zip(frame.prepared_shape, self.plan.patch.size, strict=True)]
        work = Workload(
            channels=len(prepared.image),
            outputs=outputs,
            stored_voxels=math.prod(frame.stored_shape),
            cropped_voxels=math.prod(frame.cropped_shape),
            prepared_voxels=math.prod(padded),
            is_padded=tuple(padded) != frame.prepared_shape,
            window_voxels=window,
            windows=tiling.num_windows,
            label_bytes=self._labels.values_of_classes().itemsize,
            plane_bytes=plane_bytes((outputs, *frame.prepared_shape), frame.cropped_shape),
            keeps_scan=keeps_scan,
            on_device=self.device.type != "cpu",
        )
        return choose(work, self._network_memory, budget_bytes(memory_gib), preferred_batch=preferred)

    @cached_property
    def _network_memory(self) -> NetworkMemory:
        shape = (len(self.plan.dataset.channel_names), *self.plan.patch.size)
        with _evaluating(self._network):
            one, two = (step_memory_bytes(self._network, (batch, *shape), training=False) for batch in (1, 2))
        return NetworkMemory(fixed_bytes=max(0, 2 * one - two), per_window_bytes=two - one)

    def _home_of(self, prepared: Prepared) -> torch.device:
        """Return where image and logits stay: beside the network, unless a GPU has too little room for them."""
        if self.device.type != "cuda":
            return self.device
        voxels = math.prod(max(n, m) for n, m in zip(prepared.frame.prepared_shape, self.plan.patch.size, strict=True))
        wanted = 4 * voxels * (2 * len(prepared.image) + 2 * self.plan.dataset.num_outputs)
        free, _ = torch.cuda.mem_get_info(self.device)
        return self.device if wanted < _SHARE_FOR_LOGITS * free else torch.device("cpu")


def load(bundle: str | os.PathLike[str] | Bundle, *, device: str = "auto") -> Predictor:
    """Read and verify a bundle and return its Predictor; several folds are averaged.

    Args:
        bundle: the folder that `sagittal train` wrote.
        device: `auto`, `cpu`, `cuda`, `cuda:1`, `mps`.

    Raises:
        BundleError: the bundle is damaged, or its weights do not fit its plan.
        ResourceError: no such device.
    """
    target = resolve_device(device)
    bundle = bundle if isinstance(bundle, Bundle) else read_bundle(bundle)
    return Predictor(bundle.plan, [_network(bundle, name, target) for name in bundle.weight_names], target)


def _network(bundle: Bundle, name: str, device: torch.device) -> nn.Module:
    spec = bundle.plan.dataset
    # Building draws initial weights; the caller's random numbers must not depend on that.
    with torch.random.fork_rng(devices=[]):
        network = build_network(bundle.plan.network, len(spec.channel_names), spec.num_outputs)
    # A copy, since arrays over a file's bytes can't be written to.
    state = {key: torch.from_numpy(array.copy()) for key, array in bundle.weights(name).items()}
    try:
        network.load_state_dict(state)
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise BundleError(
            f"{bundle.path}: weights '{name}' do not fit the plan's network ({reason[:300]}). "
            "Get the bundle from its maker again.",
            code="weights_do_not_fit",
        ) from None
    return network.to(device).eval().requires_grad_(False)


@contextmanager
def _evaluating(network: nn.Module) -> Iterator[None]:
    # Training validates with the network that it goes on training.
    was_training = network.training
    network.eval()
    try:
        yield
    finally:
        network.train(was_training)


@contextmanager
def _explained_out_of_memory(device: torch.device) -> Iterator[None]:
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        # On the CPU torch raises a RuntimeError that only its text tells from others.
        if isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error):
            raise ResourceError(
                f"the memory of {device} does not suffice for this scan. Free memory, use another device, or give "
                "--memory-gib to see what is needed.",
                code="memory",
            ) from None
        raise
