"""Folds on machines that share a store and nothing else: what they read goes there, what they make comes back.

    PREFIX/inputs/PART                what folds read (carried_inputs)
          /folds/N/attempts/ATTEMPT   a fold's folder, published after each checkpoint and at its end
          /folds/N/current            which attempt may publish: a node that was cut off may come back

Each attempt publishes under a name of its own, and the next one goes on from the furthest of those before it. When a
fold has ended, its folder is brought to OUT.run/fold_N as if it had been trained here, so all that follows is the same.
"""

from __future__ import annotations

import dataclasses
import re
import shutil
import time
import uuid
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from sagittal.cluster.carried_inputs import Inputs, at_once, fetch_inputs, patiently, read_here, send_inputs
from sagittal.cluster.node_folder import node_folder
from sagittal.cluster.publisher import Publisher
from sagittal.cluster.ray_session import Node, remove_from
from sagittal.cluster.shared import LISTING, Listing, Store
from sagittal.errors import DataError, PlanError, ResourceError, SagittalError
from sagittal.plan.base import write_atomically
from sagittal.plan.urls import is_url
from sagittal.training.checkpoint import newest_checkpoint
from sagittal.training.cross_validation import FoldTask, Run, own_bundle
from sagittal.training.side_by_side import Ending
from sagittal.training.signals import StopFlag

NAME_IN_STORE = "in_store.txt"
"""In the run folder: what the run is called in its store, as long as something of it is there."""
_PATIENCE_S = 120.0
_CHECKPOINT = re.compile(r"checkpoint_(\d{8})\.sha256")
_CHECKPOINTS = ("checkpoint_*.safetensors", "checkpoint_*.sha256", "best_*.safetensors", "best_*.sha256")


@dataclasses.dataclass(frozen=True)
class CarriedHand:
    """What a node does around the training of a fold: fetch, publish, clear away. It travels with the fold.

    Attributes:
        url: of the store.
        prefix: of all that is in the store of this run.
        inputs: what the fold reads.
        attempt: under which name it publishes.
        base: the attempt from which it goes on, or None.
    """

    url: str = dataclasses.field(repr=False)  # which may hold a password
    prefix: str
    inputs: Inputs
    attempt: str
    base: str | None

    def around(
        self,
        task: FoldTask,
        node: str,
        stop: StopFlag,
        say: Callable[[str], None],
        train: Callable[[FoldTask, Callable[[str], str]], dict[str, Any]],
    ) -> dict[str, Any]:
        """Train a fold in this node's own folder and return its report.

        Args:
            task: with the paths of the machine that gave it out.
            node: Ray's name of this one.
            stop: a raised flag ends it before it begins.
            say: receives lines for a person.
            train: trains a task here; told how a line with paths of this node reads on the other machine.

        Raises:
            SagittalError: what it needs can't be fetched, or what it made can't be published.
        """
        store, name = Store(self.url), task.name
        with node_folder(self.prefix, node) as here:
            began = time.monotonic()
            fetched = fetch_inputs(store, self.prefix, self.inputs, here, lambda: bool(stop))
            if fetched is None or stop:
                return {"ended": stop.reason, "not_begun": True}
            if fetched:
                say(f"fetched {fetched} parts of the data from the store in {time.monotonic() - began:.0f} s")
            run_folder = here.path / f"run-{self.attempt}"
            folder = run_folder / f"fold_{name}"
            if self.base is not None:
                base = _attempts(self.prefix, name) + self.base
                patiently(lambda: store.fetch_folder(base, folder))
            run = read_here(task.run, self.inputs, here, run_folder)
            own = dataclasses.replace(task, run=dataclasses.replace(run, out=own_bundle(run, name)))

            def as_told(line: str) -> str:
                return line.replace(str(run_folder), str(task.run.folder)).replace(
                    str(here.inputs / "data"), str(task.run.data.folder)
                )

            published = _attempts(self.prefix, name) + self.attempt
            with Publisher(store, published, folder, self._counts(store, name), say) as publisher:
                report = train(own, as_told)
            if "error" in report:
                report["error"]["message"] = as_told(report["error"]["message"])
            say("putting the fold into the store")
            publisher.last()
            shutil.rmtree(run_folder, ignore_errors=True)
            return report

    def _counts(self, store: Store, name: str) -> Callable[[], bool]:
        def counts() -> bool:
            try:
                return store.get(_current(self.prefix, name)).decode() == self.attempt
            except DataError:
                return False  # The run has ended without this node.

        return counts


class CarriedFolds:
    """Carries folds to nodes and back through a store; one of the ways of `RayFolds`.

    Args:
        url: of the store: a folder that all nodes see, or a URL.

    Raises:
        PlanError, ResourceError: as `Store`.
    """

    def __init__(self, url: str) -> None:
        self._store = Store(url if is_url(url) else Path(url).absolute())
        self._run: Run
        self._inputs: Inputs
        self._prefix = self._command = ""
        self._wanted: set[str] = set()
        self._latest: dict[str, str] = {}

    def begin(self, run: Run, names: Sequence[str], nodes: Sequence[Node]) -> None:
        """Put what the folds read into the store.

        Raises:
            PlanError: a tracker that writes one file for all folds.
            ResourceError: a file can't be read or stored.
        """
        self._prefix = ""
        if "mlflow" in run.options.trackers:
            raise PlanError(
                "--log mlflow writes one database for all folds, and with --store nodes share no disk. Use --log "
                "tensorboard, or a file system that all nodes see, without --store.",
                code="options",
            )
        self._run, self._wanted, self._latest = run, set(names), {}
        self._prefix, self._command = _name_in_store(run.folder), uuid.uuid4().hex[:8]
        began = time.monotonic()
        self._inputs = send_inputs(self._store, self._prefix, run, names)
        took, size = time.monotonic() - began, self._inputs.size_bytes / 1e9
        run.options.say(f"train: {size:.2f} GB of data are in {self._store.shown}/{self._prefix} after {took:.0f} s")

    def hand(self, name: str, number: int) -> CarriedHand:
        """Return what the next attempt at a fold is told, from now on the only one that may publish.

        Raises:
            SagittalError: the store can't be read or written.
        """
        attempt = f"{self._command}-{number}"
        base = patiently(lambda: self._base(name))
        patiently(lambda: self._store.put(_current(self._prefix, name), attempt.encode()))
        self._latest[name] = attempt
        return CarriedHand(self._store.url, self._prefix, self._inputs.of_fold(self._run, name), attempt, base)

    def home(self, ending: Ending) -> Ending:
        """Bring the folder of a fold that has ended here, and return how it ended: as before, if that could be done."""
        name, folder = ending.name, self._run.folder / f"fold_{ending.name}"
        try:
            found = patiently(lambda: self._furthest(name), within_s=_PATIENCE_S)
            lasted = ending.report is not None and "error" not in ending.report
            source = self._latest[name] if lasted or found is None else found[0]
            published = _attempts(self._prefix, name) + source
            if not lasted and self._store.published(published) is None:
                return ending  # It failed before there was anything.
            listing = patiently(lambda: self._store.fetch_folder(published, folder), within_s=_PATIENCE_S)
        except SagittalError as error:
            message = f"{error.message} It may still be in the store: --resume goes on from what is there."
            failed = {"message": message, "code": "not_fetched", "type": type(error).__name__}
            return ending if _failed(ending) else Ending(name, {"error": failed}, 1)
        for pattern in _CHECKPOINTS:
            for path in folder.glob(pattern):
                if path.name not in listing.files:
                    path.unlink()
        return ending

    def joined(self, ending: Ending) -> None:
        """Take what the store has of a fold away, once the bundle has it; one that was stopped or failed stays."""
        if _failed(ending) or ending.report is None or ending.report["ended"] in ("interrupted", "terminated"):
            return
        self._wanted.discard(ending.name)
        with suppress(SagittalError):  # What is left goes with all else at the end, or is told there.
            self._store.delete_folder(_fold(self._prefix, ending.name))

    def end(self, nodes: Callable[[], Sequence[Node]]) -> None:
        """Take the nodes' copies away, and what the store has of the run unless some of its folds are to go on."""
        if not self._prefix:
            return
        remove_from(nodes, self._prefix)
        say, where = self._run.options.say, f"{self._store.shown}/{self._prefix}"
        if self._wanted:
            say(f"what is in {where} stays there for --resume; delete it if you do not go on")
            return
        try:
            at_once(self._store.delete, self._store.list(self._prefix))
            self._store.delete_folder(self._prefix)
        except ResourceError as error:
            say(f"could not delete {where}, which is not needed any more: {error.message}")
            return
        (self._run.folder / NAME_IN_STORE).unlink(missing_ok=True)

    def _base(self, name: str) -> str | None:
        """Return the attempt to go on from: the furthest in the store, or what is in this machine's run folder."""
        folder = self._run.folder / f"fold_{name}"
        there, local = self._furthest(name), newest_checkpoint(folder)
        step = -1 if local is None else local[1].step
        if there is not None and there[1] >= step:
            return there[0]
        if not folder.is_dir() or not any(folder.iterdir()):
            return None
        here = f"{self._command}-here"
        self._store.publish(_attempts(self._prefix, name) + here, folder)
        return here

    def _furthest(self, name: str) -> tuple[str, int] | None:
        """Return the attempt that got furthest, and the step of its last checkpoint, -1 where it has none."""
        start = _attempts(self._prefix, name)
        found = []
        for path in self._store.list(start.rstrip("/")):
            attempt, _, file = path.removeprefix(start).partition("/")
            if file == LISTING and (listing := self._store.published(start + attempt)) is not None:
                found.append((_step_of(listing), attempt == self._latest.get(name), attempt))
        return (max(found)[2], max(found)[0]) if found else None


def _name_in_store(folder: Path) -> str:
    """Return what a run is called in a store: a name by chance, kept in the run folder."""
    path = folder / NAME_IN_STORE
    with suppress(OSError):
        kept = path.read_text(encoding="ascii").strip()
        if re.fullmatch(r"train-[0-9a-f]{32}", kept):
            return kept
    name = f"train-{uuid.uuid4().hex}"
    write_atomically(path, f"{name}\n".encode())
    return name


def _fold(prefix: str, name: str) -> str:
    return f"{prefix}/folds/{name}"


def _attempts(prefix: str, name: str) -> str:
    return f"{_fold(prefix, name)}/attempts/"


def _current(prefix: str, name: str) -> str:
    return f"{_fold(prefix, name)}/current"


def _step_of(listing: Listing) -> int:
    return max((int(match[1]) for match in map(_CHECKPOINT.fullmatch, listing.files) if match), default=-1)


def _failed(ending: Ending) -> bool:
    return ending.report is None or "error" in ending.report
