"""Send a scan, follow its job, fetch its results."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from datetime import datetime, timedelta
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request
from fastapi import Path as InPath
from pydantic import Field
from starlette.concurrency import run_in_threadpool
from starlette.responses import FileResponse, JSONResponse, Response

from sagittal.errors import PlanError
from sagittal.inference.subset import chosen_spec
from sagittal.plan.base import Frozen
from sagittal.serve.disk import require_disk
from sagittal.serve.forms import read_small, receive
from sagittal.serve.jobs import InputRef, Job, JobOptions, State, new_id, require_room
from sagittal.serve.models import ServedModel
from sagittal.serve.queueing import Sender, queue_job
from sagittal.serve.refusals import RefusalError, not_found
from sagittal.serve.service import Service, owner_of, service_of
from sagittal.serve.uploads import arrange, at_paths, in_channels
from sagittal.serve.views import (
    ErrorBody,
    JobList,
    JobView,
    OptionsView,
    ResultView,
    SeriesList,
    SeriesView,
)
from sagittal.volumes.dicom_catalogue import list_series

router = APIRouter(prefix="/api/v1", tags=["jobs"])

_KEY = Field(max_length=200, pattern=r"^[\x21-\x7e]+$")
_ID = r"^[0-9a-f]{32}$"
JobId = Annotated[str, InPath(pattern=_ID, description="as POST /jobs answered it")]
ResultName = Annotated[str, InPath(max_length=100, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]


class NamedScan(Frozen):
    """The body of a request for a job whose scan is here already."""

    model: Annotated[str, Field(max_length=200)] | None = None
    """Name of the model; may be left out where there is one."""
    options: JobOptions = JobOptions()
    paths: Annotated[tuple[Annotated[str, Field(max_length=4096)], ...], Field(max_length=64)] = ()
    """A scan per channel, below a folder that the service may read."""
    upload: Annotated[str, Field(pattern=_ID)] | None = None
    """What POST /series answered, instead of paths."""


_FORM = {
    "type": "object",
    "required": ["image"],
    "properties": {
        "image": {
            "type": "array",
            "minItems": 1,
            "items": {"type": "string", "format": "binary"},
            "description": "a file per channel, in the model's order, or one zip of a DICOM series",
        },
        "model": {"type": "string", "description": "may be left out where there is one"},
        "options": {"type": "string", "description": "JSON, as in the other kind of body"},
    },
}
_NAMED = NamedScan.model_json_schema()
# FastAPI knows nothing of a body that is read by hand, so nothing in its schema may point elsewhere.
_NAMED["properties"]["options"] = _NAMED.pop("$defs")["JobOptions"]
_BODY = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {"schema": _FORM},
            "application/json": {"schema": _NAMED},
        },
    },
    "parameters": [
        {
            "name": "Idempotency-Key",
            "in": "header",
            "required": False,
            "schema": {"type": "string", "maxLength": 200, "pattern": r"^[\x21-\x7e]+$"},
            "description": "a request that is sent again with the same key gives the same job",
        }
    ],
}
_ZIP = {
    "requestBody": {"required": True, "content": {"multipart/form-data": {"schema": {**_FORM, "title": "Study"}}}},
}


@router.post("/jobs", status_code=202, response_model=JobView, openapi_extra=_BODY)
async def submit(request: Request) -> Response:
    """Send a scan; the answer is its job, which waits to be computed."""
    service, owner = service_of(request), owner_of(request) or ""
    service.require_running()
    key = request.headers.get("idempotency-key")
    if key is not None and not (0 < len(key) <= 200 and key.isascii() and key.isprintable() and " " not in key):
        raise RefusalError("the Idempotency-Key is no word of at most 200 letters.", code="invalid", status=400)
    known = await run_in_threadpool(service.store.known, owner, key) if key else None
    if known is not None:
        return _accepted(service, known)
    await run_in_threadpool(require_capacity, service, request)
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() == "application/json":
        named = _named(await read_small(request, service.settings.limits))
        job, size = await run_in_threadpool(_submit_named, service, named, owner, key), None
    else:
        job, size = await _submit_form(request, service, owner, key)
    service.audit.write("submit", key=owner, job=job.id, model=job.model, status=202, bytes=size)
    service.supervisor.wake()
    return _accepted(service, job)


@router.get("/jobs")
def jobs(
    request: Request,
    state: State | None = None,
    limit: Annotated[int, Query(ge=1, le=1000)] = 100,
    after: Annotated[str | None, Query(pattern=_ID)] = None,
) -> JobList:
    """List jobs, the latest first."""
    service = service_of(request)
    found = service.store.jobs(state=state, limit=limit + 1, after=after, owner=owner_of(request))
    views = [job_view(service, job) for job in found[:limit]]
    return JobList(jobs=views, next=views[-1].id if len(found) > limit else None)


@router.get("/jobs/{job_id}")
def job(request: Request, job_id: JobId) -> JobView:
    """Return a job as it is now."""
    service = service_of(request)
    return job_view(service, service.store.get(job_id, owner=owner_of(request)))


@router.post("/jobs/{job_id}/cancel")
def cancel(request: Request, job_id: JobId) -> JobView:
    """End a job that has not ended; one that has stays as it is."""
    service = service_of(request)
    return job_view(service, service.cancel(job_id, owner_of(request)))


@router.delete("/jobs/{job_id}", status_code=204, response_class=Response)
def delete(request: Request, job_id: JobId) -> Response:
    """Delete a job that has ended, with all its files."""
    service, owner = service_of(request), owner_of(request)
    service.store.delete(job_id, owner=owner)
    service.forget_files(job_id)
    service.audit.write("delete", key=owner or "", job=job_id)
    return Response(status_code=204)


@router.head("/jobs/{job_id}/results/{name}", include_in_schema=False)
@router.get(
    "/jobs/{job_id}/results/{name}",
    response_class=Response,
    responses={
        200: {"content": {"application/octet-stream": {}}},
        206: {"description": "the ranges that were asked for"},
        304: {"description": "the client has it"},
    },
)
def result(request: Request, job_id: JobId, name: ResultName) -> Response:
    """Return a file that a job made; ranges and conditional requests are answered."""
    service, owner = service_of(request), owner_of(request)
    found = service.store.get(job_id, owner=owner)
    path = service.result_path(found, name)
    file = next(each for each in found.results if each.name == name)
    etag = f'"{file.sha256[:32]}"'
    headers = {"ETag": etag, "Cache-Control": "private, no-cache"}
    if etag in [each.strip() for each in request.headers.get("if-none-match", "").split(",")]:
        return Response(status_code=304, headers=headers)
    _require_range(request.headers.get("range"), file.bytes)
    try:
        stat = path.stat()
    except OSError:
        raise not_found("the result") from None
    service.audit.write("download", key=owner or "", job=found.id, model=found.model, bytes=file.bytes)
    return FileResponse(path, headers=headers, media_type=file.media_type, filename=name, stat_result=stat)


@router.post("/series", status_code=201, openapi_extra=_ZIP)
async def series(request: Request) -> SeriesList:
    """Send a DICOM study as a zip and learn which series are in it; then POST /jobs with the upload's id."""
    service, owner = service_of(request), owner_of(request) or ""
    service.require_running()
    await run_in_threadpool(require_capacity, service, request)
    upload, limits = new_id(), service.settings.limits
    folder = service.settings.uploads_folder / upload
    service.arriving.add(upload)
    try:
        received = await receive(request, folder, limits)
        service.metrics.upload_bytes.inc(received.size)
        given = await run_in_threadpool(arrange, received, 0, limits)
        if not given.dicom:
            raise RefusalError("no DICOM file. Expected a zip of a study.", code="unknown_format", status=415)
        found = [info for file in given.files for info in await run_in_threadpool(list_series, folder / file)]
        note = json.dumps({"owner": owner, "input": given.model_dump(mode="json")})
        await run_in_threadpool((folder / "upload.json").write_text, note)
    except BaseException:
        await run_in_threadpool(shutil.rmtree, folder, True)
        raise
    finally:
        service.arriving.discard(upload)
    service.audit.write("list_series", key=owner, status=201, bytes=received.size)
    expires = datetime.now().astimezone() + timedelta(seconds=limits.series_ttl_s)
    fields = SeriesView.model_fields
    listed = [SeriesView.model_validate({name: _plain(getattr(info, name)) for name in fields}) for info in found]
    return SeriesList(upload=upload, expires=expires.isoformat(timespec="seconds"), series=listed)


def job_view(service: Service, job: Job) -> JobView:
    """Return what callers see of a job."""
    base = f"{service.settings.base_url}/api/v1/jobs/{job.id}/results/"
    results = [
        ResultView(
            name=each.name, format=each.format, media_type=each.media_type, bytes=each.bytes, href=base + each.name
        )
        for each in job.results
    ]
    expires = None
    if job.ended is not None:
        ended = datetime.fromisoformat(job.ended) + timedelta(seconds=service.settings.limits.result_ttl_s)
        expires = ended.isoformat(timespec="seconds").replace("+00:00", "Z")
    return JobView(
        id=job.id,
        model=job.model,
        state=job.state,
        stage=job.stage,
        progress=round(job.progress, 4),
        queue_position=job.queue_position,
        created=job.created,
        started=job.started,
        ended=job.ended,
        expires=expires,
        attempt=job.attempt,
        options=OptionsView.model_validate({name: _plain(value) for name, value in job.options}),
        error=None if job.error is None else ErrorBody.model_validate(job.error.model_dump()),
        volumes_ml=job.volumes_ml,
        flags=list(job.flags),
        results=results,
    )


async def _submit_form(request: Request, service: Service, owner: str, key: str | None) -> tuple[Job, int]:
    job_id, limits = new_id(), service.settings.limits
    folder = service.settings.uploads_folder / job_id
    service.arriving.add(job_id)
    try:
        received = await receive(request, folder, limits)
        service.metrics.upload_bytes.inc(received.size)
        named = _named_by(received.fields)
        if named.upload is not None:
            raise RefusalError("images and an upload's id together. Send one of the two.", code="invalid", status=422)
        model = _sensible(service, named)

        def queue() -> Job:
            given = arrange(received, len(model.spec.channel_names), limits)
            return queue_job(service, folder, model, named.options, given, Sender(owner, key), job_id)

        return await run_in_threadpool(queue), received.size
    except BaseException:
        await run_in_threadpool(shutil.rmtree, folder, True)
        raise
    finally:
        service.arriving.discard(job_id)


def _submit_named(service: Service, named: NamedScan, owner: str, key: str | None) -> Job:
    model = _sensible(service, named)
    channels, settings = len(model.spec.channel_names), service.settings
    if bool(named.paths) == (named.upload is not None):
        raise RefusalError("expected either paths or an upload's id.", code="invalid", status=422)
    if named.upload is None:
        given = at_paths(named.paths, settings.allowed_folders, channels, settings.limits)
        folder = settings.uploads_folder / new_id()
        folder.mkdir(parents=True)
        try:
            return queue_job(service, folder, model, named.options, given, Sender(owner, key), folder.name)
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
    folder = settings.uploads_folder / named.upload
    try:
        note: dict[str, Any] = json.loads((folder / "upload.json").read_text())
    except (OSError, ValueError):
        note = {}
    if note.get("owner") != owner:
        raise not_found("the upload")
    given = in_channels(InputRef.model_validate_json(json.dumps(note["input"])), channels, True)
    return queue_job(service, folder, model, named.options, given, Sender(owner, key), new_id())


def _sensible(service: Service, named: NamedScan) -> ServedModel:
    """Return the model of a request after a look at its options."""
    model = service.models.named(named.model)
    try:
        chosen_spec(model.spec, named.options.subset)
    except PlanError as error:
        raise RefusalError(error.message.replace("--subset ", "subset: ", 1), code=error.code, status=422) from None
    return model


def _named(content: bytes) -> NamedScan:
    try:
        return NamedScan.from_json(content, source="the request")
    except PlanError as error:
        raise RefusalError(error.message, code="invalid", status=422) from None
    except RecursionError:
        raise RefusalError("the request is nested too deeply.", code="invalid", status=422) from None


def _named_by(fields: Mapping[str, str]) -> NamedScan:
    """Return what a form says beside its images."""
    unknown = sorted(fields.keys() - {"model", "options", "upload"})
    if unknown:
        raise RefusalError(
            f"{len(unknown)} unknown fields. Expected image, model and options.", code="invalid", status=422
        )
    try:
        options = json.loads(fields.get("options") or "{}")
    except (ValueError, RecursionError):
        raise RefusalError("options: no JSON.", code="invalid", status=422) from None
    given = {"options": options} | ({"model": fields["model"]} if fields.get("model") else {})
    return _named(json.dumps(given | ({"upload": fields["upload"]} if fields.get("upload") else {})).encode())


def require_capacity(service: Service, request: Request) -> None:
    """Refuse a scan before it comes where the queue or the disk is full.

    Raises:
        RefusalError: either is (429, 503).
    """
    stated = request.headers.get("content-length", "0")
    require_room(service.store.counts()["queued"], service.settings.limits.queued)
    # Once as it comes, once unpacked.
    coming = 2 * int(stated[:18]) if stated.isdigit() else 0
    if coming <= 2 * service.settings.limits.upload_bytes:
        require_disk(service.settings.folder, service.settings.limits, coming)


def _require_range(text: str | None, size: int) -> None:
    """Refuse ranges that Starlette would answer in plain text."""
    if text is None:
        return
    try:
        FileResponse._parse_range_header(text, size)
    except Exception as error:
        status = getattr(error, "status_code", 416 if "NotSatisfiable" in type(error).__name__ else 400)
        headers = {"Content-Range": f"bytes */{size}"} if status == 416 else {}
        raise RefusalError(
            "the Range makes no sense for this file.", code="range", status=status, headers=headers
        ) from None


def _accepted(service: Service, job: Job) -> Response:
    view = job_view(service, job)
    where = f"{service.settings.base_url}/api/v1/jobs/{job.id}"
    return JSONResponse(view.model_dump(mode="json"), 202, {"Location": where})


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
