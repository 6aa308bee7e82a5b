"""`python -m sagittal.serve.worker`: computes jobs on one device; `supervisor` starts it, and may kill it at any time.

It is sent lines of JSON: first what it serves (`Task`), then a job at a time. It answers with lines of JSON:
{"ready": "cpu (openvino)"}, {"progress": 0.4, "stage": "computing"}, {"done": {...}}, {"failed": {...}}, {"fatal":
{...}}. It never touches the database. What it makes lies in a folder of this attempt alone, which the supervisor turns
into the job's results; so an attempt that outlives its supervisor by a moment disturbs no other. When its input ends,
which it does even where the parent was killed, it ends at once. Signals that ask to end are for the service, which ends
its workers itself: systemd and a shutdown send them to every process.
"""

from __future__ import annotations

import logging
import math
import os
import queue
import re
import shutil
import signal
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import IO

from sagittal.bundle import Bundle, read_bundle
from sagittal.errors import DataError, ResourceError, SagittalError
from sagittal.inference.engines.choice import load_engine
from sagittal.inference.engines.engine import Engine
from sagittal.inference.fast import fast_settings
from sagittal.inference.input_check import check_grid, check_intensities, check_modality
from sagittal.inference.memory import GIB, budget_bytes
from sagittal.inference.messages import Send, sent_by_standard_output
from sagittal.inference.outputs import volumes_ml
from sagittal.inference.predictor import Predictor
from sagittal.inference.run_report import Flag
from sagittal.inference.series_choice import series_of
from sagittal.inference.subset import chosen_spec, keep_only
from sagittal.plan.base import Frozen, cannot_write
from sagittal.report.colours import class_colour
from sagittal.serve.engines import Key, WarmEngines
from sagittal.serve.jobs import InputRef, JobOptions, Outcome, Stage
from sagittal.serve.refusals import names_within, without_paths
from sagittal.serve.results import Made, keep, write_results
from sagittal.serve.security import where_raised
from sagittal.volumes import Volume
from sagittal.volumes.dicom import dicom_modality
from sagittal.volumes.dicom_files import split_series, with_series
from sagittal.volumes.io import read_header, scan_files
from sagittal.volumes.volume import read_scans

KEPT_SHARE = 0.25
"""Of the memory that is allowed, for networks that wait for their next job."""
_HELD_SHARE = 1 / 32
"""The same for the voxels of the scan that is being computed."""
_TELL_EVERY_S = 0.5
_READ, _COMPUTED = 0.05, 0.95
"""Progress after reading and after computing."""
_FLOAT_BYTES = 4
_OOM_SCORE = "500"
_LEAST_GIB = 1e-3
_GZIPPED_NIFTI = ".nii.gz"


class Task(Frozen):
    """What a worker serves, and how."""

    models: dict[str, str]
    """Path of the bundle by the model's name."""
    device: str
    engine: str
    precision: str
    threads: int | None
    memory_gib: float | None
    cache_folder: str | None
    unpacked_bytes: int
    allowed_folders: tuple[str, ...]
    """Resolved; inputs that are paths lie below one of them."""
    debug: bool


class JobTask(Frozen):
    """A job as a worker is sent it."""

    id: str
    model: str
    options: JobOptions
    input: InputRef
    folder: str
    """Of the job."""
    out: str
    """Folder for this attempt's files; it is made."""


class Worker:
    """Computes jobs one after the other.

    Args:
        task: what is served.
        send: takes messages.
    """

    def __init__(self, task: Task, send: Send) -> None:
        self._task, self._send = task, send
        self._bundles = {name: read_bundle(path) for name, path in task.models.items()}
        allowed = budget_bytes(task.memory_gib)
        self._engines = WarmEngines(self._load, None if allowed is None else int(KEPT_SHARE * allowed))
        self._told_at = 0.0

    def warm_up(self) -> str:
        """Load the models, as many as fit, and return what computes the first."""
        first: Engine | None = None
        for name, bundle in self._bundles.items():
            files = bundle.manifest.files
            size = sum(entry.size_bytes for path, entry in files.items() if path.startswith("weights/"))
            if first is None or self._engines.has_room(size):
                engine = self._engines.get((name, False), bundle)
                first = first or engine
        assert first is not None, "a service has a model"
        return f"{first.device} ({first.name})"

    def run(self, job: JobTask) -> Outcome:
        """Compute a job and write its files.

        Raises:
            SagittalError: what is wrong with the scan, the options or the machine.
        """
        options, bundle = job.options, self._bundles[job.model]
        fast = fast_settings(bundle) if options.fast else None
        used = bundle if fast is None else fast.bundle
        images, volumes, flags = self.read(job, used)
        self._progress(_READ, "computing")
        kept = volumes[0] if self._may_hold(volumes) else None
        scan: Sequence[Path] | Sequence[Volume] = images if kept is None else volumes
        del volumes
        labels = self._predicted(job, used, scan, fast is not None)
        del scan
        self._progress(_COMPUTED, "writing")
        spec = chosen_spec(bundle.plan.dataset, options.subset)
        keep_only(labels.array[0], spec, bundle.plan.dataset)
        out = Path(job.out)
        try:
            shutil.rmtree(out, ignore_errors=True)
            out.mkdir(parents=True)
            first = read_scans(images[:1])[0] if kept is None else kept
            made = self._made(job, bundle, labels, first, images[0])
            files, remarks = write_results(made, out, images[0] if job.input.dicom else None, options.formats)
            keep(out)
        except OSError as error:
            raise cannot_write(out, error, code="disk") from None
        told = [plain_message(flag.message, job) for flag in flags] + [plain_message(text, job) for text in remarks]
        return Outcome(volumes_ml=dict(made.volumes_ml), flags=tuple(told), results=files)

    def read(self, job: JobTask, bundle: Bundle) -> tuple[tuple[Path, ...], tuple[Volume, ...], list[Flag]]:
        """Return a job's images, a file or series per channel, their voxels, and what to know of them.

        Raises:
            SagittalError: they can't be read, are too large, or are not what the bundle takes.
        """
        self._progress(0.0, "reading")
        images, flags = self._images(job, self._bundles[job.model])
        self._require_size(images)
        volumes = read_scans(images)
        return images, volumes, flags + self._checked(images, volumes, bundle)

    def _made(self, job: JobTask, bundle: Bundle, labels: Volume, scan: Volume, image: Path) -> Made:
        whole = bundle.plan.dataset
        spec = chosen_spec(whole, job.options.subset)
        colours = {label.name: class_colour(number) for number, label in enumerate(whole.labels)}
        return Made(
            labels=labels,
            image=scan,
            image_file=image if image.name.endswith(_GZIPPED_NIFTI) and job.input.kind == "upload" else None,
            spec=spec,
            volumes_ml=volumes_ml(labels, spec),
            title=f"Job {job.id[:8]}",
            model=job.model,
            model_version=bundle.manifest.manifest_sha256[:16],
            colours=tuple(colours[label.name] for label in spec.labels),
        )

    def _images(self, job: JobTask, bundle: Bundle) -> tuple[tuple[Path, ...], list[Flag]]:
        folder, given = Path(job.folder), job.input
        if given.kind == "upload":
            paths = [folder / file for file in given.files]
        else:
            paths = [self._allowed(Path(file)) for file in given.files]
        names = bundle.plan.dataset.channel_names
        if not given.dicom:
            return tuple(paths), []
        if job.options.series_uid is not None:
            uids = job.options.series_uid.split(",")
            if len(uids) not in (1, len(paths)):
                raise DataError(
                    f"series_uid names {len(uids)} series for {len(paths)} channels. Name one per channel.",
                    code="channel_count",
                )
            uids = uids * len(paths) if len(uids) == 1 else uids
            paths = [with_series(path, uid) for path, uid in zip(paths, uids, strict=True)]
        chosen, flags = series_of(paths, names)
        return chosen, list(flags)

    def _allowed(self, path: Path) -> Path:
        """Look again where a path leads: a link may have been put there since the request."""
        roots = [Path(folder) for folder in self._task.allowed_folders]
        for part in (path, *scan_files(path)):
            if not any(part.resolve().is_relative_to(root) for root in roots):
                raise DataError("the scan is no longer below an allowed folder.", code="path_not_allowed")
        return path

    def _require_size(self, images: Sequence[Path]) -> None:
        total = stored = 0
        for image in images:
            header = read_header(image)
            count = math.prod(header.geometry.shape)
            total += _FLOAT_BYTES * count
            stored += header.dtype.itemsize * count
        allowed = budget_bytes(self._task.memory_gib)
        if allowed is not None and stored > allowed:
            raise ResourceError(
                f"the scan's voxels take {stored} bytes, more than the {allowed} that this service has for a job. Crop "
                "it.",
                code="memory",
            )
        if total > self._task.unpacked_bytes:
            raise DataError(
                f"the scan has {total} bytes as it is computed, more than the {self._task.unpacked_bytes} that the "
                "service takes. Crop it.",
                code="too_large",
            )

    def _may_hold(self, volumes: Sequence[Volume]) -> bool:
        """Whether the voxels may stay beside the network; their files hold them as well."""
        memory = self._task.memory_gib
        return memory is None or sum(volume.array.nbytes for volume in volumes) <= _HELD_SHARE * memory * GIB

    def _checked(self, images: Sequence[Path], volumes: Sequence[Volume], bundle: Bundle) -> list[Flag]:
        plan = bundle.plan
        named = [Path(f"image {number + 1}") for number in range(len(images))]
        modalities = [dicom_modality(path) if split_series(path)[0].is_dir() else None for path in images]
        return [
            *check_modality(named, modalities, plan),
            *check_grid(volumes[0].geometry, plan),
            *check_intensities(volumes, plan),
        ]

    def _predicted(
        self, job: JobTask, bundle: Bundle, scan: Sequence[Path] | Sequence[Volume], is_fast: bool
    ) -> Volume:
        key: Key = (job.model, bundle.whole is not None)
        try:
            return self._predict(key, job, bundle, scan, is_fast)
        except ResourceError as error:
            if error.code != "memory" or not self._engines.keep_only(key):
                raise
        # Alone in memory it may fit.
        return self._predict(key, job, bundle, scan, is_fast)

    def _predict(
        self, key: Key, job: JobTask, bundle: Bundle, scan: Sequence[Path] | Sequence[Volume], is_fast: bool
    ) -> Volume:
        options = job.options
        engine = self._engines.get(key, bundle)
        predictor = Predictor(bundle.plan, engine, postprocessing=options.postprocessing, scratch=Path(job.out).parent)
        step = options.step
        if is_fast and step is None:
            step = fast_settings(bundle.whole or bundle).step
        memory = self._task.memory_gib
        if memory is not None:
            memory = max(memory - self._engines.others_bytes(key) / GIB, _LEAST_GIB)
        return predictor.predict(
            scan,
            mirror=options.mirror and not is_fast,
            step=step,
            memory_gib=memory,
            on_window=self._after_window,
        )

    def _after_window(self, done: int, of: int) -> None:
        if time.monotonic() - self._told_at >= _TELL_EVERY_S:
            self._progress(_READ + (_COMPUTED - _READ) * done / max(1, of), "computing")

    def _progress(self, share: float, stage: Stage) -> None:
        self._told_at = time.monotonic()
        self._send(progress=round(share, 4), stage=stage)

    def _load(self, bundle: Bundle) -> Engine:
        task = self._task
        return load_engine(
            bundle, task.device, task.engine, task.precision, cache_folder=task.cache_folder, threads=task.threads
        )


def plain_message(message: str, job: JobTask) -> str:
    """Return a message of the library's without paths of this machine and names of files; images have numbers."""
    names: set[str] = {job.out, job.folder}
    for number, file in enumerate(job.input.files):
        path = Path(job.folder) / file
        message = re.sub(rf"{re.escape(str(path))}(#[0-9][0-9.@]*)?(?![/\w])", f"image {number + 1}", message)
        if job.input.kind == "path":
            # Somebody else's names, which may be patients'.
            names |= {str(path), path.name} | names_within(path)
    return without_paths(message, names)


def failure_of(error: Exception, job: JobTask) -> dict[str, str]:
    """Return what a job failed with, in the one error shape; of a bug also where it was raised, for the log."""
    if isinstance(error, SagittalError):
        return {"type": type(error).__name__, "code": error.code, "message": plain_message(error.message, job)}
    if isinstance(error, MemoryError):
        text = "the memory does not suffice. Send a smaller scan, or ask for more memory for the service."
        return {"type": "ResourceError", "code": "memory", "message": text}
    text = f"an error in the service ({type(error).__name__}), noted in its log under this job."
    where = f"{type(error).__name__} at {where_raised(error)}"
    return {"type": "SagittalError", "code": "bug", "message": text, "where": where}


def be_first_to_go() -> None:
    """Have the system end this process rather than the service where memory runs out; it is replaced."""
    with suppress(OSError):  # no Linux
        Path("/proc/self/oom_score_adj").write_text(_OOM_SCORE, encoding="ascii")


def main() -> int:
    """Compute what standard input asks for, and return the exit code."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    be_first_to_go()
    with sent_by_standard_output() as send:
        try:
            return _work(sys.stdin, send)
        except BrokenPipeError:  # the parent is gone, and nobody is left to be told
            return 1


def _work(lines: IO[str], send: Send) -> int:
    first = lines.readline()
    if not first:
        return 1
    task = Task.from_json(first)
    if task.debug:
        logging.basicConfig(stream=sys.stderr, level=logging.INFO)
    try:
        worker = Worker(task, send)
        send(ready=worker.warm_up())
    except SagittalError as error:
        send(fatal={"type": type(error).__name__, "code": error.code, "message": error.message})
        return 1
    jobs: queue.Queue[str] = queue.Queue()
    threading.Thread(target=partial(_listen, lines, jobs), daemon=True).start()
    while True:
        job = JobTask.from_json(jobs.get())
        try:
            outcome = worker.run(job)
        except Exception as error:
            if task.debug:
                logging.getLogger("sagittal.serve").error("job %s", job.id, exc_info=error)
            send(failed=failure_of(error, job))
        else:
            send(done=outcome.model_dump(mode="json"))


def _listen(lines: IO[str], jobs: queue.Queue[str]) -> None:
    for line in lines:
        jobs.put(line)
    # At once, also in the middle of a job: whoever would take its result is gone.
    os._exit(0)


if __name__ == "__main__":
    sys.exit(main())
