"""SLURM's queue: work is put into it through submitit, watched with squeue, and taken out with scancel.

submitit writes the batch script and starts Python on the node; whether a job was preempted, lost or is done is told by
SLURM's own queue, which every cluster has, while submitit would ask an accounting that many small ones lack.
"""

from __future__ import annotations

import dataclasses
import io
import os
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import submitit
from submitit.core.utils import FailedJobError, FailedSubmissionError

from sagittal.cluster.places import Place
from sagittal.errors import PlanError, ResourceError, did_you_mean
from sagittal.plan.base import cannot_write

NOTICE_S = 120
"""So long before a job's time is up it is told, for the step or the case in progress and a checkpoint."""
LEAST_MIN = 5
MOST_SHARDS = 1000
_PROGRAMS = ("sbatch", "srun", "squeue", "scancel", "scontrol")
_ASK_S = 60.0
ANSWER_S, ASK_EVERY_S = 180.0, 5.0
"""How long a controller that does not answer is asked again, where work is not begun without its answer."""
_LOOK_EVERY_S = 0.3
OVER = frozenset(
    (
        *("BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL"),
        *("OUT_OF_MEMORY", "PREEMPTED", "REVOKED", "TIMEOUT"),
    )
)
"""States of a job that runs no more; one that is requeued is PENDING again."""


@dataclass(frozen=True)
class SlurmSettings:
    """What `--on slurm:NAME=VALUE,...` may say; what is left out is as the site has it.

    Attributes:
        partition, account, qos, constraint: as sbatch takes them.
        time_min: limit of each job; one that needs longer is requeued and goes on.
        gpus: for each job.
        cpus: for each job; its threads.
        mem_gib: memory of each job's node.
        parallel: jobs of one array at a time.
        shards: into how many jobs the cases of a prediction are dealt.
    """

    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    time_min: int | None = None
    gpus: int | None = None
    cpus: int | None = None
    mem_gib: float | None = None
    parallel: int | None = None
    shards: int | None = None


@dataclass(frozen=True)
class JobState:
    """What SLURM says of a job: `state` in its words, the reason where it waits, the nodes where it runs."""

    state: str
    reason: str
    nodes: str

    def __str__(self) -> str:
        word = self.state.lower().replace("_", " ")
        if self.state == "PENDING" and self.reason != "None":
            return f"{word} ({self.reason})"
        return f"{word} on {self.nodes}" if self.nodes and self.state not in OVER else word


def read_settings(place: Place) -> SlurmSettings:
    """Return what a place says of SLURM.

    Raises:
        PlanError: a setting that nobody knows, or a value that makes no sense.
    """
    read: dict[str, Any] = {}
    for name, text in place.settings.items():
        if name not in _READERS:
            raise PlanError(f"--on {place}: unknown setting '{name}'.{did_you_mean(name, _READERS)}", code="options")
        field, reader, expected = _READERS[name]
        try:
            read[field] = reader(text)
        except ValueError:
            raise PlanError(
                f"--on {place}: {name}={text} makes no sense. Expected {expected}.", code="options"
            ) from None
    return SlurmSettings(**read)


def parse_time_min(text: str) -> int:
    """Return a time limit in whole minutes: `90`, `8h`, `30m`, `2d`, or SLURM's `H:MM:SS`, `D-HH`, `D-HH:MM:SS`.

    Raises:
        ValueError: it is none of these, or not above 0.
    """
    if short := re.fullmatch(r"([0-9]+)([mhd]?)", text):
        minutes = float(int(short[1]) * {"": 1, "m": 1, "h": 60, "d": 1440}[short[2]])
    elif found := re.fullmatch(r"(?:([0-9]+)-)?([0-9]+)(?::([0-9]{1,2}))?(?::([0-9]{1,2}))?", text):
        days, *parts = found.groups()
        first, second, third = (int(part or 0) for part in parts)
        if days is None and parts[2] is None:  # minutes and seconds, as sbatch reads two numbers
            minutes = first + second / 60
        else:
            minutes = 1440 * int(days or 0) + 60 * first + second + third / 60
    else:
        raise ValueError(text)
    whole = int(-(-minutes // 1))
    if whole <= 0:
        raise ValueError(text)
    return whole


def _limit_min(text: str) -> int:
    minutes = parse_time_min(text)
    if minutes < LEAST_MIN:
        raise ValueError(text)
    return minutes


def _count(least: int, most: int = 1 << 20) -> Callable[[str], int]:
    def read(text: str) -> int:
        value = int(text)
        if not least <= value <= most:
            raise ValueError(text)
        return value

    return read


def _mem_gib(text: str) -> float:
    found = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)(G|GB|GiB|M|MB|MiB)?", text)
    if found is None or float(found[1]) <= 0:
        raise ValueError(text)
    return float(found[1]) / (1024 if (found[2] or "G").startswith("M") else 1)


_READERS: Mapping[str, tuple[str, Callable[[str], Any], str]] = {
    "partition": ("partition", str, "its name"),
    "account": ("account", str, "its name"),
    "qos": ("qos", str, "its name"),
    "constraint": ("constraint", str, "a feature of nodes"),
    "time": ("time_min", _limit_min, f"minutes, 8h, 2d, H:MM:SS or D-HH:MM:SS, at least {LEAST_MIN} minutes"),
    "gpus": ("gpus", _count(0, 64), "a number of GPUs for each job"),
    "cpus": ("cpus", _count(1, 1024), "a number of processors for each job"),
    "mem": ("mem_gib", _mem_gib, "GiB for each job, for example 32 or 32G"),
    "parallel": ("parallel", _count(1), "how many jobs may run at a time"),
    "shards": ("shards", _count(1, MOST_SHARDS), f"a number of jobs, 1 to {MOST_SHARDS}"),
}
"""By name: the field, what reads it, and what is expected."""


class SlurmQueue:
    """Jobs of one command.

    Args:
        place: what the user named, for messages.
        settings: of each job.
        folder: for batch scripts and what jobs print; nodes see it under the same path.

    Raises:
        ResourceError: this machine has no SLURM, or the folder can't be written.
    """

    def __init__(self, place: Place, settings: SlurmSettings, folder: Path) -> None:
        absent = [program for program in _PROGRAMS if shutil.which(program) is None]
        if absent:
            raise ResourceError(
                f"--on {place}: {', '.join(absent)} not found, so this machine can't put jobs into a SLURM queue. "
                "Expected a login node of the cluster, or SLURM's clients here (Debian: slurm-client) with its "
                "slurm.conf.",
                code="no_slurm",
            )
        self._place, self.settings, self.folder = place, settings, folder.absolute()
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise cannot_write(self.folder, error) from None

    def submit(self, name: str, elements: Sequence[Callable[[], None]]) -> list[str]:
        """Put work into the queue, as an array where it is more than one piece, and return the id of each job.

        Args:
            name: that squeue shows.
            elements: what each job calls; they travel by pickle.

        Raises:
            ResourceError: SLURM refuses; the message has its words.
        """
        executor = submitit.SlurmExecutor(folder=self.folder)
        executor.update_parameters(**self._parameters(name))
        try:
            # submitit prints what sbatch said, which the error below has.
            with _own_environment(), redirect_stderr(io.StringIO()):
                if len(elements) == 1:
                    return [str(executor.submit(elements[0]).job_id)]
                with executor.batch():
                    jobs = [executor.submit(element) for element in elements]
                return [str(job.job_id) for job in jobs]
        except (FailedJobError, FailedSubmissionError) as error:
            raise self._refused(str(error)) from None
        except OSError as error:
            raise cannot_write(self.folder, error) from None

    def states(self, jobs: Iterable[str]) -> dict[str, JobState] | None:
        """Return what SLURM knows of jobs by id; None where it can't be asked at the moment.

        A job that ended minutes ago is no longer known.
        """
        wanted = set(jobs)
        listed = ",".join(sorted({job.split("_")[0] for job in wanted}))
        done = _ask("squeue", "-h", "-r", "-t", "all", "-j", listed, "-o", "%i|%T|%r|%N")
        if done.returncode != 0:
            return {} if "Invalid job id" in done.stderr else None
        found = {}
        for line in done.stdout.splitlines():
            job, state, reason, nodes = (part.strip() for part in line.split("|", 3))
            if job in wanted:
                found[job] = JobState(state, reason, nodes)
        return found

    def alive(self, jobs: Iterable[str]) -> dict[str, JobState] | None:
        """Return the jobs that wait or run; None where SLURM can't be asked at the moment."""
        states = self.states(jobs) if (jobs := list(jobs)) else {}
        return None if states is None else {job: state for job, state in states.items() if state.state not in OVER}

    def surely_alive(self, jobs: Iterable[str]) -> dict[str, JobState]:
        """Return the jobs that wait or run; a controller that does not answer is asked for a while.

        Raises:
            ResourceError: it did not answer, so nobody knows whether they run.
        """
        jobs, end = list(jobs), time.monotonic() + ANSWER_S
        while (alive := self.alive(jobs)) is None:
            if time.monotonic() > end:
                raise ResourceError(
                    f"SLURM's controller did not answer for {ANSWER_S / 60:.0f} min, so nobody knows whether the jobs "
                    f"{', '.join(jobs)} of before still run. Try 'scontrol ping', then the same command again.",
                    code="slurm_unreachable",
                )
            time.sleep(ASK_EVERY_S)
        return alive

    def end(self, jobs: Iterable[str], wait_s: float) -> bool:
        """Take jobs out of the queue and wait until none runs any more; return whether that is known of all."""
        jobs, end = list(jobs), time.monotonic() + wait_s
        self.cancel(jobs)
        while (alive := self.alive(jobs)) is None or alive:
            if time.monotonic() > end:
                return False
            time.sleep(_LOOK_EVERY_S)
        return True

    def cancel(self, jobs: Iterable[str]) -> None:
        """Take jobs out of the queue; those that run are told by SIGTERM and ended soon after."""
        if jobs := sorted(jobs):
            _ask("scancel", *jobs)

    def log_of(self, job: str) -> Path:
        """Return the file that holds what a job wrote to standard error."""
        return self.folder / f"{job}_0_log.err"

    def _parameters(self, name: str) -> dict[str, Any]:
        given = self.settings
        more: dict[str, Any] = {"requeue": True}
        # srun does not take over what sbatch was told of processors (since SLURM 22.05).
        srun = [] if given.cpus is None else [f"--cpus-per-task={given.cpus}"]
        parameters = {
            "job_name": name,
            "partition": given.partition,
            "account": given.account,
            "qos": given.qos,
            "constraint": given.constraint,
            "time": given.time_min,
            "gpus_per_node": given.gpus or None,
            "cpus_per_task": given.cpus,
            "mem": None if given.mem_gib is None else f"{max(int(given.mem_gib * 1024), 1)}M",
            "array_parallelism": given.parallel or MOST_SHARDS,
            "signal_delay_s": NOTICE_S,
            "srun_args": srun,
            "additional_parameters": more,
        }
        # None for the time: the partition's default, where submitit's would be five minutes.
        return {key: value for key, value in parameters.items() if value is not None or key == "time"}

    def _refused(self, said: str) -> ResourceError:
        lines = [line.strip() for line in said.splitlines() if "error:" in line or "fail" in line.lower()]
        reason = "; ".join(line.removeprefix("sbatch: ").removeprefix("error: ") for line in lines) or said.strip()
        if "invalid partition" in said.lower():
            there = sorted(set(_ask("sinfo", "-h", "-o", "%R").stdout.split()))
            hint = did_you_mean(self.settings.partition or "", there) if there else ""
            return ResourceError(
                f"--on {self._place}: SLURM has no partition '{self.settings.partition}' that you may use.{hint}",
                code="unknown_partition",
            )
        if "unable to contact" in said.lower():
            return ResourceError(
                f"--on {self._place}: SLURM's controller does not answer ({reason}). Try 'scontrol ping', then again.",
                code="slurm_unreachable",
            )
        return ResourceError(
            f"--on {self._place}: SLURM refused the job: {reason}. Expected settings that 'sinfo' shows; change them "
            "after slurm: in --on.",
            code="job_rejected",
        )


def without_shards(settings: SlurmSettings) -> SlurmSettings:
    """Return settings for the folds of a training.

    Raises:
        PlanError: it was asked for shards, which folds are not dealt into.
    """
    if settings.shards is not None:
        raise PlanError("--on slurm:shards=...: a training has an element per fold. Leave it out.", code="options")
    return dataclasses.replace(settings, shards=None)


def _ask(*command: str) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=_ASK_S, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return subprocess.CompletedProcess(command, 1, "", str(error))


@contextmanager
def _own_environment() -> Iterator[None]:
    """Keep what SLURM says of the job that this command runs in, if it does, from the jobs that it submits."""
    if "SLURM_JOB_ID" not in os.environ:
        yield
        return
    configuration = os.environ.get("SLURM_CONF")
    with submitit.helpers.clean_env():
        if configuration is not None:
            os.environ["SLURM_CONF"] = configuration
        yield
