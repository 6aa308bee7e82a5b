"""Cases predicted by a job in SLURM's queue. It needs no torch, as predictions on one machine don't."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sagittal.cluster.slurm_job import finish, processors
from sagittal.data.dataset import Case
from sagittal.errors import PlanError, SagittalError
from sagittal.inference.pipeline import Job
from sagittal.inference.processes import Loading, places_on, predict_on
from sagittal.inference.run_report import CasePrediction


@dataclass(frozen=True)
class ShardJob:
    """Predicts some of the cases. `journal` gets a line for each; those that have one are not computed again."""

    loading: Loading
    job: Job
    cases: tuple[Case, ...]
    devices: tuple[str, ...]
    journal: Path
    report: Path

    def __call__(self) -> None:
        """Predict, and leave a report or go back into the queue."""
        finish(self._predicted, self.report)

    def _predicted(self) -> Mapping[str, Any]:
        told = {case.case for case in read_journal(self.journal)}
        end_last_line(self.journal)

        def tell(case: CasePrediction) -> None:
            with self.journal.open("a", encoding="utf-8") as file:
                file.write(case.model_dump_json() + "\n")

        left = [case for case in self.cases if case.id not in told]
        try:
            predict_on(places_on(self.devices, processors()), self.loading, self.job, left, tell)
        except SagittalError as error:
            return error.as_dict()
        return {"ended": "finished"}


def end_last_line(path: Path) -> None:
    """End the last line of a journal whose job was killed while it wrote, so that the next one is a line of its own."""
    if path.is_file() and (content := path.read_bytes()) and not content.endswith(b"\n"):
        with path.open("ab") as file:
            file.write(b"\n")


def read_journal(path: Path) -> list[CasePrediction]:
    """Return the cases that a shard has told of; the last line of one that was killed may be cut off."""
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
    cases = []
    for line in lines:
        with suppress(PlanError):
            cases.append(CasePrediction.from_json(line))
    return cases


def shards_of(cases: Sequence[Case], count: int) -> list[tuple[Case, ...]]:
    """Deal cases out, one after the other, so that neighbours of like size do not end up together."""
    return [tuple(cases[number::count]) for number in range(min(count, len(cases)))]
