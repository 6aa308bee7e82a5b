"""What the 3D Slicer and OHIF plug-ins of MONAI Label ask for inference, so that they work unchanged.

    GET    /auth/, POST /auth/token             whether a key is needed; a key for a password
    GET    /info/                               models with type, labels, description and options
    PUT    /session/                            a scan (parts called `files`); the answer's id stands for it
    GET    /session/ID, DELETE /session/ID      whether it is still there; forget it
    PUT    /datastore/?image=NAME               a scan (part `file`) under the name that the client has for it
    GET    /datastore/                          how many there are: none, the service keeps no data set
    POST   /infer/MODEL?image=NAME&session_id=ID&output=all|image|json|dicom_seg
                                                a job, waited for; form field `params`, the scan itself in part `file`

Written from what the plug-ins send and read (MONAI Label 0.3 to 0.8). Addresses lie at the root and below /monai, with
and without the slash at their end. Labels are named in `params.label_names`. Where a class is nowhere in a scan, Slicer
would give its neighbours' names to what follows, so the label map that `output=all` answers counts the classes that are
there 1, 2, 3 and on, as `label_names` says; `output=image` and `restore_label_idx: false` keep the model's values.
"""

from __future__ import annotations

import asyncio
import hmac
import json
import shutil
import time
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal, TypeVar
from urllib.parse import parse_qs

from fastapi import APIRouter, Query, Request
from fastapi import Path as InPath
from starlette.concurrency import run_in_threadpool
from starlette.responses import JSONResponse, Response

from sagittal.serve.forms import read_small, receive
from sagittal.serve.jobs import Job, JobOptions, new_id
from sagittal.serve.kept_scans import id_of_name, keep_scan, known_upload, link_kept
from sagittal.serve.label_answers import Answer, label_answer, multipart
from sagittal.serve.models import INTENDED_USE, ServedModel, written_values
from sagittal.serve.queueing import Sender, queue_job
from sagittal.serve.refusals import RefusalError
from sagittal.serve.routes_jobs import require_capacity
from sagittal.serve.service import Service, owner_of, service_of
from sagittal.serve.settings import hash_of_key
from sagittal.serve.uploads import arrange
from sagittal.volumes.dicom_objects import software_version

router = APIRouter(tags=["monai label"])

_OPTIONS = ("mirror", "fast", "postprocessing")
"""Of a job that the plug-ins show as check boxes and send back."""
_LOOK_EVERY_S = 0.1
_UNAVAILABLE = frozenset({"worker_died", "time_limit", "memory", "disk", "bug"})
"""Codes of jobs that failed for reasons that are not the scan's own."""
Output = Literal["all", "image", "json", "dicom_seg"]
_Name = Annotated[str, Query(max_length=1000)]
_SCAN_BODY = {
    "requestBody": {
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "properties": {
                        "params": {"type": "string", "description": "JSON"},
                        "file": {"type": "string", "format": "binary"},
                        "files": {"type": "array", "items": {"type": "string", "format": "binary"}},
                    },
                }
            }
        }
    }
}


_LOGIN_BODY = {
    "requestBody": {
        "required": True,
        "content": {
            "application/x-www-form-urlencoded": {
                "schema": {
                    "type": "object",
                    "required": ["password"],
                    "properties": {"username": {"type": "string"}, "password": {"type": "string"}},
                }
            }
        },
    }
}


_Route = TypeVar("_Route", bound=Callable[..., Any])


def monai_label_route(path: str, *methods: str, **more: Any) -> Callable[[_Route], _Route]:
    """Return a decorator that answers an address at the root and below /monai, with and without a slash."""

    def decorate(function: _Route) -> _Route:
        for prefix in ("", "/monai"):
            for ending in ("", "/") if path.endswith("/") else ("",):
                where = f"{prefix}{path.rstrip('/')}{ending}"
                is_shown = prefix == "" and where == path
                router.add_api_route(where, function, methods=[*methods], include_in_schema=is_shown, **more)
        return function

    return decorate


@monai_label_route("/info/", "GET")
def info(request: Request) -> JSONResponse:
    """Tell the plug-ins of MONAI Label which models there are."""
    models = service_of(request).models
    told = {name: _model_info(model) for name, model in models.items()}
    names = [label for model in told.values() for label in model["labels"]]
    return JSONResponse(
        {
            "name": "Sagittal",
            "description": INTENDED_USE,
            "version": software_version(),
            # OHIF leaves out the first, whatever it is called.
            "labels": list(dict.fromkeys(["background", *names])),
            "models": told,
            "trainers": {},
            "strategies": {},
            "scoring": {},
            "train_stats": {},
            "datastore": _no_data_set(),
        }
    )


@monai_label_route("/auth/", "GET")
def auth(request: Request) -> JSONResponse:
    """Tell whether a key is needed, which Slicer then asks its user for as a password."""
    return JSONResponse({"enabled": bool(service_of(request).settings.api_keys)})


@monai_label_route("/auth/token", "POST", openapi_extra=_LOGIN_BODY)
async def auth_token(request: Request) -> JSONResponse:
    """Return the API key that was typed as a password, for the client to send from now on; the user's name is free."""
    service = service_of(request)
    content = await read_small(request, service.settings.limits)
    try:
        typed = parse_qs(content.decode(), max_num_fields=16).get("password", [""])[0]
    except ValueError:
        typed = ""
    digest = hash_of_key(typed)
    if not [key for key in service.settings.api_keys if hmac.compare_digest(key.sha256, digest)]:
        service.audit.write("refused", status=401)
        headers = {"WWW-Authenticate": "Bearer"}
        raise RefusalError("no valid API key. Type it as the password.", code="api_key", status=401, headers=headers)
    return JSONResponse({"access_token": typed, "token_type": "Bearer"})


@monai_label_route("/auth/token/valid", "GET")
def auth_valid(request: Request) -> JSONResponse:
    """Tell that the key that came along is valid; any other was refused before."""
    return JSONResponse({"username": owner_of(request) or ""})


@monai_label_route("/datastore/", "GET")
def datastore(request: Request, output: Annotated[str, Query(max_length=20)] = "stats") -> JSONResponse:
    """Tell that there is no data set to be labelled."""
    return JSONResponse({"objects": {}} if output == "all" else [] if output == "train" else _no_data_set())


@monai_label_route("/datastore/", "PUT", openapi_extra=_SCAN_BODY)
async def put_image(request: Request, image: Annotated[str, Query(min_length=1, max_length=1000)]) -> JSONResponse:
    """Keep a scan for later inference under the name that the client has for it; a second one takes its place."""
    owner = owner_of(request) or ""
    await keep_scan(request, id_of_name(owner, image))
    return JSONResponse({"image": image})


@monai_label_route("/session/", "PUT", openapi_extra=_SCAN_BODY)
async def put_session(request: Request) -> JSONResponse:
    """Keep a scan for later inference."""
    session = new_id()
    await keep_scan(request, session)
    return JSONResponse({"session_id": session, "session_info": _session_info(service_of(request), session)})


SessionId = Annotated[str, InPath(max_length=100)]


@monai_label_route("/session/{session_id}", "GET")
def get_session(request: Request, session_id: SessionId) -> JSONResponse:
    """Tell that a session's scan is still there, and keep it for longer."""
    service = service_of(request)
    known_upload(service, session_id, owner_of(request) or "")
    return JSONResponse(_session_info(service, session_id))


@monai_label_route("/session/{session_id}", "DELETE")
def delete_session(request: Request, session_id: SessionId) -> JSONResponse:
    """Forget a session's scan."""
    service = service_of(request)
    known_upload(service, session_id, owner_of(request) or "")
    told = _session_info(service, session_id)
    shutil.rmtree(service.settings.uploads_folder / session_id, ignore_errors=True)
    return JSONResponse(told)


@monai_label_route(
    "/infer/{model}",
    "POST",
    openapi_extra=_SCAN_BODY,
    response_class=Response,
    responses={
        200: {"content": {"multipart/form-data": {}, "application/octet-stream": {}, "application/dicom": {}}},
        503: {"description": "the scan was not computed for reasons that are not its own"},
    },
)
async def infer(
    request: Request,
    model: Annotated[str, InPath(max_length=200)],
    image: _Name = "",
    session_id: Annotated[str, Query(max_length=100)] = "",
    output: Output = "all",
) -> Response:
    """Segment a scan and answer with the label map: the one that comes along, a session's, or one that was kept."""
    service, owner = service_of(request), owner_of(request) or ""
    service.require_running()
    served = service.models.named(model)
    await run_in_threadpool(require_capacity, service, request)
    job_id, limits = new_id(), service.settings.limits
    folder = service.settings.uploads_folder / job_id
    service.arriving.add(job_id)
    try:
        fields, size = {}, 0
        has_image = False
        if request.headers.get("content-length", "") != "0" and "content-type" in request.headers:
            received = await receive(request, folder, limits, ("file", "image"))
            service.metrics.upload_bytes.inc(received.size)
            fields, size, has_image = received.fields, received.size, bool(received.images)
        params = _params(fields)
        options = _options(params, output)

        def queue() -> Job:
            channels = len(served.spec.channel_names)
            if has_image:
                given = arrange(received, channels, limits)
            else:
                shutil.rmtree(folder, ignore_errors=True)
                given = link_kept(service, owner, session_id, image, folder, channels)
            sender = Sender(owner, source="monailabel")
            return queue_job(service, folder, served, options, given, sender, job_id)

        job = await run_in_threadpool(queue)
    except BaseException:
        await run_in_threadpool(shutil.rmtree, folder, True)
        raise
    finally:
        service.arriving.discard(job_id)
    service.audit.write("submit", key=owner, job=job.id, model=job.model, status=200, bytes=size)
    service.supervisor.wake()
    done = await _waited_for(request, service, job)
    return await run_in_threadpool(_answer, service, served, done, params, output)


async def _waited_for(request: Request, service: Service, job: Job) -> Job:
    """Return a job that was done.

    Raises:
        RefusalError: it failed, or the client went away and it was cancelled.
    """
    while not job.has_ended:
        await asyncio.sleep(_LOOK_EVERY_S)
        if await request.is_disconnected():
            job = await run_in_threadpool(service.cancel, job.id, job.owner)
            break
        if service.supervisor.is_stopping and job.state == "queued":
            service.require_running()
        job = await run_in_threadpool(service.store.get, job.id)
    if job.state == "done":
        return job
    if job.error is None:
        raise RefusalError("the job was cancelled.", code="cancelled", status=409)
    status = 503 if job.error.code in _UNAVAILABLE else 422
    raise RefusalError(job.error.message, code=job.error.code, status=status)


def _answer(service: Service, model: ServedModel, job: Job, params: Mapping[str, Any], output: Output) -> Response:
    if output == "dicom_seg":
        if "labels.seg.dcm" not in {result.name for result in job.results}:
            raise RefusalError("no DICOM segmentation could be written.", code="formats", status=422)
        content = service.result_path(job, "labels.seg.dcm").read_bytes()
        service.audit.write("download", key=job.owner, job=job.id, model=job.model, bytes=len(content))
        return _file("labels.seg.dcm", content, "application/dicom")
    made = label_answer(
        service.result_path(job, "labels.nii.gz"),
        written_values(model.spec),
        params,
        is_counted=output in ("all", "json") and params.get("restore_label_idx") is not False,
    )
    told = _told(job, made)
    service.audit.write("download", key=job.owner, job=job.id, model=job.model, bytes=len(made.content))
    if output == "json":
        return JSONResponse(told)
    if output == "image":
        return _file(made.name, made.content, "application/octet-stream")
    content, kind = multipart(told, made)
    return Response(content, headers={"content-type": kind})


def _told(job: Job, made: Answer) -> dict[str, Any]:
    return {
        "label_names": made.label_names,
        # OHIF reads it whatever is in it.
        "centroids": {},
        "model": job.model,
        "job": job.id,
        "volumes_ml": job.volumes_ml,
        "flags": list(job.flags),
    }


def _file(name: str, content: bytes, media_type: str) -> Response:
    headers = {"content-disposition": f'attachment; filename="{name}"'}
    return Response(content, media_type=media_type, headers=headers)


def _session_info(service: Service, session: str) -> dict[str, Any]:
    now = int(time.time())
    return {
        "name": session,
        "creation_ts": now,
        "last_access_ts": now,
        "expiry": int(service.settings.limits.series_ttl_s),
    }


def _model_info(model: ServedModel) -> dict[str, Any]:
    view = model.view()
    channels = ", ".join(view.channels)
    return {
        "type": "segmentation",
        "labels": {label.name: label.value for label in view.labels},
        "dimension": 3,
        "description": f"{view.network}, of {channels}. {INTENDED_USE}",
        "config": {name: JobOptions.model_fields[name].default for name in _OPTIONS},
    }


def _no_data_set() -> dict[str, Any]:
    return {"total": 0, "completed": 0, "label_tags": {}, "train": []}


def _params(fields: Mapping[str, str]) -> dict[str, Any]:
    try:
        found = json.loads(fields.get("params") or "{}")
    except (ValueError, RecursionError):
        raise RefusalError("params: no JSON.", code="invalid", status=422) from None
    if found is None:
        return {}
    if not isinstance(found, dict):
        raise RefusalError("params: no JSON object.", code="invalid", status=422)
    return found


def _options(params: Mapping[str, Any], output: Output) -> JobOptions:
    """Return the options among what a plug-in sends; the rest is for other servers."""
    given = {name: params[name] for name in _OPTIONS if name in params}
    if not all(isinstance(value, bool) for value in given.values()):
        raise RefusalError(f"params: {', '.join(_OPTIONS)} are true or false.", code="invalid", status=422)
    return JobOptions(**given, formats=("seg",) if output == "dicom_seg" else ())
