"""What a worker on a node is told, and does: a warm model to which cases are handed one by one."""

from __future__ import annotations

import json
import queue
import shutil
import tempfile
import threading
import uuid
from collections.abc import Iterator, Mapping
from concurrent.futures import Future
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sagittal.bundle import read_bundle
from sagittal.cluster.node_folder import node_folder
from sagittal.cluster.shared import Store
from sagittal.data.dataset import Case
from sagittal.errors import PlanError, ResourceError
from sagittal.inference.engines.choice import kernels_switched
from sagittal.inference.ensemble import computed_by, predictor_of
from sagittal.inference.fast import fast_settings_of
from sagittal.inference.memory import GIB, budget_bytes
from sagittal.inference.pipeline import CasePipeline, Job
from sagittal.inference.processes import Loading
from sagittal.inference.run_report import REPORT, CasePrediction, FolderResult
from sagittal.volumes.dicom_files import with_series


@dataclass(frozen=True)
class Task:
    """What a worker is told when it begins.

    Attributes:
        device, threads: where and with how many threads it computes.
        loading: the bundles; names in the store where there is one.
        job: what is made of each case; with a store the worker takes a folder of its own.
        run: date of the run's report, by which a node knows that it sees the output folder; None with a store.
        sample: a scan that the node must see; None with a store.
        store: its URL, or None.
        prefix: of everything of this run in the store, and of workers' folders.
    """

    device: str
    threads: int
    loading: Loading
    job: Job
    run: str | None = None
    sample: Path | None = None
    store: str | None = None
    prefix: str = ""


class PredictHand:
    """A warm predictor on a node. Cases that are handed to it run one behind the other through one pipeline."""

    def __init__(self, task: Task) -> None:
        self._task = task
        self._cases: queue.SimpleQueue[Case | None] = queue.SimpleQueue()
        self._answers: dict[str, Future[CasePrediction]] = {}
        self._lock = threading.Lock()
        self._error: BaseException | None = None
        self._store: Store | None = None
        self._scratch: Path | None = None
        self._held = ExitStack()
        self._job = task.job

    def open(self, beside: int) -> str:
        """Load the model; return what computes."""
        task, loading = self._task, self._task.loading
        if task.store is None:
            _require_sight(task)
        else:
            self._store = Store(task.store)
            # Where this process is killed, the run takes its folder away at its end, or else a later run does.
            self._scratch = self._held.enter_context(node_folder(task.prefix, uuid.uuid4().hex)).path
            (self._scratch / "out").mkdir()
            self._job = replace(task.job, folder=self._scratch / "out")
            loading = replace(
                loading,
                bundle=_fetch(self._store, loading.bundle.as_posix(), self._scratch / "bundle"),
                others=tuple(
                    _fetch(self._store, other.as_posix(), self._scratch / f"bundle{number}")
                    for number, other in enumerate(loading.others, start=1)
                ),
            )
        if self._job.memory_gib is None and beside > 1 and (available := budget_bytes(None)) is not None:
            # All workers of a node take it at once.
            self._job = replace(self._job, memory_gib=available / GIB / beside)
        ready: Future[str] = Future()
        threading.Thread(target=self._work, args=(loading, ready), name="predict", daemon=True).start()
        return ready.result()

    def do(self, item: str) -> str:
        """Predict a case and return what became of it."""
        given = json.loads(item)
        if self._store is None:
            return self._predicted(Case(given["id"], tuple(map(Path, given["images"])))).model_dump_json()
        assert self._scratch is not None
        scans = Path(tempfile.mkdtemp(dir=self._scratch))
        try:
            images = (self._fetched(image, scans / str(number)) for number, image in enumerate(given["images"]))
            case = Case(given["id"], tuple(images))
            told = self._predicted(case)
            if told.files:
                paths = {stamp.path for stamp in told.files}
                self._store.publish(given["result"], self._job.folder, lambda path: path in paths)
                for path in paths:
                    (self._job.folder / path).unlink()
            return told.model_dump_json()
        finally:
            shutil.rmtree(scans, ignore_errors=True)

    def close(self) -> None:
        """End the thread and take the node's copies away."""
        self._cases.put(None)
        if self._scratch is not None:
            shutil.rmtree(self._scratch, ignore_errors=True)
        self._held.close()

    def _fetched(self, image: Mapping[str, str | None], folder: Path) -> Path:
        assert self._store is not None and image["name"] and image["path"]
        self._store.fetch_folder(image["name"], folder)
        path = folder / image["path"]
        return with_series(path, image["series"]) if image["series"] else path

    def _predicted(self, case: Case) -> CasePrediction:
        answer: Future[CasePrediction] = Future()
        with self._lock:
            if self._error is not None:
                raise self._error
            self._answers[case.id] = answer
        self._cases.put(case)
        return answer.result()

    def _work(self, loading: Loading, ready: Future[str]) -> None:
        try:
            with kernels_switched(loading.kernels, loading.known_kernels):
                self._run(loading, ready)
        except BaseException as error:
            with self._lock:
                self._error = error
                waiting: list[Future[Any]] = [ready, *self._answers.values()]
            for future in waiting:
                if not future.done():
                    future.set_exception(error)

    def _run(self, loading: Loading, ready: Future[str]) -> None:
        choices = self._job.choices
        bundles = [read_bundle(path) for path in (loading.bundle, *loading.others)]
        if choices.fast:
            bundles = [each.bundle for each in fast_settings_of(bundles)]
        predictor = predictor_of(
            bundles,
            choices,
            self._task.device,
            loading.engine,
            cache_folder=loading.cache_folder,
            scratch=self._job.folder,
            threads=self._task.threads,
        )
        job = replace(self._job, device=computed_by(predictor))
        ready.set_result(job.device or "")
        while (case := self._cases.get()) is not None:
            # Ends where nothing waits, so that a last case is not held back for the next one.
            CasePipeline(predictor, job, self._tell).run(self._at_hand(case))

    def _at_hand(self, case: Case | None) -> Iterator[Case]:
        while case is not None:
            yield case
            try:
                case = self._cases.get_nowait()
            except queue.Empty:
                return
        self._cases.put(None)

    def _tell(self, case: CasePrediction) -> None:
        with self._lock:
            answer = self._answers.pop(case.case)
        answer.set_result(case)


def _require_sight(task: Task) -> None:
    """Check that this node sees the output folder and the scans.

    Raises:
        ResourceError: it does not.
    """
    advice = "Put it on a disk that all nodes have under that path, or give --store s3://BUCKET/FOLDER."
    try:
        # Listing first: network disks remember for a while that a file was not there.
        sorted(task.job.folder.iterdir())
        seen = FolderResult.read(task.job.folder / REPORT).started
    except (OSError, PlanError):
        seen = None
    if seen != task.run:
        raise ResourceError(f"{task.job.folder}: this node does not see the output folder. {advice}", code="not_shared")
    for path in (task.loading.bundle, *task.loading.others):
        if not path.exists():
            raise ResourceError(f"{path}: this node does not see the bundle. {advice}", code="not_shared")
    if task.sample is not None and not task.sample.exists():
        raise ResourceError(f"{task.sample}: this node does not see the scans. {advice}", code="not_shared")


def _fetch(store: Store, name: str, target: Path) -> Path:
    """Write a bundle that was sent to a path and return it."""
    if store.published(name) is not None:
        store.fetch_folder(name, target)
        return target
    return store.fetch(name, target if target.suffix else target.with_name(target.name + "".join(Path(name).suffixes)))
