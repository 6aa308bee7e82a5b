"""Jobs of an earlier command where SLURM's controller answers late or not: none is taken for gone unasked."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from sagittal.cluster import slurm, slurm_folds, slurm_predict
from sagittal.cluster.places import parse_place
from sagittal.cluster.slurm import JobState, SlurmQueue, SlurmSettings
from sagittal.cluster.slurm_folds import SlurmFolds
from sagittal.cluster.slurm_predict import SLURM, recover
from sagittal.errors import ResourceError, TrainingError
from sagittal.training.run_folder import HANDED_OUT

SILENT, GONE, RUNS = None, dict[str, JobState](), {"12": JobState("RUNNING", "None", "n1")}
Answers = Callable[..., list[str]]


@pytest.fixture
def answers(monkeypatch: pytest.MonkeyPatch) -> Answers:
    """Return what lets a queue answer so, the last answer for ever, and collects what it was told."""
    monkeypatch.setattr(slurm.shutil, "which", lambda program: program)
    for name in ("ANSWER_S", "ASK_EVERY_S", "_LOOK_EVERY_S"):
        monkeypatch.setattr(slurm, name, 0.0)
    for module in (slurm_predict, slurm_folds):
        monkeypatch.setattr(module, "LATE_S", 0.0)

    def answers(*given: dict[str, JobState] | None) -> list[str]:
        left, told = list(given), list[str]()

        def states(queue: SlurmQueue, jobs: Iterable[str]) -> dict[str, JobState] | None:
            return left.pop(0) if len(left) > 1 else left[0]

        def submit(queue: SlurmQueue, name: str, elements: list[Any]) -> list[str]:
            told.append("submitted")
            return [f"{20 + number}" for number in range(len(elements))]

        monkeypatch.setattr(SlurmQueue, "states", states)
        monkeypatch.setattr(SlurmQueue, "cancel", lambda queue, jobs: told.append(f"cancelled {' '.join(jobs)}"))
        monkeypatch.setattr(SlurmQueue, "submit", submit)
        return told

    return answers


def _queue(folder: Path) -> SlurmQueue:
    return SlurmQueue(parse_place("slurm"), SlurmSettings(), folder / "jobs")


def test_a_controller_that_does_not_answer_is_asked_again(
    answers: Answers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers(SILENT)
    assert _queue(tmp_path).alive(["12"]) is None
    with pytest.raises(ResourceError, match="nobody knows whether the jobs 12 of before still run") as caught:
        _queue(tmp_path).surely_alive(["12"])
    assert caught.value.code == "slurm_unreachable"
    answers(SILENT, SILENT, RUNS)
    monkeypatch.setattr(slurm, "ANSWER_S", 300.0)
    assert _queue(tmp_path).surely_alive(["12"]) == RUNS


def test_jobs_have_ended_once_the_controller_says_so(
    answers: Answers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers(SILENT)
    assert not _queue(tmp_path).end(["12"], 0.0)
    told = answers(SILENT, RUNS, SILENT, {"12": JobState("CANCELLED", "None", "n1")})
    assert _queue(tmp_path).end(["12"], 300.0) and told == ["cancelled 12"]


@pytest.mark.parametrize(("given", "code"), [((SILENT,), "slurm_unreachable"), ((RUNS,), "jobs_left")])
def test_a_prediction_takes_no_files_from_jobs_that_may_run(
    answers: Answers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: tuple[Any, ...], code: str
) -> None:
    folder = tmp_path / SLURM
    folder.mkdir()
    (folder / "jobs.json").write_text('["12"]')
    answers(*given)
    with pytest.raises(ResourceError) as caught:
        recover(parse_place("slurm"), tmp_path)
    assert caught.value.code == code and "12" in caught.value.message and (folder / "jobs.json").is_file()
    told = answers(SILENT, GONE)
    monkeypatch.setattr(slurm, "ANSWER_S", 300.0)
    recover(parse_place("slurm"), tmp_path)
    assert not folder.exists() and told == ["cancelled "]


class _Left:
    """A run folder in which an earlier command left a job, and what would train its fold now."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch, *, plan: str, done: bool) -> None:
        self.lines, self._queue = list[str](), _queue(folder)
        self._run: Any = SimpleNamespace(folder=folder, plan="now", options=SimpleNamespace(say=self.lines.append))
        (folder / HANDED_OUT).write_text(json.dumps({"plan_sha256": plan, "jobs": {"0": "12"}}))
        monkeypatch.setattr(slurm_folds, "plan_sha256", str)
        monkeypatch.setattr(slurm_folds, "_is_done", lambda run, name: done)
        monkeypatch.setattr(SlurmFolds, "_element", lambda *given: None)

    def jobs(self) -> dict[str, str]:
        return SlurmFolds(parse_place("slurm"))._jobs(self._queue, self._run, ["0"])


def test_no_second_job_trains_a_fold_whose_first_one_may_run(
    answers: Answers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    left = _Left(tmp_path, monkeypatch, plan="now", done=False)
    told = answers(SILENT)
    with pytest.raises(ResourceError, match="did not answer"):
        left.jobs()
    answers(SILENT, RUNS)
    monkeypatch.setattr(slurm, "ANSWER_S", 300.0)
    assert left.jobs() == {"0": "12"} and told == []


def test_a_fold_that_is_done_by_another_plan_is_trained_again(
    answers: Answers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = answers(GONE)
    assert _Left(tmp_path, monkeypatch, plan="now", done=True).jobs() == {"0": "12"} and told == []
    assert _Left(tmp_path, monkeypatch, plan="before", done=True).jobs() == {"0": "20"} and told == ["submitted"]
    answers(RUNS)
    with pytest.raises(TrainingError, match="jobs of another plan"):
        _Left(tmp_path, monkeypatch, plan="before", done=False).jobs()
