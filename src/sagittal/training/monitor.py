"""What a run tells while it goes on: the log, lines for a person, and what its validations say."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from statistics import mean, median
from types import TracebackType
from typing import Any, Self

from sagittal.training.log import JsonlLog
from sagittal.training.standing import Standing
from sagittal.training.step import StepResult
from sagittal.training.validation import Score

Say = Callable[[str], None]

SAY_EVERY_S = 15.0


class Monitor:
    """Receives every step and validation of a fold; nothing that it does can change a weight.

    Args:
        folder: the fold's; `log.jsonl` is written there.
        step: finished steps, from which a resumed run goes on.
        say: receives lines for a person.
    """

    def __init__(self, folder: Path, *, step: int, say: Say) -> None:
        self._say = say
        self._log = JsonlLog(folder / "log.jsonl", keep_to_step=step)
        self._first_s: float | None = None
        self._seconds: deque[float] = deque(maxlen=50)
        self._losses: deque[float] = deque(maxlen=50)
        self._told = time.monotonic()

    def add_step(
        self, step: int, end: int, result: StepResult, *, rate: float, step_s: float, elapsed_s: float
    ) -> None:
        """Take in a finished step: `end` is the last one as things stand, `rate` the learning rate."""
        self._log.write("step", step, loss=result.loss, learning_rate=rate, seconds=elapsed_s)
        self._losses.append(result.loss)
        if self._first_s is None:
            self._first_s = step_s
        else:
            self._seconds.append(step_s)
        if time.monotonic() - self._told >= SAY_EVERY_S or step == end:
            self._told = time.monotonic()
            left = int((end - step) * self.step_s())
            self._say(
                f"step {step}/{end}  loss {mean(self._losses):.3f}  rate {rate:.1e}  {self.step_s():.2f} s/step  "
                f"left {left // 3600}:{left // 60 % 60:02d}:{left % 60:02d}"
            )

    def step_s(self) -> float:
        """Return a pessimistic mean of the recent steps: their mean or their median, whichever is longer.

        The first step of an attempt allocates memory and fills caches; it counts only while there is no other.
        """
        assert self._first_s is not None
        return max(mean(self._seconds), median(self._seconds)) if self._seconds else self._first_s

    def add_validation(self, step: int, score: Score, standing: Standing, *, cases: int, seconds: float) -> None:
        """Take in a validation and how the run stands after it."""
        self._log.write(
            "validation", step, dice=score.dice, mean_dice=score.mean_dice, cases=cases, seconds=round(seconds, 2)
        )
        self._say(f"step {step}: Dice {score.mean_dice:.3f} on {cases} whole held-out cases")

    def add_event(self, kind: str, step: int, text: str, **fields: Any) -> None:
        """Take in what else happened, such as a schedule that was shortened."""
        self._log.write(kind, step, reason=text, **fields)
        self._say(text)

    def __enter__(self) -> Self:
        self._log.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._log.__exit__(kind, value, trace)
