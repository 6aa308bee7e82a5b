"""What a run tells while it goes on: the log, lines or a table for a person, a page, trackers, alarms."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import mean, median
from types import TracebackType
from typing import Any, Self

import torch

from sagittal.errors import ResourceError
from sagittal.report.training import Final
from sagittal.training.history import History
from sagittal.training.live import LiveClass, LiveTable, Reading, duration
from sagittal.training.log import JsonlLog
from sagittal.training.progress_page import Moment, ProgressPage, Watched, class_standings
from sagittal.training.standing import Standing
from sagittal.training.step import StepResult
from sagittal.training.trackers import Tracker, open_trackers
from sagittal.training.validation import Score

Say = Callable[[str], None]

SAY_EVERY_S = 15.0
EPOCH_STEPS = 250
"""After as many steps there is a new page: an epoch, as nnU-Net counts."""
TRACK_EVERY = 10
"""Steps between two points that trackers get; each is the mean of the steps since the one before."""
PICTURES = 3
"""Worst cases that the page shows."""

_ENDINGS = {
    "finished": "finished",
    "shortened": "finished, shortened by the clock",
    "stale": "stopped early: no better validation",
    "interrupted": "interrupted; --resume goes on",
    "terminated": "terminated; --resume goes on",
}


class Monitor:
    """Receives every step and validation of a fold; nothing that it does can change a weight.

    Args:
        folder: the fold's; `log.jsonl` and `progress.html` are written there.
        watched: the fold.
        step: finished steps, from which a resumed run goes on.
        say: receives lines for a person.

    Raises:
        TrainingError: a tracker that is not known.
        ResourceError: a tracker's package is missing, or the folder can't be written.
    """

    def __init__(self, folder: Path, watched: Watched, *, step: int, say: Say) -> None:
        self._say, self._watched = say, watched
        self._trackers = open_trackers(watched.trackers, folder, run=watched.title, step=step)
        self._log = JsonlLog(folder / "log.jsonl", keep_to_step=step)
        self._history = History(self._log.kept, steps=watched.plan.schedule.steps)
        self._page = ProgressPage(folder / "progress.html", watched)
        self._table = LiveTable()
        self._moment = Moment(step, watched.plan.schedule.steps, 0.0, 0.0, worst_step=step)
        self._first_s: float | None = None
        self._seconds: deque[float] = deque(maxlen=50)
        self._since: list[StepResult] = []
        self._told = time.monotonic()

    def add_step(
        self,
        step: int,
        end: int,
        result: StepResult,
        *,
        rate: float,
        step_s: float,
        elapsed_s: float,
        waited_s: float = 0.0,
    ) -> None:
        """Take in a finished step.

        Args:
            step: finished steps.
            end: the last one as things stand.
            result: what the step told.
            rate: the learning rate.
            step_s: what it took, waiting for its batch included.
            elapsed_s: training time so far, over all attempts.
            waited_s: of `step_s`, the time that it waited for its batch.
        """
        if self._first_s is None:
            self._first_s = step_s
        else:
            self._seconds.append(step_s)
        self._moment = replace(
            self._moment,
            step=step,
            end=end,
            elapsed_s=elapsed_s,
            left_s=(end - step) * self.step_s(),
            memory_mib=self._memory_mib(),
        )
        self._record_step(step, result, rate=rate, step_s=step_s, elapsed_s=elapsed_s, waited_s=waited_s)
        if self._table.due():
            self._table.show(self._reading())
        if time.monotonic() - self._told >= SAY_EVERY_S or step == end:
            self._told = time.monotonic()
            if not self._table.is_shown:
                self._say(self._line(rate))
        if step % EPOCH_STEPS == 0 and self._page.affordable():
            self._page.write(self._history, self._moment)

    def step_s(self) -> float:
        """Return a pessimistic mean of the recent steps: their mean or their median, whichever is longer.

        The first step of an attempt allocates memory and fills caches; it counts only while there is no other. Before
        it, the mean of an earlier attempt's last steps, NaN where there was none.
        """
        if self._seconds:
            return max(mean(self._seconds), median(self._seconds))
        return self._history.recent("step_s") if self._first_s is None else self._first_s

    def add_validation(self, step: int, score: Score, standing: Standing, *, cases: int, seconds: float) -> None:
        """Take in a validation and how the run stands after it."""
        self._record(
            "validation",
            step,
            dice=score.dice,
            mean_dice=score.mean_dice,
            cases=cases,
            seconds=round(seconds, 2),
            elapsed_s=round(self._moment.elapsed_s, 2),
            present=dict(score.present),
            by_case={case: dict(dice) for case, dice in score.by_case.items()},
            best_dice=standing.best_dice,
            best_step=standing.best_step,
            stale=standing.stale,
        )
        self._track(step, {"dice/mean": score.mean_dice, **_by_label("dice", score.dice)})
        self._say(f"step {step}: Dice {score.mean_dice:.3f} on {cases} whole held-out cases{self._compared(standing)}")
        self._moment = replace(self._moment, worst_step=step, worst=score.worst)
        self._page.write(self._history, self._moment)
        if self._table.is_shown:
            self._table.show(self._reading())

    def add_event(self, kind: str, step: int, text: str, **fields: Any) -> None:
        """Take in what else happened, such as a schedule that was shortened."""
        self._record(kind, step, reason=text, **fields)
        self._say(text)

    def finish(self, ended: str) -> None:
        """Take in how training ended."""
        self._moment = replace(self._moment, state=_ENDINGS.get(ended, ended), running=False, left_s=0.0)

    def add_evaluation(self, final: Final) -> None:
        """Take in the evaluation after the end; the page shows it from now on.

        Raises:
            ResourceError: the disk is full.
        """
        self._moment = replace(self._moment, final=final)
        self._page.write(self._history, self._moment)

    def __enter__(self) -> Self:
        self._log.__enter__()
        if self._watched.live:
            self._table.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._table.stop()
        self._log.__exit__(kind, value, trace)
        self._to_trackers(lambda tracker: tracker.close())
        if self._moment.running:
            told = () if value is None else (str(value).splitlines()[0] if str(value) else type(value).__name__,)
            self._moment = replace(self._moment, state="stopped by an error", running=False, notes=told)
        try:
            self._page.write(self._history, self._moment)
        except ResourceError:
            # The disk is full: what happened is told by the error itself, or by the next file that is written.
            if kind is None:
                raise

    def _record(self, kind: str, step: int, **fields: Any) -> None:
        before = {alarm.label: alarm for alarm in self._history.alarms}
        self._history.add(self._log.write(kind, step, **fields))
        if kind != "validation":
            return
        after = {alarm.label: alarm for alarm in self._history.alarms}
        for label, alarm in after.items():
            if label not in before:
                self._log.write("alarm", step, label=label, alarm=alarm.kind, reason=alarm.text, advice=alarm.advice)
                self._say(f"ALARM: {alarm.text}. {alarm.advice}")
        for label in before.keys() - after.keys():
            # One alarm for all of the classes may give way to alarms for some of them.
            self._log.write("alarm_over", step, label=label)
            self._say(f"step {step}: {label or 'some class'} is found again")

    def _record_step(
        self, step: int, result: StepResult, *, rate: float, step_s: float, elapsed_s: float, waited_s: float
    ) -> None:
        more: dict[str, float] = {}
        if self._moment.memory_mib is not None:
            more["memory_mib"] = round(self._moment.memory_mib, 1)
        if result.loss_scale is not None:
            more["loss_scale"] = result.loss_scale
        self._record(
            "step",
            step,
            loss=_finite(result.loss),
            learning_rate=rate,
            gradient_norm=_finite(result.gradient_norm),
            seconds=elapsed_s,
            step_s=step_s,
            waited_s=waited_s,
            **more,
        )
        if not self._trackers:
            return
        self._since.append(result)
        if step % TRACK_EVERY == 0:
            done = [one for one in self._since if not one.skipped]
            values = {
                **({"train/loss": mean(one.loss for one in done)} if done else {}),
                **({"train/gradient_norm": mean(one.gradient_norm for one in done)} if done else {}),
                "train/learning_rate": rate,
                "time/step_s": self._history.recent("step_s", len(self._since)),
                "time/waited_share": self._history.waited_share(len(self._since)),
                **more,
            }
            self._since.clear()
            self._track(step, values)

    def _track(self, step: int, values: dict[str, float]) -> None:
        self._to_trackers(lambda tracker: tracker.log(step, values))

    def _to_trackers(self, work: Callable[[Tracker], None]) -> None:
        """Do something with every tracker; one that fails is told of and gets nothing more, and training goes on."""
        for tracker in self._trackers:
            try:
                work(tracker)
            except Exception as error:
                # Of a package that training does not hang on, which may raise anything.
                self._trackers = tuple(other for other in self._trackers if other is not tracker)
                told = " ".join(f"{type(error).__name__}: {error}".split())[:200]
                self._say(f"{type(tracker).__name__}: failed and gets nothing more; log.jsonl has everything ({told})")

    def _line(self, rate: float) -> str:
        moment = self._moment
        return (
            f"step {moment.step}/{moment.end}  loss {self._history.recent('loss'):.3f}  rate {rate:.1e}  "
            f"{self.step_s():.2f} s/step  waited {100 * self._history.waited_share():.1f} %  "
            f"left {duration(moment.left_s)}"
        )

    def _reading(self) -> Reading:
        moment = self._moment
        numbers = {
            "loss": f"{self._history.recent('loss'):.3f}",
            "rate": f"{self._history.recent('learning_rate', 1):.1e}",
            "s/step": f"{self.step_s():.3g}",
            "waited": f"{100 * self._history.waited_share():.1f} %",
        }
        if moment.memory_mib is not None:
            numbers["GPU"] = f"{moment.memory_mib / 1024:.1f} GiB"
        if self._history.validations:
            last = self._history.validations[-1]
            numbers["Dice"] = f"{last['mean_dice']:.3f} at step {last['step']}"
        classes = [
            LiveClass(one.name, one.dice, one.best, one.best_step or 0)
            for one in class_standings(self._watched.plan, self._history)
        ]
        alarms = [alarm.text for alarm in self._history.alarms]
        return Reading(self._watched.title, moment.step, moment.end, moment.left_s, numbers, classes, alarms)

    def _compared(self, standing: Standing) -> str:
        if standing.best_dice is None or len(self._history.validations) < 2:
            return ""
        if standing.stale == 0:
            return ", the best so far"
        patience = self._watched.plan.schedule.early_stop_validations
        of = f" of {patience}" if patience else ""
        since = f"{standing.stale}{of} validation{'s' if standing.stale > 1 or patience else ''} ago"
        return f"; best {standing.best_dice:.3f} at step {standing.best_step}, {since}"

    def _memory_mib(self) -> float | None:
        device = self._watched.device
        return torch.cuda.max_memory_allocated(device) / 2**20 if device.type == "cuda" else None


def _finite(value: float) -> float | None:
    """Return a number that JSON has, None for the loss or norm of a step that overflowed."""
    return value if math.isfinite(value) else None


def _by_label(prefix: str, dice: dict[str, float | None]) -> dict[str, float]:
    return {f"{prefix}/{name}": value for name, value in dice.items() if value is not None}
