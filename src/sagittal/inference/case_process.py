"""`python -m sagittal.inference.case_process`: one device's part of a folder; `processes` starts it.

It is sent lines of JSON: first the task, then a case for each that it asks for. It answers with lines of JSON:
{"ready": "cpu (openvino)"}, {"want": true}, {"window": [case, done, of]}, {"case": ...}, {"fatal": ...}. The end of its
input, which comes even from a parent that was killed, means that there are no more cases.
"""

from __future__ import annotations

import json
import logging
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from sagittal.bundle import read_bundle
from sagittal.data.dataset import Case
from sagittal.errors import SagittalError
from sagittal.inference.engines.choice import kernels_switched
from sagittal.inference.ensemble import computed_by, predictor_of
from sagittal.inference.fast import fast_settings_of
from sagittal.inference.messages import Send, sent_by_standard_output
from sagittal.inference.pipeline import CasePipeline, Job
from sagittal.inference.run_report import CasePrediction, Choices

TELL_EVERY_S = 2.0
"""How often it says how far the scan in progress is."""


def main() -> int:
    """Do the task on standard input and return the exit code."""
    with sent_by_standard_output() as send:
        try:
            return _work(sys.stdin, send)
        except SagittalError as error:
            send(fatal={"type": type(error).__name__, "message": error.message, "code": error.code})
        except BrokenPipeError:  # the parent is gone, and nobody is left to be told
            return 1
        except Exception as error:
            traceback.print_exc()
            send(fatal={"type": "SagittalError", "message": f"{type(error).__name__}: {error}", "code": "bug"})
        return 1


def _work(lines: IO[str], send: Send) -> int:
    first = lines.readline()
    if not first:
        return 1
    task = json.loads(first)
    known = None if task["known_kernels"] is None else Path(task["known_kernels"])
    with kernels_switched(task["kernels"], known):
        return _predict(task, lines, send)


def _predict(task: dict[str, Any], lines: IO[str], send: Send) -> int:
    if task["debug"]:
        logging.basicConfig(stream=sys.stderr)
        logging.getLogger("sagittal").setLevel(logging.DEBUG)
    bundles = [read_bundle(path) for path in task["bundles"]]
    folder, choices = Path(task["folder"]), Choices.from_json(json.dumps(task["choices"]))
    if choices.fast:
        bundles = [each.bundle for each in fast_settings_of(bundles)]
    cache_folder = None if task["cache_folder"] is None else Path(task["cache_folder"])
    predictor = predictor_of(
        bundles,
        choices,
        task["device"],
        task["engine"],
        cache_folder=cache_folder,
        scratch=folder,
        threads=task["threads"],
    )
    job = Job(
        folder=folder,
        choices=choices,
        bundle_sha256=task["bundle_sha256"],
        device=computed_by(predictor),
        memory_gib=task["memory_gib"],
        threshold=(task["threshold"][0], task["threshold"][1]),
    )
    send(ready=job.device)

    def tell(case: CasePrediction) -> None:
        send(case=case.model_dump(mode="json"))

    CasePipeline(predictor, job, tell, _windows_told(send)).run(_cases(lines, send))
    return 0


def _windows_told(send: Send) -> Callable[[str, int, int], None]:
    """Return what tells the parent how far a case is, now and then."""
    told_at = time.monotonic()

    def tell(case: str, done: int, of: int) -> None:
        nonlocal told_at
        if time.monotonic() - told_at > TELL_EVERY_S:
            told_at = time.monotonic()
            send(window=[case, done, of])

    return tell


def _cases(lines: IO[str], send: Send) -> Iterator[Case]:
    while True:
        send(want=True)
        line = lines.readline()
        if not line:
            return
        case = json.loads(line)
        yield Case(case["id"], tuple(Path(image) for image in case["images"]))


if __name__ == "__main__":
    sys.exit(main())
