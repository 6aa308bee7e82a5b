"""A folder of scans predicted on a Ray cluster: warm models on every node, the same outputs and the same report.

This is what `inference.folder.run_folder` calls to compute cases, so finding them, leaving finished ones alone and
prediction.json are as on one machine. Nodes either see the scans and the output folder under the same paths, and write
there themselves, or share nothing but a `Store`, through which each case's files go there and back.
"""

from __future__ import annotations

import hashlib
import json
import os
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path, PurePath, PurePosixPath

from sagittal.cluster.places import Place
from sagittal.cluster.pool import Pool, Told
from sagittal.cluster.predict_hand import PredictHand, Task
from sagittal.cluster.ray_session import Needs, Node, Session, connected, remove_from
from sagittal.cluster.shared import Store
from sagittal.data.dataset import Case
from sagittal.errors import DataError, PlanError, ResourceError
from sagittal.inference.outputs import input_state
from sagittal.inference.pipeline import Job
from sagittal.inference.processes import Loading
from sagittal.inference.run_report import REPORT, CasePrediction, FolderResult
from sagittal.volumes.dicom_files import split_series
from sagittal.volumes.io import scan_files

MAX_CPUS = 8
"""Of a worker by itself: beyond, more workers predict more scans in the same time, where the memory is there."""
CPUS_PER_GPU = 4
"""For a worker on a GPU: its scans are read, resampled and written beside the network."""
_OF_SCAN = ("unreadable", "changing")
"""Codes of what a store tells of a file that it is given."""


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
    road: _Road = _SameFolders() if crew.store is None else _ByStore(Store(crew.store), job, lambda: place.nodes)
    by_id = {case.id: case for case in cases}

    def answer(case: str, text: str) -> None:
        tell(road.home(by_id[case], CasePrediction.from_json(text)))

    def brief(case: str) -> str | None:
        try:
            return road.brief(by_id[case])
        except DataError as error:
            road.forget(case)
            tell(CasePrediction(case=case, status="failed", seconds=0.0, message=error.message, code=error.code))
            return None

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
        pool.run(list(by_id), brief, Told(answer, poison, say))
    finally:
        road.end()


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

    def __init__(self, store: Store, job: Job, nodes: Callable[[], Sequence[Node]] = lambda: ()) -> None:
        self._store, self._job, self._nodes = store, job, nodes
        self._prefix = f"predict-{uuid.uuid4().hex}"
        self._sent: dict[str, tuple[str, str]] = {}  # what nodes are given for a case, and the state of its files

    def task(self, crew: Crew, needs: Needs, loading: Loading, job: Job, sample: Case) -> Task:
        names = []
        for number, path in enumerate((loading.bundle, *loading.others)):
            names.append(Path(_send(self._store, path, f"{self._prefix}/bundle/{number}")))
        loading = replace(loading, bundle=names[0], others=tuple(names[1:]))
        return Task(crew.device, needs.cpus, loading, job, store=self._store.url, prefix=self._prefix)

    def brief(self, case: Case) -> str:
        """Send a case's scans, unless they are there, and return what a node is given.

        Raises:
            DataError: a scan can't be read.
            ResourceError: the store can't be written.
        """
        if case.id not in self._sent:
            state = _state_of(case)
            try:
                images = [
                    _send_scan(self._store, image, f"{self._scans(case.id)}/{number}")
                    for number, image in enumerate(case.images)
                ]
            except ResourceError as error:
                if error.code not in _OF_SCAN:
                    raise
                raise DataError(f"{case.id}: {error.message}", code="unreadable") from None
            given = {"id": case.id, "images": images, "result": self._result(case.id)}
            self._sent[case.id] = json.dumps(given), state
        return self._sent[case.id][0]

    def home(self, case: Case, told: CasePrediction) -> CasePrediction:
        if told.files:
            self._store.fetch_folder(self._result(case.id), self._job.folder)
        _, state = self._sent[case.id]
        self.forget(case.id)
        if told.input is None:
            return told
        # The node knows the scan by another path, and the next run asks for this one, as it was when it was sent.
        return told.replace(input=told.input.replace(state=state))

    def forget(self, case: str) -> None:
        self._sent.pop(case, None)
        self._store.delete_folder(self._scans(case))
        self._store.delete_folder(self._result(case))

    def end(self) -> None:
        # First on the nodes: without their folders nothing more is sent.
        remove_from(self._nodes, self._prefix)
        self._store.delete_folder(self._prefix)

    def _scans(self, case: str) -> str:
        return f"{self._prefix}/scans/{_in_store(case)}"

    def _result(self, case: str) -> str:
        return f"{self._prefix}/results/{_in_store(case)}"


_Road = _SameFolders | _ByStore


def _in_store(case: str) -> str:
    """Return what a case is called in a store: of two ids, one may be a folder of the other."""
    return hashlib.sha256(os.fsencode(case)).hexdigest()[:32]


def _state_of(case: Case) -> str:
    try:
        return input_state(case)
    except OSError as error:
        raise DataError(f"{case.id}: {error.filename} can't be read ({error.strerror}).", code="unreadable") from None


def _send(store: Store, path: Path, name: str) -> str:
    """Store a bundle below a name and return its own, which ends like its path."""
    name = f"{name}/{_own_name(path)}"
    if path.is_dir():
        store.publish(name, path)
    else:
        store.put(name, path)
    return name


def _send_scan(store: Store, scan: Path, name: str) -> dict[str, str | None]:
    """Store all files of a scan under a name; return where they are and which of them, and what in it, is the scan.

    Raises:
        DataError: a file of it is missing, or it is damaged.
        ResourceError: a file can't be read or stored.
    """
    path, series = split_series(scan)
    # The names that the user gave: what a link leads to may have no suffix.
    own = _own_name(path)
    files = {}
    for part in scan_files(path):
        base, folder = (path, own) if part.is_relative_to(path) else (path.parent, "")
        short = PurePosixPath(folder, PurePath(os.path.relpath(part, base)).as_posix())
        if ".." in short.parts or "\\" in str(short):
            raise DataError(f"{scan}: its file {part} can't be named in a store. Rename it.", code="bad_input")
        files[str(short)] = part
    store.publish_files(name, files)
    return {"name": name, "path": own, "series": series}


def _own_name(path: Path) -> str:
    return path.name if path.name not in ("", "..") else path.resolve().name
