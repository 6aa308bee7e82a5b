"""What became of the series that a watch found."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Query, Request
from fastapi import Path as InPath
from starlette.responses import Response

from sagittal.serve.refusals import not_found
from sagittal.serve.service import owner_of, service_of
from sagittal.serve.views import View
from sagittal.serve.watch_state import WatchState

router = APIRouter(prefix="/api/v1", tags=["watch"])
_PRIVATE = ("series_uid", "study_uid", "job")
"""What leads to a patient. A watch's jobs are no key's, so neither is this."""


class WatchedView(View):
    """A series that the rule matched; where the service has keys, no key learns which one it is, nor its job."""

    series_uid: str | None
    study_uid: str | None
    state: WatchState
    instances: int
    job: str | None
    tries: int
    code: str | None
    found: str
    changed: str


class WatchView(View):
    """A watch, or that there is none."""

    watching: bool
    counts: dict[str, int]
    series: list[WatchedView]


@router.get("/watch")
def watch(request: Request, limit: Annotated[int, Query(ge=1, le=1000)] = 100) -> WatchView:
    """List the series that the watch found, the latest first, and what became of each."""
    found = service_of(request).watch
    if found is None:
        return WatchView(watching=False, counts={}, series=[])
    hidden = {} if owner_of(request) is None else dict.fromkeys(_PRIVATE)
    names = WatchedView.model_fields.keys()
    series = [
        WatchedView(**{name: getattr(each, name) for name in names} | hidden) for each in found.store.latest(limit)
    ]
    return WatchView(watching=True, counts=found.store.counts(), series=series)


@router.post("/watch/{series_uid}/retry", status_code=204, response_class=Response)
def retry(request: Request, series_uid: Annotated[str, InPath(pattern=r"^[0-9][0-9.]{0,63}$")]) -> Response:
    """Begin a series that failed once more; its UID comes from whoever can look into the PACS or the folder."""
    service = service_of(request)
    found = service.watch.store.get(series_uid) if service.watch is not None else None
    if service.watch is None or found is None or found.state != "failed":
        raise not_found("a failed series")
    service.watch.store.change(found, state="found", job=None, round=found.round + 1, tries=0, next_try=0.0, code=None)
    service.audit.write("watch_retry", key=owner_of(request) or "", status=204)
    return Response(status_code=204)
