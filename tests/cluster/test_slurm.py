"""What may be said of SLURM in --on, how its refusals read, and what a job knows of itself."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from slurm_site import SlurmSite

from sagittal.cluster import slurm_job
from sagittal.cluster.places import parse_place
from sagittal.cluster.slurm import SlurmQueue, SlurmSettings, parse_time_min, read_settings, without_shards
from sagittal.cluster.slurm_fold_job import _Starts
from sagittal.cluster.slurm_job import STOPPED, finish, job_id, processors, put_back, read_report
from sagittal.cluster.slurm_shard_job import shards_of
from sagittal.cluster.slurm_table import FoldRow, table
from sagittal.data.dataset import Case
from sagittal.errors import PlanError, ResourceError
from sagittal.training.run_folder import FoldStanding


@pytest.mark.parametrize(
    ("text", "minutes"),
    [
        *(("90", 90), ("30m", 30), ("8h", 480), ("2d", 2880), ("10:30", 11), ("1:30:00", 90), ("0:00:01", 1)),
        *(("1-0", 1440), ("1-12", 2160), ("1-12:30", 2190), ("2-00:00:30", 2881)),
    ],
)
def test_times_are_read_as_sbatch_reads_them(text: str, minutes: int) -> None:
    assert parse_time_min(text) == minutes


@pytest.mark.parametrize("text", ["", "0", "0h", "soon", "-5", "1:2:3:4", "8 h", "1-", "0-0"])
def test_a_time_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(ValueError):
        parse_time_min(text)


def test_settings_are_read() -> None:
    text = "slurm:partition=gpu,time=8h,gpus=1,cpus=8,mem=32G,account=me,qos=low,constraint=a100,parallel=2,shards=16"
    assert read_settings(parse_place(text)) == SlurmSettings(
        partition="gpu",
        account="me",
        qos="low",
        constraint="a100",
        time_min=480,
        gpus=1,
        cpus=8,
        mem_gib=32.0,
        parallel=2,
        shards=16,
    )
    assert read_settings(parse_place("slurm")) == SlurmSettings()
    assert read_settings(parse_place("slurm:mem=512M")).mem_gib == 0.5


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("slurm:partion=gpu", "unknown setting 'partion'. Did you mean 'partition'?"),
        ("slurm:time=soon", "time=soon makes no sense. Expected minutes"),
        ("slurm:time=4", "at least 5 minutes"),
        ("slurm:gpus=-1", "gpus=-1 makes no sense"),
        ("slurm:cpus=0", "cpus=0 makes no sense"),
        ("slurm:mem=0", "mem=0 makes no sense"),
        ("slurm:shards=1001", "1 to 1000"),
    ],
)
def test_a_setting_that_makes_no_sense_is_refused(text: str, message: str) -> None:
    with pytest.raises(PlanError) as caught:
        read_settings(parse_place(text))
    assert message in caught.value.message


def test_folds_are_not_dealt_into_shards() -> None:
    with pytest.raises(PlanError, match="an element per fold"):
        without_shards(SlurmSettings(shards=2))


@settings(max_examples=30, deadline=None, derandomize=True)
@given(st.integers(1, 40), st.integers(1, 12))
def test_shards_hold_each_case_once_and_are_even(count: int, shards: int) -> None:
    cases = [Case(f"c{number}", (Path(f"c{number}.nii"),)) for number in range(count)]
    dealt = shards_of(cases, shards)
    assert sorted(case.id for shard in dealt for case in shard) == sorted(case.id for case in cases)
    assert len(dealt) == min(shards, count) and max(map(len, dealt)) - min(map(len, dealt)) <= 1


@pytest.mark.parametrize(
    ("text", "code", "message"),
    [
        ("slurm:partition=spar", "unknown_partition", "no partition 'spar' that you may use. Did you mean 'spare'?"),
        ("slurm:time=3h", "job_rejected", "time limit"),
        ("slurm:gpus=1", "job_rejected", "gres"),
        ("slurm:cpus=64", "job_rejected", "More processors requested than permitted"),
    ],
)
def test_a_job_that_slurm_refuses_is_told_in_its_words(
    slurm: SlurmSite, tmp_path: Path, capfd: pytest.CaptureFixture[str], text: str, code: str, message: str
) -> None:
    place = parse_place(text)
    queue = SlurmQueue(place, read_settings(place), tmp_path / "jobs")
    with pytest.raises(ResourceError) as caught:
        queue.submit("refused", [_nothing])
    assert caught.value.code == code and message.lower() in caught.value.message.lower(), caught.value.message
    assert f"--on {text}" in caught.value.message
    assert capfd.readouterr().err == "" and slurm.jobs() == {}


def test_a_job_that_nobody_knows_has_no_state(slurm: SlurmSite, tmp_path: Path) -> None:
    queue = SlurmQueue(parse_place("slurm"), SlurmSettings(), tmp_path)
    assert queue.states(["987654"]) == {} and queue.alive(["987654_1"]) == {} and queue.alive([]) == {}


def test_without_a_controller_the_queue_is_unknown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _programs(
        tmp_path, monkeypatch, squeue="echo 'slurm_load_jobs error: Unable to contact slurm controller' >&2; exit 1"
    )
    queue = SlurmQueue(parse_place("slurm"), SlurmSettings(), tmp_path / "jobs")
    assert queue.states(["1"]) is None


def test_a_controller_that_is_silent_is_told_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said = "sbatch: error: Batch job submission failed: Unable to contact slurm controller (connect failure)"
    _programs(tmp_path, monkeypatch, sbatch=f"echo '{said}' >&2; exit 1")
    queue = SlurmQueue(parse_place("slurm"), SlurmSettings(), tmp_path / "jobs")
    with pytest.raises(ResourceError, match="controller does not answer") as caught:
        queue.submit("x", [_nothing, _nothing])
    assert caught.value.code == "slurm_unreachable"


@pytest.mark.parametrize(("state", "back"), [("RUNNING", True), ("COMPLETING", False), ("PENDING", False), ("", False)])
def test_only_a_job_that_runs_goes_back_into_the_queue(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, state: str, back: bool
) -> None:
    """One that was cancelled is completing when it is told, and is not to come back."""
    _programs(tmp_path, monkeypatch, squeue=f"echo {state}", scontrol=f"echo $* >> {tmp_path}/asked")
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "12")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "3")
    assert job_id() == "12_3"
    assert put_back() is back
    assert (tmp_path / "asked").exists() is back
    if back:
        assert (tmp_path / "asked").read_text() == "requeue 12_3\n"


@pytest.mark.parametrize("silent", ["squeue", "scontrol"])
def test_a_controller_that_is_silent_for_a_while_is_asked_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, silent: str
) -> None:
    asked = tmp_path / "asked"
    first_fails = f"echo x >> {asked}; test $(wc -l < {asked}) -gt 2 || exit 1"
    programs = {"squeue": "echo RUNNING", "scontrol": "true"}
    _programs(tmp_path, monkeypatch, **{**programs, silent: f"{first_fails}; {programs[silent]}"})
    monkeypatch.setattr(slurm_job, "ASK_EVERY_S", 0.0)
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    assert put_back()
    assert asked.read_text() == "x\n" * 3
    asked.unlink()
    monkeypatch.setattr(slurm_job, "ASK_S", 0.0)
    assert not put_back(), "it does not ask for ever"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR2])
def test_a_job_that_is_told_to_end_leaves_no_report_and_exits_with_75(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    asked: list[str] = []
    monkeypatch.setattr(slurm_job, "put_back", lambda: asked.append("back"))
    before = {each: signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGUSR2)}

    def work() -> dict[str, str]:
        os.kill(os.getpid(), number)
        return {"ended": "finished"}

    try:
        with pytest.raises(SystemExit) as caught:
            finish(work, tmp_path / "report.json")
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)
    assert caught.value.code == STOPPED and asked == ["back"]
    assert read_report(tmp_path / "report.json") is None


def test_starts_that_get_no_further_are_counted(tmp_path: Path) -> None:
    assert _Starts.read(tmp_path) == _Starts()
    starts = _Starts().again(10.0, 0)
    assert starts == _Starts(10.0, 0, 0)
    assert starts.again(5.0, 0).again(5.0, 0) == _Starts(20.0, 0, 2)
    assert starts.again(5.0, 0).again(5.0, 7) == _Starts(20.0, 7, 0)
    (tmp_path / "slurm_starts.json").write_text('{"used_s": 3.5, "step": 2, "stuck": 1}')
    assert _Starts.read(tmp_path) == _Starts(3.5, 2, 1)
    (tmp_path / "slurm_starts.json").write_text('{"used_s": 3.5, "st')
    assert _Starts.read(tmp_path) == _Starts()


def test_a_job_that_is_done_leaves_its_report(tmp_path: Path) -> None:
    finish(lambda: {"ended": "finished"}, tmp_path / "report.json")
    assert read_report(tmp_path / "report.json") == {"ended": "finished"}


def test_a_job_takes_the_processors_that_it_was_given(monkeypatch: pytest.MonkeyPatch) -> None:
    there = len(os.sched_getaffinity(0))
    monkeypatch.setenv("SLURM_CPUS_ON_NODE", "1")
    assert processors() == 1
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", "4096")
    assert processors() == there


def test_the_table_has_a_row_for_each_fold() -> None:
    rows = [
        FoldRow("0", "12_0", "running on n1", FoldStanding("0", 50, 100, 0.5, 40)),
        FoldRow("1", "12_1", "pending (Resources)", None),
    ]
    console = Console(width=120, record=True)
    with console.capture() as captured:
        console.print(table(rows))
    first, second = captured.get().splitlines()[1:]
    assert "running on n1" in first and "50 of 100" in first and "0.500 at 40" in first
    assert "pending (Resources)" in second


def _nothing() -> None:
    """Do nothing in a job."""


def _programs(folder: Path, monkeypatch: pytest.MonkeyPatch, **scripts: str) -> None:
    """Put programs in the place of SLURM's."""
    (folder / "bin").mkdir()
    for name in ("sbatch", "srun", "squeue", "scancel", "scontrol"):
        path = folder / "bin" / name
        path.write_text(f"#!/bin/sh\n{scripts.get(name, 'exit 1')}\n")
        path.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder / 'bin'}:/usr/bin:/bin")
