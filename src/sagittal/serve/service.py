"""What all routes share: one value with everything that a service is made of."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from starlette.requests import HTTPConnection

from sagittal.serve.audit import Audit
from sagittal.serve.dicomweb import DicomWeb
from sagittal.serve.jobs import Job, JobStore
from sagittal.serve.metrics import Metrics
from sagittal.serve.models import ServedModels
from sagittal.serve.refusals import RefusalError
from sagittal.serve.settings import ServeSettings
from sagittal.serve.watch_state import WatchStore


class Supervision(Protocol):
    """What routes need of `supervisor.Supervisor`."""

    @property
    def workers(self) -> int:
        """How many worker processes there should be."""
        ...

    @property
    def ready_workers(self) -> int:
        """How many of them take jobs."""
        ...

    @property
    def is_stopping(self) -> bool:
        """Whether no further job is begun."""
        ...

    def start(self) -> None:
        """Begin to compute jobs."""
        ...

    def wake(self) -> None:
        """Look for jobs now: one was sent or cancelled."""
        ...

    def stop(self, grace_s: float) -> None:
        """Begin no further job, give those in progress some time, and put what is left back into the queue."""
        ...


class Watching(Protocol):
    """What routes and the application need of `watch.Watch`."""

    store: WatchStore

    def start(self) -> None:
        """Begin to look."""
        ...

    def stop(self) -> None:
        """End after the step in progress."""
        ...


@dataclass(eq=False)
class Service:
    """A service at work; `service_of(request)` gives it to a route."""

    settings: ServeSettings
    store: JobStore
    models: ServedModels
    supervisor: Supervision
    audit: Audit
    metrics: Metrics
    arriving: set[str] = field(default_factory=set)
    """Ids of the uploads that are on their way."""
    pacs: DicomWeb | None = None
    """Where series may be fetched from by their UID."""
    watch: Watching | None = None
    """What looks for new series; set once the service is made, since it needs it."""

    def forget_files(self, job: str) -> None:
        """Delete the folder of a job."""
        shutil.rmtree(self.settings.job_folder(job), ignore_errors=True)

    def forget_input(self, job: Job) -> None:
        """Delete what was uploaded for a job that has ended; its results stay."""
        if job.input.kind == "upload":
            shutil.rmtree(self.settings.job_folder(job.id) / "input", ignore_errors=True)

    def cancel(self, job_id: str, owner: str | None) -> Job:
        """End a job that has not ended, with all that belongs to it; one that has stays as it is. Return it.

        Args:
            job_id: of the job.
            owner: see `JobStore.get`; it is the one who cancels.

        Raises:
            RefusalError: see `JobStore.get`.
        """
        before = self.store.get(job_id, owner=owner)
        found = self.store.cancel(job_id, owner=owner)
        self.supervisor.wake()
        if found.state == "cancelled" and not before.has_ended:
            self.metrics.ended.labels(found.model, "cancelled").inc()
            self.audit.write("cancel", key=owner or "", job=found.id, model=found.model)
            if found.started is None:
                # Of a running one the supervisor deletes it, once nobody reads it any more.
                self.forget_input(found)
        return found

    def result_path(self, job: Job, name: str) -> Path:
        """Return the file of a result, which the job's row must list.

        Raises:
            RefusalError: it does not (404).
        """
        if job.state != "done" or name not in {result.name for result in job.results}:
            raise RefusalError("the result: not found, or no longer there.", code="not_found", status=404)
        return self.settings.job_folder(job.id) / "results" / name

    def require_running(self) -> None:
        """Refuse new jobs while the service stops.

        Raises:
            RefusalError: it does (503).
        """
        if self.supervisor.is_stopping:
            raise RefusalError(
                "the service is stopping. Send this again when it is back.",
                code="stopping",
                status=503,
                headers={"Retry-After": "10"},
            )


def service_of(request: HTTPConnection) -> Service:
    """Return the service that a request came to."""
    service = request.app.state.service
    assert isinstance(service, Service)
    return service


def owner_of(request: HTTPConnection) -> str | None:
    """Return whose jobs a request may see: the name of its key; None, all of them, where the service has no keys."""
    owner: str | None = getattr(request.state, "owner", None)
    return owner
