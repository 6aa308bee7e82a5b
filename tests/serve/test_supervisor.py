"""Workers that die, hang and lie: scripts of a few lines in the place of the real one, so that it is quick."""

from __future__ import annotations

import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from serving import PATIENCE_S, held_by

from sagittal.bundle import read_bundle
from sagittal.errors import SagittalError
from sagittal.serve import supervisor as supervisor_module
from sagittal.serve.audit import Audit
from sagittal.serve.jobs import InputRef, Job, JobOptions, JobStore
from sagittal.serve.metrics import Metrics
from sagittal.serve.models import ServedModels
from sagittal.serve.settings import Limits, ServeSettings
from sagittal.serve.supervisor import Supervisor
from sagittal.serve.worker_process import worker_environment

START = """
import json, os, sys, time
from pathlib import Path
def send(**message): print(json.dumps(message), flush=True)
sys.stdin.readline()
"""
DONE = """
def done(job):
    out = Path(job["out"]); out.mkdir(parents=True); (out / "labels.nii.gz").write_text("made")
    send(done={"volumes_ml": {}, "flags": [], "results": []})
send(ready="here")
for line in sys.stdin:
    job = json.loads(line)
"""
Make = Callable[..., tuple[Supervisor, JobStore]]


@pytest.fixture
def make(tmp_path: Path, tiny_bundle: Path) -> Iterator[Make]:
    opened: list[tuple[Supervisor, JobStore, Audit]] = []

    def begin(script: str, *, devices: int = 1, **limits: float) -> tuple[Supervisor, JobStore]:
        settings = ServeSettings(folder=tmp_path, devices=("cpu",) * devices, limits=Limits(**limits))  # type: ignore[arg-type]
        store, audit = JobStore(settings.database), Audit(settings.audit_file)
        (tmp_path / "worker.py").write_text(START + script)
        supervisor = Supervisor(
            settings,
            store,
            ServedModels([read_bundle(tiny_bundle)]),
            audit,
            Metrics(store.counts),
            command=(sys.executable, "-S", str(tmp_path / "worker.py")),
        )
        opened.append((supervisor, store, audit))
        return supervisor, store

    yield begin
    for supervisor, store, audit in opened:
        supervisor.stop(0)
        store.close()
        audit.close()


def _send(supervisor: Supervisor, store: JobStore, model: str = "tiny") -> Job:
    job = store.submit(model, JobOptions(), InputRef(kind="upload", files=("input/0/x",)))
    (supervisor.settings.job_folder(job.id) / "input").mkdir(parents=True)
    supervisor.wake()
    return job


def _until(look: Callable[[], object]) -> None:
    end = time.monotonic() + PATIENCE_S
    while not look():
        assert time.monotonic() < end, "it took too long"
        time.sleep(0.01)


def _ended(store: JobStore, job: Job) -> Job:
    _until(lambda: store.get(job.id).has_ended)
    return store.get(job.id)


def test_many_jobs_and_workers_that_die_at_random(make: Make) -> None:
    supervisor, store = make(DONE + "    os._exit(9) if os.urandom(1)[0] < 60 else done(job)\n", devices=3)
    jobs = [_send(supervisor, store) for _ in range(25)]
    supervisor.start()
    ended = [_ended(store, job) for job in jobs]
    assert {job.state for job in ended} <= {"done", "failed"} and ended[0].attempt >= 1
    for job in ended:
        assert (job.error is None) == (job.state == "done")
        assert job.error is None or (job.error.code, job.attempt) == ("worker_died", 2)
        results = supervisor.settings.job_folder(job.id) / "results"
        assert results.exists() == (job.state == "done")
    # The last that is done for a job; its number in the metrics comes after its state too.
    _until(lambda: not list(supervisor.settings.jobs_folder.glob("*/input")))
    text = supervisor.metrics.text().decode()
    assert f'sagittal_jobs_ended_total{{model="tiny",state="done"}} {sum(j.state == "done" for j in ended)}.0' in text
    assert not list(supervisor.settings.jobs_folder.glob("*/attempt-*"))


def test_what_is_held_does_not_grow_with_the_jobs(make: Make) -> None:
    supervisor, store = make(DONE + "    os._exit(9) if os.urandom(1)[0] < 25 else done(job)\n")
    (seat,) = supervisor._seats
    supervisor.start()

    def after(jobs: int) -> tuple[Counter[str], int]:
        for job in [_send(supervisor, store) for _ in range(jobs)]:
            _ended(store, job)
        _until(lambda: not list(supervisor.settings.jobs_folder.glob("*/input")))
        # One that died of the last job has been replaced, and without a job the new one lives on.
        _until(lambda: (child := seat._child) is not None and child.is_alive and seat.is_ready)
        return held_by(supervisor), threading.active_count()

    before, threads = after(15)
    then, threads_then = after(30)
    # One object per job would be 30.
    assert (then - before).total() < 25, (then - before).most_common(5)
    assert threads_then <= threads + 1


def test_an_answer_that_is_cut_off_or_nonsense_is_a_lost_attempt(make: Make) -> None:
    script = DONE + '    sys.stdout.write(\'[1]\\n{"done": {"vol\'); sys.stdout.flush(); os._exit(0)\n'
    supervisor, store = make(script)
    job = _send(supervisor, store)
    supervisor.start()
    ended = _ended(store, job)
    assert (ended.state, ended.attempt) == ("failed", 2)


def test_done_without_files_is_never_done(make: Make) -> None:
    supervisor, store = make(DONE + "    send(done={'volumes_ml': {}, 'flags': [], 'results': []})\n")
    job = _send(supervisor, store)
    supervisor.start()
    assert _ended(store, job).state == "failed"


def test_a_job_that_takes_too_long_is_ended_and_the_next_one_begun(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    # A clock that the test puts forward, since on a busy machine the quick job too may take long.
    late_s = [0.0]
    clock = SimpleNamespace(monotonic=lambda: time.monotonic() + late_s[0])
    monkeypatch.setattr(supervisor_module, "time", clock)
    script = DONE + "    Path(job['folder'], 'begun').touch()\n"
    script += "    time.sleep(600) if not Path(job['folder'], 'quick').exists() else done(job)\n"
    supervisor, store = make(script, job_s=3600)
    slow, quick = _send(supervisor, store), _send(supervisor, store)
    (supervisor.settings.job_folder(quick.id) / "quick").touch()
    supervisor.start()
    _until(lambda: (supervisor.settings.job_folder(slow.id) / "begun").exists())
    late_s[0] = 3601.0
    failed = _ended(store, slow)
    assert failed.error is not None and (failed.error.code, failed.attempt) == ("time_limit", 1)
    assert _ended(store, quick).state == "done"


def test_a_cancelled_job_frees_its_worker(make: Make) -> None:
    script = DONE + "    time.sleep(600) if not Path(job['folder'], 'quick').exists() else done(job)\n"
    supervisor, store = make(script)
    slow, quick = _send(supervisor, store), _send(supervisor, store)
    (supervisor.settings.job_folder(quick.id) / "quick").touch()
    supervisor.start()
    _until(lambda: store.state(slow.id) == "running")
    store.cancel(slow.id)
    supervisor.wake()
    assert _ended(store, quick).state == "done" and store.state(slow.id) == "cancelled"
    _until(lambda: not (supervisor.settings.job_folder(slow.id) / "input").exists())


def test_a_stop_gives_time_and_then_puts_the_job_back_as_if_it_had_not_begun(make: Make) -> None:
    # The job ends once the stop has begun: by a clock alone, the next one might begin before.
    wait = "    while not Path(job['folder'], 'go').exists(): time.sleep(0.01)\n"
    supervisor, store = make(DONE + wait + "    done(job)\n")
    job, later = _send(supervisor, store), _send(supervisor, store)
    supervisor.start()
    _until(lambda: store.state(job.id) == "running")
    stopping = threading.Thread(target=supervisor.stop, args=(PATIENCE_S,))
    stopping.start()
    _until(lambda: supervisor.is_stopping)
    (supervisor.settings.job_folder(job.id) / "go").touch()
    stopping.join()
    assert store.get(job.id).state == "done" and store.get(later.id).state == "queued"

    supervisor, store = make(DONE + "    time.sleep(600)\n")
    supervisor.start()
    _until(lambda: store.state(later.id) == "running")
    supervisor.stop(0)
    back = store.get(later.id)
    assert (back.state, back.attempt) == ("queued", 0)
    assert (supervisor.settings.job_folder(later.id) / "input").exists()


def test_a_worker_that_a_shutdown_ended_first_costs_the_job_no_attempt(make: Make) -> None:
    wait = "    while not Path(job['folder'], 'go').exists(): time.sleep(0.01)\n"
    supervisor, store = make(DONE + wait + "    os._exit(9)\n")
    job = _send(supervisor, store)
    supervisor.start()
    _until(lambda: store.state(job.id) == "running")
    stopping = threading.Thread(target=supervisor.stop, args=(PATIENCE_S,))
    stopping.start()
    _until(lambda: supervisor.is_stopping)
    (supervisor.settings.job_folder(job.id) / "go").touch()
    stopping.join()
    back = store.get(job.id)
    assert (back.state, back.attempt) == ("queued", 0)
    assert (supervisor.settings.job_folder(job.id) / "input").exists()


def test_a_job_of_a_model_that_is_gone_fails_with_that(make: Make) -> None:
    supervisor, store = make(DONE + "    done(job)\n")
    job = _send(supervisor, store, "former")
    supervisor.start()
    ended = _ended(store, job)
    assert ended.error is not None and ended.error.code == "unknown_model"


def test_workers_that_never_start_are_told_once_and_not_started_in_a_loop(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = "send(fatal={'type': 'ResourceError', 'code': 'device', 'message': 'no such device'})\n"
    supervisor, store = make(script)
    told: list[SagittalError] = []
    supervisor.on_hopeless = told.append
    pauses, wait = list[float](), supervisor.pause

    def pause(seconds: float) -> None:
        pauses.append(seconds)
        # Until the service stops: what is counted below must not depend on how soon this test looks.
        wait(3600)

    monkeypatch.setattr(supervisor, "pause", pause)
    job = _send(supervisor, store)
    supervisor.start()
    _until(lambda: told and pauses)
    assert (type(told[0]).__name__, told[0].code) == ("ResourceError", "device")
    assert supervisor.ready_workers == 0 and store.state(job.id) == "queued"
    assert len(told) == 1 and pauses == [supervisor_module._FIRST_PAUSE_S] and pauses[0] >= 0.5
    assert "sagittal_workers_started_total 1.0" in supervisor.metrics.text().decode()


def test_workers_know_no_key_of_the_service() -> None:
    given = {"SAGITTAL_API_KEY": "k" * 32, "SAGITTAL_PACS_CREDENTIALS": "a:b", "PATH": "/bin", "OMP_NUM_THREADS": "8"}
    expected = {"PATH": "/bin", "OMP_NUM_THREADS": "2", "OMP_WAIT_POLICY": "passive"}
    assert worker_environment(given, 2) == expected
    assert worker_environment(given, None) == expected | {"OMP_NUM_THREADS": "8"}
