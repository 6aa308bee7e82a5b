"""The application: routes, one shape for every error, and the supervisor that computes beside them."""

from __future__ import annotations

import logging
import re
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any

from fastapi import Depends, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.security import APIKeyHeader
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response

from sagittal.bundle import Bundle
from sagittal.errors import SagittalError
from sagittal.serve import routes_health, routes_jobs, routes_models, routes_monai_label, routes_page, routes_watch
from sagittal.serve.audit import Audit
from sagittal.serve.dicomweb import DicomWeb
from sagittal.serve.expiry import Expiry, sweep
from sagittal.serve.jobs import JobStore
from sagittal.serve.metrics import Metrics
from sagittal.serve.models import ServedModels
from sagittal.serve.refusals import RefusalError
from sagittal.serve.security import Guard, error_response, route_path
from sagittal.serve.service import Service, Supervision
from sagittal.serve.settings import ServeSettings
from sagittal.serve.supervisor import Supervisor
from sagittal.serve.views import ErrorView
from sagittal.serve.watch import Watch
from sagittal.volumes.dicom_objects import software_version

_log = logging.getLogger("sagittal.serve")
_DESCRIPTION = "Segmentation of 3D medical scans. For research use; not a medical device."
_STATUS_CODES = {404: "not_found", 405: "method_not_allowed", 416: "range"}
_ROUTERS = (
    routes_health.router,
    routes_models.router,
    routes_jobs.router,
    routes_page.router,
    routes_monai_label.router,
    routes_watch.router,
)


def create_app(
    settings: ServeSettings,
    bundles: ServedModels | Sequence[Bundle],
    *,
    supervisor: Supervision | None = None,
) -> FastAPI:
    """Return the service as an ASGI application; its jobs are kept in the settings' folder.

    Jobs of a service that died are taken back before the first request. The supervisor starts and stops with the
    application's lifespan.

    Args:
        settings: where it listens, computes and keeps its jobs.
        bundles: that it serves.
        supervisor: computes jobs; None: worker processes, as the settings say.

    Raises:
        ResourceError: the folder can't be used.
    """
    models = bundles if isinstance(bundles, ServedModels) else ServedModels(bundles)
    store = JobStore(settings.database)
    audit, metrics = Audit(settings.audit_file), Metrics(store.counts)
    computing = supervisor or Supervisor(settings, store, models, audit, metrics)
    service = Service(settings, store, models, computing, audit, metrics, pacs=_pacs(settings))
    if settings.watch is not None:
        service.watch = Watch(service, settings.watch)
    app = FastAPI(
        title="Sagittal",
        version=software_version(),
        description=_DESCRIPTION,
        # Their pages load scripts from elsewhere.
        docs_url=None,
        redoc_url=None,
        lifespan=_lifespan(service),
        responses={"4XX": {"model": ErrorView, "description": "What was refused, and why."}},
        dependencies=[Depends(APIKeyHeader(name="X-API-Key", auto_error=False))] if settings.api_keys else [],
        redirect_slashes=False,
    )
    app.state.service = service
    for router in _ROUTERS:
        app.include_router(router)
    app.add_exception_handler(SagittalError, _told)
    app.add_exception_handler(HTTPException, _told_of_http)
    app.add_exception_handler(RequestValidationError, _told_of_invalid)
    if settings.allowed_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=settings.allowed_origins,
            allow_methods=["GET", "POST", "PUT", "DELETE"],
            allow_headers=["X-API-Key", "Authorization", "Content-Type", "Idempotency-Key", "Range"],
            expose_headers=["Content-Range", "ETag", "Location"],
        )
    app.add_middleware(Guard, settings=settings, audit=audit, metrics=metrics)
    return app


def _pacs(settings: ServeSettings) -> DicomWeb | None:
    watch = settings.watch
    return None if watch is None or watch.dicomweb is None else DicomWeb(watch.dicomweb, watch.credentials)


def _lifespan(service: Service) -> Any:
    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        for job in service.store.recover():
            service.audit.write("lost", job=job.id, model=job.model, status=None)
            _log.warning("job %s: the service died while it ran; now %s", job.id, job.state)
        sweep(service)
        expiry = Expiry(service)
        service.supervisor.start()
        expiry.start()
        if service.watch is not None:
            service.watch.start()
        try:
            yield
        finally:
            if service.watch is not None:
                await run_in_threadpool(service.watch.stop)
            expiry.stop()
            await run_in_threadpool(service.supervisor.stop, service.settings.limits.stop_s)
            service.audit.close()
            service.store.close()

    return lifespan


async def _told(request: Request, error: Exception) -> Response:
    assert isinstance(error, SagittalError)
    return error_response(error)


async def _told_of_http(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    code = _STATUS_CODES.get(error.status_code, "http")
    message = {404: "no such address.", 405: "this address does not take this method."}.get(
        error.status_code, "the request can't be answered."
    )
    headers: Mapping[str, str] = error.headers or {}
    if error.status_code == 405:
        headers = {"Allow": _methods_of(request)}
    return error_response(RefusalError(message, code=code, status=error.status_code, headers=headers))


def _methods_of(request: Request) -> str:
    """Return the methods of an address that several routes share, of which the router names those of the first."""
    document = request.app.openapi()["paths"]
    path = route_path(request.scope)
    for pattern, methods in document.items():
        if re.fullmatch(re.sub(r"\{[a-z_]+\}", "[^/]+", pattern), path):
            return ", ".join(sorted(method.upper() for method in methods))
    return "GET"


async def _told_of_invalid(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    # Where and what was expected; what was sent stays out of the answer and of every log.
    told = "; ".join(f"{'.'.join(str(part) for part in item['loc'])}: {item['msg']}" for item in error.errors()[:5])
    return error_response(RefusalError(f"not valid: {told}.", code="invalid", status=422))
