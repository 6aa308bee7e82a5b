"""Workers are started, fed, watched and replaced: one process per device, a thread here for each.

Whatever dies, every job ends with one result or one stated error:
- a worker dies: the store takes its job back, once to the queue, then the job has failed;
- a job takes too long or is cancelled: the worker is killed, and another takes its place;
- a result counts when the store says so, which it does once: first the files lie where they belong, then the row says
  done. A service that dies between the two computes the job again over the same folder.
"""

from __future__ import annotations

import json
import logging
import shutil
import sys
import threading
import time
from collections.abc import Callable, Mapping

from sagittal.errors import SagittalError
from sagittal.inference.engines.sharing import threads_each
from sagittal.inference.memory import GIB, budget_bytes
from sagittal.serve.audit import Audit
from sagittal.serve.jobs import Job, JobError, JobStore, Outcome
from sagittal.serve.metrics import Metrics
from sagittal.serve.models import ServedModels
from sagittal.serve.results import keep
from sagittal.serve.security import where_raised
from sagittal.serve.settings import ServeSettings
from sagittal.serve.worker import JobTask, Task
from sagittal.serve.worker_process import Command, WorkerProcess

_log = logging.getLogger("sagittal.serve")
_LOOK_EVERY_S = 0.25
_IDLE_LOOK_S = 1.0
_START_S = 600.0
"""For a worker to load its models."""
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.5, 30.0
RESULTS = "results"
WORKER: Command = (sys.executable, "-m", "sagittal.serve.worker")


class Supervisor:
    """Computes the jobs of a store with worker processes.

    Args:
        settings: devices, memory and limits.
        store: whose jobs are computed.
        models: that they name.
        audit, metrics: are told what becomes of them.
        on_hopeless: called with the error where no worker can be started, not even the first time.
        command: starts a worker.
    """

    def __init__(
        self,
        settings: ServeSettings,
        store: JobStore,
        models: ServedModels,
        audit: Audit,
        metrics: Metrics,
        *,
        on_hopeless: Callable[[SagittalError], None] | None = None,
        command: Command = WORKER,
    ) -> None:
        self.settings, self.store, self.models, self.audit, self.metrics = settings, store, models, audit, metrics
        self.on_hopeless, self.command = on_hopeless, command
        self._changed = threading.Condition()
        self._stopping, self._kill_at = False, float("inf")
        self._wakes = 0
        self._seats = [_Seat(self, device, number) for number, device in enumerate(settings.devices)]

    @property
    def workers(self) -> int:
        """How many worker processes there should be."""
        return len(self._seats)

    @property
    def ready_workers(self) -> int:
        """How many of them take jobs."""
        return sum(seat.is_ready for seat in self._seats)

    @property
    def is_stopping(self) -> bool:
        """Whether no further job is begun."""
        return self._stopping

    @property
    def is_out_of_time(self) -> bool:
        """Whether the jobs in progress have had their grace."""
        return time.monotonic() >= self._kill_at

    @property
    def has_worked(self) -> bool:
        """Whether a worker was ready once."""
        return any(seat.was_ready for seat in self._seats)

    def start(self) -> None:
        """Begin to compute jobs."""
        for seat in self._seats:
            seat.start()

    def wake(self) -> None:
        """Look for jobs now: one was sent or cancelled."""
        with self._changed:
            self._wakes += 1
            self._changed.notify_all()

    @property
    def wakes(self) -> int:
        """How often `wake` was called."""
        return self._wakes

    def wait(self, seconds: float, wakes: int) -> None:
        """Sleep for that long, or until `wake` was called more often than `wakes`."""
        with self._changed:
            self._changed.wait_for(lambda: self._stopping or self._wakes != wakes, seconds)

    def pause(self, seconds: float) -> None:
        """Sleep for that long, or until the service stops."""
        with self._changed:
            self._changed.wait_for(lambda: self._stopping, seconds)

    def stop(self, grace_s: float) -> None:
        """Begin no further job, give those in progress `grace_s`, and put what is left back into the queue."""
        with self._changed:
            self._kill_at = min(self._kill_at, time.monotonic() + grace_s)
            self._stopping = True
            self._changed.notify_all()
        for seat in self._seats:
            seat.join()

    def task(self, device: str) -> Task:
        """Return what a worker on a device is told first."""
        settings = self.settings
        memory = settings.memory_gib
        if memory is None and self.workers > 1:
            available = budget_bytes(None)
            memory = None if available is None else available / GIB
        return Task(
            models={name: str(model.bundle.path.resolve()) for name, model in self.models.items()},
            device=device,
            engine=settings.engine,
            precision=settings.precision,
            threads=threads_each(self.workers, settings.threads),
            memory_gib=None if memory is None else memory / self.workers,
            cache_folder=None if settings.cache_folder is None else str(settings.cache_folder),
            unpacked_bytes=settings.limits.unpacked_bytes,
            allowed_folders=tuple(str(folder.resolve()) for folder in settings.allowed_folders),
            debug=settings.debug,
        )

    def take_back(self, worker: str) -> None:
        """Put what a worker that is gone had begun back into the queue, or end it where that happened too often."""
        if self.is_stopping:
            # Whoever stops the service may end its workers too, a shutdown for example: no fault of the job's.
            self.store.release(worker)
            return
        for job in self.store.requeue_lost(worker):
            _log_lost(self, job)

    def hopeless(self, error: SagittalError) -> None:
        """Tell that a worker could not even be started; only where none ever was."""
        if self.on_hopeless is not None and not self.has_worked:
            self.on_hopeless(error)


class _Seat:
    """A device and the thread that keeps a worker on it."""

    def __init__(self, supervisor: Supervisor, device: str, number: int) -> None:
        self._supervisor, self._device = supervisor, device
        self._thread = threading.Thread(target=self._run, name=f"worker-{number}", daemon=True)
        self._child: WorkerProcess | None = None
        self._pause_s = _FIRST_PAUSE_S
        self.is_ready = self.was_ready = False

    def start(self) -> None:
        self._thread.start()

    def join(self) -> None:
        if self._thread.ident is not None:
            self._thread.join()

    def _run(self) -> None:
        supervisor = self._supervisor
        while not supervisor.is_stopping:
            try:
                self._turn()
            except Exception as error:
                # A full disk for example: the store could not be written. Nothing is lost, and the next turn may do.
                _log.error("worker on %s: %s at %s", self._device, type(error).__name__, where_raised(error))
                self._let_go_whatever()
                supervisor.pause(self._longer_pause())
        self._let_go_whatever()

    def _turn(self) -> None:
        """Have a worker, take a job, see it to its end; or sleep for a moment."""
        supervisor = self._supervisor
        child = self._child if self._child is not None and self._child.is_alive else self._new_child()
        if child is None:
            supervisor.pause(self._longer_pause())
            return
        wakes = supervisor.wakes
        job = supervisor.store.claim(child.name)
        if job is None:
            supervisor.wait(_IDLE_LOOK_S, wakes)
            return
        self._pause_s = _FIRST_PAUSE_S
        _Attempt(supervisor, child, job).run()
        if not child.is_alive:
            self._let_go()

    def _new_child(self) -> WorkerProcess | None:
        """Start a worker and wait until it is ready; None where it did not become so."""
        supervisor = self._supervisor
        self._let_go()
        self._child = child = WorkerProcess(
            supervisor.command, supervisor.task(self._device), supervisor.settings.debug
        )
        supervisor.metrics.workers_started.inc()
        until = time.monotonic() + _START_S
        while time.monotonic() < until and not supervisor.is_stopping:
            message = child.next(_LOOK_EVERY_S)
            if message is None and not child.is_alive:
                _log.error("worker on %s: ended with %s before it was ready", self._device, child.how_it_ended)
                break
            if message is not None and "ready" in message:
                _log.info("worker on %s: ready, %s", self._device, message["ready"])
                self.is_ready = self.was_ready = True
                return child
            if message is not None and "fatal" in message:
                error = _error(message["fatal"])
                _log.error("worker on %s can't start: %s", self._device, error.code)
                supervisor.hopeless(error)
                break
        self._let_go()
        return None

    def _let_go_whatever(self) -> None:
        """The same where even that may fail; what the store could not be told it finds when it is opened again."""
        try:
            self._let_go()
        except Exception as error:
            _log.error("worker on %s: %s at %s", self._device, type(error).__name__, where_raised(error))

    def _let_go(self) -> None:
        self.is_ready = False
        if self._child is not None:
            self._child.end()
            # Whatever it had claimed and did not end is lost with it.
            self._supervisor.take_back(self._child.name)
            self._child = None

    def _longer_pause(self) -> float:
        pause, self._pause_s = self._pause_s, min(2 * self._pause_s, _LONGEST_PAUSE_S)
        return pause


class _Attempt:
    """One attempt at one job."""

    def __init__(self, supervisor: Supervisor, child: WorkerProcess, job: Job) -> None:
        self._supervisor, self._child, self._job = supervisor, child, job
        self._folder = supervisor.settings.job_folder(job.id)
        self._out = self._folder / f"attempt-{child.name}"
        self._began = time.monotonic()

    def run(self) -> None:
        """See it to its end: done, failed, cancelled, lost or put back."""
        supervisor, child, job = self._supervisor, self._child, self._job
        task = JobTask(
            id=job.id,
            model=job.model,
            options=job.options,
            input=job.input,
            folder=str(self._folder.resolve()),
            out=str(self._out.resolve()),
        )
        if job.model not in supervisor.models:
            self._fail(JobError(type="DataError", code="unknown_model", message="the model is no longer served."))
            return
        child.send(task.model_dump(mode="json"))
        while not self._is_over():
            message = child.next(_LOOK_EVERY_S)
            if message is None:
                continue
            if "progress" in message:
                supervisor.store.progress(job.id, child.name, message["progress"], message["stage"])
            elif "done" in message:
                self._finish(Outcome.from_json(json.dumps(message["done"])))
                return
            elif "failed" in message:
                self._failed(message["failed"])
                return

    def _is_over(self) -> bool:
        """Whether this attempt ends without an answer of the worker, which is dead or killed then."""
        supervisor, child, job = self._supervisor, self._child, self._job
        if child.has_said_all:
            child.end()
            self._clean()
            _log.warning("job %s: its worker ended with %s", job.id, child.how_it_ended)
            supervisor.take_back(child.name)
            self._forget_if_ended()
            return True
        limit = supervisor.settings.limits.job_s
        if time.monotonic() - self._began > limit:
            child.end()
            message = f"not done within {limit:g} s, the limit of this service. Send a smaller scan, or fast: true."
            self._fail(JobError(type="ResourceError", code="time_limit", message=message))
            return True
        if supervisor.store.state(job.id) != "running":
            child.end()
            self._clean()
            self._forget_if_ended()
            return True
        if supervisor.is_out_of_time:
            child.end()
            self._clean()
            supervisor.store.release(child.name)
            return True
        return False

    def _finish(self, outcome: Outcome) -> None:
        supervisor, job = self._supervisor, self._job
        target = self._folder / RESULTS
        if supervisor.store.state(job.id) == "running":
            shutil.rmtree(target, ignore_errors=True)
            self._out.rename(target)
            keep(target)
        if supervisor.store.finish(job.id, self._child.name, outcome):
            seconds = time.monotonic() - self._began
            supervisor.metrics.ended.labels(job.model, "done").inc()
            supervisor.metrics.job_seconds.labels(job.model).observe(seconds)
            supervisor.audit.write("done", key=job.owner, job=job.id, model=job.model)
            _log.info("job %s: done in %.1f s", job.id, seconds)
        else:
            # Cancelled in the last moment: nobody sees these files.
            shutil.rmtree(target, ignore_errors=True)
        self._clean()
        self._forget_if_ended()

    def _failed(self, given: Mapping[str, str]) -> None:
        if "where" in given:
            _log.error("job %s: %s", self._job.id, given["where"])
        self._fail(JobError(type=given["type"], code=given["code"], message=given["message"]))

    def _fail(self, error: JobError) -> None:
        supervisor, job = self._supervisor, self._job
        if supervisor.store.fail(job.id, self._child.name, error):
            supervisor.metrics.ended.labels(job.model, "failed").inc()
            supervisor.audit.write("failed", key=job.owner, job=job.id, model=job.model)
            _log.info("job %s: failed (%s)", job.id, error.code)
        self._clean()
        self._forget_if_ended()

    def _clean(self) -> None:
        shutil.rmtree(self._out, ignore_errors=True)

    def _forget_if_ended(self) -> None:
        """Delete the scan of a job that has ended; it was kept only to try again."""
        state = self._supervisor.store.state(self._job.id)
        if state not in ("queued", "running") and self._job.input.kind == "upload":
            shutil.rmtree(self._folder / "input", ignore_errors=True)


def _log_lost(supervisor: Supervisor, job: Job) -> None:
    supervisor.metrics.lost.inc()
    supervisor.audit.write("lost", key=job.owner, job=job.id, model=job.model)
    if job.state == "failed":
        supervisor.metrics.ended.labels(job.model, "failed").inc()
    _log.warning("job %s: lost with its worker, now %s", job.id, job.state)


def _error(given: Mapping[str, str]) -> SagittalError:
    kinds = {kind.__name__: kind for kind in SagittalError.__subclasses__()}
    return kinds.get(given["type"], SagittalError)(given["message"], code=given["code"])
