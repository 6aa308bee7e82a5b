"""`python -m sagittal.training.fold_process`: one fold in a process of its own; `side_by_side` starts it."""

from __future__ import annotations

import json
import os
import pickle
import sys
import threading
import traceback
from typing import TextIO

import torch

from sagittal.errors import SagittalError
from sagittal.kernels import keep_freed_memory
from sagittal.kernels.choice import use_kernels
from sagittal.training.cross_validation import FoldTask, run_task
from sagittal.training.side_by_side import LENGTH_BYTES, OUTPUT_LOG
from sagittal.training.signals import StopFlag, graceful_stop


def main() -> int:
    """Do the task on standard input, telling each line as JSON, and return the exit code."""
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as channel:
        # What libraries print, and a traceback, must not mix with the messages.
        os.dup2(2, 1)
        # The parent, of the same program and user, wrote it a moment ago; it was never on a disk.
        task = pickle.loads(_read(int.from_bytes(_read(LENGTH_BYTES), "big")))  # noqa: S301
        assert isinstance(task, FoldTask)
        torch.set_num_threads(task.threads)
        keep_freed_memory()
        with graceful_stop() as stop:
            threading.Thread(target=_listen, args=(stop,), daemon=True).start()
            return _do(task, stop, channel)


def _do(task: FoldTask, stop: StopFlag, channel: TextIO) -> int:
    def tell(**message: object) -> None:
        channel.write(json.dumps(message) + "\n")
        channel.flush()

    try:
        with use_kernels(task.run.options.kernels, task.run.options.known_kernels):
            ended = run_task(task, stop, lambda line: tell(say=line))
    except SagittalError as error:
        tell(error={"message": error.message, "code": error.code, "type": type(error).__name__})
        return 1
    except Exception as error:
        traceback.print_exc()
        message = f"{type(error).__name__}: {error}; the traceback is in fold_{task.name}/{OUTPUT_LOG}"
        tell(error={"message": message, "code": "bug", "type": type(error).__name__})
        return 1
    tell(ended=ended)
    return 0


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
