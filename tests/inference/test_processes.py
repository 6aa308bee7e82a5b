"""A folder shared between two processes, which run the whole way of a prediction on a tiny bundle."""

from __future__ import annotations

import logging
import os
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
from known_network import scan_of, tiny_plan

from sagittal.bundle import read_bundle
from sagittal.data.dataset import Case
from sagittal.errors import PlanError, ResourceError, SagittalError
from sagittal.inference import case_process, memory, processes
from sagittal.inference.folder import model_of, run_folder
from sagittal.inference.pipeline import Job
from sagittal.inference.predictor import load
from sagittal.inference.processes import Loading, Place, places_on, predict_on
from sagittal.inference.run_report import CasePrediction, Choices
from sagittal.testing.bundle import write_random_bundle
from sagittal.volumes import read_labels

pytest.importorskip("openvino", reason="OpenVINO starts faster than PyTorch, and these tests start processes")
PLACES = (Place("cpu", 1), Place("cpu", 1))


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_random_bundle(tmp_path_factory.mktemp("model") / "bundle", tiny_plan())


def write_scans(folder: Path, count: int) -> list[Case]:
    cases = []
    for number in range(count):
        path = scan_of((9 + number, 10, 11), seed=number).write(folder / f"c{number}.nii.gz")
        cases.append(Case(f"c{number}", (path,)))
    return cases


@pytest.mark.slow
def test_two_processes_predict_each_case_once_and_as_one_does(tmp_path: Path, bundle: Path) -> None:
    write_scans(tmp_path / "in", 5)
    (tmp_path / "in" / "c2.nii.gz").write_bytes(b"no scan")
    read = read_bundle(bundle)
    model = model_of(read, read.plan, "openvino", ("cpu", "cpu"))
    job = Job(tmp_path / "out", Choices(mirror=False), model.sha256, None, 8.0, model.threshold)
    told: list[CasePrediction] = []
    result = run_folder(
        model,
        job,
        tmp_path / "in",
        lambda cases, tell: predict_on(PLACES, Loading(bundle, "openvino"), job, cases, tell),
        on_case=told.append,
    )
    assert sorted(case.case for case in told) == ["c0", "c1", "c2", "c3", "c4"]
    assert [case.case for case in result.failures] == ["c2"] and result.cases[0].device == "cpu (openvino)"
    alone = load(bundle, device="cpu", engine="openvino")
    for name in ("c0", "c4"):
        expected = alone.predict(tmp_path / "in" / f"{name}.nii.gz", mirror=False).array[0]
        np.testing.assert_array_equal(read_labels(tmp_path / "out" / f"{name}.nii.gz")[0], expected)


@pytest.mark.kill
def test_a_process_that_is_killed_loses_one_case_and_the_rest_is_done(
    tmp_path: Path, bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cases, told = write_scans(tmp_path / "in", 4), list[CasePrediction]()
    killed: list[str] = []
    give = processes._Child.give

    def kill_at_the_first(child: processes._Child, case: Case | None) -> None:
        if not killed and case is not None:
            killed.append(case.id)
            os.kill(child._process.pid, signal.SIGKILL)
        give(child, case)

    monkeypatch.setattr(processes._Child, "give", kill_at_the_first)
    predict_on(PLACES, Loading(bundle, "openvino"), Job(tmp_path / "out", Choices(mirror=False)), cases, told.append)
    assert sorted(case.case for case in told) == ["c0", "c1", "c2", "c3"]
    (failure,) = (case for case in told if case.status == "failed")
    assert failure.case == killed[0] and "signal 9" in str(failure.message)


def _stand_in(folder: Path, monkeypatch: pytest.MonkeyPatch, program: str) -> None:
    """Have processes run a program of the test's own; `sys.argv[0]` tells where it may leave notes."""
    path = folder / "stand_in"
    path.write_text(
        f"#!{sys.executable}\nimport json, os, pathlib, sys, time\nhere = pathlib.Path(sys.argv[0])\n{program}"
    )
    path.chmod(0o755)
    monkeypatch.setattr(processes.sys, "executable", str(path))


_ANSWERING = """
def say(**message): print(json.dumps(message), flush=True)
def hear(): return json.loads(line) if (line := sys.stdin.readline()) else None
def done(case): say(case={"case": case["id"], "status": "done", "seconds": 0.0})
hear()
"""


def test_cases_that_come_back_when_the_others_have_ended_are_predicted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The first process takes two cases and dies; the second has been told by then that there are no more.
    _stand_in(
        tmp_path,
        monkeypatch,
        _ANSWERING
        + """
try:
    (here.parent / "first").mkdir()
except FileExistsError:
    while not (here.parent / "taken").exists(): time.sleep(0.01)
    say(want=True)
    while case := hear():
        done(case)
        say(want=True)
    (here.parent / "ended").touch()
    sys.exit(0)
say(want=True), hear(), say(want=True), hear()
(here.parent / "taken").touch()
while not (here.parent / "ended").exists(): time.sleep(0.01)
os._exit(9)
""",
    )
    cases, told = [Case(name, (tmp_path / name,)) for name in "abc"], list[CasePrediction]()
    predict_on(PLACES, Loading(tmp_path, "torch"), Job(tmp_path / "out", Choices()), cases, told.append)
    assert {case.case: case.status for case in told} == {"a": "failed", "b": "done", "c": "done"}


def test_a_process_that_dies_in_the_middle_of_a_word_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _stand_in(
        tmp_path,
        monkeypatch,
        _ANSWERING + """say(want=True), hear(), sys.stdout.write('{"case": {"ca'), sys.stdout.flush(), os._exit(9)""",
    )
    told = list[CasePrediction]()
    job = Job(tmp_path / "out", Choices())
    predict_on(PLACES[:1], Loading(tmp_path, "torch"), job, [Case("a", (tmp_path / "a",))], told.append)
    assert [(case.case, case.status) for case in told] == [("a", "failed")]


def test_when_no_process_is_left_the_run_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes.sys, "executable", "/bin/false")
    cases = [Case("a", (tmp_path / "a.nii",))]
    with pytest.raises(ResourceError, match=r"ended with code 1.*no other is left"):
        predict_on(PLACES, Loading(tmp_path, "torch"), Job(tmp_path / "out", Choices()), cases, print)
    monkeypatch.setattr(processes.sys, "executable", str(tmp_path / "absent"))
    with pytest.raises(ResourceError, match="can't be started"):
        predict_on(PLACES, Loading(tmp_path, "torch"), Job(tmp_path / "out", Choices()), cases, print)


@pytest.mark.parametrize(("engine", "kind"), [("torhc", PlanError), ("torch", SagittalError)])
def test_a_model_that_can_not_be_loaded_ends_the_run(
    tmp_path: Path, bundle: Path, engine: str, kind: type[SagittalError]
) -> None:
    where = bundle if engine == "torhc" else tmp_path / "absent"
    with pytest.raises(kind):
        predict_on(PLACES[:1], Loading(where, engine), Job(tmp_path, Choices()), write_scans(tmp_path / "in", 1), print)


def test_no_case_starts_no_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes.subprocess, "Popen", lambda *_, **__: pytest.fail("a process was started"))
    predict_on(PLACES, Loading(tmp_path, "torch"), Job(tmp_path, Choices()), [], print)


def test_places_share_the_threads() -> None:
    assert [place.threads for place in places_on(["cuda:0", "cuda:1"], 6)] == [3, 3]
    assert all(place.threads >= 1 for place in places_on(["cpu"] * 500))


def test_processes_share_the_memory_that_is_available(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "available_bytes", lambda: 10 * memory.GIB)
    assert processes._share_gib(None, 2) == 4.0 and processes._share_gib(None, 1) is None
    monkeypatch.setattr(memory, "available_bytes", lambda: None)
    assert processes._share_gib(None, 2) is None


def test_a_budget_counts_the_process_that_hands_out_the_cases(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "own_bytes", lambda: memory.GIB // 4)
    grows = processes._PARENT_GROWS_BYTES / memory.GIB
    assert processes._share_gib(6.0, 2) == (5.75 - grows) / 2 and processes._share_gib(6.0, 1) == 5.75 - grows
    with pytest.raises(ResourceError, match=r"--memory-gib 0\.2: .* takes 0\.25 GiB by itself.*for 3 that") as caught:
        processes._share_gib(0.2, 3)
    assert caught.value.code == "memory"


def test_the_memory_of_this_process_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    before = memory.own_bytes()
    held = np.ones(8 << 20)
    grown = memory.own_bytes() - before
    assert 0.9 * held.nbytes < grown < 1.3 * held.nbytes

    def absent(*_: object, **__: object) -> str:
        raise FileNotFoundError

    monkeypatch.setattr(Path, "read_text", absent)
    assert memory.own_bytes() == memory.PROCESS_BYTES["torch"]


def test_a_process_has_its_share_of_the_threads_and_says_how_far_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    _stand_in(
        tmp_path,
        monkeypatch,
        """
task = json.loads(sys.stdin.readline())
def say(**message): print(json.dumps(message), flush=True)
say(want=True)
case = json.loads(sys.stdin.readline())
say(window=[case["id"], task["threads"], 9])
say(case={"case": case["id"], "status": "done", "seconds": 0.0, "code": str(task["debug"])})
""",
    )
    told: list[CasePrediction] = []
    windows: list[tuple[str, int, int]] = []
    job, case = Job(tmp_path, Choices()), write_scans(tmp_path / "in", 1)
    predict_on([Place("cpu", 5)], Loading(tmp_path, "torch"), job, case, told.append, lambda *at: windows.append(at))
    assert windows == [("c0", 5, 9)]
    assert [found.code for found in told] == ["False"]
    with caplog.at_level(logging.DEBUG, logger="sagittal"):
        assert processes._task(Place("cpu", 1), Loading(tmp_path, "torch"), job, 1)["debug"] is True


def test_windows_are_told_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[list[object]] = []
    now = [0.0]
    monkeypatch.setattr(case_process.time, "monotonic", lambda: now[0])
    tell = case_process._windows_told(lambda window: said.append(window))
    for second in range(8):
        now[0] = float(second)
        tell("c", second, 9)
    assert said == [["c", 3, 9], ["c", 6, 9]]
