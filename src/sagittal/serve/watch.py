"""New series that a rule matches are fetched, segmented, and their segmentation is stored where they came from.

One thread looks for series, and takes each a step further when its time has come. A series is begun once its images
have stopped coming: when a look finds as much as the one before. Each step is noted before the next: what dies in
between is done again, and comes to the same: a job has its series' name as idempotency key, and a segmentation's UIDs
follow from what is in it, so that a PACS that has it keeps the one it has. An error puts a series off, further
each time, and holds up no other one; after too many of them it has failed, which its row, the audit log and the
service's log say.
"""

from __future__ import annotations

import logging
import shutil
import threading
import time
from collections import Counter
from datetime import date, timedelta
from pathlib import Path
from typing import Protocol

from sagittal.errors import DataError, PlanError, ResourceError, SagittalError
from sagittal.plan.base import write_atomically
from sagittal.serve.arrivals import Arrival, WatchRule, parse_rule
from sagittal.serve.dicomweb import DicomWeb
from sagittal.serve.disk import require_disk, without_path
from sagittal.serve.jobs import InputRef, Job, JobOptions, new_id
from sagittal.serve.models import ServedModel
from sagittal.serve.pacs import fetched
from sagittal.serve.queueing import Sender, queue_job
from sagittal.serve.refusals import RefusalError
from sagittal.serve.security import where_raised
from sagittal.serve.service import Service
from sagittal.serve.settings import WatchSettings
from sagittal.serve.uploads import INPUT
from sagittal.serve.watch_state import Watched, WatchStore
from sagittal.volumes.dicom_arrivals import WatchedFolder

_log = logging.getLogger("sagittal.serve")
RESULT = "labels.seg.dcm"
OUTBOX = "sagittal"
"""Folder in a watched folder that segmentations go to."""
MAX_TRIES = 8
LONGEST_WAIT_S = 3600.0
_STEP_S = 1.0
_PATIENT = frozenset({"queue_full", "disk", "stopping", "pacs_unreachable", "pacs_credentials", "still_arriving"})
"""Codes of what passes by itself, or by somebody's work elsewhere: they are no tries, and no number of them fails."""


class Place(Protocol):
    """Where series come from and segmentations go to."""

    def find(self) -> tuple[Arrival, ...]:
        """Return the series that are there."""
        ...

    def fetch(self, service: Service, watched: Watched, folder: Path) -> int:
        """Write the files of a series into an upload's folder and return how many there are."""
        ...

    def store(self, watched: Watched, file: Path) -> None:
        """Put a segmentation there; where it is already, nothing changes."""
        ...


class PacsPlace:
    """A PACS over DICOMweb.

    Args:
        pacs: that is asked.
        rule: whose modality is looked for.
        since_days: of studies, counted back from today; None: all.
    """

    def __init__(self, pacs: DicomWeb, rule: WatchRule, since_days: int | None) -> None:
        self._pacs, self._rule, self._since_days = pacs, rule, since_days

    def find(self) -> tuple[Arrival, ...]:
        """Ask for the series of the rule's modality (QIDO-RS)."""
        since = None
        if self._since_days is not None:
            since = (date.today() - timedelta(days=self._since_days)).strftime("%Y%m%d")
        return self._pacs.series((self._rule.modality,), since)

    def fetch(self, service: Service, watched: Watched, folder: Path) -> int:
        """Fetch a series (WADO-RS)."""
        return fetched(service, self._pacs, watched.study_uid, watched.series_uid, folder)[1]

    def store(self, watched: Watched, file: Path) -> None:
        """Store a segmentation (STOW-RS)."""
        self._pacs.store(watched.study_uid, [file])


class FolderPlace:
    """A folder that files come into; segmentations go to `sagittal/SERIES_UID.seg.dcm` in it.

    Args:
        folder: that is there.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._watched = WatchedFolder(folder, without=OUTBOX)
        self._files: dict[str, tuple[Path, ...]] = {}

    def find(self) -> tuple[Arrival, ...]:
        """Group the files that are there."""
        if not self._folder.is_dir():
            raise ResourceError("the watched folder is not there. Check --watch-folder.", code="watch_folder")
        series = self._watched.series()
        self._files = {each.series_uid: each.files for each in series}
        return tuple(
            Arrival(
                series_uid=each.series_uid,
                study_uid=each.study_uid,
                modality=each.modality,
                description=each.description,
                study_description=each.study_description,
                body_part=each.body_part,
                instances=len(each.files),
                mark=each.mark,
            )
            for each in series
        )

    def fetch(self, service: Service, watched: Watched, folder: Path) -> int:
        """Copy the files of a series."""
        if watched.series_uid not in self._files:
            self.find()
        files = self._files.get(watched.series_uid, ())
        limits, place = service.settings.limits, folder / INPUT / "0"
        try:
            size = sum(file.stat().st_size for file in files)
            if len(files) > limits.files or size > limits.unpacked_bytes:
                raise DataError("a series of the watched folder: larger than this service takes.", code="too_large")
            require_disk(service.settings.folder, limits, size)
            place.mkdir(parents=True)
            for number, file in enumerate(files):
                shutil.copyfile(file, place / f"{number:06d}.dcm")
        except OSError as error:
            raise without_path(error) from None
        return len(files)

    def store(self, watched: Watched, file: Path) -> None:
        """Write a segmentation; it appears whole or not at all."""
        try:
            (self._folder / OUTBOX).mkdir(exist_ok=True)
            write_atomically(self._folder / OUTBOX / f"{watched.series_uid}.seg.dcm", file.read_bytes())
        except OSError as error:
            raise without_path(error) from None


class Watch:
    """Looks, and takes series further, until it is stopped.

    Args:
        service: that computes.
        settings: what to watch.
        place: of the series; None: what the settings name.

    Raises:
        PlanError: the rule makes no sense, or names no model that it could use.
        ResourceError: what it knows can't be kept.
    """

    def __init__(self, service: Service, settings: WatchSettings, place: Place | None = None) -> None:
        self._service, self._every_s = service, settings.every_s
        self.rule = parse_rule(settings.rule)
        self._model = _model_of(service, self.rule)
        self._place = place or _place_of(service, settings, self.rule)
        self.store = WatchStore(service.settings.folder / "watch.sqlite")
        self._marks: dict[str, str] = {}
        self._waits = Counter[str]()
        self._failed_looks = 0
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def stop(self, patience_s: float = 10.0) -> None:
        """End after the step in progress, which is done again at the next start where it takes too long."""
        self._stopping.set()
        if self._thread.ident is not None:
            self._thread.join(patience_s)
        if not self._thread.is_alive():
            self.store.close()

    def look(self) -> None:
        """Note the series that match and whose images have stopped coming.

        Raises:
            SagittalError: the place can't be looked at.
        """
        marks = {}
        for arrival in self._place.find():
            if not (arrival.is_sound and self.rule.matches(arrival)) or self.store.knows(arrival.series_uid):
                continue
            mark = arrival.mark or str(arrival.instances)
            marks[arrival.series_uid] = mark
            if self._marks.get(arrival.series_uid) == mark and self.store.add(arrival):
                self._service.audit.write("watch_found", model=self._model.name)
        self._marks = marks

    def advance(self, now: float | None = None) -> None:
        """Take every series whose time has come one step further; an error of one holds up no other."""
        for watched in self.store.due(time.time() if now is None else now):
            if self._stopping.is_set():
                return
            try:
                self._step(watched)
                del self._waits[watched.series_uid]
            except SagittalError as error:
                self._put_off(watched, error.code)
            except Exception as error:
                # A bug, or a disk that went: noted without what the message may hold.
                _log.error("watch: %s at %s", type(error).__name__, where_raised(error))
                self._put_off(watched, "bug")

    def _run(self) -> None:
        next_look = 0.0
        while not self._stopping.wait(min(_STEP_S, self._every_s)):
            if time.monotonic() >= next_look:
                next_look = time.monotonic() + self._look_and_wait_s()
            try:
                self.advance()
            except Exception as error:
                _log.error("watch: %s at %s", type(error).__name__, where_raised(error))

    def _look_and_wait_s(self) -> float:
        try:
            self.look()
        except Exception as error:
            told = error.message if isinstance(error, SagittalError) else f"{type(error).__name__}"
            if self._failed_looks == 0:
                _log.error("watch: %s", told)
            self._failed_looks += 1
        else:
            if self._failed_looks:
                _log.warning("watch: works again after %d tries", self._failed_looks)
            self._failed_looks = 0
        return min(LONGEST_WAIT_S, self._every_s * 2.0 ** min(self._failed_looks, 5))

    def _step(self, watched: Watched) -> None:
        match watched.state:
            case "found":
                self._begin(watched)
            case "computing":
                self._follow(watched)
            case _:
                self._deliver(watched)

    def _begin(self, watched: Watched) -> None:
        """Fetch a series and make a job of it; the same job where it was made before."""
        service = self._service
        service.require_running()
        upload = new_id()
        folder = service.settings.uploads_folder / upload
        service.arriving.add(upload)
        try:
            count = self._place.fetch(service, watched, folder)
            if count != watched.instances:
                self.store.change(watched, instances=count)
                raise DataError("images of the series still come.", code="still_arriving")
            given = InputRef(kind="upload", files=(f"{INPUT}/0",), dicom=True)
            sender = Sender("", f"watch {watched.series_uid} {watched.round}", "watch")
            job = queue_job(service, folder, self._model, JobOptions(formats=("seg",)), given, sender, upload)
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        finally:
            service.arriving.discard(upload)
        self.store.change(watched, state="computing", job=job.id, tries=0, next_try=0.0, code=None)
        service.audit.write("watch_fetched", job=job.id, model=job.model)
        service.supervisor.wake()

    def _follow(self, watched: Watched) -> None:
        """Look what became of a job."""
        job = self._job(watched)
        if job is None:
            return
        if job.state == "done":
            if self.store.change(watched, state="storing", tries=0, next_try=0.0, code=None):
                self._deliver(watched._replace(state="storing", tries=0))
        elif job.has_ended:
            self._fail(watched, job.error.code if job.error is not None else job.state)

    def _deliver(self, watched: Watched) -> None:
        job = self._job(watched)
        if job is None:
            return
        self._place.store(watched, self._service.result_path(job, RESULT))
        self.store.change(watched, state="done", next_try=0.0, code=None)
        self._service.audit.write("watch_stored", job=job.id, model=job.model)

    def _job(self, watched: Watched) -> Job | None:
        """Return the job of a series; where it was deleted, begin anew and return None."""
        try:
            return self._service.store.get(watched.job or "")
        except RefusalError:
            self.store.change(watched, state="found", job=None, round=watched.round + 1, tries=0)
            return None

    def _put_off(self, watched: Watched, code: str) -> None:
        now = self.store.get(watched.series_uid)
        if now is None or now.state in ("done", "failed"):
            return
        tries = now.tries
        if code in _PATIENT:
            self._waits[now.series_uid] += 1
        else:
            tries += 1
        if tries >= MAX_TRIES:
            self._fail(now, code)
            return
        before = tries + self._waits[now.series_uid] - 1
        wait = min(LONGEST_WAIT_S, self._every_s * 2.0 ** min(before, 12))
        self.store.change(now, tries=tries, code=code, next_try=time.time() + wait)
        _log.warning("watch: a series (%s) is tried again in %.0f s: %s", now.state, wait, code)

    def _fail(self, watched: Watched, code: str) -> None:
        del self._waits[watched.series_uid]
        if self.store.change(watched, state="failed", code=code):
            _log.error("watch: a series failed with the code %s (job %s)", code, watched.job or "none")
            self._service.audit.write("watch_failed", job=watched.job, model=self._model.name, status=None)


def _model_of(service: Service, rule: WatchRule) -> ServedModel:
    try:
        model = service.models.named(rule.model)
    except RefusalError as error:
        raise PlanError(f"--watch-rule: {error.message}", code="watch_rule") from None
    channels = len(model.spec.channel_names)
    if channels != 1:
        raise PlanError(
            f"--watch-rule: the model '{model.name}' takes {channels} channels, but a watch gives it one series. Send "
            "these scans by the API.",
            code="watch_rule",
        )
    return model


def _place_of(service: Service, settings: WatchSettings, rule: WatchRule) -> Place:
    if settings.folder is not None:
        return FolderPlace(settings.folder)
    assert service.pacs is not None, "settings name a folder or an address"
    return PacsPlace(service.pacs, rule, settings.since_days)
