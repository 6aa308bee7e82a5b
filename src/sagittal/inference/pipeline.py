"""Cases one after the other, with reading the next and writing the last beside computing.

    reader thread   scan n + 1: voxels, hash, is it like those of the training
    this thread     scan n: the network
    writer thread   scan n - 1: subset, volumes, label map, probabilities, entropy, preview

A case that fails is told and the next one goes on. A full disk fails every further case too, so it ends the run.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from sagittal.data.dataset import Case
from sagittal.data.preprocessing import Frame, frame_of
from sagittal.errors import ResourceError, SagittalError
from sagittal.inference.averaging import SCRATCH
from sagittal.inference.consumers import SlabConsumer
from sagittal.inference.dicom_outputs import NO_DICOM, OVERVIEW, write_dicom_outputs
from sagittal.inference.input_check import check_grid, check_intensities, check_modality
from sagittal.inference.missing import plan_of_scans
from sagittal.inference.outputs import paths_of, stamp_input, stamp_output, volumes_ml
from sagittal.inference.probabilities import ProbabilityFile
from sagittal.inference.run_report import CasePrediction, Choices, FileStamp, Flag, InputStamp, Quality
from sagittal.inference.series_choice import series_of
from sagittal.inference.subset import chosen_spec, keep_only
from sagittal.inference.timings import Timings
from sagittal.inference.uncertainty import Disagreement, EntropyMap, quality_flags, quality_of
from sagittal.plan.base import write_atomically
from sagittal.plan.dataset import DatasetSpec
from sagittal.plan.plan import Plan
from sagittal.report.prediction import preview_png
from sagittal.volumes import Volume
from sagittal.volumes.dicom import dicom_modality
from sagittal.volumes.dicom_objects import Origin
from sagittal.volumes.dicom_source import DicomSource, read_source
from sagittal.volumes.io import is_dicom, read_header
from sagittal.volumes.volume import read_scans, read_volume

_log = logging.getLogger("sagittal.inference")
GIB = 1 << 30
HELD_SHARE = 0.125
"""Of the memory that is allowed, for scans that wait and results that are being written."""
_KEPT_SHARE = 1 / 32
"""Of the memory that is allowed, for the voxels of the scan that is being computed, which its files hold as well."""
_LEAST_GIB = 1e-3
"""Where less is left, so that it is refused for want of memory and not as a slip of the user's."""
_FLOAT_BYTES, _HALF_BYTES = 4, 2
_MEMORY = "memory"
_OF_ONE_CASE = (_MEMORY, SCRATCH)
"""Codes of what a case lacks and a smaller one may not; all else ends the run."""


@runtime_checkable
class CasePredictor(Protocol):
    """What a pipeline needs of `inference.predictor.Predictor`."""

    @property
    def plan(self) -> Plan:
        """What the networks were trained with."""
        ...

    @property
    def last_timings(self) -> Timings | None:
        """Where the time of the last `predict` went."""
        ...

    def predict(
        self,
        scan: Sequence[Path] | Sequence[Volume],
        *,
        mirror: bool = True,
        step: float | None = None,
        memory_gib: float | None = None,
        on_window: Callable[[int, int], None] | None = None,
        consumers: Sequence[SlabConsumer] = (),
        disagreement: Disagreement | None = None,
    ) -> Volume:
        """Return the label map of a scan."""
        ...


@dataclass(frozen=True)
class Job:
    """What is to be made of each case.

    Attributes:
        folder: for the outputs.
        choices: what was asked for.
        bundle_sha256: hash of the model's manifest, None where it has none.
        device: what the report says of it.
        memory_gib: that this process may use; None: no limit.
        threshold: agreement below which a case is flagged, and where it comes from.
    """

    folder: Path
    choices: Choices
    bundle_sha256: str | None = None
    device: str | None = None
    memory_gib: float | None = None
    threshold: tuple[float, str] = (0.0, "")


@dataclass(eq=False)
class _Loaded:
    """A case as the reader leaves it: its voxels, where they may be held, or why it can't be predicted."""

    case: Case
    seconds: float
    volumes: tuple[Volume, ...] | None = None
    frame: Frame | None = None
    stamp: InputStamp | None = None
    source: DicomSource | None = None
    flags: tuple[Flag, ...] = ()
    error: SagittalError | None = None

    @property
    def held_bytes(self) -> int:
        """Memory that its voxels take."""
        return sum(volume.array.nbytes for volume in self.volumes or ())


@dataclass(frozen=True, eq=False)
class _Computed:
    """A case as the network leaves it."""

    loaded: _Loaded
    labels: Volume
    seconds: float
    phases_s: dict[str, float]
    open: ExitStack
    probabilities: ProbabilityFile | None = None
    entropy: EntropyMap | None = None
    quality: Quality | None = None

    @property
    def writing_bytes(self) -> int:
        """Memory that writing it takes at most."""
        voxels = self.labels.array[0].size
        # Entropy is kept as bytes and written as float32; of probabilities one class is turned at a time, as float16.
        entropy = 0 if self.entropy is None else (1 + _FLOAT_BYTES) * voxels
        probabilities = 0 if self.probabilities is None else 2 * _HALF_BYTES * voxels
        # DICOM objects are put together in memory: bits or numbers of each voxel, and the file they make.
        objects = 0 if self.loaded.source is None else 3 * self.labels.array.nbytes
        return self.labels.array.nbytes + self.loaded.held_bytes + entropy + probabilities + objects


@dataclass
class CasePipeline:
    """Predicts cases with one predictor. Call `run` once.

    Args:
        predictor: the model.
        job: what is to be made of each case.
        tell: called with what became of each case as soon as it is known, from whichever thread knows.
        on_window: called after each call of the network, with the case's id, windows done and windows in all.
    """

    predictor: CasePredictor
    job: Job
    tell: Callable[[CasePrediction], None]
    on_window: Callable[[str, int, int], None] | None = None
    _ahead: Future[_Loaded] | None = field(default=None, init=False)
    _writing: Future[None] | None = field(default=None, init=False)
    _written_bytes: int = field(default=0, init=False)

    def run(self, cases: Iterable[Case]) -> None:
        """Predict the cases; the next is asked for while one is computed.

        Raises:
            ResourceError: the disk is full or the folder can't be written.
        """
        waiting = iter(cases)
        with ThreadPoolExecutor(1, "read") as reader, ThreadPoolExecutor(1, "write") as writer:
            case = next(waiting, None)
            while case is not None:
                loaded = (self._ahead or reader.submit(self._load, case)).result()
                self._ahead = None
                case = next(waiting, None)
                if case is not None and self._has_room(loaded, case):
                    self._ahead = reader.submit(self._load, case)
                computed = self._computed(loaded)
                try:
                    self._finish_writing()
                except BaseException:
                    if computed is not None:
                        computed.open.close()
                    raise
                if computed is not None:
                    self._written_bytes = computed.writing_bytes
                    self._writing = writer.submit(self._write, computed)
                del loaded, computed
            self._finish_writing()

    def _load(self, case: Case) -> _Loaded:
        began = time.monotonic()

        def seconds() -> float:
            return time.monotonic() - began

        try:
            plan = plan_of_scans(self.predictor.plan, self.job.choices.missing)
            stamp = stamp_input(case)
            images, of_series = series_of(case.images, plan.dataset.channel_names)
            case = replace(case, images=images)
            volumes = read_scans(case.images)
            modalities = [dicom_modality(image) if is_dicom(image) else None for image in case.images]
            flags = (
                *of_series,
                *check_modality(case.images, modalities, plan),
                *check_grid(volumes[0].geometry, plan),
                *check_intensities(volumes, plan),
            )
            source = read_source(case.images[0]) if self.job.choices.dicom and is_dicom(case.images[0]) else None
            if self.job.choices.dicom and source is None:
                flags = (*flags, NO_DICOM)
            needs_frame = self.job.choices.probabilities or self.job.choices.entropy
            frame = frame_of(volumes, plan.preprocessing) if needs_frame else None
            held = volumes if self._may_hold(sum(volume.array.nbytes for volume in volumes)) else None
            return _Loaded(case, seconds(), held, frame, stamp, source, flags)
        except SagittalError as error:
            return _Loaded(case, seconds(), error=error)
        except Exception as error:
            return _Loaded(case, seconds(), error=_bug(error, case))

    def _may_hold(self, count: int, share: float = HELD_SHARE) -> bool:
        return self.job.memory_gib is None or count <= share * self.job.memory_gib * GIB

    def _has_room(self, loaded: _Loaded, case: Case) -> bool:
        """Whether the next scan may be read while this one is computed."""
        if self.job.memory_gib is None:
            return True
        try:
            coming = sum(_FLOAT_BYTES * math.prod(read_header(image).geometry.shape) for image in case.images)
        except SagittalError:
            return True  # reading it will say what is wrong
        # Unpacking takes the voxels a second time for a moment.
        return self._may_hold(loaded.held_bytes + 2 * coming)

    def _computed(self, loaded: _Loaded) -> _Computed | None:
        """Return the case's label map; None, and told, where it has none."""
        began = time.monotonic()
        if loaded.error is not None:
            self.tell(_failure(loaded, loaded.error, 0.0))
            return None
        try:
            try:
                return self._predict(loaded)
            except ResourceError as error:
                if error.code != _MEMORY or self.job.memory_gib is None:
                    raise
                self._make_room(loaded)
                return self._predict(loaded)
        except ResourceError as error:
            if error.code not in _OF_ONE_CASE:
                raise
            self.tell(_failure(loaded, error, time.monotonic() - began))
        except SagittalError as error:
            self.tell(_failure(loaded, error, time.monotonic() - began))
        except Exception as error:
            self.tell(_failure(loaded, _bug(error, loaded.case), time.monotonic() - began))
        return None

    def _make_room(self, loaded: _Loaded) -> None:
        """Let go of everything that is held beside the network: the scan is read again, and the next one later."""
        if self._ahead is not None:
            self._ahead.result()
            self._ahead = None
        self._finish_writing()
        loaded.volumes = None

    def _predict(self, loaded: _Loaded) -> _Computed:
        began, choices, spec = time.monotonic(), self.job.choices, self.predictor.plan.dataset
        allowed = self._memory_gib()
        if allowed is not None and choices.entropy and loaded.frame is not None:
            # One byte for each voxel, all along.
            allowed = max(_LEAST_GIB, allowed - math.prod(loaded.frame.cropped_shape) / GIB)
        options: dict[str, Any] = {"mirror": choices.mirror, "memory_gib": allowed}
        if choices.step is not None:
            options["step"] = choices.step
        with ExitStack() as stack:
            probabilities = entropy = disagreement = None
            if choices.probabilities and loaded.frame is not None:
                path = paths_of(self.job.folder, loaded.case.id, spec.file_ending).probabilities
                probabilities = stack.enter_context(ProbabilityFile(path, spec, loaded.frame))
            if choices.entropy and loaded.frame is not None:
                entropy = EntropyMap(spec, loaded.frame)
            consumers = tuple(consumer for consumer in (probabilities, entropy) if consumer is not None)
            if consumers:
                options["consumers"] = consumers
            if choices.quality:
                options["disagreement"] = disagreement = Disagreement(spec)
            if not self._may_hold(loaded.held_bytes, _KEPT_SHARE):
                # Reading it again takes seconds; a network with less memory takes longer.
                loaded.volumes = None
            scan: Any = loaded.case.images if loaded.volumes is None else loaded.volumes
            labels = self.predictor.predict(scan, on_window=partial(self._after_window, loaded.case.id), **options)
            quality = (
                None
                if disagreement is None or not disagreement.looked
                else quality_of(disagreement, *self.job.threshold)
            )
            seconds, timings = time.monotonic() - began, self.predictor.last_timings
            phases: dict[str, float] = {} if timings is None else {str(name): s for name, s in timings.seconds.items()}
            # Of a scan that was read ahead, the predictor read nothing.
            phases["reading"] = phases.get("reading", 0.0) + loaded.seconds
            return _Computed(loaded, labels, seconds, phases, stack.pop_all(), probabilities, entropy, quality)

    def _memory_gib(self) -> float | None:
        """Return what is left for the network beside what waits and what is being written."""
        if self.job.memory_gib is None:
            return None
        if not self._may_hold(self._written_bytes):
            self._finish_writing()
        writing = self._written_bytes / GIB if self._writing is not None and not self._writing.done() else 0.0
        ahead = 0.0 if self._ahead is None else HELD_SHARE * self.job.memory_gib
        return max(_LEAST_GIB, self.job.memory_gib - writing - ahead)

    def _after_window(self, case: str, done: int, of: int) -> None:
        """Tell how far it is; end at once where the disk is full, not after the scan in progress."""
        if self.on_window is not None:
            self.on_window(case, done, of)
        if self._writing is not None and self._writing.done():
            self._finish_writing()

    def _finish_writing(self) -> None:
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def _write(self, computed: _Computed) -> None:
        began, loaded = time.monotonic(), computed.loaded
        try:
            with computed.open:
                files, volumes = self._written(computed)
        except ResourceError:
            raise
        except SagittalError as error:
            self.tell(_failure(loaded, error, computed.seconds + time.monotonic() - began))
            return
        except Exception as error:
            self.tell(_failure(loaded, _bug(error, loaded.case), computed.seconds + time.monotonic() - began))
            return
        writing_s, quality = time.monotonic() - began, computed.quality
        phases = {**computed.phases_s, "writing": writing_s}
        self.tell(
            CasePrediction(
                case=loaded.case.id,
                status="done",
                seconds=round(loaded.seconds + computed.seconds + writing_s, 3),
                output=files[0].path,
                volumes_ml=volumes,
                phases_s={name: round(value, 3) for name, value in phases.items()},
                flags=(*loaded.flags, *(() if quality is None else quality_flags(quality))),
                quality=quality,
                device=self.job.device,
                input=loaded.stamp,
                files=files,
                choices=self.job.choices,
                bundle_sha256=self.job.bundle_sha256,
            )
        )

    def _written(self, computed: _Computed) -> tuple[tuple[FileStamp, ...], dict[str, float]]:
        """Write the files of a case and return them, the label map first though it is written last."""
        job, plan, labels = self.job, self.predictor.plan, computed.labels
        paths = paths_of(job.folder, computed.loaded.case.id, plan.dataset.file_ending)
        spec = chosen_spec(plan.dataset, job.choices.subset)
        keep_only(labels.array[0], spec, plan.dataset)
        files = []
        if computed.probabilities is not None:
            files.append(stamp_output(job.folder, computed.probabilities.finish()))
        if computed.entropy is not None:
            written = Volume.on(labels.geometry, computed.entropy.on_grid()).write(paths.entropy)
            files.append(stamp_output(job.folder, written))
        volumes = volumes_ml(labels, spec)
        if job.choices.preview:
            scan = _first_channel(computed.loaded)
            picture = preview_png(computed.loaded.case.id, labels, scan, spec, volumes)
            files.append(stamp_output(job.folder, write_atomically(paths.preview, picture)))
        if computed.loaded.source is not None:
            files.extend(self._dicom_files(computed.loaded, labels, spec, volumes))
        paths.labels.parent.mkdir(parents=True, exist_ok=True)
        return (stamp_output(job.folder, labels.write(paths.labels)), *files), volumes

    def _dicom_files(
        self, loaded: _Loaded, labels: Volume, spec: DatasetSpec, volumes: Mapping[str, float]
    ) -> list[FileStamp]:
        """Write the DICOM objects of a series and return them."""
        job = self.job
        assert loaded.source is not None
        places = paths_of(job.folder, loaded.case.id, self.predictor.plan.dataset.file_ending).dicom
        origin = Origin(self.predictor.plan.dataset.name, (job.bundle_sha256 or "unknown")[:16])
        shown = _first_channel(loaded) if OVERVIEW in job.choices.dicom else None
        wanted = {kind: places[kind] for kind in job.choices.dicom}
        made = write_dicom_outputs(wanted, labels, spec, loaded.source, shown, volumes, origin)
        return [stamp_output(job.folder, path) for path in made]


def _first_channel(loaded: _Loaded) -> Volume:
    held: Sequence[Volume] = loaded.volumes or ()
    return held[0] if held else read_volume(loaded.case.images[0])


def _failure(loaded: _Loaded, error: SagittalError, seconds: float) -> CasePrediction:
    return CasePrediction(
        case=loaded.case.id,
        status="failed",
        seconds=round(loaded.seconds + seconds, 3),
        message=error.message,
        code=error.code,
        flags=loaded.flags,
        input=loaded.stamp,
    )


def _bug(error: Exception, case: Case) -> SagittalError:
    """Return an error that is not the user's as one that a case is told to have failed with.

    Where it was raised goes to the log, which `--debug` shows.
    """
    _log.debug("%s: %s", case.id, type(error).__name__, exc_info=error)
    if isinstance(error, OSError):
        return SagittalError(f"{error.filename or 'a file'}: can't be read ({error.strerror}).", code="unreadable")
    if isinstance(error, MemoryError):
        return ResourceError(
            "the memory does not suffice. Free memory, or give --memory-gib to see what is needed.", code=_MEMORY
        )
    text = " ".join(str(error).split())[:300]
    return SagittalError(f"{type(error).__name__}: {text}. This is a bug in Sagittal; --debug shows where.", code="bug")
