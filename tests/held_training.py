"""Sagittal's command line, whose training waits for what is to end it: `python held_training.py STEP train ...`.

A test that ends training from outside need not be quicker than training then: from that step on the run waits, before
the first step where STEP is 0, until it is killed or told to end.
"""

from __future__ import annotations

import signal
import sys
import time
from typing import Any

from sagittal.cli import main
from sagittal.training import run
from sagittal.training.log import JsonlLog
from sagittal.training.signals import StopFlag

LONGEST_S = 500.0


def hold_at(step: int) -> None:
    """Let training of this process wait from a step on."""
    flags: list[StopFlag] = []
    begin, write, last_check = StopFlag.__init__, JsonlLog.write, run.require_shared

    def begun(flag: StopFlag) -> None:
        begin(flag)
        flags.append(flag)

    def held(log: JsonlLog, kind: str, reached: int, **fields: Any) -> dict[str, Any]:
        record = write(log, kind, reached, **fields)
        if kind == "step" and reached >= step:
            _wait(flags)
        return record

    def held_before(*given: Any) -> None:
        last_check(*given)
        _wait(flags)

    StopFlag.__init__ = begun  # type: ignore[method-assign]
    JsonlLog.write = held  # type: ignore[method-assign]
    if step == 0:
        run.require_shared = held_before


def _wait(flags: list[StopFlag]) -> None:
    end = time.monotonic() + LONGEST_S
    while not any(flags) and time.monotonic() < end:
        time.sleep(0.002)


if __name__ == "__main__":
    # A shell's background jobs ignore Ctrl-C, and so would their children.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    hold_at(int(sys.argv.pop(1)))
    main()
