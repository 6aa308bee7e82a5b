"""A folder of scans predicted in SLURM's queue: the cases dealt into the jobs of an array, the same report at the end.

This is what `inference.folder.run_folder` calls to compute cases, so finding them, leaving finished ones alone and
prediction.json are as on one machine. Nodes see bundle, scans and output folder under the same paths and write there.
"""

from __future__ import annotations

import json
import shutil
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from sagittal.cluster.places import Place
from sagittal.cluster.slurm import OVER, JobState, SlurmQueue, SlurmSettings, read_settings
from sagittal.cluster.slurm_job import read_report
from sagittal.cluster.slurm_shard_job import ShardJob, read_journal, shards_of
from sagittal.data.dataset import Case
from sagittal.errors import PlanError, ResourceError, SagittalError
from sagittal.inference.pipeline import Job
from sagittal.inference.processes import Loading
from sagittal.inference.run_report import JOURNAL, CasePrediction
from sagittal.plan.base import cannot_write, write_atomically

SHARDS = 8
"""Jobs of a prediction where nothing is said."""
SLURM = ".slurm"
"""Folder in the outputs for what jobs print and tell, until all are done."""
POLL_S = 5.0
LATE_S = 30.0
"""How long a line may take from a node to this machine by the file system that they share."""
SILENT_S = 900.0
_JOBS = "jobs.json"


@dataclass(eq=False)
class _Shard:
    """Cases of one job: those that were not told of yet, in their order.

    `losses` counts the jobs that were lost with these cases, one after the other, and told of none.
    """

    number: int
    cases: tuple[Case, ...]
    journal: Path
    report: Path
    job: str = ""
    losses: int = 0
    over_since: float | None = None
    state: JobState | None = None


def shards_wanted(settings: SlurmSettings, cases: int) -> int:
    """Return into how many jobs so many cases are dealt."""
    return min(settings.shards or SHARDS, cases)


def device_in_jobs(place: Place, asked: str) -> str:
    """Return the device of each job: `auto` takes the GPU that jobs ask for, else the CPU.

    Raises:
        PlanError: a setting that makes no sense, or a device of one machine.
    """
    settings = read_settings(place)
    if asked == "auto":
        return "cuda" if settings.gpus else "cpu"
    if asked not in ("cpu", "cuda"):
        message = f"--device {asked}: in SLURM's queue each job has a device of its own. Expected auto, cpu or cuda."
        raise PlanError(message, code="options")
    return asked


def recover(place: Place, out: Path) -> None:
    """Take over what an earlier command on SLURM left in the output folder: its jobs are ended, its results are kept.

    Raises:
        ResourceError: there are such jobs, and no SLURM or they have not ended; or the folder can't be written.
    """
    folder = out.absolute() / SLURM
    if not folder.is_dir():
        return
    try:
        jobs: list[str] = json.loads((folder / _JOBS).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        jobs = []
    if jobs:
        _require_ended(SlurmQueue(place, read_settings(place), folder), jobs)
    told = [case for path in sorted(folder.glob("shard_*.jsonl")) for case in read_journal(path)]
    try:
        if told:
            # Where `run_folder` looks for what a run that was killed had finished.
            with (out / JOURNAL).open("a", encoding="utf-8") as file:
                file.writelines(case.model_dump_json() + "\n" for case in told)
        shutil.rmtree(folder)
    except OSError as error:
        raise cannot_write(out, error) from None


def predict_on_slurm(
    place: Place,
    loading: Loading,
    job: Job,
    cases: Sequence[Case],
    tell: Callable[[CasePrediction], None],
    say: Callable[[str], None] = lambda line: None,
    *,
    device: str = "cpu",
    poll_s: float | None = None,
) -> None:
    """Predict cases in SLURM's queue, each told once, in any order.

    A preempted job goes on where it was. The cases of one that is lost, with its node or for want of memory, are put
    into the queue again; a case that two jobs in a row were lost at is told as failed. The jobs end with this command.

    Args:
        place: what the user named.
        loading: the bundles, which nodes see under the same paths.
        job: what is made of each case; its memory is for each job.
        cases: each is told.
        tell: called from this thread.
        say: a line for a person.
        device: of each job.
        poll_s: seconds between two looks at the queue; by itself `POLL_S`.

    Raises:
        PlanError: a setting that makes no sense.
        ResourceError: there is no SLURM, it refuses the jobs, or a job was lost before its first case.
        SagittalError: what ended a job for all cases: a model that can't be loaded, a full disk.
    """
    if not cases:
        return
    settings = read_settings(place)
    folder = job.folder.absolute() / SLURM
    queue = SlurmQueue(place, settings, folder)
    loading = replace(
        loading, bundle=loading.bundle.absolute(), others=tuple(path.absolute() for path in loading.others)
    )
    work = _Work(queue, loading, replace(job, folder=job.folder.absolute()), device, tell, say)
    try:
        work.submit(shards_of([_absolute(case) for case in cases], shards_wanted(settings, len(cases))))
        work.wait(POLL_S if poll_s is None else poll_s)
    except BaseException:
        queue.end(work.jobs, LATE_S)
        work.look_at_journals()
        raise
    if not work.lost:  # else what lost jobs wrote is there to be read
        shutil.rmtree(folder, ignore_errors=True)


class _Work:
    """The shards of a run."""

    def __init__(
        self,
        queue: SlurmQueue,
        loading: Loading,
        job: Job,
        device: str,
        tell: Callable[[CasePrediction], None],
        say: Callable[[str], None],
    ) -> None:
        self._queue, self._loading, self._job, self._device = queue, loading, job, device
        self._tell, self._say = tell, say
        self.lost = False
        self._shards: list[_Shard] = []
        self._run = uuid.uuid4().hex[:8]
        self._number = 0
        self._answered = time.monotonic()

    @property
    def jobs(self) -> list[str]:
        """Ids of the jobs that have not ended."""
        return [shard.job for shard in self._shards if shard.job]

    def submit(self, dealt: Sequence[tuple[Case, ...]], *, losses: int = 0) -> None:
        """Put a job for each group of cases into the queue."""
        new = [self._shard(cases, losses) for cases in dealt]
        elements = [
            ShardJob(self._loading, self._job, shard.cases, (self._device,), shard.journal, shard.report)
            for shard in new
        ]
        ids = self._queue.submit("sagittal-predict", elements)
        for shard, job in zip(new, ids, strict=True):
            shard.job = job
        self._shards += new
        write_atomically(self._queue.folder / _JOBS, json.dumps(self.jobs).encode())
        count = sum(len(cases) for cases in dealt)
        self._say(f"{count} cases in SLURM's queue, jobs {', '.join(ids)}")

    def wait(self, poll_s: float) -> None:
        """Tell of cases until all are told."""
        while self._shards:
            self._look_at_queue()
            for shard in list(self._shards):
                report = read_report(shard.report)
                self._read(shard)
                if report is not None or not shard.cases:
                    self._shards.remove(shard)
                    self._close(shard, report or {})
                elif shard.over_since is not None and time.monotonic() - shard.over_since > LATE_S:
                    self._shards.remove(shard)
                    self._lost(shard)
            if self._shards:
                time.sleep(poll_s)

    def look_at_journals(self) -> None:
        """Tell what jobs had finished when they were ended."""
        for shard in self._shards:
            self._read(shard)

    def _shard(self, cases: tuple[Case, ...], losses: int) -> _Shard:
        self._number += 1
        stem = f"shard_{self._run}_{self._number:04d}"
        folder = self._queue.folder
        return _Shard(self._number, cases, folder / f"{stem}.jsonl", folder / f"{stem}.json", losses=losses)

    def _read(self, shard: _Shard) -> None:
        told = {case.case: case for case in read_journal(shard.journal)}
        for case in shard.cases:
            if case.id in told:
                shard.losses = 0
                self._tell(told[case.id])
        shard.cases = tuple(case for case in shard.cases if case.id not in told)

    def _close(self, shard: _Shard, report: object) -> None:
        """Take a shard that has ended by its own word.

        Raises:
            SagittalError: what ended it concerns all cases.
        """
        error = report.get("error") if isinstance(report, dict) else None
        if error is not None:
            kinds = {kind.__name__: kind for kind in SagittalError.__subclasses__()}
            raise kinds.get(error["type"], SagittalError)(error["message"], code=error["code"])
        if shard.cases:  # the report was quicker than the last lines
            time.sleep(1.0)
            self._read(shard)
        self.lost = self.lost or bool(shard.cases)
        for case in shard.cases:
            message = f"{case.id}: job {shard.job} ended without telling of it; see {self._queue.log_of(shard.job)}."
            self._tell(CasePrediction(case=case.id, status="failed", seconds=0.0, message=message, code="job_lost"))

    def _lost(self, shard: _Shard) -> None:
        """Put the cases of a lost job into the queue again; of one that is lost again, name the case that it was at.

        Raises:
            ResourceError: three in a row told of no case, so the next one would not either.
        """
        self.lost = True
        how = "left the queue" if shard.state is None else f"ended, by SLURM's account: {shard.state}"
        cause = f"job {shard.job} {how}, without a word of its own; see {self._queue.log_of(shard.job)}"
        if shard.losses > 1:
            raise ResourceError(
                f"{cause}. It was the third in a row without a case. Give more mem= or time= in --on.", code="job_lost"
            )
        first, *others = shard.cases
        if shard.losses == 0:
            self._say(f"{cause}; its {len(shard.cases)} cases go into the queue again")
            self.submit([shard.cases], losses=1)
            return
        message = f"{first.id}: {cause}. Give more mem= in --on, or look at the scan."
        self._tell(CasePrediction(case=first.id, status="failed", seconds=0.0, message=message, code="job_lost"))
        if others:
            self.submit([tuple(others)], losses=2)

    def _look_at_queue(self) -> None:
        states, now = self._queue.states(self.jobs), time.monotonic()
        if states is None:
            if now - self._answered > SILENT_S:
                minutes = f"{SILENT_S / 60:.0f} min"
                raise ResourceError(f"SLURM's controller did not answer for {minutes}.", code="slurm_unreachable")
            return
        self._answered = now
        for shard in self._shards:
            state = states.get(shard.job)
            if state is not None and str(state) != str(shard.state):
                self._say(f"job {shard.job}: {state}")
            shard.state = state or shard.state
            if state is not None and state.state not in OVER:
                shard.over_since = None
            elif shard.over_since is None:
                shard.over_since = now


def _absolute(case: Case) -> Case:
    # A job may stand in another folder than this command's user thinks of.
    return replace(case, images=tuple(image.absolute() for image in case.images), labels=None)


def _require_ended(queue: SlurmQueue, jobs: Sequence[str]) -> None:
    """End jobs of before, whose files are about to be taken from them.

    Raises:
        ResourceError: they have not ended, or SLURM's controller does not say.
    """
    if not queue.end(queue.surely_alive(jobs), LATE_S):
        raise ResourceError(
            f"the jobs {', '.join(jobs)} of an earlier command were told to end {LATE_S:.0f} s ago, and SLURM does not "
            f"say that they have. Look with squeue -j {','.join(jobs)}, then give the same command again.",
            code="jobs_left",
        )
