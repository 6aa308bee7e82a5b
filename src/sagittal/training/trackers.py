"""What else may receive the log: TensorBoard and MLflow, both in the run's own folder, neither on a network."""

from __future__ import annotations

import importlib
import logging
import os
import time
import warnings
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from sagittal.errors import ResourceError, TrainingError

KNOWN = ("tensorboard", "mlflow")
_PACKAGES = {"tensorboard": ("tensorboard",), "mlflow": ("mlflow", "sqlalchemy", "alembic")}
FLUSH_EVERY_S = 10.0
"""MLflow's file is a database, and each of its transactions waits for the disk."""


class Tracker(Protocol):
    """Receives numbers by their names."""

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Take in what was measured at a step."""

    def close(self) -> None:
        """Write what is not yet written."""


def require_known(names: Sequence[str]) -> None:
    """Make sure that trackers can be opened, before anything is done.

    Raises:
        TrainingError: an unknown name.
        ResourceError: the tracker's package is not installed.
    """
    unknown = [name for name in names if name not in KNOWN]
    if unknown:
        raise TrainingError(
            f"--log {','.join(names)}: '{unknown[0]}' is not known. Expected {' or '.join(KNOWN)}, or both with a "
            "comma between them.",
            code="unknown_tracker",
        )
    for name in names:
        for package in _PACKAGES[name]:
            if find_spec(package) is None:
                raise ResourceError(
                    f"--log {name}: {package} is not installed. Run: pip install 'sagittal[{name}]'",
                    code="missing_extra",
                )


def open_trackers(names: Sequence[str], folder: Path, *, run: str = "", step: int = 0) -> tuple[Tracker, ...]:
    """Open trackers: TensorBoard in `folder`/tensorboard, MLflow in `mlruns` beside `folder`.

    Args:
        names: of `KNOWN`.
        folder: the fold's.
        run: name of the run in MLflow.
        step: finished steps, from which a resumed run goes on; later points of an earlier attempt are dropped or
            overwritten.

    Raises:
        TrainingError: an unknown name.
        ResourceError: the tracker's package is not installed.
    """
    require_known(names)
    opened: list[Tracker] = []
    for name in dict.fromkeys(names):
        if name == "tensorboard":
            opened.append(TensorBoard(folder / "tensorboard", step=step))
        else:
            opened.append(MLflow(folder, run=run or folder.name))
    return tuple(opened)


def prepare_trackers(names: Sequence[str], run_folder: Path) -> None:
    """Make what the trackers of folds side by side share: MLflow's tables, which two processes can't make at once."""
    if "mlflow" in names:
        store = _Store(run_folder)
        store.experiment()
        store.close()


class TensorBoard:
    """Event files that `tensorboard --logdir OUT.run` shows."""

    def __init__(self, folder: Path, *, step: int) -> None:
        writer = importlib.import_module("torch.utils.tensorboard").SummaryWriter
        self._writer = writer(log_dir=str(folder), purge_step=step + 1 if step else None)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Take in what was measured at a step."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Write what is not yet written."""
        self._writer.close()


class MLflow:
    """A run in OUT.run/mlruns/mlflow.db, an SQLite file: `mlflow ui --backend-store-uri sqlite:///OUT.run/mlruns/mlflow.db`.

    MLflow sends usage statistics to its makers unless it is told not to before it is first imported. It is told, and
    where something else has imported it before, its sender is taken away.
    """

    def __init__(self, folder: Path, *, run: str) -> None:
        self._store = _Store(folder.resolve().parent)
        self._client, self._entities = self._store.client, self._store.entities
        self._pending: list[Any] = []
        self._flushed = time.monotonic()
        self._run = self._begun(folder, run)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Take in what was measured at a step."""
        now = int(time.time() * 1000)
        # MLflow allows spaces and dots in a name, but not what classes may be called otherwise.
        self._pending += [
            self._entities.Metric(_plain(name), value, now, step) for name, value in values.items() if value == value
        ]
        if time.monotonic() - self._flushed > FLUSH_EVERY_S:
            self._flush()

    def close(self) -> None:
        """Write what is not yet written and mark the run as finished."""
        self._flush()
        self._client.set_terminated(self._run)
        self._store.close()

    def _begun(self, folder: Path, name: str) -> str:
        """Return the id of the fold's run: that of an earlier attempt where there is one."""
        kept = folder / "mlflow_run.txt"
        run_id = kept.read_text(encoding="utf-8").strip() if kept.is_file() else ""
        if run_id in self._store.run_ids():
            self._client.update_run(run_id, status="RUNNING")
            return run_id
        run_id = str(self._client.create_run(self._store.experiment(), run_name=name).info.run_id)
        kept.write_text(run_id + "\n", encoding="utf-8")
        return run_id

    def _flush(self) -> None:
        while self._pending:
            # At most a thousand are taken at once.
            self._client.log_batch(self._run, metrics=self._pending[:1000])
            self._pending = self._pending[1000:]
        self._flushed = time.monotonic()


class _Store:
    """MLflow's database of a run folder, of which all folds are runs of one experiment."""

    def __init__(self, run_folder: Path) -> None:
        self._home = run_folder.resolve() / "mlruns"
        self._home.mkdir(parents=True, exist_ok=True)
        self.client, self.entities = _silent_mlflow(f"sqlite:///{self._home / 'mlflow.db'}")

    def experiment(self) -> str:
        """Return the id of the experiment, made where there is none."""
        found = self.client.get_experiment_by_name("sagittal")
        if found is not None:
            return str(found.experiment_id)
        return str(self.client.create_experiment("sagittal", artifact_location=(self._home / "artifacts").as_uri()))

    def run_ids(self) -> set[str]:
        """Return the ids of its runs: someone may have removed the database between two attempts."""
        return {str(run.info.run_id) for run in self.client.search_runs([self.experiment()])}

    def close(self) -> None:
        """Close the connection; one that is still open at the end of the process is a warning."""
        self.client._tracking_client.store.engine.dispose()


def _silent_mlflow(uri: str) -> tuple[Any, Any]:
    """Return a client of the store at `uri` and MLflow's entities; nothing that it does leaves the machine."""
    os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
    os.environ["DO_NOT_TRACK"] = "true"
    with warnings.catch_warnings():
        # Theirs, about each other's old ways; users can do nothing about them.
        warnings.simplefilter("ignore")
        importlib.import_module("mlflow.telemetry.client").set_telemetry_client()
        for told in ("mlflow", "alembic"):
            logging.getLogger(told).setLevel(logging.WARNING)
        client = importlib.import_module("mlflow.tracking").MlflowClient(tracking_uri=uri)
        # Makes the tables of a new database.
        client.get_experiment_by_name("sagittal")
        return client, importlib.import_module("mlflow.entities")


def _plain(name: str) -> str:
    return "".join(letter if letter.isascii() and (letter.isalnum() or letter in "_-./ ") else "_" for letter in name)
