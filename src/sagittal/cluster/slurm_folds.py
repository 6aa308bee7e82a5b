"""The folds of a run as jobs of a SLURM array: submitted, watched, and joined by the command that waits.

All machines see the run folder, the cache and the data set under the same paths. What a fold does in its job is what it
does in a process of its own on one machine, and what it leaves is joined by the same code, so the weights are the same.
The jobs need no one to wait for them: the same command with --resume finds those that it left in the queue.
"""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from sagittal.cluster.places import Place
from sagittal.cluster.slurm import OVER, JobState, SlurmQueue, SlurmSettings, read_settings, without_shards
from sagittal.cluster.slurm_fold_job import REPORT, FoldJob
from sagittal.cluster.slurm_job import read_report
from sagittal.cluster.slurm_table import FoldRow, FoldTable
from sagittal.errors import PlanError, ResourceError, TrainingError
from sagittal.plan.base import write_atomically
from sagittal.training.cross_validation import FoldTask, Run, own_bundle
from sagittal.training.run_folder import HANDED_OUT, FoldStanding, fold_standing
from sagittal.training.side_by_side import OUTPUT_LOG, Ending
from sagittal.training.signals import StopFlag
from sagittal.training.stages import plan_sha256
from sagittal.training.trackers import prepare_trackers

MOST_FOLDS = 5
POLL_S = 5.0
"""How often the queue is asked: SLURM's controller serves all its users."""
LATE_S = 30.0
"""How long a report may take from a node to this machine by the file system that they share."""
SILENT_S = 900.0
"""How long SLURM's controller may not answer before waiting ends; jobs go on meanwhile."""
_STOP_S = 0.2
_ADVICE = {
    "TIMEOUT": " Give a longer time= in --on.",
    "DEADLINE": " Give a longer time= in --on.",
    "OUT_OF_MEMORY": " Give more mem= in --on.",
}


class SlurmFolds:
    """Trains folds in SLURM's queue; `RunOptions.carrier` of a run.

    Args:
        place: what the user named.
        device: of each fold on its node: `auto`, `cpu` or `cuda`.
        poll_s: seconds between two looks at the queue.

    Raises:
        PlanError: a setting that makes no sense.
    """

    def __init__(self, place: Place, *, device: str = "auto", poll_s: float = POLL_S) -> None:
        self._place, self._device, self._poll_s = place, device, poll_s
        self._settings = without_shards(read_settings(place))

    @property
    def at_once(self) -> int:
        """Return how many folds may be trained at a time, as far as it is known."""
        return self._settings.parallel or MOST_FOLDS

    def __call__(self, run: Run, names: list[str], stop: StopFlag) -> Iterator[Ending]:
        """Train folds and yield how each ended, as soon as it has.

        Raises:
            ResourceError: there is no SLURM, it refuses the jobs, or its controller is silent for long.
            TrainingError: jobs of another plan are still in the queue.
        """
        require_measured_here(run, self._settings)
        queue = SlurmQueue(self._place, self._settings, run.folder / "slurm")
        prepare_trackers(run.options.trackers, run.folder)
        jobs = self._jobs(queue, run, names)
        watch = _Watch(queue, run, jobs, self._poll_s)
        yield from watch.through(stop)
        if not watch.left_in_queue:
            (run.folder / HANDED_OUT).unlink(missing_ok=True)

    def _jobs(self, queue: SlurmQueue, run: Run, names: list[str]) -> dict[str, str]:
        """Return the job of each fold: one of before that is in the queue or done, or a new one."""
        record, say = run.folder / HANDED_OUT, run.options.say
        known = _known_jobs(record)
        left: dict[str, str] = {name: job for name, job in known.get("jobs", {}).items() if name in names}
        alive, same_plan = queue.surely_alive(left.values()), known.get("plan_sha256") == plan_sha256(run.plan)
        if alive and not same_plan:
            raise TrainingError(
                f"{queue.folder}: jobs of another plan are in the queue: {', '.join(sorted(alive))}. Take them out "
                f"with scancel {' '.join(sorted(alive))}, or choose another --out.",
                code="other_jobs",
            )
        kept = {name: job for name, job in left.items() if job in alive or (same_plan and _is_done(run, name))}
        new = [name for name in names if name not in kept]
        if kept:
            say(f"train: folds {', '.join(kept)} are in the queue already or done, jobs {', '.join(kept.values())}")
        if new:
            for name in new:
                (run.folder / f"fold_{name}" / REPORT).unlink(missing_ok=True)
            submitted = queue.submit("sagittal-train", [self._element(run, name, len(new)) for name in new])
            kept |= dict(zip(new, submitted, strict=True))
            say(f"train: folds {', '.join(new)} on {self._place}, jobs {', '.join(submitted)}")
        ordered = {name: kept[name] for name in names}
        content = {"plan_sha256": plan_sha256(run.plan), "jobs": ordered}
        write_atomically(record, json.dumps(content, indent=1).encode())
        return ordered

    def _element(self, run: Run, name: str, count: int) -> FoldJob:
        options = dataclasses.replace(run.options, device=self._device, carrier=None, live=False, say=_nobody)
        folder = run.folder.absolute()
        own = dataclasses.replace(run, folder=folder, options=options, budget=None)
        own = dataclasses.replace(own, out=own_bundle(own, name))
        share_s = None if run.budget is None else run.budget.share_s(math.ceil(count / self.at_once))
        return FoldJob(FoldTask(own, name, 1, None), share_s)


class _Watch:
    """Waits for jobs, and tells how they are.

    Attributes:
        left_in_queue: whether jobs go on without this command.
    """

    def __init__(self, queue: SlurmQueue, run: Run, jobs: Mapping[str, str], poll_s: float) -> None:
        self._queue, self._run, self._jobs, self._poll_s = queue, run, jobs, poll_s
        self._waiting = dict(jobs)
        self.left_in_queue = False
        self._states: dict[str, JobState] = {}
        self._told: dict[str, str] = {}
        self._over_since: dict[str, float] = {}
        self._answered = time.monotonic()
        self._read = {name: _size(self._log(name)) for name in jobs}

    def through(self, stop: StopFlag) -> Iterator[Ending]:
        """Yield how each fold ended; after a stop those that had not have no ending."""
        table = FoldTable(shown=self._run.options.live)
        try:
            while self._waiting and not stop:
                self._look()
                for name in list(self._waiting):
                    ending = self._ending(name)
                    self._say_lines(name)
                    if ending is not None:
                        del self._waiting[name]
                        yield ending
                table.show([self._row(name) for name in self._jobs])
                if self._waiting:
                    _pause(self._poll_s, stop)
        finally:
            table.stop()
        if self._waiting and stop:
            self._leave(stop)

    def _leave(self, stop: StopFlag) -> None:
        """Take the jobs out of the queue after Ctrl-C; what ends this command alone leaves them there."""
        say, jobs = self._run.options.say, list(self._waiting.values())
        told = ", ".join(jobs)
        if stop.reason != "interrupted":
            self.left_in_queue = True
            say(f"train: jobs {told} go on without this command, which joins them when it is given again")
            return
        say(f"train: jobs {told} are cancelled; each leaves a checkpoint")
        if not self._queue.end(jobs, LATE_S):
            say(f"train: whether they have ended is not known yet; look with squeue -j {','.join(jobs)}")

    def _look(self) -> None:
        states = self._queue.states(self._waiting.values())
        now = time.monotonic()
        if states is None:
            if now - self._answered > SILENT_S:
                raise ResourceError(
                    f"SLURM's controller did not answer for {SILENT_S / 60:.0f} min. The jobs "
                    f"{', '.join(self._waiting.values())} may go on; the same command with --resume joins them.",
                    code="slurm_unreachable",
                )
            return
        self._answered = now
        for name, job in self._waiting.items():
            state = states.get(job)
            if state is not None:
                self._states[name] = state
            if state is None or state.state in OVER:
                self._over_since.setdefault(name, now)
            else:
                self._over_since.pop(name, None)
            told = "" if state is None else str(state)
            if told and told != self._told.get(name):
                self._told[name] = told
                self._run.options.say(f"fold {name} | job {job}: {told}")

    def _ending(self, name: str) -> Ending | None:
        report = read_report(self._run.folder / f"fold_{name}" / REPORT)
        if report is not None:
            return Ending(name, report, 0)
        since, job = self._over_since.get(name), self._waiting[name]
        if since is None or time.monotonic() - since < LATE_S:
            return None
        state = self._states.get(name)
        word = "is not in the queue any more" if state is None else f"ended, by SLURM's account: {state}"
        advice = "" if state is None else _ADVICE.get(state.state.split()[0], "")
        message = f"its job {job} {word}, without a word of its own; see {self._queue.log_of(job)}.{advice}"
        return Ending(name, {"error": {"message": message, "code": "job_lost", "type": "TrainingError"}}, 1)

    def _say_lines(self, name: str) -> None:
        """Say what a fold's job has written since the last look."""
        try:
            with self._log(name).open("rb") as file:
                file.seek(self._read[name])
                content = file.read()
        except OSError:
            return
        whole = content[: content.rfind(b"\n") + 1]
        self._read[name] += len(whole)
        for line in whole.decode(errors="replace").splitlines():
            self._run.options.say(f"fold {name} | {line}")

    def _log(self, name: str) -> Path:
        return self._run.folder / f"fold_{name}" / OUTPUT_LOG

    def _row(self, name: str) -> FoldRow:
        standing: FoldStanding | None = None
        with suppress(OSError, ValueError, KeyError):  # no log yet, or one that is being written on another machine
            standing = fold_standing(self._run.folder / f"fold_{name}", self._run.plan.schedule.steps)
        state = "done" if name not in self._waiting else str(self._states.get(name, "submitted"))
        return FoldRow(name, self._jobs[name], state, standing)


def require_measured_here(run: Run, settings: SlurmSettings) -> None:
    """Make sure that a budget was fitted to what a step takes where folds are trained.

    Raises:
        PlanError: the jobs have a GPU, and this machine, which measured a step, has none.
    """
    if run.budget is not None and settings.gpus and not torch.cuda.is_available():
        raise PlanError(
            "--budget with --on slurm:gpus=...: a step is measured on this machine, which has no GPU. Give the command "
            "on a node that has one, or leave out --budget and set schedule.steps.",
            code="options",
        )


def _known_jobs(record: Path) -> dict[str, Any]:
    try:
        known: dict[str, Any] = json.loads(record.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return known


def _is_done(run: Run, name: str) -> bool:
    """Whether a job of before left a fold that only has to be joined."""
    report = read_report(run.folder / f"fold_{name}" / REPORT)
    return report is not None and "ended" in report and (own_bundle(run, name) / "manifest.json").is_file()


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


def _pause(seconds: float, stop: StopFlag) -> None:
    end = time.monotonic() + seconds
    while not stop and (left := end - time.monotonic()) > 0:
        time.sleep(min(left, _STOP_S))


def _nobody(line: str) -> None:
    """Drop a line; a job writes its own."""
