"""Train one fold: the loop, read from top to bottom."""

from __future__ import annotations

import time
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch

from sagittal.bundle import Bundle
from sagittal.data.cache import Cache
from sagittal.data.case_weights import CaseWeights
from sagittal.data.label_index import LabelIndex, label_index
from sagittal.data.loader import TrainingBatches
from sagittal.plan.plan import Plan
from sagittal.training.checkpoint import (
    Progress,
    drop_parts,
    load_best,
    load_checkpoint,
    newest_checkpoint,
    save_best,
    save_checkpoint,
)
from sagittal.training.distributed import World, require_equal
from sagittal.training.initialization import Freezing, describe_start, fill, frozen_steps, write_report
from sagittal.training.monitor import PICTURES, Monitor, Say
from sagittal.training.pace import Pace, new_pace
from sagittal.training.peers import NO_PEERS, Peers, agree
from sagittal.training.progress_page import Watched
from sagittal.training.schedules import LAST_STEPS, Shortening, position, rate_factor, shorten, validation_steps
from sagittal.training.signals import StopFlag
from sagittal.training.standing import Standing
from sagittal.training.state import TrainState, new_state
from sagittal.training.step import StepResult, train_on_batch
from sagittal.training.synchronised_norms import synchronise_batch_norm
from sagittal.training.validation import StoppedError, validate_on_cache

Ended = Literal["finished", "shortened", "stale", "interrupted", "terminated"]
COMPLETE = ("finished", "shortened", "stale")
"""How a fold that reached its end may have ended: by the plan, by the clock, or because no validation was better."""
CLOCK_EVERY_S = 10.0


@dataclass(frozen=True)
class FoldJob:
    """What one fold needs.

    Attributes:
        name: `0` to `4`, or `none` for all cases.
        train, validation: indices of cases in the cache.
        folder: where checkpoints and the log live.
        deadline: `time.monotonic()` at which training must end, or None.
        checkpoint_every_s: seconds between two checkpoints.
        source: the weights to start from, where the plan says so and there is no checkpoint.
        peers: the processes that train this fold together; only the main one writes.
        keep_checkpoints: how many of them are kept, the last ones.
        loader_workers: threads that make batches; None for what the device needs.
        compile: whether the network is compiled; `auto` where that pays.
        trackers: what else receives the log: `tensorboard`, `mlflow`.
        live: whether a terminal shows a table in place.
        case_weights: how often each case is drawn; None for equally often.
    """

    plan: Plan
    plan_sha256: str
    cache: Cache
    name: str
    train: tuple[int, ...]
    validation: tuple[int, ...]
    folder: Path
    device: torch.device
    deadline: float | None
    checkpoint_every_s: float
    source: Bundle | None = None
    peers: Peers = NO_PEERS
    keep_checkpoints: int = 2
    loader_workers: int | None = None
    compile: Literal["auto", "on", "off"] = "auto"
    trackers: tuple[str, ...] = ()
    live: bool = False
    case_weights: CaseWeights | None = None

    @property
    def world(self) -> World:
        """The processes that train this fold together."""
        return self.peers.world


@dataclass(frozen=True)
class FoldRun:
    """A fold's weights and how its training ended."""

    network: torch.nn.Module
    progress: Progress
    ended: Ended
    waited_s: float
    """Time spent waiting for data in this attempt."""
    weights_step: int
    """Finished steps at which the network had these weights: the last ones, or those of the best validation."""
    monitor: Monitor | None = None
    """Where what follows is told; None in all processes but the main one."""

    @property
    def complete(self) -> bool:
        """Whether the fold reached its end, by the plan, the clock or an early stop."""
        return self.ended in COMPLETE

    def weights(self) -> dict[str, np.ndarray]:
        """Return the weights as arrays on the CPU, by official names."""
        return {name: value.detach().cpu().contiguous().numpy() for name, value in self.network.state_dict().items()}


def train_fold(job: FoldJob, stop: StopFlag, say: Say) -> FoldRun:
    """Train until the plan's last step, the deadline or a stop; start from the newest checkpoint where there is one.

    Losses depend on the plan, the cache and the device only: a run killed at any moment and started again gives the
    same ones, bit for bit on the CPU (steps done after the last checkpoint are done again). Several processes share
    each batch and each validation, and give those of one process up to rounding; all of them hold the same weights.

    Raises:
        TrainingError: a loss that is not finite, a checkpoint that does not fit, or processes that differ.
        ResourceError: the disk is full; the last checkpoint stays intact.
    """
    plan, index, world = job.plan, label_index(job.plan.dataset), job.world
    # Processes that compile would all have to succeed or fail together.
    state = new_state(plan, job.device, compile=job.compile if world.size == 1 else "off", say=say)
    progress = _begin(job, state, say)
    synchronise_batch_norm(state.network, world)
    require_equal(state.network.state_dict(), world)
    clock, freezing = _Clock(job, progress.shortening), Freezing(state.network, frozen_steps(plan), say)
    keeper, step, standing = _Keeper(job, state, progress), progress.step, progress.standing

    with _monitor(job, step, say) as monitor, closing(_batches(job, step)) as batches:
        validations = _Validations(job, state, index, monitor, stop, progress)
        if validations.is_due:
            standing = validations.at(step, clock.end, keeper.elapsed_s, standing)
        start = time.monotonic()
        for batch in batches:
            clock.agree(stop)
            if stop or step >= clock.end or _is_stale(plan, standing):
                break
            freezing.obey(position(plan.schedule, step, clock.shortening), step)
            factor = rate_factor(plan.schedule, step, clock.shortening)
            result = train_on_batch(state, batch, plan, rate_factor=factor, index=index, world=world)
            step += 1
            if monitor is not None:
                took = _Took(time.monotonic() - start, batches.last_wait_s, keeper.elapsed_s)
                _tell(monitor, step, clock.end, result, factor * plan.training.optimizer.learning_rate, took)
                clock.look(step, monitor)
            if step in validation_steps(plan.schedule) and job.validation:
                standing = validations.at(step, clock.end, keeper.elapsed_s, standing)
            if keeper.due():
                keeper.save(step, clock.shortening, standing, validation_due=validations.is_due)
            start = time.monotonic()
        clock.agree(stop)
        keeper.save(step, clock.shortening, standing, validation_due=validations.is_due)
        ended = world.broadcast_object(_how_it_ended(job, step, clock.end, standing, stop))
        if plan.schedule.keep == "best" and ended in ("finished", "shortened") and job.validation:
            # Not saved: a run that is resumed here does it again, and may count it only once.
            standing = validations.last(step, standing)
        if monitor is not None:
            monitor.finish(ended)
        waited_s = batches.waited_s
    require_equal(state.network.state_dict(), world)
    network, weights_step = _resulting(job, state, step, standing, ended, say)
    # The best weights are read from a file, which a machine of several may see late or not at all.
    require_equal(network.state_dict(), world)
    return FoldRun(network, keeper.progress(step, clock.shortening, standing), ended, waited_s, weights_step, monitor)


class _Keeper:
    """Writes a checkpoint now and then, and at the end; it has the clock of the training time."""

    def __init__(self, job: FoldJob, state: TrainState, found: Progress) -> None:
        self._job, self._state, self._found = job, state, found
        self._began = time.monotonic() - found.elapsed_s
        self._last_s, self._last_step = time.monotonic(), found.step

    @property
    def elapsed_s(self) -> float:
        """Training time so far, over all attempts."""
        return time.monotonic() - self._began

    def due(self) -> bool:
        """Return whether the last checkpoint is old enough for another one."""
        return time.monotonic() - self._last_s > self._job.checkpoint_every_s

    def progress(
        self, step: int, shortening: Shortening | None, standing: Standing, *, validation_due: bool = False
    ) -> Progress:
        """Return how far the run has come."""
        return self._found.replace(
            step=step,
            elapsed_s=self.elapsed_s,
            shortening=shortening,
            standing=standing,
            validation_due=validation_due,
        )

    def save(self, step: int, shortening: Shortening | None, standing: Standing, *, validation_due: bool) -> None:
        """Write a checkpoint, unless there is one of this step: a kill in between would leave it without its hash."""
        if self._job.world.main and (step == 0 or step != self._last_step):
            now = self.progress(step, shortening, standing, validation_due=validation_due)
            save_checkpoint(self._job.folder, self._state, now, keep=self._job.keep_checkpoints)
        self._last_s, self._last_step = time.monotonic(), step


class _Took(NamedTuple):
    """Seconds: of a step, of it waiting for data, and of the training so far."""

    step_s: float
    waited_s: float
    elapsed_s: float


def _tell(monitor: Monitor, step: int, end: int, result: StepResult, rate: float, took: _Took) -> None:
    monitor.add_step(step, end, result, rate=rate, step_s=took.step_s, elapsed_s=took.elapsed_s, waited_s=took.waited_s)
    if result.skipped:
        scale = f"loss scale now {result.loss_scale:g}"
        monitor.add_event("skipped", step, f"step {step}: gradients overflowed in fp16, so it was skipped; {scale}")


def _monitor(job: FoldJob, step: int, say: Say) -> AbstractContextManager[Monitor | None]:
    if not job.world.main:
        return nullcontext()
    watched = Watched(
        job.plan, job.name, job.device, len(job.train), len(job.validation), trackers=job.trackers, live=job.live
    )
    return Monitor(job.folder, watched, step=step, say=say)


def _pace(job: FoldJob, step: int) -> Pace:
    path = job.folder / "validations.json"
    return new_pace(job.plan, job.cache, job.validation, job.world, path=path, plan_sha256=job.plan_sha256, step=step)


def _batches(job: FoldJob, step: int) -> TrainingBatches:
    return TrainingBatches(
        job.cache,
        job.train,
        job.plan,
        start_step=step,
        workers=job.loader_workers,
        device=job.device,
        weights=job.case_weights,
        rank=job.world.rank,
        world=job.world.size,
    )


def _how_it_ended(job: FoldJob, step: int, end: int, standing: Standing, stop: StopFlag) -> Ended:
    if _is_stale(job.plan, standing):
        return "stale"
    if stop.reason is not None and step < end:
        return stop.reason
    return "shortened" if step < job.plan.schedule.steps else "finished"


class _Validations:
    """Makes the validations of a fold, each on as many cases as there is time for.

    Attributes:
        is_due: whether a stop cut the last one short, so that it is made first of all when the run goes on.
    """

    def __init__(
        self,
        job: FoldJob,
        state: TrainState,
        index: LabelIndex,
        monitor: Monitor | None,
        stop: StopFlag,
        found: Progress,
    ) -> None:
        self._job, self._state, self._index, self._monitor, self._stop = job, state, index, monitor, stop
        self._pace, self.is_due = _pace(job, found.step), found.validation_due

    def at(self, step: int, end: int, elapsed_s: float, standing: Standing) -> Standing:
        """Validate after a step, unless that is left out; return how the run stands then. `end` is the last step."""
        cases = self._pace.due(step, end, elapsed_s, self._monitor)
        began = time.monotonic()
        after = self._made(cases, step, standing) if cases else standing
        self.is_due = after is None
        if cases and after is not None:
            self._pace.took(step, time.monotonic() - began)
        return after or standing

    def last(self, step: int, standing: Standing) -> Standing:
        """Validate at the end, where the last weights may be the best ones."""
        return self._made(self._pace.last(), step, standing) or standing

    def _made(self, cases: tuple[int, ...], step: int, standing: Standing) -> Standing | None:
        """Return how the run stands after a validation, None where a stop cut it short."""
        job, began, stop = self._job, time.monotonic(), self._stop
        network, index, world = self._state.result, self._index, job.world
        try:
            score = validate_on_cache(
                network, job.cache, cases, job.plan, index, world=world, pictures=PICTURES, stop=stop
            )
        except StoppedError:
            return None
        after = standing.after(step, score.mean_dice)
        if self._monitor is not None:
            self._monitor.add_validation(step, score, after, cases=len(cases), seconds=time.monotonic() - began)
        may_be_result = job.plan.schedule.keep == "best" or job.plan.schedule.early_stop_validations > 0
        if after.best_step == step and may_be_result and world.main:
            save_best(job.folder, self._state.result, step, plan_sha256=job.plan_sha256)
        return after


def _resulting(
    job: FoldJob, state: TrainState, step: int, standing: Standing, ended: Ended, say: Say
) -> tuple[torch.nn.Module, int]:
    """Return the network that the fold ends with, in eval mode, and the step that its weights are from."""
    network, best = state.result.eval(), standing.best_step
    if standing.best_dice is None or best == step or not (job.plan.schedule.keep == "best" or ended == "stale"):
        return network, step
    if load_best(job.folder, network, best, plan_sha256=job.plan_sha256):
        say(
            f"fold {job.name}: ends with the weights of step {best}, the best validation, Dice {standing.best_dice:.3f}"
        )
        return network, best
    say(f"fold {job.name}: the weights of step {best}, the best validation, are missing or damaged in {job.folder}")
    say("  so it ends with those of the last step")
    return network, step


def _is_stale(plan: Plan, standing: Standing) -> bool:
    patience = plan.schedule.early_stop_validations
    return 0 < patience <= standing.stale


def _begin(job: FoldJob, state: TrainState, say: Say) -> Progress:
    """Fill network and optimiser from the newest checkpoint, else the network from the plan's source if it has one."""
    if job.world.main:
        drop_parts(job.folder)
    found = job.world.broadcast_object(newest_checkpoint(job.folder) if job.world.main else None)
    if found is None:
        if job.plan.training.initialization is not None:
            assert job.source is not None
            report = fill(state.network, job.plan, job.source, job.name)
            if job.world.main:
                write_report(job.folder, job.plan, report, job.name)
            if state.average is not None:
                state.average.start_from(state.network)
            for line in describe_start(job.plan, report, job.name):
                say(line)
        return Progress(step=0, plan_sha256=job.plan_sha256, elapsed_s=0.0)
    path, progress = found
    load_checkpoint(path, state, plan_sha256=job.plan_sha256)
    say(f"fold {job.name}: goes on after step {progress.step} of {job.plan.schedule.steps}")
    return progress


class _Clock:
    """Holds a run to its deadline by shortening its schedule; without a deadline it does nothing."""

    def __init__(self, job: FoldJob, shortening: Shortening | None) -> None:
        self._job, self.shortening = job, shortening
        self._agreed = shortening
        self._last = time.monotonic()

    @property
    def end(self) -> int:
        """The last step, as things stand."""
        return self._job.plan.schedule.steps if self.shortening is None else self.shortening.end

    def agree(self, stop: StopFlag) -> None:
        """Take over the main process's schedule in all of them, and a stop that any of them was asked for."""
        if agree(stop, self.shortening != self._agreed, self._job.world):
            self.shortening = self._agreed = self._job.world.broadcast_object(self.shortening)

    def look(self, step: int, monitor: Monitor) -> None:
        """Look at the time now and then, at the end after every step, and shorten the schedule where it must be."""
        now, deadline = time.monotonic(), self._job.deadline
        if deadline is None or (self.end - step > LAST_STEPS and now - self._last <= CLOCK_EVERY_S):
            return
        self._last = now
        schedule, before = self._job.plan.schedule, self.shortening
        after = shorten(schedule, step, before, left_s=deadline - now, step_s=monitor.step_s())
        if after is not None and after != before:
            monitor.add_event("shortening", step, f"clock: {after.reason}", end=after.end)
        self.shortening = after
