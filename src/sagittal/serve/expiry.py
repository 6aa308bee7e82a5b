"""Old jobs and uploads are deleted with all their files; so is what a service that died left half done."""

from __future__ import annotations

import logging
import shutil
import threading
import time
from pathlib import Path

from sagittal.serve.service import Service

_log = logging.getLogger("sagittal.serve")
_EVERY_S = 60.0


class Expiry:
    """Looks every minute for what has had its time.

    Args:
        service: whose jobs they are.
    """

    def __init__(self, service: Service) -> None:
        self._service = service
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="expiry", daemon=True)

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def stop(self) -> None:
        """End, once what is being deleted is."""
        self._stopping.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stopping.wait(_EVERY_S):
            try:
                expire(self._service)
            except Exception as error:
                # The next minute may go better; a thread that ended would fill the disk.
                _log.error("old jobs can't be deleted: %s", type(error).__name__)


def expire(service: Service) -> None:
    """Delete the jobs that ended long ago and the uploads that nobody made a job of."""
    limits = service.settings.limits
    for job in service.store.expire(limits.result_ttl_s):
        service.forget_files(job)
        service.audit.write("expired", job=job)
    before = time.time() - limits.series_ttl_s
    for folder in _folders(service.settings.uploads_folder):
        if folder.name not in service.arriving and _changed(folder) < before:
            shutil.rmtree(folder, ignore_errors=True)


def sweep(service: Service) -> None:
    """Delete what belongs to no job; only before the first request, when nothing is on its way."""
    known = service.store.ids()
    for folder in _folders(service.settings.jobs_folder):
        if folder.name not in known:
            shutil.rmtree(folder, ignore_errors=True)
    for folder in _folders(service.settings.uploads_folder):
        if not (folder / "upload.json").exists():
            shutil.rmtree(folder, ignore_errors=True)
    for job in service.store.jobs(limit=1_000_000):
        if job.has_ended:
            service.forget_input(job)
        for attempt in service.settings.job_folder(job.id).glob("attempt-*"):
            shutil.rmtree(attempt, ignore_errors=True)


def _folders(place: Path) -> list[Path]:
    place.mkdir(parents=True, exist_ok=True)
    return [path for path in place.iterdir() if path.is_dir()]


def _changed(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0
