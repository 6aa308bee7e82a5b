"""Cases scored on a Ray cluster: what `report.scoring_pool.score_all` does on one machine.

Scoring is one processor's work, so a worker has one and its process is the one that a bad case may end.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from sagittal.cluster.places import Place
from sagittal.cluster.pool import Pool, Told
from sagittal.cluster.ray_session import Needs, Session, connected
from sagittal.errors import ResourceError
from sagittal.evaluation import Failure
from sagittal.report.scoring import Answer, Job, Outcome
from sagittal.report.scoring_process import answer


def score_on_ray(
    place: Place | Session,
    jobs: Sequence[Job],
    workers: int | None = None,
    on_case: Callable[[Outcome], None] | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> list[Outcome]:
    """Return the outcome of every job, in their order.

    Args:
        place: the cluster, or a session with it. Its nodes see the label maps under the same paths.
        jobs: the cases.
        workers: at most; by itself one for each processor of the cluster.
        on_case: told of each as it is done, in any order, from this thread.
        say: a line for a person.

    Raises:
        ResourceError: a node does not see the label maps or lacks a package that a metric needs, or none is left.
    """
    if isinstance(place, Place):
        with connected(place, say=say) as session:
            return score_on_ray(session, jobs, workers, on_case, say)
    by_case = {job.case: job for job in jobs}
    outcomes: dict[str, Outcome] = {}

    def keep(case: str, outcome: Outcome) -> None:
        outcomes[case] = outcome
        if on_case is not None:
            on_case(outcome)

    def poison(case: str, why: str) -> None:
        message = f"{why}, and no other case did; most likely its memory does not suffice."
        keep(case, Outcome(failure=Failure(case=case, code="poison", message=message)))

    told = Told(lambda case, text: keep(case, Outcome.from_json(text)), poison, say)
    pool = Pool(place, ScoringHand, Needs(), workers=workers, environment={"OMP_NUM_THREADS": "1"})
    pool.run(list(by_case), lambda case: _absolute(by_case[case]).model_dump_json(), told)
    return [outcomes[job.case] for job in jobs]


class ScoringHand:
    """A worker that scores one case after the other."""

    def open(self, beside: int) -> str:
        """Return what this is; nothing is loaded."""
        return "scoring"

    def do(self, item: str) -> str:
        """Return the outcome of a job."""
        job = Job.from_json(item, source="the cluster")
        for path in (job.reference, job.prediction):
            if not path.exists():
                raise ResourceError(
                    f"{path}: this node does not see it. Put the label maps on a disk that all nodes have under that "
                    "path.",
                    code="not_shared",
                )
        found: Answer = answer(job)
        if found.lack is not None and found.lack.code == "memory":
            return Outcome(failure=found.lack).model_dump_json()
        if found.lack is not None:
            raise ResourceError(found.lack.message, code=found.lack.code)
        assert found.bug is None, f"scoring {job.case} failed:\n{found.bug}"
        assert found.outcome is not None
        return found.outcome.model_dump_json()

    def close(self) -> None:
        """Let go of nothing."""


def _absolute(job: Job) -> Job:
    def whole(path: Path | None) -> Path | None:
        return None if path is None else path.absolute()

    return job.replace(
        reference=whole(job.reference), prediction=whole(job.prediction), probabilities=whole(job.probabilities)
    )
