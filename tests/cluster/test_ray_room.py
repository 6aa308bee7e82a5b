"""Folds that no node takes: that is told and ends, and a stop does not wait for them."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import ray

from sagittal.cluster import folds
from sagittal.cluster.board import Board
from sagittal.cluster.places import parse_place
from sagittal.cluster.ray_session import Needs, Session
from sagittal.cluster.room import NO_NODE_S, Room
from sagittal.errors import ResourceError
from sagittal.training.side_by_side import Ending
from sagittal.training.signals import StopFlag


class _Cluster(Session):
    """One that has room for so many pieces of work."""

    def __init__(self, room: int) -> None:
        super().__init__(parse_place("ray"), started=False)
        self.room = room

    def slots(self, needs: Needs) -> int:
        return self.room


def test_a_cluster_without_a_node_is_told_and_waited_for_a_while() -> None:
    cluster, lines = _Cluster(1), list[str]()
    room = Room(cluster, Needs(2), lines.append)
    room.look(0.0)
    cluster.room = 0
    for now_s in (1.0, 2.0, NO_NODE_S):
        room.look(now_s)
    assert lines == ["no node of ray that has 2 CPUs is left; waiting for one for 120 s"]
    cluster.room = 1
    room.look(NO_NODE_S + 2)
    cluster.room = 0
    room.look(NO_NODE_S + 4)
    with pytest.raises(ResourceError, match="go on with --resume") as caught:
        room.look(2 * NO_NODE_S + 5)
    assert caught.value.code == "no_node" and len(lines) == 2


class _Handle:
    """A board of this process, asked as an actor is."""

    def __init__(self, board: Board) -> None:
        self._board = board

    def __getattr__(self, name: str) -> Any:
        return SimpleNamespace(remote=getattr(self._board, name))


class _Ray:
    """Ray with tasks whose results are known once they are in `done`."""

    exceptions = ray.exceptions

    def __init__(self) -> None:
        self.done: dict[str, Any] = {}
        self.cancelled: list[str] = []

    def remote(self, **settings: Any) -> Any:
        return lambda function: function

    def get(self, promised: Any) -> Any:
        result = self.done.get(promised, promised) if isinstance(promised, str) else promised
        if isinstance(result, Exception):
            raise result
        return result

    def wait(self, tasks: Sequence[str], timeout: float) -> tuple[list[str], list[str]]:
        return [task for task in tasks if task in self.done], []

    def cancel(self, task: str, *, force: bool = False) -> None:
        self.cancelled.append(task)
        self.done[task] = ray.exceptions.TaskCancelledError()


def test_a_stop_takes_back_the_folds_that_wait_for_a_node(monkeypatch: pytest.MonkeyPatch) -> None:
    fake, board, stop, asked = _Ray(), Board(), StopFlag(), list[Any]()
    monkeypatch.setattr(folds, "ray", fake)

    def begin(work: folds._Work, name: str, *, rounds: int) -> None:
        task = f"task {name}"
        work._running[task] = folds._Attempt(name, 0, task)
        if name == "0":  # the other one waits in Ray for a node
            board.arrive(name, 0)
        else:
            stop.reason = "interrupted"

    def stopped(reason: Any) -> None:
        asked.append(reason)
        fake.done["task 0"] = {"ended": "interrupted"}

    monkeypatch.setattr(folds._Work, "_begin", begin)
    monkeypatch.setattr(board, "stop", stopped)
    run: Any = SimpleNamespace(options=SimpleNamespace(say=print))
    road: Any = folds.SamePaths()
    work = folds._Work(_Cluster(2), Needs(1), run, _Handle(board), print, road)
    assert list(work.through(["0", "1"], stop)) == [Ending("0", {"ended": "interrupted"}, 0)]
    assert fake.cancelled == ["task 1"] and asked == ["interrupted"]
