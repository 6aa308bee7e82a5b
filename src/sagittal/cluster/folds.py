"""The folds of a run on a Ray cluster: one task each, begun again elsewhere from its last checkpoint after a loss.

All machines see the run folder, the cache and the data set by the same paths, as with several processes on several
machines, or a store carries them there and back (`carried_folds`). What a fold does on its node is what it does in a
process of its own on one machine, and what it leaves is joined by the same code, so the weights are the same.
"""

from __future__ import annotations

import dataclasses
import math
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import redirect_stderr
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TextIO

import ray
import torch

from sagittal.cluster.board import Board, Said, obeying
from sagittal.cluster.fold_table import FoldTable
from sagittal.cluster.ray_session import Needs, Node, Session, on_node
from sagittal.cluster.room import Room
from sagittal.errors import ResourceError, SagittalError
from sagittal.kernels import keep_freed_memory
from sagittal.plan.base import write_atomically
from sagittal.training.cross_validation import FoldTask, Run, own_bundle
from sagittal.training.fold_process import report_of
from sagittal.training.side_by_side import OUTPUT_LOG, Ending
from sagittal.training.signals import StopFlag, graceful_stop
from sagittal.training.trackers import prepare_trackers

LOSSES = 5
"""So often a fold is begun again after its node or its worker was lost; then it counts as failed."""
TOKEN = ".seen-by-all"
_LOOK_EVERY_S = 0.3
_STOP_S = 600.0
"""How long folds that were told to stop may take for the step or the case in progress and the checkpoint."""


@dataclass(frozen=True)
class _Attempt:
    name: str
    number: int
    task: Any
    """Ray's promise of the report."""


Train = Callable[[FoldTask, Callable[[str], str]], dict[str, Any]]
"""Trains a task on this node and returns its report; told how a line of it reads on the machine that gave it out."""


class Hand(Protocol):
    """What a node does around the training of a fold; it travels with the fold."""

    def around(
        self, task: FoldTask, node: str, stop: StopFlag, say: Callable[[str], None], train: Train
    ) -> dict[str, Any]:
        """Train a fold on the node of this name and return its report; `not_begun` in it: it was stopped before."""


class Road(Protocol):
    """How nodes come by what folds read, and this machine by what they make: by the same paths, or by a store."""

    def begin(self, run: Run, names: Sequence[str], nodes: Sequence[Node]) -> None:
        """Do what is done once for all folds."""

    def hand(self, name: str, number: int) -> Hand:
        """Return what the next attempt at a fold is told."""

    def home(self, ending: Ending) -> Ending:
        """Bring what a fold made into the run folder; return how it ended."""

    def joined(self, ending: Ending) -> None:
        """Clear away what is not needed once a fold is in the bundle."""

    def end(self, nodes: Callable[[], Sequence[Node]]) -> None:
        """Clear away what is left, also after an error."""


class SamePaths:
    """All nodes see the run folder, the cache and the data set by the same paths."""

    def begin(self, run: Run, names: Sequence[str], nodes: Sequence[Node]) -> None:
        """Make sure of that.

        Raises:
            ResourceError: a node does not see one.
        """
        require_seen(nodes, _folders(run))

    def hand(self, name: str, number: int) -> Hand:
        """Return what looks once more on the node."""
        return SamePathsHand()

    def home(self, ending: Ending) -> Ending:
        """Return how a fold ended; what it made is here."""
        return ending

    def joined(self, ending: Ending) -> None:
        """Do nothing."""

    def end(self, nodes: Callable[[], Sequence[Node]]) -> None:
        """Do nothing."""


class SamePathsHand:
    """Looks whether this node sees the folders."""

    def around(
        self, task: FoldTask, node: str, stop: StopFlag, say: Callable[[str], None], train: Train
    ) -> dict[str, Any]:
        """Train a fold and return its report.

        Raises:
            ResourceError: this node does not see a folder.
        """
        missing = _missing(_folders(task.run))
        if missing:
            raise ResourceError(_not_shared(f"{platform.node()} {node}", missing[0]), code="not_shared")
        return train(task, str)


class RayFolds:
    """Trains folds on a cluster; `RunOptions.carrier` of a run.

    Args:
        session: the cluster.
        needs: what each fold occupies; its CPUs are its threads.
        table: shows where they stand; by default their lines are said with the fold's name before them.
        road: how nodes come by what folds read; by default by the same paths.
    """

    def __init__(
        self, session: Session, needs: Needs, *, table: FoldTable | None = None, road: Road | None = None
    ) -> None:
        self._session, self._needs, self._table = session, needs, table
        self._road = road or SamePaths()

    def __call__(self, run: Run, names: list[str], stop: StopFlag) -> Iterator[Ending]:
        """Train folds and yield how each ended, as soon as it has.

        Raises:
            ResourceError: no node has what a fold needs, or can come by the run's folders.
        """
        self._session.require(self._needs, "a fold")
        try:
            self._road.begin(run, names, self._session.nodes)
            yield from self._train(run, names, stop)
        finally:
            self._road.end(lambda: self._session.nodes)

    def _train(self, run: Run, names: list[str], stop: StopFlag) -> Iterator[Ending]:
        prepare_trackers(run.options.trackers, run.folder)
        count = min(self._session.slots(self._needs), len(names))
        say = run.options.say
        say(f"train: folds {', '.join(names)} on {self._session.place}, {count} at a time, {self._needs} each")
        board: Any = ray.remote(Board).options(num_cpus=0, scheduling_strategy=self._session.home).remote()
        table = self._table or FoldTable(say)
        work = _Work(self._session, self._needs, run, board, table.take, self._road)
        try:
            with table.shown():
                for ending in work.through(names, stop):
                    yield ending
                    self._road.joined(ending)
        finally:
            work.end()
            ray.kill(board)


def needs_of_a_fold(nodes: Sequence[Node], *, cpus: int | None, gpus: int | None) -> Needs:
    """Return what a fold occupies where the user left it open: a GPU where there are some, and a node's share of CPUs.

    Without GPUs a fold takes all CPUs of the smallest node that has any, so that nodes and not folds share a machine.

    Args:
        nodes: of the cluster.
        cpus, gpus: what was asked for; None for what fits.
    """
    wanted = gpus if gpus is not None else int(any(node.gpus for node in nodes))
    shares = [node.cpus // max(node.gpus, 1) if wanted else node.cpus for node in nodes if node.fits(Needs(1, wanted))]
    return Needs(cpus if cpus is not None else max(min(shares, default=1), 1), wanted)


class _Work:
    """Folds that wait and folds that are trained."""

    def __init__(
        self, session: Session, needs: Needs, run: Run, board: Any, show: Callable[[Said], None], road: Road
    ) -> None:
        self._session, self._needs, self._run, self._board, self._show = session, needs, run, board, show
        self._road = road
        self._running: dict[Any, _Attempt] = {}
        self._losses: dict[str, int] = {}
        self._withdrawn: set[Any] = set()
        # Each fold in a process of its own, whose end frees its memory.
        self._train = ray.remote(max_calls=1)(_train_fold)

    def through(self, names: Sequence[str], stop: StopFlag) -> Iterator[Ending]:
        """Yield how each fold ended; after a stop those that had not begun have no ending.

        Raises:
            ResourceError: no node that folds fit on was left, and none came for long.
        """
        waiting, told = list(names), math.inf
        room = Room(self._session, self._needs, self._run.options.say)
        while self._running or (waiting and not stop):
            while waiting and not stop and len(self._running) < max(self._session.slots(self._needs), 1):
                name = waiting.pop(0)
                self._begin(name, rounds=self._rounds(1 + len(waiting)))
            if stop and told == math.inf:
                told = time.monotonic()
                ray.get(self._board.stop.remote(stop.reason))
                self._withdraw()
            if not stop:
                room.look(time.monotonic())
            if time.monotonic() - told > _STOP_S:
                return
            self._say_lines()
            for done in ray.wait(list(self._running), timeout=_LOOK_EVERY_S)[0]:
                attempt = self._running.pop(done)
                self._say_lines()
                ending = self._ending(attempt, stop)
                if ending is None:
                    waiting.insert(0, attempt.name)
                else:
                    yield self._road.home(ending)

    def end(self) -> None:
        """End what is still trained, at once; checkpoints stay."""
        for task in self._running:
            ray.cancel(task, force=True)

    def _withdraw(self) -> None:
        """Take back what Ray keeps until a node has room: it would not end before it had begun."""
        arrived = ray.get(self._board.arrived.remote())
        self._withdrawn = {task for task, each in self._running.items() if (each.name, each.number) not in arrived}
        for task in self._withdrawn:
            ray.cancel(task)

    def _rounds(self, waiting: int) -> int:
        return math.ceil((waiting + len(self._running)) / max(self._session.slots(self._needs), 1))

    def _begin(self, name: str, *, rounds: int) -> None:
        run, number = self._run, self._losses.get(name, 0)
        options = dataclasses.replace(run.options, carrier=None, live=False, say=_nobody)
        device = torch.device("cuda" if self._needs.gpus else "cpu")
        # Its budget is told by the wall clock, which machines share.
        own = dataclasses.replace(run, out=own_bundle(run, name), devices=(device,), options=options, budget=None)
        ends = None if run.budget is None else time.time() + run.budget.share_s(rounds)
        ray.get(self._board.begin.remote(name, number))
        settings = {
            "num_cpus": self._needs.cpus,
            "num_gpus": self._needs.gpus,
            "max_retries": 0,  # a lost fold is begun again here, which says so and counts
            "runtime_env": {"env_vars": {"OMP_NUM_THREADS": str(self._needs.cpus), "OMP_WAIT_POLICY": "passive"}},
        }
        sent = ray.put((FoldTask(own, name, self._needs.cpus, None), self._road.hand(name, number)))
        task = self._train.options(**settings).remote(sent, ends, self._board, number)
        self._running[task] = _Attempt(name, number, task)

    def _say_lines(self) -> None:
        for said in ray.get(self._board.take.remote()):
            self._show(said)

    def _ending(self, attempt: _Attempt, stop: StopFlag) -> Ending | None:
        """Return how a fold ended, None where it is to be begun again."""
        name = attempt.name
        try:
            report = ray.get(attempt.task)
            lost = None
            if stop and report.get("not_begun"):
                return None
            if report.get("ended") in ("interrupted", "terminated") and not stop:
                lost = "its node asked it to end"
        except ray.exceptions.RayError as error:
            if attempt.task in self._withdrawn:
                return None
            if isinstance(error, ray.exceptions.RayTaskError):
                return Ending(name, _failed("bug", f"{type(error.cause).__name__}: {error.cause}"), 1)
            report, lost = None, _how_lost(error)
        if lost is None or (stop and report is not None):
            return Ending(name, report, 0)
        self._losses[name] = losses = self._losses.get(name, 0) + 1
        if losses > LOSSES or stop:
            often = "" if losses == 1 else f", the {losses}th loss of this fold"
            return Ending(name, _failed("process_lost", f"{lost}{often}; its last checkpoint stays"), 1)
        self._run.options.say(f"fold {name}: {lost}; it goes on elsewhere from its last checkpoint")
        return None


def _train_fold(sent: tuple[FoldTask, Hand], ends: float | None, board: Any, attempt: int) -> dict[str, Any]:
    """Train a fold on this node and return its report: what Ray runs in a worker of its own.

    Args:
        sent: the fold, and what to do around it.
        ends: of its budget, by the wall clock.
        board: handle of the actor.
        attempt: which one at this fold it is.
    """
    task, hand = sent
    number = ray.get_runtime_context().get_node_id()[:8]
    node, name = f"{platform.node()} {number}", task.name
    task = dataclasses.replace(task, ends=None if ends is None else time.monotonic() + ends - time.time())
    torch.set_num_threads(task.threads)
    keep_freed_memory()
    logs: list[TextIO] = []

    def say(line: str) -> None:
        for log in logs:
            log.write(f"{line}\n")
            log.flush()
        board.say.remote(name, attempt, node, line)

    def train(task: FoldTask, as_told: Callable[[str], str]) -> dict[str, Any]:
        folder = task.run.folder / f"fold_{name}"
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / OUTPUT_LOG).open("a", encoding="utf-8") as log, redirect_stderr(log):
            logs.append(log)
            try:
                say(f"on {node}")
                return report_of(task, stop, lambda line: say(as_told(line)))
            finally:
                logs.remove(log)

    with graceful_stop() as stop, obeying(board, name, attempt, stop):
        ray.get(board.arrive.remote(name, attempt))
        try:
            return hand.around(task, number, stop, say, train)
        except SagittalError as error:
            return _failed(error.code, f"on node {node}: {error.message}")


def _folders(run: Run) -> tuple[Path, ...]:
    return run.folder, run.cache.folder, run.data.folder


def require_seen(nodes: Sequence[Node], folders: Sequence[Path]) -> None:
    """Make sure that every node sees these folders, and the same first one as this machine.

    Raises:
        ResourceError: one does not.
    """
    write_atomically(folders[0] / TOKEN, b"")
    look = ray.remote(_looking())
    asked = [(node, look.options(num_cpus=0, scheduling_strategy=on_node(node.id)).remote(folders)) for node in nodes]
    for node, answer in asked:
        try:
            missing = ray.get(answer)
        except ray.exceptions.NodeDiedError:
            continue  # It went while it was asked.
        if missing:
            raise ResourceError(_not_shared(node.name, missing[0]), code="not_shared")


def _missing(folders: Sequence[Path]) -> list[Path]:
    """Return which folders this machine does not see; of the first, another one of the same name counts as none."""
    return _looking()(folders)


def _looking() -> Callable[[Sequence[Path]], list[Path]]:
    """Return what looks for folders, pickled by value: a worker that only looks need not load torch."""
    token = TOKEN

    def look(folders: Sequence[Path]) -> list[Path]:
        first = [folders[0]] if not (folders[0] / token).exists() else []
        return first + [folder for folder in folders[1:] if not folder.is_dir()]

    return look


def _not_shared(node: str, folder: Path) -> str:
    return (
        f"node {node} does not see {folder}, where this machine reads and writes. Give --out and --cache (and the data "
        "set) on a file system that all machines share, by the same paths, or --store s3://BUCKET/FOLDER."
    )


def _how_lost(error: Exception) -> str:
    if isinstance(error, ray.exceptions.OutOfMemoryError):
        return "its node ran out of memory, and Ray ended it"
    if isinstance(error, ray.exceptions.WorkerCrashedError):
        return "its process was lost, as when memory runs out"
    if isinstance(error, ray.exceptions.NodeDiedError | ray.exceptions.ObjectLostError):
        return "its node was lost"
    return f"its node was lost ({type(error).__name__})"


def _failed(code: str, message: str) -> dict[str, Any]:
    return {"error": {"message": message, "code": code, "type": "TrainingError"}}


def _nobody(line: str) -> None:
    """Drop a line; a fold has its own to tell."""
