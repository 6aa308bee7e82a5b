"""Train one fold: the loop, read from top to bottom."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median
from typing import Literal

import numpy as np
import torch

from sagittal.bundle import Bundle
from sagittal.data.cache import Cache
from sagittal.data.label_index import label_index
from sagittal.data.loader import TrainingBatches
from sagittal.networks.encoder import set_encoder_frozen
from sagittal.plan.plan import Plan
from sagittal.training.checkpoint import Progress, load_checkpoint, newest_checkpoint, save_checkpoint
from sagittal.training.initialization import describe_start, fill, frozen_steps, write_report
from sagittal.training.log import JsonlLog
from sagittal.training.schedules import LAST_STEPS, Shortening, position, rate_factor, shorten, validation_steps
from sagittal.training.signals import StopFlag
from sagittal.training.step import new_network, new_optimizer, train_on_batch
from sagittal.training.validation import validate_on_cache

Say = Callable[[str], None]

SAY_EVERY_S = 15.0
COMPLETE = ("finished", "shortened")
"""How a fold that reached its end may have ended: by the plan or by the clock."""
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


@dataclass(frozen=True)
class FoldRun:
    """A fold's weights and how its training ended."""

    network: torch.nn.Module
    progress: Progress
    ended: Literal["finished", "shortened", "interrupted", "terminated"]
    waited_s: float
    """Time spent waiting for data in this attempt."""

    @property
    def complete(self) -> bool:
        """Whether the fold reached its end, by the plan or by the clock."""
        return self.ended in COMPLETE

    def weights(self) -> dict[str, np.ndarray]:
        """Return the weights as arrays on the CPU, by official names."""
        return {name: value.detach().cpu().contiguous().numpy() for name, value in self.network.state_dict().items()}


def train_fold(job: FoldJob, stop: StopFlag, say: Say) -> FoldRun:
    """Train until the plan's last step, the deadline or a stop; start from the newest checkpoint where there is one.

    Losses depend on the plan, the cache and the device only: a run killed at any moment and started again gives the
    same ones, bit for bit on the CPU (steps done after the last checkpoint are done again).

    Raises:
        TrainingError: a loss that is not finite, or a checkpoint that does not fit.
        ResourceError: the disk is full; the last checkpoint stays intact.
    """
    schedule, index = job.plan.schedule, label_index(job.plan.dataset)
    network = new_network(job.plan, job.device).train()
    optimizer = new_optimizer(network, job.plan.training.optimizer)
    progress = _begin(job, network, optimizer, say)
    step, shortening = progress.step, progress.shortening
    began, validations = time.monotonic() - progress.elapsed_s, validation_steps(schedule)
    pace, freezing = _Pace(say), _Freezing(network, frozen_steps(job.plan), say)

    def state() -> Progress:
        return progress.replace(step=step, elapsed_s=time.monotonic() - began, shortening=shortening)

    with (
        JsonlLog(job.folder / "log.jsonl", keep_to_step=step) as log,
        closing(TrainingBatches(job.cache, job.train, job.plan, start_step=step, device=job.device)) as batches,
    ):
        last_saved = last_clock = start = time.monotonic()
        for batch in batches:
            if stop or step >= _end(job.plan, shortening):
                break
            freezing.obey(position(schedule, step, shortening), step)
            rate = job.plan.training.optimizer.learning_rate * rate_factor(schedule, step, shortening)
            loss = train_on_batch(network, optimizer, batch, job.plan, learning_rate=rate, index=index)
            step += 1
            pace.add(time.monotonic() - start, loss)
            log.write("step", step, loss=loss, learning_rate=rate, seconds=time.monotonic() - began)
            near_end = _end(job.plan, shortening) - step <= LAST_STEPS
            if job.deadline is not None and (near_end or time.monotonic() - last_clock > CLOCK_EVERY_S):
                shortening = _obey_clock(job, step, shortening, pace, log, say)
                last_clock = time.monotonic()
            pace.tell(step, _end(job.plan, shortening), rate)
            if step in validations and job.validation:
                cases = _some(job.validation, schedule.validation_cases)
                score = validate_on_cache(network, job.cache, cases, job.plan, index)
                log.write("validation", step, dice=score.dice, mean_dice=score.mean_dice, cases=len(cases))
                say(f"step {step}: Dice {score.mean_dice:.3f} on {len(cases)} whole held-out cases")
            if time.monotonic() - last_saved > job.checkpoint_every_s:
                save_checkpoint(job.folder, network, optimizer, state())
                last_saved = time.monotonic()
            start = time.monotonic()
        save_checkpoint(job.folder, network, optimizer, state())
        waited_s = batches.waited_s
    ended: Literal["finished", "shortened", "interrupted", "terminated"]
    if stop.reason is not None and step < _end(job.plan, shortening):
        ended = stop.reason
    else:
        ended = "shortened" if step < schedule.steps else "finished"
    return FoldRun(network=network.eval(), progress=state(), ended=ended, waited_s=waited_s)


def _begin(job: FoldJob, network: torch.nn.Module, optimizer: torch.optim.Optimizer, say: Say) -> Progress:
    """Fill network and optimiser from the newest checkpoint, else the network from the plan's source if it has one."""
    found = newest_checkpoint(job.folder)
    if found is None:
        if job.plan.training.initialization is not None:
            assert job.source is not None
            report = fill(network, job.plan, job.source, job.name)
            write_report(job.folder, job.plan, report, job.name)
            for line in describe_start(job.plan, report, job.name):
                say(line)
        return Progress(step=0, plan_sha256=job.plan_sha256, elapsed_s=0.0)
    path, progress = found
    load_checkpoint(path, network, optimizer, plan_sha256=job.plan_sha256)
    say(f"fold {job.name}: goes on after step {progress.step} of {job.plan.schedule.steps}")
    return progress


def _end(plan: Plan, shortening: Shortening | None) -> int:
    return plan.schedule.steps if shortening is None else shortening.end


def _some(cases: tuple[int, ...], count: int) -> tuple[int, ...]:
    """Return `count` of the cases, evenly spread and always the same."""
    if len(cases) <= count:
        return cases
    return tuple(cases[int(position)] for position in np.linspace(0, len(cases) - 1, count))


def _obey_clock(
    job: FoldJob, step: int, shortening: Shortening | None, pace: _Pace, log: JsonlLog, say: Say
) -> Shortening | None:
    assert job.deadline is not None
    left_s = job.deadline - time.monotonic()
    shorter = shorten(job.plan.schedule, step, shortening, left_s=left_s, step_s=pace.step_s())
    if shorter is not None and shorter != shortening:
        log.write("shortening", step, end=shorter.end, reason=shorter.reason)
        say(f"clock: {shorter.reason}")
    return shorter


class _Freezing:
    """Keeps the encoder frozen over the first steps of the schedule; a pure function of where in it a step stands."""

    def __init__(self, network: torch.nn.Module, steps: int, say: Say) -> None:
        self._network, self._steps, self._say = network, steps, say
        self._frozen = False

    def obey(self, reached: float, step: int) -> None:
        """Freeze the encoder or let it go, as the place in the schedule that `step` has reached demands."""
        if reached < self._steps:
            # Each time anew: a validation puts the whole network back into train mode.
            set_encoder_frozen(self._network, True)
            self._frozen = True
        elif self._frozen:
            set_encoder_frozen(self._network, False)
            self._frozen = False
            self._say(f"step {step}: the encoder is trained from here on")


class _Pace:
    """The time and loss of recent steps, told now and then with the time left."""

    def __init__(self, say: Say) -> None:
        self._say = say
        self._first_s: float | None = None
        self._seconds: deque[float] = deque(maxlen=50)
        self._losses: deque[float] = deque(maxlen=50)
        self._told = time.monotonic()

    def add(self, seconds: float, loss: float) -> None:
        self._losses.append(loss)
        if self._first_s is None:
            self._first_s = seconds
        else:
            self._seconds.append(seconds)

    def step_s(self) -> float:
        """Return a pessimistic mean of the recent steps: their mean or their median, whichever is longer.

        The first step of an attempt allocates memory and fills caches; it counts only while there is no other.
        """
        assert self._first_s is not None
        return max(mean(self._seconds), median(self._seconds)) if self._seconds else self._first_s

    def tell(self, step: int, end: int, rate: float) -> None:
        if time.monotonic() - self._told < SAY_EVERY_S and step != end:
            return
        self._told = time.monotonic()
        left = int((end - step) * self.step_s())
        self._say(
            f"step {step}/{end}  loss {mean(self._losses):.3f}  rate {rate:.1e}  {self.step_s():.2f} s/step  "
            f"left {left // 3600}:{left // 60 % 60:02d}:{left % 60:02d}"
        )
