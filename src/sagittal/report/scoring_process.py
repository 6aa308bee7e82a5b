"""The other end of `scoring_pool`: jobs from standard input, a line each, and their answers to standard output."""

from __future__ import annotations

import sys
import traceback

from sagittal.errors import ResourceError
from sagittal.evaluation import Failure
from sagittal.report.scoring import Answer, Job, score_files


def main() -> None:
    """Answer every job until the input ends."""
    for line in sys.stdin:
        sys.stdout.write(answer(Job.from_json(line, source="standard input")).model_dump_json() + "\n")
        sys.stdout.flush()


def answer(job: Job) -> Answer:
    """Return what became of a job; every error is in it."""
    try:
        return Answer(outcome=score_files(job))
    except MemoryError:
        return Answer(lack=Failure(case=job.case, code="memory", message="it does not fit into memory."))
    except ResourceError as error:
        return Answer(lack=Failure(case=job.case, code=error.code, message=error.message))
    except Exception:
        return Answer(bug=traceback.format_exc())


if __name__ == "__main__":
    main()
