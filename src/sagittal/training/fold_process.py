"""`python -m sagittal.training.fold_process`: one fold in a process of its own; `side_by_side` starts it."""

from __future__ import annotations

import os
import pickle
import sys
import threading
import traceback
from collections.abc import Callable
from typing import Any

import torch

from sagittal.errors import SagittalError
from sagittal.inference.messages import Send, sent_by_standard_output
from sagittal.kernels import keep_freed_memory
from sagittal.kernels.choice import use_kernels
from sagittal.training.cross_validation import FoldTask, run_task
from sagittal.training.side_by_side import LENGTH_BYTES, OUTPUT_LOG
from sagittal.training.signals import StopFlag, graceful_stop


def main() -> int:
    """Do the task on standard input, telling each line as JSON, and return the exit code."""
    with sent_by_standard_output() as send:
        # The parent, of the same program and user, wrote it a moment ago; it was never on a disk.
        task = pickle.loads(_read(int.from_bytes(_read(LENGTH_BYTES), "big")))  # noqa: S301
        assert isinstance(task, FoldTask)
        torch.set_num_threads(task.threads)
        keep_freed_memory()
        with graceful_stop() as stop:
            threading.Thread(target=_listen, args=(stop,), daemon=True).start()
            return _do(task, stop, send)


def _do(task: FoldTask, stop: StopFlag, send: Send) -> int:
    report = report_of(task, stop, lambda line: send(say=line))
    send(**report)
    return 1 if "error" in report else 0


def report_of(task: FoldTask, stop: StopFlag, say: Callable[[str], None]) -> dict[str, Any]:
    """Train a fold in this process and return the last message of it: how it ended, or the error that ended it.

    The traceback of what was not foreseen goes to standard error, which belongs into the fold's output.log.
    """
    try:
        with use_kernels(task.run.options.kernels, task.run.options.known_kernels):
            return {"ended": run_task(task, stop, say)}
    except SagittalError as error:
        return {"error": {"message": error.message, "code": error.code, "type": type(error).__name__}}
    except Exception as error:
        traceback.print_exc()
        message = f"{type(error).__name__}: {error}; the traceback is in fold_{task.name}/{OUTPUT_LOG}"
        return {"error": {"message": message, "code": "bug", "type": type(error).__name__}}


def _listen(stop: StopFlag) -> None:
    """Raise the flag when the parent says so, or is gone."""
    word = os.read(0, 64).decode().strip()
    if not stop:
        stop.reason = "interrupted" if word == "interrupted" else "terminated"


def _read(count: int) -> bytes:
    content = b""
    while len(content) < count:
        part = os.read(0, count - len(content))
        if not part:
            sys.exit(1)  # The parent ended before it had said what to do.
        content += part
    return content


if __name__ == "__main__":
    sys.exit(main())
