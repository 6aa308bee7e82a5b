"""Series of a PACS as the input of jobs."""

from __future__ import annotations

import shutil
from pathlib import Path

from sagittal.errors import ResourceError
from sagittal.serve.arrivals import is_uid
from sagittal.serve.dicomweb import DicomWeb
from sagittal.serve.disk import require_disk, without_path
from sagittal.serve.jobs import InputRef
from sagittal.serve.refusals import RefusalError, not_found
from sagittal.serve.service import Service
from sagittal.serve.uploads import INPUT, in_channels


def fetched(service: Service, pacs: DicomWeb, study_uid: str, series_uid: str, folder: Path) -> tuple[Path, int]:
    """Write a series into an upload's folder and return its own folder there, and how many files came.

    Raises:
        ResourceError: the PACS gives it not.
        DataError: it is larger than the service takes.
        RefusalError: the disk is full or can't be used (503).
    """
    place = folder / INPUT / "0"
    try:
        require_disk(service.settings.folder, service.settings.limits)
        shutil.rmtree(folder, ignore_errors=True)
        place.mkdir(parents=True)
        return place, pacs.fetch(study_uid, series_uid, place, service.settings.limits)
    except OSError as error:
        raise without_path(error) from None


def fetch_named(service: Service, series_uid: str, folder: Path, channels: int) -> InputRef:
    """Fetch the series that a viewer names by its UID, as OHIF does.

    Raises:
        RefusalError: no such series (404), or the PACS does not answer (503).
    """
    pacs = service.pacs
    if pacs is None or not is_uid(series_uid):
        raise not_found("the image")
    try:
        arrival = pacs.one_series(series_uid)
        if arrival is None or not arrival.is_sound:
            raise not_found("the image")
        fetched(service, pacs, arrival.study_uid, arrival.series_uid, folder)
    except ResourceError as error:
        if error.code == "pacs_not_found":
            raise not_found("the image") from None
        raise RefusalError("the PACS does not answer as expected.", code=error.code, status=503) from None
    return in_channels(InputRef(kind="upload", files=(f"{INPUT}/0",), dicom=True), channels, True)
