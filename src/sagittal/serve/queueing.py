"""From an upload that was looked at to a job that waits: what every way into the service does last."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from sagittal.serve.disk import without_path
from sagittal.serve.jobs import InputRef, Job, JobOptions, Source
from sagittal.serve.models import ServedModel
from sagittal.serve.refusals import RefusalError, not_found
from sagittal.serve.service import Service


class Sender(NamedTuple):
    """Who wants a job: the name of a key (empty: none), the sender's own name for the job, and which way."""

    owner: str = ""
    key: str | None = None
    source: Source = "api"


def queue_job(
    service: Service,
    folder: Path,
    model: ServedModel,
    options: JobOptions,
    given: InputRef,
    sender: Sender,
    job_id: str,
) -> Job:
    """Make an upload's folder that of a job, and put the job into the queue.

    The same key of the same sender gives the same job, and the folder is deleted. Where this raises, the folder stays.

    Raises:
        RefusalError: the queue is full (429), formats make no sense (422), or the upload is gone (404).
    """
    if options.formats and not given.dicom:
        raise RefusalError("formats: DICOM objects need a DICOM series as input.", code="formats", status=422)
    target = service.settings.job_folder(job_id)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        folder.rename(target)
    except FileNotFoundError:
        raise not_found("the upload") from None  # another request was faster
    except OSError as error:
        raise without_path(error) from None
    try:
        job = service.store.submit(
            model.name,
            options,
            given,
            job_id=job_id,
            owner=sender.owner,
            source=sender.source,
            idempotency_key=sender.key,
            most_queued=service.settings.limits.queued,
        )
    except BaseException:
        # What could not be queued now may be sent again; callers delete what is theirs.
        with suppress(OSError):
            target.rename(folder)
        raise
    if job.id != job_id:
        service.forget_files(job_id)
    return job
