"""From a scan to its label map, with the networks of a bundle. PyTorch is not needed here: an engine computes."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TypeAlias

import numpy as np

from sagittal.bundle import Bundle, read_bundle
from sagittal.data.label_index import LabelIndex, label_index
from sagittal.data.mirroring import output_swaps
from sagittal.data.normalizing import mask_bytes
from sagittal.data.preprocessing import Frame, frame_of, prepare_image
from sagittal.errors import DataError, PlanError, ResourceError
from sagittal.inference.blending import carried_voxels, visiting_order
from sagittal.inference.coarse import coarse_voxels, kept_windows, piece_bytes
from sagittal.inference.consumers import SlabConsumer
from sagittal.inference.copies import Copies, Mirror, mirrors_of, outputs_of
from sagittal.inference.engines.choice import load_engine
from sagittal.inference.engines.engine import Engine, NetworkMemory, members_of
from sagittal.inference.engines.sharing import engines_in
from sagittal.inference.labelling import plane_bytes
from sagittal.inference.memory import PROCESS_BYTES, Choice, Workload, budget_bytes, choose, row_bytes
from sagittal.inference.missing import channels_given, fill, preprocessing_of
from sagittal.inference.postprocessing import postprocess, rules_bytes
from sagittal.inference.scratch import disk_folder, lacking
from sagittal.inference.slabs import halo_voxels, most_outputs
from sagittal.inference.streaming import Target, stream
from sagittal.inference.timings import Timings
from sagittal.inference.uncertainty import Disagreement, comparison_of
from sagittal.inference.windows import Tiling, tile
from sagittal.plan import Plan
from sagittal.plan.base import Triple
from sagittal.plan.plan import NoNormalization, ZScore
from sagittal.volumes import Volume
from sagittal.volumes.volume import read_scans, require_same_grid

__all__ = ["Predictor", "load"]

Scan: TypeAlias = str | os.PathLike[str] | Volume
Progress: TypeAlias = Callable[[int, int], None]

_WINDOW_VOXELS_PER_CALL = {"cpu": 64**3, "cuda": 160**3, "mps": 128**3}
_MAX_BATCH = 16
_FLOAT_BYTES = 4


class Predictor:
    """Networks with their plan, ready to predict. Make one with `load`.

    Args:
        plan: what the networks were trained with.
        engine: computes them.
        missing: names of channels that the scans lack, where the networks were trained to do without.
        postprocessing: whether the plan's rules are applied to label maps.
        scratch: folder on a disk for what windows share, where memory is short; None keeps all of it in memory, so
            that budgets may be refused, or cost accuracy, that a file would keep.

    Raises:
        DataError: channels can't be missing, or there are none of these names.

    Attributes:
        last_timings: where the time of the last `predict` went; None before the first.
    """

    def __init__(
        self,
        plan: Plan,
        engine: Engine,
        *,
        missing: Sequence[str] = (),
        postprocessing: bool = True,
        scratch: str | os.PathLike[str] | None = None,
    ) -> None:
        self.plan = plan
        self._postprocessing = postprocessing
        self._scratch = None if scratch is None else Path(scratch)
        self._given = channels_given(plan, missing)
        self._preprocessing = preprocessing_of(plan.preprocessing, self._given)
        self.engine = engine
        self.last_timings: Timings | None = None
        self._labels: LabelIndex = label_index(plan.dataset)

    @property
    def device(self) -> str:
        """Where the engine computes: cpu, cuda:0, mps; several with commas."""
        return self.engine.device

    def predict(
        self,
        scan: Scan | Sequence[Scan],
        *,
        mirror: bool = True,
        step: float | None = None,
        memory_gib: float | None = None,
        on_window: Progress | None = None,
        consumers: Sequence[SlabConsumer] = (),
        disagreement: Disagreement | None = None,
    ) -> Volume:
        """Return the label map of a scan, (1, D, H, W), on exactly the scan's grid.

        It is uint8 or uint16; int32 or int64 where the data set's own label values need that (`DatasetSpec.label_map`).

        Args:
            scan: a file or a Volume; several of them where the data set has several channels, in its order.
            mirror: average over the mirrored copies that the plan names.
            step: from one window to the next, as a share of the window's edge; None is the plan's.
            memory_gib: main memory that may be used, without a GPU's own; None is four fifths of what is available.
            on_window: called with the number of windows done and in all.
            consumers: get the logits on the cropped scan's grid, slab by slab.
            disagreement: is shown what each fold decides on each mirrored copy.

        Raises:
            DataError: a scan that can't be read, another number of channels, grids that differ, or values that are not
                finite.
            PlanError: `step` or `memory_gib` makes no sense.
            ResourceError: the memory does not suffice; known before the network starts.
        """
        overlap = self._overlap(step)
        allowed = budget_bytes(memory_gib)
        timings = Timings()
        images = [scan] if isinstance(scan, str | os.PathLike | Volume) else list(scan)
        with _explained_out_of_memory(self.device):
            with timings.phase("reading"):
                volumes = [volume for image in images for volume in _read(image)]
            self._check(volumes)
            geometry = volumes[0].geometry
            with timings.phase("preparing"):
                frame = frame_of(volumes, self._preprocessing)
            mirrors = self._mirrors(mirror)
            tiling = tile(frame.prepared_shape, self.plan.patch.size, overlap)
            keeps_scan = any(isinstance(image, Volume) for image in images)
            compares = disagreement is not None
            work = self._work(volumes, frame, tiling, mirrors, bool(consumers), keeps_scan, compares)
            choice = self._choose(work, allowed)
            with timings.phase("preparing"):
                image = prepare_image(volumes, self._preprocessing, frame, compact=choice.halve_image)
                image = fill(image, self._given, len(self.plan.dataset.channel_names))
            # Files can be read again: their voxels need not stay while the network works.
            del volumes
            labels = np.zeros(frame.stored_shape, self._labels.values_of_classes().dtype)
            copies = Copies(
                self.engine,
                mirrors,
                tiling.window,
                window_batch=choice.window_batch,
                kept_values=choice.kept_values,
                half=choice.half,
                disagreement=disagreement,
            )
            target = Target(self._labels, frame.crop(labels), consumers, self._scratch)
            stream(image, copies, tiling, target, choice, timings=timings, on_window=on_window)
            del image, copies
            result = Volume.on(geometry, labels)
            if self._postprocessing:
                with timings.phase("finishing"):
                    result = postprocess(result, self.plan)
        timings.stop()
        self.last_timings = timings
        return result

    def _overlap(self, step: float | None) -> float:
        if step is None:
            return self.plan.inference.overlap
        if not 0 < step <= 1:
            raise PlanError(
                f"step {step:g}: expected a share of the window's edge above 0, at most 1, for example 0.5.",
                code="step",
            )
        return 1 - step

    def _mirrors(self, mirror: bool) -> tuple[Mirror, ...]:
        swaps = output_swaps(self.plan.dataset, self.plan.training.augmentation)
        return mirrors_of(self.plan.inference.mirror_axes if mirror else (), swaps)

    def _check(self, volumes: Sequence[Volume]) -> None:
        expected = [self.plan.dataset.channel_names[position] for position in self._given]
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

    def _work(
        self,
        volumes: Sequence[Volume],
        frame: Frame,
        tiling: Tiling,
        mirrors: Sequence[Mirror],
        has_consumers: bool,
        keeps_scan: bool,
        compares: bool,
    ) -> Workload:
        preprocessing = self.plan.preprocessing
        own, target = frame.prepared_shape, frame.cropped_shape
        order = visiting_order(tiling, 0 if has_consumers else None)
        outputs = outputs_of(self.engine, mirrors, tiling.window)
        channels = outputs.channels
        output_voxels = coarse_voxels(tiling.window, outputs.stride)
        carried, halo = carried_voxels(tiling, order), halo_voxels(tiling, order, own, target)
        finishing = row_bytes(channels, tiling.window, order[0], own, target)
        if outputs.stride > 1:
            carried = (output_voxels * kept_windows(tiling, order, outputs.stride, (own, target)), 0, 0)
            halo, finishing = 0, piece_bytes(channels, outputs.stride)
        gathered = most_outputs(tiling, 0, own[0], target[0]) * target[1] * target[2] * channels * _FLOAT_BYTES
        raw = any(isinstance(scheme, NoNormalization) for scheme in preprocessing.normalization)
        masked = any(isinstance(scheme, ZScore) and scheme.nonzero_only for scheme in preprocessing.normalization)
        spec, label_bytes = self.plan.dataset, math.prod(frame.stored_shape) * self._labels.values_of_classes().itemsize
        members = members_of(self.engine) if compares else 1
        comparison = comparison_of(
            members, len(mirrors), (spec.num_outputs, channels), output_voxels, has_regions=spec.has_regions
        )
        why_no_file = self._lacking(channels * sum(carried)) if outputs.stride == 1 else None
        return Workload(
            stored_bytes=sum(volume.array.nbytes for volume in volumes),
            stored_voxels=math.prod(frame.stored_shape),
            between_voxels=_between(target, own),
            prepared_values=self._prepared_channels * math.prod(own),
            may_halve_image=not raw,
            channels=channels,
            carried_voxels=carried,
            halo_voxels=halo,
            output_voxels=output_voxels,
            window_voxels=math.prod(tiling.window),
            window_channels=len(preprocessing.normalization),
            windows=tiling.num_windows,
            copies=len(mirrors),
            label_bytes=label_bytes,
            row_bytes=finishing,
            consumer_bytes=gathered if has_consumers else 0,
            plane_bytes=plane_bytes(spec.num_outputs, *target[1:]) if has_consumers else 0,
            mask_bytes=mask_bytes(math.prod(target)) if masked else 0,
            comparison=comparison if members * len(mirrors) > 1 and compares else None,
            rules_bytes=rules_bytes(label_bytes, math.prod(frame.stored_shape))
            if self._postprocessing and self.plan.postprocessing
            else 0,
            may_use_file=outputs.stride == 1 and why_no_file is None,
            why_no_file=why_no_file or "",
            keeps_scan=keeps_scan,
            process_bytes=PROCESS_BYTES[self.engine.name],
        )

    def _lacking(self, values: int) -> str | None:
        """Return why no file can take so many values, None where one can; empty where none is wanted."""
        return "" if self._scratch is None else lacking(self._scratch, _FLOAT_BYTES * values)

    def _choose(self, work: Workload, allowed_bytes: int | None) -> Choice:
        kind, engines = self.device.partition(",")[0].partition(":")[0], engines_in(self.engine)
        preferred = engines * max(1, min(_MAX_BATCH, _WINDOW_VOXELS_PER_CALL[kind] // work.window_voxels))
        if allowed_bytes is None:
            # Nothing to stay within: what the network takes need not be measured.
            return choose(work, NetworkMemory(0, 0), 1 << 62, preferred_batch=preferred)
        network = self.engine.memory(self.plan.patch.size)
        return choose(work, network, allowed_bytes, preferred_batch=preferred, least_batch=engines)

    @property
    def _prepared_channels(self) -> int:
        """How many prepared channels there are at most at a time: those given lie beside all where some are missing."""
        every = len(self.plan.preprocessing.normalization)
        return every if len(self._given) == every else every + len(self._given)


def load(
    bundle: str | os.PathLike[str] | Bundle,
    *,
    device: str = "auto",
    engine: str = "auto",
    precision: str = "fp32",
    cache_folder: str | os.PathLike[str] | None = None,
    scratch: str | os.PathLike[str] | None = None,
) -> Predictor:
    """Read and verify a bundle and return its Predictor; several folds are averaged.

    Args:
        bundle: the folder that `sagittal train` wrote.
        device: `auto`, `cpu`, `cuda`, `cuda:1`, `mps`; `cuda:0,cuda:1` share each scan.
        engine: `torch`, `openvino`, or `auto`: OpenVINO on a CPU where it is installed and knows the network.
        precision: `fp32`; `bf16`, `fp16` and `int8` where the engine has them; see `engines.choice`.
        cache_folder: where OpenVINO keeps compiled networks for the next process, or None.
        scratch: folder for what windows share, used only where `memory_gib` or the memory that is free asks for it; the
            file has no name and is gone with the prediction. None is the system's temporary folder (TMPDIR), or
            /var/tmp where that one is in main memory.

    Raises:
        BundleError: the bundle is damaged, or its weights do not fit its plan.
        PlanError: an unknown engine or precision.
        ResourceError: no such device, or an engine that is not installed.
    """
    bundle = bundle if isinstance(bundle, Bundle) else read_bundle(bundle)
    computes = load_engine(bundle, device, engine, precision, cache_folder=cache_folder)
    return Predictor(bundle.plan, computes, scratch=disk_folder() if scratch is None else scratch)


def _read(image: Scan) -> tuple[Volume, ...]:
    """Return a scan's volumes; small integers stay as they are stored, in half the memory of float32."""
    return (image,) if isinstance(image, Volume) else read_scans([image])


def _between(shape: Triple, target: Triple) -> int:
    """Return the voxels of a channel between the two grids (`data.resampling.resample_channel`)."""
    if shape == target:
        return 0
    return min(target[0] * shape[1] * shape[2], shape[0] * target[1] * target[2])


@contextmanager
def _explained_out_of_memory(device: str) -> Iterator[None]:
    try:
        yield
    except MemoryError:
        raise ResourceError(
            f"the memory of {device} does not suffice for this scan. Free memory, use another device, or give "
            "--memory-gib to see what is needed.",
            code="memory",
        ) from None
