"""TensorBoard and MLflow in the run's folder: real ones where they are installed, nothing on a network."""

from __future__ import annotations

import os
import sqlite3
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from sagittal.errors import ResourceError, TrainingError
from sagittal.training import trackers as trackers_module
from sagittal.training.trackers import open_trackers, require_known


def test_an_unknown_tracker_is_named() -> None:
    with pytest.raises(TrainingError, match=r"'wandb' is not known\. Expected tensorboard or mlflow"):
        require_known(("wandb",))


@pytest.mark.parametrize("name", ["tensorboard", "mlflow"])
def test_a_package_that_is_missing_is_named_with_its_extra(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trackers_module, "find_spec", lambda package: None)
    with pytest.raises(ResourceError, match=rf"pip install 'sagittal\[{name}\]'") as caught:
        open_trackers((name,), tmp_path)
    assert caught.value.code == "missing_extra"
    assert not list(tmp_path.iterdir())


def test_no_tracker_opens_nothing(tmp_path: Path) -> None:
    assert open_trackers((), tmp_path) == ()
    assert not list(tmp_path.iterdir())


@pytest.mark.filterwarnings("ignore")
def test_tensorboard_writes_what_it_was_told(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="the extra [tensorboard] is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (tracker,) = open_trackers(("tensorboard",), tmp_path)
    for step in (1, 2, 3):
        tracker.log(step, {"train/loss": 1 / step})
    tracker.close()
    (again,) = open_trackers(("tensorboard",), tmp_path, step=1)
    again.log(2, {"train/loss": 0.75})
    again.close()
    found = EventAccumulator(str(tmp_path / "tensorboard"))
    found.Reload()
    values = [(event.step, event.value) for event in found.Scalars("train/loss")]
    assert values == [(1, 1.0), (2, 0.75)], "points after the checkpoint are dropped on resume"


_IN_MLFLOW = """
import socket, sys
def refuse(*arguments, **more):
    raise AssertionError(f"on the network: {arguments}")
socket.socket.connect = socket.socket.connect_ex = socket.create_connection = socket.getaddrinfo = refuse
from pathlib import Path
from sagittal.training.trackers import open_trackers
for step in (0, 2):
    (tracker,) = open_trackers(("mlflow",), Path(sys.argv[1]), run="Spleen: fold 0", step=step)
    tracker.log(step + 1, {"train/loss": 0.5, "dice/left lobe (2)": 0.25, "train/norm": float("nan")})
    tracker.close()
from mlflow.telemetry.client import get_telemetry_client
assert get_telemetry_client() is None, "telemetry is on"
import threading
assert [thread.name for thread in threading.enumerate()] == ["MainThread"]
"""


@pytest.mark.slow
def test_mlflow_keeps_one_run_in_the_folder_and_sends_nothing(tmp_path: Path) -> None:
    for package in ("mlflow", "sqlalchemy", "alembic"):
        pytest.importorskip(package, reason="the extra [mlflow] is not installed")
    fold = tmp_path / "fold_0"
    fold.mkdir()
    # Without the marks of a test or of CI, by which MLflow would be silent anyway.
    marks = ("CI", "PYTEST_CURRENT_TEST", "GITHUB_ACTIONS", "MLFLOW_DISABLE_TELEMETRY", "DO_NOT_TRACK")
    environment = {name: value for name, value in os.environ.items() if name not in marks}
    command = [sys.executable, "-c", _IN_MLFLOW, str(fold)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    with sqlite3.connect(tmp_path / "mlruns" / "mlflow.db") as database:
        rows: list[Any] = database.execute("select key, value, step from metrics order by key, step").fetchall()
        assert database.execute("select name, status from runs").fetchall() == [("Spleen: fold 0", "FINISHED")]
    database.close()
    assert rows == [
        ("dice/left lobe _2_", 0.25, 1),
        ("dice/left lobe _2_", 0.25, 3),
        ("train/loss", 0.5, 1),
        ("train/loss", 0.5, 3),
    ]


_SIDE_BY_SIDE = """
import sys
from pathlib import Path
from sagittal.training.trackers import open_trackers
(tracker,) = open_trackers(("mlflow",), Path(sys.argv[1]), run=sys.argv[1][-1])
tracker.log(1, {"train/loss": 0.5})
tracker.close()
"""


@pytest.mark.slow
def test_folds_side_by_side_share_a_database(tmp_path: Path) -> None:
    for package in ("mlflow", "sqlalchemy", "alembic"):
        pytest.importorskip(package, reason="the extra [mlflow] is not installed")
    folders = [tmp_path / "fold_0", tmp_path / "fold_1"]
    for folder in folders:
        folder.mkdir()
    # Of a database that someone removed since.
    (folders[0] / "mlflow_run.txt").write_text("0123456789abcdef\n")
    # Without it, both make the tables, and one of them ends by an error of alembic's.
    prepare = "import sys; from pathlib import Path; from sagittal.training.trackers import prepare_trackers; "
    prepare += "prepare_trackers(('mlflow',), Path(sys.argv[1]))"
    subprocess.run([sys.executable, "-c", prepare, str(tmp_path)], check=True, capture_output=True, timeout=300)
    both = [
        subprocess.Popen([sys.executable, "-c", _SIDE_BY_SIDE, str(folder)], stderr=subprocess.PIPE, text=True)
        for folder in folders
    ]
    for one in both:
        _, told = one.communicate(timeout=300)
        assert one.returncode == 0, told
    with sqlite3.connect(tmp_path / "mlruns" / "mlflow.db") as database:
        runs = database.execute("select name, status from runs order by name").fetchall()
    database.close()
    assert runs == [("0", "FINISHED"), ("1", "FINISHED")]
