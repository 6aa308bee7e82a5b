"""The page for people, and the files it is made of."""

from __future__ import annotations

from fastapi import APIRouter, Request
from starlette.responses import Response

from sagittal.serve.page_files import INDEX, page_files
from sagittal.serve.refusals import not_found

router = APIRouter(include_in_schema=False)


@router.head("/")
@router.get("/")
def index(request: Request) -> Response:
    """Return the page."""
    return _file(request, INDEX)


@router.head("/static/{name}")
@router.get("/static/{name}")
def static(request: Request, name: str) -> Response:
    """Return one of the page's files."""
    return _file(request, name)


def _file(request: Request, name: str) -> Response:
    file = page_files().get(name)
    if file is None:
        raise not_found("the file")
    # Asked about each time, so that nobody works with half of an older page after an update.
    headers = {"ETag": file.etag, "Cache-Control": "no-cache"}
    if file.etag in [each.strip() for each in request.headers.get("if-none-match", "").split(",")]:
        return Response(status_code=304, headers=headers)
    return Response(file.content, headers=headers, media_type=file.media_type)
