"""Warm workers on every node of a Ray cluster, and items handed out to them one by one.

A worker keeps what is slow to load. It holds at most `AHEAD` items, so memory does not grow with their number and a
fast worker gets more of them. Where a worker is lost, its items go to others; an item whose worker ended twice on a
node that lives on is named as what ends workers. After the first time it is alone with its worker, so that its
neighbours are not suspected with it. Nodes that join are checked and get workers, nodes that go take theirs along.

Each item is told once. It may be computed twice where a node was lost after computing and before telling, so what is
done for an item must give the same bytes again.
"""

from __future__ import annotations

import json
import logging
import time
import traceback
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Protocol

import ray

from sagittal.cluster.ray_session import Needs, Node, Session, on_node, require_same_versions
from sagittal.errors import ResourceError, SagittalError

_log = logging.getLogger("sagittal.cluster")
AHEAD = 3
"""Items that a worker holds: one that is written, one that is computed and one that is read."""
MAX_DEATHS = 2
"""Workers that an item may end, on nodes that live on, before it is named."""
MAX_LOSSES = 10
"""Nodes that may be lost under an item before it is named all the same."""
MAX_FAILED_STARTS = 2
"""Workers of one node that may end while they load, one after the other."""
LOOK_EVERY_S = 1.0
"""How often nodes are counted."""
NOTICE_S = 20.0
"""How long the cluster may take to notice that a node is gone whose workers have ended: Ray's five checks in a row, a
little more. Before, a worker's end is nobody's fault."""
CLOSE_S = 10.0
"""How long workers may take to let go of what they hold, at the end."""
NO_NODE_S = 120.0
"""How long there may be no node at all before the run ends."""


class Hand(Protocol):
    """What a worker does; it lives on a node, and `do` is called from several threads at a time."""

    def open(self, beside: int) -> str:
        """Load what is slow to load, with at most `beside` workers on this node; return what this is, for a log."""
        ...

    def do(self, item: str) -> str:
        """Return the answer for an item."""
        ...

    def close(self) -> None:
        """Let go of what was loaded."""
        ...


@dataclass(frozen=True)
class Told:
    """What a pool tells while it works; each is called from the thread of `run`.

    Attributes:
        answer: an item's id and answer.
        poison: an item's id and why it is given up.
        say: a line for a person.
    """

    answer: Callable[[str, str], None]
    poison: Callable[[str, str], None]
    say: Callable[[str], None] = lambda line: None


class _Host:
    """The process of a worker. Errors that a user can act on are answers, as pickling may lose them."""

    def __init__(self, make: Callable[[], Hand]) -> None:
        self._make = make
        self._hand: Hand | None = None

    def open(self, beside: int) -> str:
        def opened() -> str:
            self._hand = self._make()
            return self._hand.open(beside)

        return _answer(opened)

    def do(self, item: str) -> str:
        assert self._hand is not None
        hand = self._hand
        return _answer(lambda: hand.do(item))

    def close(self) -> None:
        if self._hand is not None:
            self._hand.close()


def _answer(act: Callable[[], str]) -> str:
    try:
        return json.dumps({"answer": act()})
    except SagittalError as error:
        return json.dumps({"fatal": error.as_dict()["error"]})
    except Exception as error:
        text = f"{type(error).__name__}: {error}"
        return json.dumps({"fatal": {"type": "SagittalError", "message": text, "code": "bug"}, "trace": _trace(error)})


def _trace(error: Exception) -> str:
    return "".join(traceback.format_exception(error))


@dataclass(eq=False)
class _Worker:
    node: Node
    actor: Any
    ready: bool = False
    items: list[str] = field(default_factory=list)


@dataclass(eq=False)
class _Suspicion:
    """What speaks against an item: the nodes on which workers ended that held it, and when the last did."""

    nodes: list[Node] = field(default_factory=list)
    at: float = 0.0

    def is_proved(self, alive: Mapping[str, Node]) -> bool:
        """Whether it ended too many workers: those of nodes that were lost don't count."""
        return sum(node.id in alive for node in self.nodes) >= MAX_DEATHS or len(self.nodes) >= MAX_LOSSES


class Pool:
    """Workers of one kind. Call `run` once.

    Args:
        session: the cluster.
        make: makes a worker's hand, on the node; it is pickled.
        needs: of each worker.
        environment: variables of its process.
        workers: at most; by itself as many as the cluster has room for, nodes that join later included.
    """

    def __init__(
        self,
        session: Session,
        make: Callable[[], Hand],
        needs: Needs,
        *,
        environment: Mapping[str, str] | None = None,
        workers: int | None = None,
    ) -> None:
        self._session, self._make, self._needs, self._limit = session, make, needs, workers
        self._environment = dict(environment or {})
        self._nodes: dict[str, Node] = {node.id: node for node in session.nodes}
        self._checked: dict[str, bool] = dict.fromkeys(self._nodes, True)
        self._workers: set[_Worker] = set()
        self._asked: dict[Any, tuple[_Worker, str | None]] = {}
        self._suspected: dict[str, _Suspicion] = {}
        self._suspects: deque[str] = deque()
        self._in_doubt: list[str] = []
        self._failed_starts: Counter[str] = Counter()
        self._rests_until: dict[str, float] = {}
        self._looked_at = self._had_node_at = time.monotonic()
        self._checking: dict[Future[None], Node] = {}

    def run(self, items: Sequence[str], brief: Callable[[str], str | None], told: Told) -> None:
        """Hand out items until each is told.

        Args:
            items: ids, in the order in which they are begun.
            brief: returns what a worker is given for an item, None where the caller has told of it already; called when
                it is handed out, once or again.
            told: what is called.

        Raises:
            SagittalError: what a worker could not begin or go on without: the disk is full, the model can't be loaded
                on a node (which is named).
            ResourceError: no node is left.
        """
        if not items:
            return
        self._session.require(self._needs, "a worker")
        self._brief, self._told = brief, told
        self._waiting, self._open = deque(items), set(items)
        self._most = len(items) if self._limit is None else min(self._limit, len(items))
        with ThreadPoolExecutor(1, "check-node") as self._checker:
            try:
                while self._open:
                    self._look()
                    self._judge()
                    self._staff()
                    self._hand_out()
                    self._listen()
                self._close()
            finally:
                for worker in self._workers:
                    ray.kill(worker.actor)
                self._checker.shutdown(wait=False, cancel_futures=True)

    def _listen(self) -> None:
        if not self._asked:
            if self._open:
                time.sleep(LOOK_EVERY_S)
            return
        asked = list(self._asked)
        ray.wait(asked, num_returns=1, timeout=LOOK_EVERY_S)
        # All that came by then: each call looks at everything that was handed out.
        done, _ = ray.wait(asked, num_returns=len(asked), timeout=0)
        for reference in done:
            if reference in self._asked:  # one worker's end takes its other references along
                self._heard(reference)

    def _close(self) -> None:
        closing = [worker.actor.close.remote() for worker in self._workers if worker.ready]
        if closing:
            ray.wait(closing, num_returns=len(closing), timeout=CLOSE_S)

    def _look(self) -> None:
        """Take note of nodes that came and went."""
        now = time.monotonic()
        if now - self._looked_at >= LOOK_EVERY_S:
            self._looked_at, before = now, self._nodes
            self._nodes = {node.id: node for node in self._session.nodes}
            for gone in before.keys() - self._nodes.keys():
                self._told.say(f"{before[gone].name} is gone; what its workers held goes to others")
            for node in self._nodes.values():
                if node.id not in self._checked:
                    self._checked[node.id] = False
                    self._checking[self._checker.submit(require_same_versions, (node,))] = node
        for check in [check for check in self._checking if check.done()]:
            node = self._checking.pop(check)
            error = check.exception()
            self._checked[node.id] = error is None
            self._told.say(f"{node.name} joined" if error is None else f"{node.name} is not used: {error}")
        if any(self._checked.get(node.id) and node.fits(self._needs) for node in self._nodes.values()):
            self._had_node_at = now
        elif now - self._had_node_at > NO_NODE_S:
            raise ResourceError(
                f"no node of {self._session.place} that has {self._needs} is left, and none came for {NO_NODE_S:g} s.",
                code="no_node",
            )

    def _staff(self) -> None:
        """Start workers where there is room for them and work."""
        per_node = Counter(worker.node.id for worker in self._workers)
        places = [
            (number, node)
            for node in self._nodes.values()
            if self._checked.get(node.id) and self._rests_until.get(node.id, 0.0) <= time.monotonic()
            for number in range(per_node[node.id], node.fits(self._needs))
        ]
        # One for each node first, so that few items use many nodes.
        places.sort(key=lambda place: place[0])
        limit = min(self._most, len(self._open))
        for _, node in places[: max(0, limit - len(self._workers))]:
            hosts: Any = ray.remote(_Host)
            actor = hosts.options(
                num_cpus=self._needs.cpus,
                num_gpus=self._needs.gpus,
                max_restarts=0,
                max_task_retries=0,
                max_concurrency=AHEAD + 1,
                scheduling_strategy=on_node(node.id),
                runtime_env={"env_vars": self._environment} if self._environment else None,
            ).remote(self._make)
            worker = _Worker(node, actor)
            self._workers.add(worker)
            self._asked[actor.open.remote(min(self._most, node.fits(self._needs)))] = (worker, None)

    def _hand_out(self) -> None:
        ready = sorted((worker for worker in self._workers if worker.ready), key=lambda worker: len(worker.items))
        for worker in ready:
            if self._suspects and not worker.items:
                self._give(worker, self._suspects.popleft())
        if not self._waiting:
            return
        # Towards the end nobody keeps items that another worker could begin.
        fair = -(-len(self._waiting) // max(1, len(self._workers)))
        for depth in range(1, min(AHEAD, fair) + 1):
            for worker in ready:
                while self._waiting and len(worker.items) < depth and not self._is_alone(worker):
                    self._give(worker, self._waiting.popleft())

    def _is_alone(self, worker: _Worker) -> bool:
        return any(item in self._suspected for item in worker.items)

    def _give(self, worker: _Worker, item: str) -> None:
        brief = self._brief(item)
        if brief is None:
            self._suspected.pop(item, None)
            self._open.remove(item)
            return
        worker.items.append(item)
        self._asked[worker.actor.do.remote(brief)] = (worker, item)

    def _heard(self, reference: Any) -> None:
        worker, item = self._asked.pop(reference)
        try:
            answer = json.loads(ray.get(reference))
        except ray.exceptions.RayError as error:
            self._lost(worker, item, error)
            return
        if "fatal" in answer:
            _log.debug("%s: %s", worker.node.name, answer.get("trace", ""))
            raise _error(answer["fatal"], worker.node)
        if item is None:
            worker.ready = True
            self._failed_starts[worker.node.id] = 0
            self._told.say(f"{answer['answer']} on {worker.node.name}")
            return
        worker.items.remove(item)
        self._answered(item, answer["answer"])

    def _answered(self, item: str, answer: str) -> None:
        self._suspected.pop(item, None)
        self._open.remove(item)
        self._told.answer(item, answer)

    def _lost(self, worker: _Worker, item: str | None, error: Exception) -> None:
        """Take back what a lost worker held; what it had told before it ended counts."""
        self._workers.discard(worker)
        held = {reference: asked for reference, (who, asked) in self._asked.items() if who is worker}
        finished, _ = ray.wait(list(held), num_returns=len(held), timeout=0) if held else ([], [])
        for reference, asked in held.items():
            del self._asked[reference]
            answer = _answer_or_none(reference) if reference in finished else None
            if answer is not None and asked is not None:
                worker.items.remove(asked)
                self._answered(asked, answer)
        ray.kill(worker.actor)  # Where it is only out of reach, it must not go on beside its successor.
        _log.debug("a worker on %s ended: %s", worker.node.name, error)
        now = time.monotonic()
        if item is None:
            self._rests_until[worker.node.id] = now + NOTICE_S
            self._failed_start(worker.node, error)
        for lost in worker.items:
            suspicion = self._suspected.setdefault(lost, _Suspicion())
            suspicion.nodes.append(worker.node)
            suspicion.at = now
            if suspicion.is_proved(self._nodes):
                self._in_doubt.append(lost)
            else:
                self._suspects.append(lost)

    def _judge(self) -> None:
        """Give up the items that ended workers on nodes that are still there, once a node's loss would be known."""
        due = [item for item in self._in_doubt if time.monotonic() - self._suspected[item].at > NOTICE_S]
        for item in due:
            self._in_doubt.remove(item)
            suspicion = self._suspected[item]
            if suspicion.is_proved(self._nodes):
                self._open.remove(item)
                names = " and ".join(dict.fromkeys(node.name for node in suspicion.nodes))
                self._told.poison(item, f"it ended {len(suspicion.nodes)} workers, on {names}")
            else:
                self._suspects.append(item)

    def _failed_start(self, node: Node, error: Exception) -> None:
        self._failed_starts[node.id] += 1
        if self._failed_starts[node.id] >= MAX_FAILED_STARTS and node.id in self._nodes:
            cause = next((line.strip() for line in str(error).splitlines() if line.strip()), "no message")
            raise ResourceError(
                f"node {node.name}: its workers end while they load ({cause}), most likely for want of memory. Give "
                "each worker more of the node, or take the node out of the cluster.",
                code="worker_start",
            )


def _answer_or_none(reference: Any) -> str | None:
    try:
        answer: str | None = json.loads(ray.get(reference)).get("answer")
    except ray.exceptions.RayError:
        return None
    return answer


def _error(given: Mapping[str, str], node: Node) -> SagittalError:
    kinds = {kind.__name__: kind for kind in SagittalError.__subclasses__()}
    return kinds.get(given["type"], SagittalError)(f"node {node.name}: {given['message']}", code=given["code"])
