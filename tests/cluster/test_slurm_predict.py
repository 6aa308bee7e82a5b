"""Scans in a SLURM queue: the outputs of one machine, whatever becomes of the jobs, and nothing computed twice."""

from __future__ import annotations

import hashlib
import json
import shutil
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from slurm_site import SlurmSite

from sagittal.bundle import read_bundle
from sagittal.cli import run
from sagittal.cluster import slurm_predict
from sagittal.cluster.places import Place, parse_place
from sagittal.cluster.slurm_predict import SLURM, device_in_jobs, predict_on_slurm, recover
from sagittal.cluster.slurm_shard_job import end_last_line, read_journal
from sagittal.data.dataset import Case
from sagittal.errors import PlanError, ResourceError
from sagittal.inference.folder import Compute, Tell, model_of, run_folder
from sagittal.inference.pipeline import Job
from sagittal.inference.processes import Loading, places_on, predict_on
from sagittal.inference.run_report import CasePrediction, Choices, FolderResult
from sagittal.testing.bundle import write_untrained_bundle
from sagittal.testing.datasets import TINY_SETTINGS
from sagittal.volumes import Volume

CASES, DAMAGED = 8, "c05"
TINY = {name: value for name, value in TINY_SETTINGS.items() if name.startswith(("network", "patch"))}


@pytest.fixture(scope="module")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle, scans of which one is none, and what one machine makes of them."""
    folder = tmp_path_factory.mktemp("cohort")
    write_untrained_bundle(folder / "bundle", "mednext-s", 3, settings=TINY)
    for number in range(CASES):
        scan = np.random.default_rng(number).normal(100, 20, (1, 40 + number % 4, 36, 38)).astype(np.float32)
        Volume(scan, np.diag([1.0, 1.0, 1.0, 1.0])[:, [2, 1, 0, 3]]).write(folder / "scans" / f"c{number:02d}.nii.gz")
    (folder / "scans" / f"{DAMAGED}.nii.gz").write_bytes(b"no scan")
    loading = Loading(folder / "bundle", "torch", kernels="auto")

    def compute(cases: Sequence[Case], tell: Tell) -> None:
        predict_on(places_on(("cpu",), 1), loading, _job(folder, folder / "here"), cases, tell)

    _run(folder, folder / "here", compute)
    return folder


def _job(cohort: Path, out: Path) -> Job:
    sha256 = read_bundle(cohort / "bundle").manifest.manifest_sha256
    return Job(out, Choices(mirror=False), sha256, "cpu")


def _run(cohort: Path, out: Path, compute: Compute) -> FolderResult:
    bundle = read_bundle(cohort / "bundle")
    return run_folder(
        model_of(bundle, bundle.plan, "torch fp32", ("cpu",)), _job(cohort, out), cohort / "scans", compute
    )


def _on(place: Place, cohort: Path, out: Path, lines: list[str]) -> Compute:
    loading = Loading(cohort / "bundle", "torch", kernels="auto")

    def compute(cases: Sequence[Case], tell: Tell) -> None:
        predict_on_slurm(place, loading, _job(cohort, out), cases, tell, lines.append, poll_s=0.2)

    return compute


def _never(cases: Sequence[Case], tell: Tell) -> None:
    assert list(cases) == [], "cases were to be computed again"


def _sums(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.glob("*.nii.gz"))}


def _until(true: Callable[[], bool]) -> None:
    end = time.monotonic() + 300
    while not true():
        assert time.monotonic() < end
        time.sleep(0.02)


def _has_told(out: Path, journals: str) -> bool:
    return any(read_journal(path) for path in (out / SLURM).glob(f"shard_{journals}"))


def _facts(result: FolderResult) -> list[tuple[object, ...]]:
    """Return what a report says of its cases but for times."""
    return [
        (case.case, case.status, case.output, case.volumes_ml, case.code, case.flags, case.files, case.choices)
        for case in result.cases
    ]


@pytest.mark.slow
def test_outputs_are_those_of_one_machine_when_one_job_is_preempted_and_another_lost(
    slurm: SlurmSite, cohort: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(slurm_predict, "LATE_S", 1.0)
    out, lines, place = tmp_path / "out", list[str](), parse_place("slurm:shards=2,cpus=1,time=10")

    def disturb() -> None:
        _until(lambda: len(slurm.jobs()) == 2)
        first, second = sorted(slurm.jobs())
        # Each at its own first case: one job may be through before the other has begun.
        waiting = {"*_0001.jsonl": (first, "TERM"), "*_0002.jsonl": (second, "KILL")}
        while waiting:
            _until(lambda: any(_has_told(out, name) for name in waiting))
            for name in [name for name in waiting if _has_told(out, name)]:
                job, number = waiting.pop(name)
                slurm.ask("scancel", f"--signal={number}", job)
        slurm.go_on(first)

    disturber = threading.Thread(target=disturb)
    disturber.start()
    result = _run(cohort, out, _on(place, cohort, out, lines))
    disturber.join()
    assert any("go into the queue again" in line for line in lines), lines
    assert sum(": running on" in line for line in lines) >= 3, lines
    expected = FolderResult.read(cohort / "here" / "prediction.json")
    assert _facts(result) == _facts(expected) == _facts(FolderResult.read(out / "prediction.json"))
    assert [case.case for case in result.failures] == [DAMAGED]
    assert _sums(out) == _sums(cohort / "here") and len(_sums(out)) == CASES - 1
    recover(place, out)
    (cohort / "scans" / f"{DAMAGED}.nii.gz").rename(tmp_path / "damaged")
    try:
        again = _run(cohort, out, _never)
    finally:
        (tmp_path / "damaged").rename(cohort / "scans" / f"{DAMAGED}.nii.gz")
    assert all(case.finished_before for case in again.cases) and len(again.cases) == CASES - 1


@pytest.mark.slow
def test_what_a_killed_command_left_is_taken_over(slurm: SlurmSite, cohort: Path, tmp_path: Path) -> None:
    """Its job is ended, and the lines of its shards count, the last one cut off."""
    out = tmp_path / "out"
    shutil.copytree(cohort / "here", out)
    told = FolderResult.read(out / "prediction.json").cases
    (out / "prediction.json").unlink()
    job = slurm.ask("sbatch", "--parsable", "-o", "/dev/null", "--wrap", "sleep 600").strip()
    (out / SLURM).mkdir()
    (out / SLURM / "jobs.json").write_text(json.dumps([job]))
    text = "".join(case.model_dump_json() + "\n" for case in told)
    (out / SLURM / "shard_a_0001.jsonl").write_text(text + '{"case": "c99", "sta')
    recover(parse_place("slurm"), out)
    assert job not in slurm.jobs() and not (out / SLURM).exists()
    computed: list[str] = []

    def compute(cases: Sequence[Case], tell: Tell) -> None:
        for case in cases:
            computed.append(case.id)
            tell(CasePrediction(case=case.id, status="failed", seconds=0.0, message="no scan", code="x"))

    result = _run(cohort, out, compute)
    assert computed == [DAMAGED]
    assert sum(case.finished_before for case in result.cases) == CASES - 1


@pytest.mark.slow
def test_the_command_line_predicts_in_the_queue(
    slurm: SlurmSite, cohort: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(slurm_predict, "POLL_S", 0.2)
    for name in ("c00", "c01"):
        (tmp_path / "scans").mkdir(exist_ok=True)
        shutil.copy(cohort / "scans" / f"{name}.nii.gz", tmp_path / "scans")
    command = ["predict", str(cohort / "bundle"), str(tmp_path / "scans"), "--out", str(tmp_path / "out")]
    command += ["--engine", "torch", "--no-mirror", "--on", "slurm:cpus=1"]
    assert run(command) == 0
    assert "2 cases in SLURM's queue, jobs " in capsys.readouterr().err
    expected = _sums(cohort / "here")
    assert _sums(tmp_path / "out") == {name: expected[name] for name in ("c00.nii.gz", "c01.nii.gz")}
    assert not (tmp_path / "out" / SLURM).exists()
    assert run(command) == 0
    told = capsys.readouterr()
    assert told.out.count("finished before") == 2 and "queue" not in told.err
    assert run([*command, "--workers", "2"]) == 2
    assert "--workers, --worker-cpus and --store are" in capsys.readouterr().err


@pytest.mark.slow
def test_an_error_of_a_job_reaches_the_user(slurm: SlurmSite, cohort: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    loading = Loading(cohort / "gone", "torch", kernels="auto")
    cases = [Case("c00", (cohort / "scans" / "c00.nii.gz",))]
    out.mkdir()
    with pytest.raises(Exception, match="gone") as caught:
        predict_on_slurm(parse_place("slurm"), loading, _job(cohort, out), cases, print, poll_s=0.2)
    assert type(caught.value).__name__ == "BundleError"


def test_what_follows_a_line_that_was_cut_off_is_read(tmp_path: Path) -> None:
    journal = tmp_path / "shard.jsonl"
    end_last_line(journal)
    assert not journal.exists()
    line = CasePrediction(case="c00", status="failed", seconds=0.0, message="no scan", code="x").model_dump_json()
    journal.write_text(f'{line}\n{{"case": "c01", "sta')
    for _ in range(2):
        end_last_line(journal)
    with journal.open("a") as file:
        file.write(line.replace("c00", "c01") + "\n")
    assert [case.case for case in read_journal(journal)] == ["c00", "c01"]


def test_no_case_asks_for_no_slurm(tmp_path: Path) -> None:
    predict_on_slurm(parse_place("slurm"), Loading(tmp_path, "torch"), Job(tmp_path, Choices()), [], print)


def test_recover_leaves_a_folder_of_no_jobs_alone(tmp_path: Path) -> None:
    recover(parse_place("slurm"), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_without_slurm_the_programs_that_are_missing_are_named(
    cohort: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    cases = [Case("c00", (cohort / "scans" / "c00.nii.gz",))]
    with pytest.raises(ResourceError, match="sbatch, srun, squeue, scancel, scontrol not found") as caught:
        predict_on_slurm(parse_place("slurm"), Loading(cohort, "torch"), _job(cohort, tmp_path), cases, print)
    assert caught.value.code == "no_slurm"


def test_the_device_of_jobs_follows_what_they_are_given() -> None:
    assert device_in_jobs(parse_place("slurm:gpus=1"), "auto") == "cuda"
    assert device_in_jobs(parse_place("slurm"), "auto") == "cpu"
    assert device_in_jobs(parse_place("slurm"), "cuda") == "cuda"
    with pytest.raises(PlanError, match="device of its own"):
        device_in_jobs(parse_place("slurm"), "cuda:1")
