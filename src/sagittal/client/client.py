"""A client of `sagittal serve`, for scripts and other people's programs."""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias
from urllib.parse import quote

from sagittal.client.connection import Connection, error_of
from sagittal.client.upload import multipart
from sagittal.errors import DataError, ResourceError, SagittalError

LABELS = "labels.nii.gz"
_FIRST_POLL_S = 0.2
_LONGEST_POLL_S = 3.0
_ENDED = frozenset({"done", "failed", "cancelled"})

Job: TypeAlias = dict[str, Any]
"""A job as the service tells it: id, state, stage, progress, results, volumes_ml, flags, error, and more."""
Scan: TypeAlias = str | os.PathLike[str]


@dataclass(frozen=True)
class Prediction:
    """What became of a scan.

    Attributes:
        job: as the service told it at the end.
        volumes_ml: volume of each class or region in mL.
        flags: sentences about what a person should look at.
        results: names of what can be read or saved: labels.nii.gz, volumes.json, labels.seg.dcm, ...
    """

    job: Job
    volumes_ml: dict[str, float]
    flags: tuple[str, ...]
    results: tuple[str, ...]
    _client: Client = field(repr=False, compare=False)

    def save(self, path: Scan, name: str = LABELS) -> Path:
        """Write a result to a file, whole or not at all, and return its path. Errors are those of `Client.download`."""
        return self._client.download(self.job["id"], name, path)

    def read(self, name: str = LABELS) -> bytes:
        """Return the bytes of a result. Errors are those of `Client.download`."""
        return self._client.read(self.job["id"], name)


class Client:
    """Ask a service to segment scans. Made for use from one thread.

    Args:
        url: of the service, with its base path: `http://127.0.0.1:8000`, `https://host/seg`.
        key: the API key, where the service asks for one.
        timeout_s: without a byte from the service.
        patience_s: how long a dropped connection or a busy service is tried again.

    Raises:
        DataError: not an address of a service.

    Every call raises `SagittalError` in the kind that the service names, and `ResourceError` with the code `connection`
    where it can't be reached.
    """

    def __init__(self, url: str, key: str | None = None, *, timeout_s: float = 60.0, patience_s: float = 120.0) -> None:
        self._connection = Connection(url, key, timeout_s, patience_s)

    def models(self) -> list[dict[str, Any]]:
        """Return the models that are served: name, channels, labels, licence, mean Dice, options."""
        found = self._connection.ask("GET", "/api/v1/models")
        return list(found["models"])

    def submit(self, *images: Scan, model: str | None = None, **options: Any) -> str:
        """Send a scan and return the id of its job.

        Args:
            images: a file per channel, in the model's order, or one folder or zip archive of a DICOM series.
            model: name of the model; needed where the service has several.
            options: of the job: mirror, fast, step, subset, postprocessing, series_uid, formats.
        """
        if not images:
            raise DataError("no scan given. Expected a file per channel, or a folder of DICOM slices.")
        fields = {"model": model, "options": options or None}
        with multipart([Path(image) for image in images], fields) as body:
            once = {"Idempotency-Key": secrets.token_hex(16)}
            job = self._connection.ask("POST", "/api/v1/jobs", body=body, headers=once)
        return str(job["id"])

    def job(self, id: str) -> Job:
        """Return a job as it is now."""
        found = self._connection.ask("GET", f"/api/v1/jobs/{quote(id, safe='')}")
        assert isinstance(found, dict)
        return found

    def wait(
        self, id: str, *, on_progress: Callable[[Job], object] | None = None, timeout_s: float | None = None
    ) -> Job:
        """Return a job when it is done, through dropped connections and a restart of the service.

        Args:
            id: of the job.
            on_progress: called with the job whenever it changed.
            timeout_s: give up waiting after this long; the job itself goes on.

        Raises:
            SagittalError: the job failed (in the kind that the service names) or was cancelled (code `cancelled`).
            ResourceError: not done in time (code `timeout`).
        """
        until = None if timeout_s is None else time.monotonic() + timeout_s
        pause_s, before = _FIRST_POLL_S, None
        while True:
            job = self.job(id)
            if job != before and on_progress is not None:
                on_progress(job)
            pause_s = _FIRST_POLL_S if job != before else min(1.5 * pause_s, _LONGEST_POLL_S)
            before = job
            if job["state"] in _ENDED:
                return _of_success(job)
            if until is not None and time.monotonic() + pause_s > until:
                raise ResourceError(
                    f"job {id}: {job['state']} after {timeout_s:g} s. It goes on; wait for it again.", code="timeout"
                )
            time.sleep(pause_s)

    def predict(
        self,
        *images: Scan,
        out: Scan | None = None,
        model: str | None = None,
        on_progress: Callable[[Job], object] | None = None,
        timeout_s: float | None = None,
        **options: Any,
    ) -> Prediction:
        """Send a scan, wait for it and return what became of it.

        Args:
            images: as for `submit`.
            out: file for the label map, `labels.nii.gz` for example; None: fetch it later by `Prediction.save`.
            model: as for `submit`.
            on_progress: as for `wait`.
            timeout_s: as for `wait`.
            options: as for `submit`.
        """
        job = self.wait(self.submit(*images, model=model, **options), on_progress=on_progress, timeout_s=timeout_s)
        names = tuple(str(result["name"]) for result in job["results"])
        done = Prediction(job, dict(job["volumes_ml"]), tuple(job["flags"]), names, self)
        if out is not None:
            done.save(out)
        return done

    def download(self, id: str, name: str, path: Scan) -> Path:
        """Write a result of a job to a file, whole or not at all, and return its path.

        Raises:
            DataError: the job has no such result, or the folder can't be written to.
        """
        target = Path(path)
        part = target.with_name(f".{target.name}.{secrets.token_hex(4)}.part")
        try:
            with part.open("wb") as stream:
                self._fetch(id, name, stream.write, lambda: (stream.seek(0), stream.truncate()))
            part.replace(target)
        except OSError as error:
            raise DataError(
                f"{target}: can't be written ({error.strerror}). Expected a folder with room. Choose another.",
                code="cannot_write",
            ) from None
        finally:
            part.unlink(missing_ok=True)
        return target

    def read(self, id: str, name: str) -> bytes:
        """Return the bytes of a result of a job."""
        content = bytearray()
        self._fetch(id, name, content.extend, content.clear)
        return bytes(content)

    def cancel(self, id: str) -> Job:
        """Stop a job and return it."""
        found = self._connection.ask("POST", f"/api/v1/jobs/{quote(id, safe='')}/cancel")
        assert isinstance(found, dict)
        return found

    def delete(self, id: str) -> None:
        """Remove an ended job, its scan and its results from the service."""
        self._connection.ask("DELETE", f"/api/v1/jobs/{quote(id, safe='')}")

    def _fetch(self, id: str, name: str, write: Callable[[bytes], object], restart: Callable[[], object]) -> None:
        place = "/".join(quote(part, safe="") for part in _parts(id, name))
        self._connection.fetch(f"/api/v1/jobs/{place}", write, restart)


def _parts(id: str, name: str) -> Sequence[str]:
    return id, "results", name


def _of_success(job: Job) -> Job:
    if job["state"] == "done":
        return job
    if job["state"] == "cancelled":
        raise SagittalError(f"job {job['id']}: was cancelled. Submit the scan again.", code="cancelled")
    raise error_of(job.get("error") or {})
