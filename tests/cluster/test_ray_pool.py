"""The pool against a cluster made of lists: workers and nodes that end in any order, on a clock of its own."""

from __future__ import annotations

import json
import random
from collections import deque
from collections.abc import Callable, Iterator, Set
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sagittal.cluster import pool
from sagittal.cluster.places import Place
from sagittal.cluster.pool import AHEAD, Pool, Told
from sagittal.cluster.ray_session import Needs, Node
from sagittal.errors import DataError, ResourceError, SagittalError

real = pytest.importorskip("ray", reason="no Ray: pip install 'sagittal[ray]'")


class Call:
    """A reference: open where it has no item."""

    def __init__(self, actor: Actor, item: str | None) -> None:
        self.actor, self.item = actor, item
        self.answer: str | None = None
        self.failed = False


class Method:
    def __init__(self, call: Callable[..., Call]) -> None:
        self.remote = call


class Actor:
    def __init__(self, node: str) -> None:
        self.node, self.lives = node, True
        self.calls: deque[Call] = deque()
        self.beside = 0
        self.open, self.do, self.close = Method(self._open), Method(self._call), Method(self._end)

    def _open(self, beside: int) -> Call:
        self.beside = beside
        return self._call(None)

    def _call(self, item: str | None) -> Call:
        call = Call(self, item)
        call.failed = not self.lives
        self.calls.append(call)
        assert len(self.calls) <= AHEAD, "more is handed out than a worker may hold"
        return call

    def _end(self) -> Call:
        call = Call(self, None)
        call.answer = ""
        return call

    def die(self) -> None:
        self.lives = False
        for call in self.calls:
            call.failed = call.answer is None


class Cluster:
    """What the pool needs of Ray and of a session with it; `wait` is where time passes and fate strikes.

    Args:
        seed: of who is quicker.
        poison: items that end the worker that does them.
        losses, joins: after how many answers a node is lost, and one joins.
        notice_s: how long a lost node is listed as alive.
        nodes, cpus: how many there are at the beginning, and processors of each, one for a worker.
    """

    exceptions = real.exceptions

    def __init__(
        self,
        seed: int,
        poison: set[str],
        losses: list[int],
        joins: list[int],
        notice_s: float = 10.0,
        nodes: int = 3,
        cpus: int = 1,
    ) -> None:
        self._random = random.Random(seed)
        self._poison, self._losses, self._joins = poison, sorted(losses), sorted(joins)
        self._notice_s = notice_s
        self.place = Place("ray")
        self._alive = {f"n{number}": Node(f"n{number}", f"n{number}", cpus, 0) for number in range(nodes)}
        self._lost_at: dict[str, float] = {}
        self._actors: list[Actor] = []
        self.now, self.answers, self.begun = 0.0, 0, 0
        self.cannot_open = self.cannot_do = ""

    @property
    def nodes(self) -> tuple[Node, ...]:
        noticed = {node for node, at in self._lost_at.items() if self.now - at >= self._notice_s}
        return tuple(node for node in self._alive.values() if node.id not in noticed)

    def require(self, needs: Needs, what: str) -> None:
        pass

    def remote(self, host: type) -> Any:
        return self

    def options(self, *, scheduling_strategy: Any, **_: object) -> Any:
        outer = self

        class Made:
            def remote(self, make: object) -> Actor:
                actor = Actor(scheduling_strategy.node_id)
                actor.lives = actor.node not in outer._lost_at
                outer._actors.append(actor)
                return actor

        return Made()

    def kill(self, actor: Actor) -> None:
        actor.die()

    def wait(self, calls: list[Call], *, num_returns: int, timeout: float) -> tuple[list[Call], list[Call]]:
        if timeout == 0:
            done = [call for call in calls if call.failed or call.answer is not None]
        else:
            self.now += 0.2
            self._strike()
            self._work()
            done = [call for call in calls if call.failed or call.answer is not None][:num_returns]
        return done, [call for call in calls if call not in done]

    def get(self, call: Call) -> str:
        if call.failed:
            raise real.exceptions.RayActorError
        assert call.answer is not None
        return call.answer

    def sleep(self, seconds: float) -> None:
        self.now += seconds

    def monotonic(self) -> float:
        return self.now

    def _strike(self) -> None:
        if self._losses and self.answers >= self._losses[0] and len(self._lost_at) < len(self._alive) - 1:
            self._losses.pop(0)
            node = self._random.choice([node for node in self._alive if node not in self._lost_at])
            self._lost_at[node] = self.now
            for actor in self._actors:
                if actor.node == node:
                    actor.die()
        if self._joins and self.answers >= self._joins[0]:
            self._joins.pop(0)
            name = f"n{len(self._alive)}"
            self._alive[name] = Node(name, name, 1, 0)

    def _work(self) -> None:
        busy = [actor for actor in self._actors if actor.lives and actor.calls]
        if not busy:
            return
        actor = self._random.choice(busy)
        # Any of them: what is read ahead may end a worker, too.
        call = self._random.choice(actor.calls)
        if call.item in self._poison or (call.item is None and self.cannot_open == "dies"):
            actor.die()
            return
        actor.calls.remove(call)
        if call.item is None and self.cannot_open:
            call.answer = json.dumps({"fatal": {"type": "DataError", "code": "x", "message": self.cannot_open}})
        else:
            self.answers += call.item is not None
            call.answer = json.dumps({"answer": f"{call.item}!"})


def run(
    cluster: Cluster,
    items: list[str],
    patch: pytest.MonkeyPatch,
    unfit: Set[str] = frozenset(),
    workers: int | None = None,
) -> tuple[dict[str, str], dict[str, str]]:
    """Return what was answered and what was given up; each at most once. Unfit items are told when they are briefed."""
    answers: dict[str, str] = {}
    given_up: dict[str, str] = {}

    def answer(item: str, text: str) -> None:
        assert item not in answers and item not in given_up
        answers[item] = text

    def poison(item: str, why: str) -> None:
        assert item not in answers and item not in given_up
        given_up[item] = why

    for name, value in {
        "ray": cluster,
        "time": cluster,
        "on_node": lambda node: type("At", (), {"node_id": node}),
        "require_same_versions": lambda nodes: None,
    }.items():
        patch.setattr(pool, name, value)

    def brief(item: str) -> str | None:
        if item not in unfit:
            return item
        poison(item, "unfit")
        return None

    made = Pool(cluster, lambda: None, Needs(), workers=workers)  # type: ignore[arg-type, return-value]
    made.run(items, brief, Told(answer, poison))
    return answers, given_up


@pytest.fixture
def patched() -> Iterator[pytest.MonkeyPatch]:
    with pytest.MonkeyPatch.context() as patch:
        yield patch


@given(
    seed=st.integers(0, 10**6),
    count=st.integers(1, 40),
    poison=st.sets(st.integers(0, 39), max_size=3),
    losses=st.lists(st.integers(0, 40), max_size=4),
    joins=st.lists(st.integers(0, 40), max_size=3),
    notice_s=st.sampled_from([0.0, 3.0, 15.0]),
)
@settings(max_examples=80, deadline=None, derandomize=True)
def test_every_item_is_told_once_and_only_poison_is_given_up(
    seed: int, count: int, poison: set[int], losses: list[int], joins: list[int], notice_s: float
) -> None:
    items = [f"i{number}" for number in range(count)]
    bad = {f"i{number}" for number in poison} & set(items)
    with pytest.MonkeyPatch.context() as patch:
        answers, given_up = run(Cluster(seed, bad, losses, joins, notice_s), items, patch)
    assert set(given_up) == bad
    assert answers == {item: f"{item}!" for item in items if item not in bad}


@pytest.mark.parametrize("unfit", [["a"], ["b", "c", "d", "e"], ["j"], list("abcdefghij")])
def test_what_is_told_before_it_is_handed_out_holds_nothing_up(patched: pytest.MonkeyPatch, unfit: list[str]) -> None:
    items = list("abcdefghij")
    answers, told = run(Cluster(0, set(), [], []), items, patched, frozenset(unfit))
    assert sorted(told) == unfit and sorted([*answers, *told]) == items


@pytest.mark.parametrize(
    ("nodes", "workers", "items", "started"),
    [
        (1, 2, 40, [("n0", 2)] * 2),
        (3, 3, 40, [("n0", 3), ("n1", 3), ("n2", 3)]),
        (2, None, 3, [("n0", 3), ("n0", 3), ("n1", 3)]),
        (2, None, 40, [("n0", 8)] * 8 + [("n1", 8)] * 8),
    ],
)
def test_few_workers_are_spread_over_nodes_and_told_how_many_may_share_theirs(
    patched: pytest.MonkeyPatch, nodes: int, workers: int | None, items: int, started: list[tuple[str, int]]
) -> None:
    cluster = Cluster(0, set(), [], [], nodes=nodes, cpus=8)
    run(cluster, [f"i{number}" for number in range(items)], patched, workers=workers)
    assert sorted((actor.node, actor.beside) for actor in cluster._actors) == started


def test_a_worker_that_can_not_begin_ends_the_run_with_its_node(patched: pytest.MonkeyPatch) -> None:
    cluster = Cluster(0, set(), [], [])
    cluster.cannot_open = "no bundle"
    with pytest.raises(DataError, match=r"node n\d: no bundle") as told:
        run(cluster, ["a"], patched)
    assert told.value.code == "x"


def test_workers_that_end_while_they_load_end_the_run(patched: pytest.MonkeyPatch) -> None:
    cluster = Cluster(0, set(), [], [])
    cluster.cannot_open = "dies"
    with pytest.raises(ResourceError, match=r"node n\d: its workers end while they load"):
        run(cluster, ["a", "b"], patched)
    assert cluster.now > pool.NOTICE_S, "until then the node might have been lost"


def test_without_any_node_the_run_ends_after_a_while(patched: pytest.MonkeyPatch) -> None:
    cluster = Cluster(0, set(), [], [], nodes=0)
    with pytest.raises(ResourceError, match="no node of ray that has 1 CPU is left"):
        run(cluster, ["a"], patched)
    assert pool.NO_NODE_S < cluster.now < pool.NO_NODE_S + 5


def test_a_node_with_other_versions_is_left_out_and_told(patched: pytest.MonkeyPatch) -> None:
    cluster, said = Cluster(0, set(), [], [1]), list[str]()

    def refuse(nodes: tuple[Node, ...]) -> None:
        raise ResourceError("has torch 2.10")

    with pytest.raises(SagittalError, match="no node"):
        # Of three nodes two are lost, and the one that joins is of no use; the last one is lost from outside.
        cluster._losses = [1, 1]
        answers = 0

        def answer(item: str, text: str) -> None:
            nonlocal answers
            answers += 1
            if answers == 6:
                for node in cluster._alive:
                    if node not in cluster._lost_at and node != "n3":
                        cluster._lost_at[node] = cluster.now
                        for actor in cluster._actors:
                            if actor.node == node:
                                actor.die()

        for name, value in {"ray": cluster, "time": cluster, "require_same_versions": refuse}.items():
            patched.setattr(pool, name, value)
        patched.setattr(pool, "on_node", lambda node: type("At", (), {"node_id": node}))
        items = [f"i{number}" for number in range(30)]
        Pool(cluster, lambda: None, Needs()).run(  # type: ignore[arg-type, return-value]
            items, lambda item: item, Told(answer, lambda item, why: None, said.append)
        )
    assert any("n3 is not used: has torch 2.10" in line for line in said)


def test_nothing_to_do_starts_nothing(patched: pytest.MonkeyPatch) -> None:
    cluster = Cluster(0, set(), [], [])
    assert run(cluster, [], patched) == ({}, {}) and not cluster._actors
