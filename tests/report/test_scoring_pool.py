from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from sagittal.errors import ResourceError
from sagittal.evaluation import ClassSet, EvaluationSettings
from sagittal.evaluation.lesions import LesionRule
from sagittal.report import scoring_pool, scoring_process
from sagittal.report.scoring import Job, score_files
from sagittal.report.scoring_pool import ScoringProcess, need_bytes, read_values, score_all
from sagittal.volumes import Volume

SHAPE = (5, 8, 11)
CLASSES = ClassSet.of_mapping({"head": 1, "tail": 2})


def write(path: Path, array: np.ndarray) -> Path:
    affine = np.diag([3.0, 0.8, 0.5, 1.0])[[2, 1, 0, 3]]
    Volume(array[None], affine).write(path)
    return path


def job(folder: Path, case: str, **changes: object) -> Job:
    rng = np.random.default_rng(sum(map(ord, case)))
    paths = {side: folder / f"{case}-{side}.nii.gz" for side in ("reference", "prediction")}
    for path in paths.values():
        if not path.exists():
            write(path, rng.integers(0, 3, SHAPE, np.uint8))
    given = {"probabilities": None, "patient": f"patient of {case}", "strict": True, **paths, **changes}
    return Job(case=case, classes=CLASSES, settings=EvaluationSettings(), **given)


@pytest.fixture
def jobs(tmp_path: Path) -> list[Job]:
    return [job(tmp_path, case) for case in ("a", "b", "c")]


def test_processes_find_what_one_finds(jobs: list[Job], monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = score_all(jobs, 1)
    monkeypatch.setattr(scoring_pool, "APART_VOX", 1)
    told: list[str] = []
    found = score_all(jobs, 2, lambda outcome: told.append(outcome.score.case if outcome.score else "?"))
    assert found == wanted and [outcome.score.case for outcome in found if outcome.score] == ["a", "b", "c"]
    assert sorted(told) == ["a", "b", "c"]
    assert found[0].score is not None and found[0].score.patient == "patient of a"


def test_small_work_starts_no_process(jobs: list[Job], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ScoringProcess, "score", lambda self, job: pytest.fail("a process was started"))
    assert all(outcome.score for outcome in score_all(jobs, 2))


def test_giving_up_ends_the_processes_and_starts_no_other(jobs: list[Job], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scoring_pool, "APART_VOX", 1)
    started: list[subprocess.Popen[str]] = []
    start = subprocess.Popen

    def record(*arguments: object, **options: object) -> subprocess.Popen[str]:
        started.append(start(*arguments, **options))
        return started[-1]

    def interrupt(_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("sagittal.report.scoring_pool.subprocess.Popen", record)
    with pytest.raises(KeyboardInterrupt):
        score_all(jobs, 2, interrupt)
    assert 1 <= len(started) <= 2 and all(process.poll() is not None for process in started)
    given_up = ScoringProcess()
    given_up.abandon()
    with pytest.raises(ResourceError, match="given up"):
        given_up.score(jobs[0])
    assert len(started) <= 2


def test_a_case_that_kills_its_process_is_told_and_the_others_are_scored(
    jobs: list[Job], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scoring_pool, "APART_VOX", 1)
    real, started = scoring_pool.subprocess.Popen, []
    deadly = (
        "import sys, os; from sagittal.report import scoring_process as p; real = p.answer; "
        "p.answer = lambda job: os._exit(9) if job.case == 'b' else real(job); p.main()"
    )

    def popen(command: list[str], **options: object) -> object:
        started.append(command)
        assert command[1:] == ["-m", "sagittal.report.scoring_process"]
        return real([sys.executable, "-c", deadly], **options)

    monkeypatch.setattr(scoring_pool.subprocess, "Popen", popen)
    outcomes = score_all(jobs, 2)
    assert [outcome.score is None for outcome in outcomes] == [False, True, False]
    failure = outcomes[1].failure
    assert failure is not None and failure.code == "memory" and "only case at work" in failure.message
    assert len(started) >= 3, "the case was tried again in a process of its own"


def test_what_is_missing_in_a_process_ends_the_evaluation(jobs: list[Job], monkeypatch: pytest.MonkeyPatch) -> None:
    def lacking(job: Job) -> None:
        raise ResourceError("no such package", code="missing_package")

    monkeypatch.setattr(scoring_process, "score_files", lacking)
    answer = scoring_process.answer(jobs[0])
    assert answer.lack is not None and answer.lack.code == "missing_package" and answer.outcome is None


def test_a_bug_in_a_process_keeps_its_traceback(jobs: list[Job], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scoring_process, "score_files", lambda job: 1 / 0)
    answer = scoring_process.answer(jobs[0])
    assert answer.bug is not None and "ZeroDivisionError" in answer.bug


def test_memory_that_is_short_in_a_process_is_told(jobs: list[Job], monkeypatch: pytest.MonkeyPatch) -> None:
    def greedy(job: Job) -> None:
        raise MemoryError

    monkeypatch.setattr(scoring_process, "score_files", greedy)
    answer = scoring_process.answer(jobs[0])
    assert answer.lack is not None and answer.lack.code == "memory"


def test_need_grows_with_the_scan_and_its_probabilities(tmp_path: Path, jobs: list[Job]) -> None:
    plain, more = need_bytes(jobs[0]), need_bytes(jobs[0].replace(probabilities=tmp_path / "a.npz"))
    assert plain == np.prod(SHAPE) * scoring_pool.BYTES_PER_VOXEL < more
    assert need_bytes(jobs[0].replace(reference=tmp_path / "absent.nii.gz")) == 0


def test_files_that_cannot_be_scored_are_an_outcome(tmp_path: Path, jobs: list[Job]) -> None:
    (tmp_path / "broken.nii.gz").write_bytes(b"no scan")
    failure = score_files(jobs[0].replace(prediction=tmp_path / "broken.nii.gz")).failure
    assert failure is not None and failure.case == "a" and "broken" in failure.message


def test_probabilities_give_the_calibration(tmp_path: Path, jobs: list[Job]) -> None:
    rng = np.random.default_rng(0)
    raw = rng.random((3, *SHAPE), np.float32)
    np.savez(tmp_path / "a.npz", probabilities=(raw / raw.sum(0)).astype(np.float16))
    score = score_files(jobs[0].replace(probabilities=tmp_path / "a.npz")).score
    assert score is not None and score.calibration is not None
    assert score.calibration.whole.voxels == np.prod(SHAPE)
    np.savez(tmp_path / "a.npz", probabilities=raw[:, 1:].astype(np.float16))
    failure = score_files(jobs[0].replace(probabilities=tmp_path / "a.npz")).failure
    assert failure is not None


def test_lesions_with_probabilities_give_free_response_curves(tmp_path: Path, jobs: list[Job]) -> None:
    reference = np.zeros(SHAPE, np.uint8)
    reference[1, 2, 3], reference[3, 5, 8], reference[3, 5, 9] = 1, 1, 2
    probabilities = np.zeros((3, *SHAPE), np.float16)
    probabilities[1, 1, 2, 3], probabilities[1, 0, 0, 0] = 0.9, 0.3
    probabilities[0] = 1 - probabilities[1:].sum(0)
    np.savez(tmp_path / "a.npz", probabilities=probabilities)
    settings = EvaluationSettings(lesions=LesionRule())
    given = jobs[0].replace(
        reference=write(tmp_path / "r.nii.gz", reference), probabilities=tmp_path / "a.npz", settings=settings
    )
    score = score_files(given).score
    assert score is not None
    head, tail = score.classes["head"], score.classes["tail"]
    assert head.lesions is not None and head.free_response is not None and tail.free_response is not None
    assert [lesion.centre_vox for lesion in head.lesions.reference] == [(1, 2, 3), (3, 5, 8)]
    assert head.free_response.curve[-1] == (1.0, 0.5), "at 0.05 one of two is found, with one false alarm"
    assert head.free_response.sensitivity_at(0.0) == 0.5 and tail.free_response.curve[-1] == (0.0, 0.0)
    ignoring = ClassSet.of_mapping({"head": 1, "ignore": 2})
    two = np.stack([1 - probabilities[1], probabilities[1]])
    np.savez(tmp_path / "a.npz", probabilities=two)
    reference[0, 0, 0] = 2
    write(tmp_path / "r.nii.gz", reference)
    ignored = score_files(given.replace(classes=ignoring)).score
    assert ignored is not None and ignored.classes["head"].free_response is not None
    assert ignored.classes["head"].free_response.curve[-1] == (0.0, 0.5)


def test_values_are_read_in_the_pool_and_files_that_cannot_be_are_left_to_their_cases(tmp_path: Path) -> None:
    for number in range(4):
        array = np.zeros((3, 4, 5), np.uint8)
        array[0, 0, :number] = range(2, 2 + number)
        Volume(array[None], np.eye(4)).write(tmp_path / f"{number}.nii.gz")
    (tmp_path / "bad.nii.gz").write_bytes(b"no scan")
    expected = [{0}, {0, 2}, {0, 2, 3}, {0, 2, 3, 4}, set()]
    for workers in (1, 3):
        paths = [tmp_path / f"{name}.nii.gz" for name in (0, 1, 2, 3, "bad")]
        assert read_values(paths, workers) == expected
