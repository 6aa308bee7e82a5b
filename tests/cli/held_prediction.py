"""Sagittal's command line, which waits at a case to be ended: `python held_prediction.py CASE predict ...`.

A test that ends a prediction from outside need not be quicker than all its cases then.
"""

from __future__ import annotations

import sys
import time

from sagittal.cli import main
from sagittal.inference.run_report import CasePrediction, RunLog

LONGEST_S = 500.0


def hold_at(name: str) -> None:
    """Let this process wait when it has told of a case."""
    add = RunLog.add

    def held(log: RunLog, case: CasePrediction) -> None:
        add(log, case)
        if case.case == name:
            time.sleep(LONGEST_S)

    RunLog.add = held  # type: ignore[method-assign]


if __name__ == "__main__":
    hold_at(sys.argv.pop(1))
    main()
