"""Whether the service is there, whether it takes jobs, and its numbers."""

from __future__ import annotations

import shutil

from fastapi import APIRouter, Request
from starlette.responses import Response

from sagittal.serve.refusals import RefusalError
from sagittal.serve.service import service_of
from sagittal.serve.views import AliveView, ErrorView, ReadyView
from sagittal.volumes.dicom_objects import software_version

router = APIRouter(tags=["health"])


@router.get("/health")
def health() -> AliveView:
    """Tell that the service answers."""
    return AliveView(status="ok", version=software_version())


@router.get("/ready", responses={503: {"model": ErrorView, "description": "No job would be computed now."}})
def ready(request: Request) -> ReadyView:
    """Tell that jobs are taken and computed: workers are ready, and the disk has room."""
    service = service_of(request)
    service.require_running()
    supervisor, settings = service.supervisor, service.settings
    free, counts = shutil.disk_usage(settings.folder).free, service.store.counts()
    if supervisor.ready_workers == 0:
        raise _not_ready(f"none of {supervisor.workers} workers is ready", "workers")
    if free < settings.limits.free_bytes:
        raise _not_ready("the disk is nearly full", "disk")
    if counts["queued"] >= settings.limits.queued:
        raise _not_ready("the queue is full", "queue_full")
    return ReadyView(
        status="ready",
        workers=supervisor.workers,
        ready_workers=supervisor.ready_workers,
        queued=counts["queued"],
        running=counts["running"],
        disk_free_bytes=free,
    )


@router.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}})
def metrics(request: Request) -> Response:
    """Return the service's numbers in Prometheus' text format."""
    service = service_of(request)
    service.metrics.workers_ready.set(service.supervisor.ready_workers)
    return Response(service.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")


def _not_ready(why: str, code: str) -> RefusalError:
    return RefusalError(f"not ready: {why}.", code=code, status=503, headers={"Retry-After": "5"})
