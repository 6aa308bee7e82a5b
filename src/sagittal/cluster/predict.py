"""A folder of scans predicted on a Ray cluster: warm models on every node, the same outputs and the same report.

This is what `inference.folder.run_folder` calls to compute cases, so finding them, leaving finished ones alone and
prediction.json are as on one machine. Nodes either see the scans and the output folder under the same paths, and write
there themselves, or share nothing but a `Store`, through which each case's files go there and back.
"""

from __future__ import annotations

import json
import queue
import shutil
import tempfile
import threading
import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from sagittal.bundle import read_bundle
from sagittal.cluster.places import Place
from sagittal.cluster.pool import Pool, Told
from sagittal.cluster.ray_session import Needs, Session, connected
from sagittal.cluster.shared import Store
from sagittal.data.dataset import Case
from sagittal.errors import PlanError, ResourceError
from sagittal.inference.engines.choice import kernels_switched
from sagittal.inference.ensemble import computed_by, predictor_of
from sagittal.inference.fast import fast_settings_of
from sagittal.inference.memory import GIB, budget_bytes
from sagittal.inference.outputs import input_state
from sagittal.inference.pipeline import CasePipeline, Job
from sagittal.inference.processes import Loading
from sagittal.inference.run_report import REPORT, CasePrediction, FolderResult
from sagittal.volumes.dicom_files import split_series, with_series

MAX_CPUS = 8
"""Of a worker by itself: beyond, more workers predict more scans in the same time, where the memory is there."""
CPUS_PER_GPU = 4
"""For a worker on a GPU: its scans are read, resampled and written beside the network."""


@dataclass(frozen=True)
class Crew:
    """The workers of a run.

    Attributes:
        device: of each: `cpu` or `cuda`.
        cpus: of each, which its threads share; by itself those of the smallest node, at most 8, and 4 beside a GPU.
        workers: at most; by itself as many as the cluster has room for.
        store: URL or folder through which scans and results go, where nodes do not see this machine's folders.
    """

    device: str = "cpu"
    cpus: int | None = None
    workers: int | None = None
    store: str | None = None


def device_on(session: Session, asked: str) -> str:
    """Return the device of each worker for what a user asked: `auto` takes GPUs where the cluster has any.

    Raises:
        PlanError: a device of one machine.
    """
    if asked == "auto":
        return "cuda" if any(node.gpus for node in session.nodes) else "cpu"
    if asked not in ("cpu", "cuda"):
        raise PlanError(
            f"--device {asked}: on a cluster each worker has a device of its own. Expected auto, cpu or cuda.",
            code="usage",
        )
    return asked


def needs_of(session: Session, crew: Crew) -> Needs:
    """Return what each worker occupies."""
    if crew.device == "cuda":
        with_gpu = [node.cpus // node.gpus for node in session.nodes if node.gpus]
        return Needs(crew.cpus or max(1, min([CPUS_PER_GPU, *with_gpu])), 1)
    return Needs(crew.cpus or max(1, min([MAX_CPUS, *(node.cpus for node in session.nodes if node.cpus)])))


def predict_on_ray(
    place: Place | Session,
    crew: Crew,
    loading: Loading,
    job: Job,
    cases: Sequence[Case],
    tell: Callable[[CasePrediction], None],
    say: Callable[[str], None] = lambda line: None,
) -> None:
    """Predict cases on a cluster, each told once, in any order.

    Args:
        place: the cluster, or a session with it.
        crew: the workers.
        loading: the bundles, which nodes see under the same paths where there is no store.
        job: what is made of each case; its memory is for each worker.
        cases: each is computed until it is told; one that ends two workers is told as failed.
        tell: called from this thread.
        say: a line for a person: a worker is ready, a node joined or is gone.

    Raises:
        SagittalError: a node can't load the model or can't see the folders, the disk is full, or no node is left.
    """
    if not cases:
        return
    if isinstance(place, Place):
        with connected(place, say=say) as session:
            predict_on_ray(session, crew, loading, job, cases, tell, say)
        return
    needs = needs_of(place, crew)
    job = replace(job, folder=job.folder.absolute())
    road: _Road = _SameFolders() if crew.store is None else _ByStore(Store(crew.store), job)
    by_id = {case.id: case for case in cases}

    def answer(case: str, text: str) -> None:
        tell(road.home(by_id[case], CasePrediction.from_json(text)))

    def poison(case: str, why: str) -> None:
        road.forget(case)
        message = (
            f"{case}: {why}, and no other scan did; most likely its memory does not suffice, or the scan is damaged. "
            "Give workers more of a node (--worker-cpus), or --memory-gib, or look at the scan."
        )
        tell(CasePrediction(case=case, status="failed", seconds=0.0, message=message, code="poison"))

    try:
        task = road.task(crew, needs, loading, job, cases[0])
        threads = {"OMP_NUM_THREADS": str(needs.cpus), "OMP_WAIT_POLICY": "passive"}
        pool = Pool(place, partial(PredictHand, task), needs, environment=threads, workers=crew.workers)
        pool.run(list(by_id), lambda case: road.brief(by_id[case]), Told(answer, poison, say))
    finally:
        road.end()


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
        prefix: of everything of this run in the store.
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
        self._job = task.job

    def open(self, beside: int) -> str:
        """Load the model; return what computes."""
        task, loading = self._task, self._task.loading
        if task.store is None:
            _require_sight(task)
        else:
            self._store, self._scratch = Store(task.store), Path(tempfile.mkdtemp(prefix="sagittal-"))
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
            case = Case(given["id"], tuple(self._fetched(image, scans) for image in given["images"]))
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

    def _fetched(self, image: str, folder: Path) -> Path:
        assert self._store is not None
        name, _, series = image.partition("#")
        path = _fetch(self._store, name, folder / Path(name).parent.name / Path(name).name)
        return with_series(path, series) if series else path

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


class _SameFolders:
    """Nodes see this machine's folders, so paths are all that goes there."""

    def task(self, crew: Crew, needs: Needs, loading: Loading, job: Job, sample: Case) -> Task:
        report = job.folder / REPORT
        run = FolderResult.read(report).started if report.exists() else None
        loading = replace(
            loading, bundle=loading.bundle.absolute(), others=tuple(other.absolute() for other in loading.others)
        )
        scan = split_series(sample.images[0])[0].absolute()
        return Task(crew.device, needs.cpus, loading, job, run, scan)

    def brief(self, case: Case) -> str:
        return json.dumps({"id": case.id, "images": [str(image.absolute()) for image in case.images]})

    def home(self, case: Case, told: CasePrediction) -> CasePrediction:
        return told

    def forget(self, case: str) -> None:
        pass

    def end(self) -> None:
        pass


class _ByStore:
    """Nodes share a store with this machine: scans go through it when they are handed out, results come back."""

    def __init__(self, store: Store, job: Job) -> None:
        self._store, self._job = store, job
        self._prefix = f"predict-{uuid.uuid4().hex}"
        self._sent: set[str] = set()

    def task(self, crew: Crew, needs: Needs, loading: Loading, job: Job, sample: Case) -> Task:
        names = []
        for number, path in enumerate((loading.bundle, *loading.others)):
            names.append(Path(_send(self._store, path, f"{self._prefix}/bundle/{number}")))
        loading = replace(loading, bundle=names[0], others=tuple(names[1:]))
        return Task(crew.device, needs.cpus, loading, job, store=self._store.url, prefix=self._prefix)

    def brief(self, case: Case) -> str:
        images = []
        for number, image in enumerate(case.images):
            path, series = split_series(image)
            name = f"{self._scans(case.id)}/{number}/{path.resolve().name}"
            if case.id not in self._sent:
                _send(self._store, path, name, exact=True)
            images.append(name if series is None else f"{name}#{series}")
        self._sent.add(case.id)
        return json.dumps({"id": case.id, "images": images, "result": self._result(case.id)})

    def home(self, case: Case, told: CasePrediction) -> CasePrediction:
        if told.files:
            self._store.fetch_folder(self._result(case.id), self._job.folder)
        self.forget(case.id)
        if told.input is None:
            return told
        # The node knows the scan by another path, and the next run asks for this one.
        return told.replace(input=told.input.replace(state=input_state(case)))

    def forget(self, case: str) -> None:
        self._store.delete_folder(self._scans(case))
        self._store.delete_folder(self._result(case))

    def end(self) -> None:
        self._store.delete_folder(self._prefix)

    def _scans(self, case: str) -> str:
        return f"{self._prefix}/scans/{case}"

    def _result(self, case: str) -> str:
        return f"{self._prefix}/results/{case}"


_Road = _SameFolders | _ByStore


def _send(store: Store, path: Path, name: str, *, exact: bool = False) -> str:
    """Store a folder or a file and return its name, which ends like the path where it is not given exactly."""
    name = name if exact else f"{name}/{path.resolve().name}"
    if path.is_dir():
        store.publish(name, path)
    else:
        store.put(name, path)
    return name


def _fetch(store: Store, name: str, target: Path) -> Path:
    """Write what `_send` stored to a path and return it."""
    if store.published(name) is not None:
        store.fetch_folder(name, target)
        return target
    return store.fetch(name, target if target.suffix else target.with_name(target.name + "".join(Path(name).suffixes)))
