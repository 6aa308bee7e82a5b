"""Scans that a client sent once and asks for with several models: kept in a folder each, until none asked for long.

UPLOADS/ID/upload.json     whose it is, and what files it has; written last
UPLOADS/ID/input           the files
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil

from fastapi import Request
from starlette.concurrency import run_in_threadpool

from sagittal.serve.disk import link_or_copy, without_path
from sagittal.serve.forms import receive
from sagittal.serve.jobs import InputRef, new_id
from sagittal.serve.pacs import fetch_named
from sagittal.serve.refusals import RefusalError, not_found
from sagittal.serve.routes_jobs import require_capacity
from sagittal.serve.service import Service, owner_of, service_of
from sagittal.serve.uploads import INPUT, arrange, in_channels

NOTE = "upload.json"


async def keep_scan(request: Request, upload: str) -> None:
    """Write a request's scan into a folder that inference takes it from, until it was not asked for long enough."""
    service, owner = service_of(request), owner_of(request) or ""
    service.require_running()
    await run_in_threadpool(require_capacity, service, request)
    limits, uploads = service.settings.limits, service.settings.uploads_folder
    arriving = new_id()
    folder = uploads / arriving
    service.arriving.add(arriving)
    try:
        received = await receive(request, folder, limits, ("file", "files", "image"))
        service.metrics.upload_bytes.inc(received.size)

        def put() -> None:
            given = arrange(received, 0, limits)
            note = json.dumps({"owner": owner, "input": given.model_dump(mode="json")})
            (folder / NOTE).write_text(note, encoding="utf-8")
            shutil.rmtree(uploads / upload, ignore_errors=True)
            folder.rename(uploads / upload)

        await run_in_threadpool(put)
    except BaseException:
        await run_in_threadpool(shutil.rmtree, folder, True)
        raise
    finally:
        service.arriving.discard(arriving)
    service.audit.write("keep_scan", key=owner, status=200, bytes=received.size)


def link_kept(service: Service, owner: str, session: str, image: str, folder: Path, channels: int) -> InputRef:
    """Link a scan that was kept into a new job's folder; where a PACS is known, `image` may name a series of it."""
    if not session and not image:
        raise RefusalError(
            "no scan. Expected one in the part 'file', a session_id, or the name of an image that was sent before.",
            code="no_image",
            status=422,
        )
    upload = session or id_of_name(owner, image)
    try:
        given = known_upload(service, upload, owner)
    except RefusalError:
        if session or service.pacs is None:
            raise
        return fetch_named(service, image, folder, channels)
    given = in_channels(given, channels, given.dicom)
    # The scan is asked for again with the next model, so the job gets its files under a second name.
    try:
        shutil.copytree(service.settings.uploads_folder / upload / INPUT, folder / INPUT, copy_function=link_or_copy)
    except OSError as error:
        raise without_path(error) from None
    return given


def id_of_name(owner: str, image: str) -> str:
    """Return the id of a scan that a client gave a name: the name, which may be a patient's, is not kept."""
    return hashlib.sha256(f"{owner}\0{image}".encode("utf-8", "surrogatepass")).hexdigest()[:32]


def known_upload(service: Service, upload: str, owner: str) -> InputRef:
    """Return the files of a kept scan, which is then kept for longer.

    Raises:
        RefusalError: there is none of this id, or it is somebody else's.
    """
    is_id = len(upload) == 32 and set(upload) <= set("0123456789abcdef")
    folder = service.settings.uploads_folder / upload
    try:
        note = json.loads((folder / NOTE).read_text(encoding="utf-8")) if is_id else {}
        if note.get("owner") == owner:
            os.utime(folder)
            return InputRef.model_validate_json(json.dumps(note["input"]))
    except (OSError, ValueError):
        pass
    raise not_found("the session" if is_id else "the image")
