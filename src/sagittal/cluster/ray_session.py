"""A session with a Ray cluster: joined or started, with every node checked before work is given to it.

Ray runs what it is given wherever it fits. Two nodes with other versions would train other weights, or fail in the
middle with a traceback from deep inside; so versions and resources are compared first, and told by node.
"""

from __future__ import annotations

import logging
import platform
import signal
import socket
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from types import FrameType
from typing import Any

import ray
from ray._private import worker as ray_worker
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from sagittal.cluster.node_folder import removing
from sagittal.cluster.places import LOCAL, Place
from sagittal.errors import ResourceError

REACH_S = 10.0
"""How long the head of a cluster may take to accept a connection."""
PROBE_S = 120.0
"""How long a node may take to start a worker and answer."""
STARTS = 5
"""How often Ray may try to come up on a busy machine."""
REMOVE_S = 60.0
"""How long nodes may take to remove a run's folders."""
_LATE = "timed out during startup"
_log = logging.getLogger("sagittal.cluster")
OBJECT_STORE_BYTES = 256 * 1024**2
"""Memory for Ray's objects where a cluster is started here: cases and weights go by files, Ray carries paths."""


def _to_log(data: Mapping[str, Any], ignore_prefix: bool) -> None:
    """Log what nodes say of themselves at their end."""
    _log.debug("%s", data.get("lines"))


# Ray prints it to stdout, two dozen lines for each node that is lost, where `--json` has its own. No setting keeps it
# from that, not even log_to_driver; who lost which node is told by us.
ray_worker.print_to_stdstream = _to_log


@dataclass(frozen=True)
class Needs:
    """What one piece of work occupies on a node while it runs."""

    cpus: int = 1
    gpus: int = 0

    def __str__(self) -> str:
        return _told(self.cpus, self.gpus)


@dataclass(frozen=True)
class Node:
    """A node of the cluster that is alive.

    Attributes:
        id: Ray's.
        name: its host's name and address, for messages.
        cpus, gpus: what Ray may give away there.
    """

    id: str
    name: str
    cpus: int
    gpus: int

    def fits(self, needs: Needs) -> int:
        """Return how many pieces of such work fit at a time."""
        by_cpu = self.cpus // needs.cpus if needs.cpus else self.gpus
        return min(by_cpu, self.gpus // needs.gpus) if needs.gpus else by_cpu


class Session:
    """A connection to a cluster; valid inside `connected`."""

    def __init__(self, place: Place, *, started: bool) -> None:
        self.place, self.started = place, started

    @property
    def nodes(self) -> tuple[Node, ...]:
        """The nodes that are alive now; they come and go."""
        return tuple(
            Node(
                id=node["NodeID"],
                name=f"{node['NodeManagerHostname']} ({node['NodeManagerAddress']}, {node['NodeID'][:8]})",
                cpus=int(node["Resources"].get("CPU", 0)),
                gpus=int(node["Resources"].get("GPU", 0)),
            )
            for node in ray.nodes()  # type: ignore[no-untyped-call]
            if node["Alive"]
        )

    @property
    def home(self) -> NodeAffinitySchedulingStrategy:
        """Where what may not be lost belongs: the node of this process, or the head's where this is a client."""
        return on_node(ray.get_runtime_context().get_node_id())

    def slots(self, needs: Needs) -> int:
        """Return how many pieces of such work the cluster can do at a time."""
        return sum(node.fits(needs) for node in self.nodes)

    def require(self, needs: Needs, what: str) -> None:
        """Check that at least one node has what a piece of work needs.

        Raises:
            ResourceError: none has; Ray itself would wait for one for ever.
        """
        nodes = self.nodes
        if not any(node.fits(needs) for node in nodes):
            there = "; ".join(f"{node.name} has {_told(node.cpus, node.gpus)}" for node in nodes)
            raise ResourceError(
                f"{what} needs {needs} on one node, and no node of {self.place} has that: {there}. Ask for less, or "
                "add a node that has it.",
                code="cluster_too_small",
            )


def on_node(node_id: str) -> NodeAffinitySchedulingStrategy:
    """Return the strategy that puts work on this node and no other."""
    return NodeAffinitySchedulingStrategy(node_id=node_id, soft=False)


def remove_from(nodes: Callable[[], Sequence[Node]], run: str) -> None:
    """Remove the folders of a run from nodes.

    Args:
        nodes: returns those that are alive.
        run: its name in the store.
    """
    # A cluster that is gone has taken its nodes' processes with it; what is on their disks, a later run removes.
    with suppress(ray.exceptions.RayError, ConnectionError, RuntimeError):
        remove: Any = ray.remote(removing(run))
        ways = [{"num_cpus": 0, "max_retries": 0, "scheduling_strategy": on_node(node.id)} for node in nodes()]
        asked = [remove.options(**way).remote() for way in ways]
        if asked:
            ray.wait(asked, num_returns=len(asked), timeout=REMOVE_S)


@contextmanager
def connected(place: Place, *, say: Callable[[str], None] = lambda line: None) -> Iterator[Session]:
    """Join or start a cluster while the block runs, and check that all its nodes run what runs here.

    Where this process has a session with Ray already, that is used and left as it is.

    Args:
        place: which cluster.
        say: receives a line about the nodes.

    Raises:
        ResourceError: it can't be reached, or a node has other versions; the message names the node and both.
    """
    owned = not ray.is_initialized()
    started = owned and _begin(place)
    try:
        with sigterm_interrupts():
            session = Session(place, started=started)
            nodes = session.nodes
            require_same_versions(nodes)
            cpus, gpus = sum(node.cpus for node in nodes), sum(node.gpus for node in nodes)
            how = "started on this machine" if started else "joined"
            count = "1 node" if len(nodes) == 1 else f"{len(nodes)} nodes"
            say(f"{place}: {how}, {count} with {_told(cpus, gpus)}")
            yield session
    finally:
        if owned:
            ray.shutdown()


def require_same_versions(nodes: tuple[Node, ...]) -> None:
    """Check that all nodes have this process's Ray, Python, Sagittal and PyTorch.

    Raises:
        ResourceError: one has not, or does not answer.
    """
    # Pickled by value, as it is no module's: a node that lacks Sagittal must be able to answer too.
    probe = ray.remote(_probe())
    here = _probe()()
    asked = [
        (node, probe.options(num_cpus=0, max_retries=0, scheduling_strategy=on_node(node.id)).remote())
        for node in nodes
    ]
    for node, answer in asked:
        try:
            there = ray.get(answer, timeout=PROBE_S)
        except ray.exceptions.NodeDiedError:
            continue  # It went while it was asked; no work will be given to it.
        except (ray.exceptions.RayError, TimeoutError) as error:
            raise ResourceError(
                f"node {node.name} did not say within {PROBE_S:g} s which versions it runs ({type(error).__name__}: "
                f"{_first_line(error)}). Expected a node that starts a Python worker. Look at its logs "
                "(`ray logs`), or take it out of the cluster.",
                code="node_silent",
            ) from None
        compare_versions(node.name, here=here, there=there)


def compare_versions(name: str, *, here: Mapping[str, str | None], there: Mapping[str, str | None]) -> None:
    """Compare what a node runs with what this process does.

    Args:
        name: the node.
        here, there: version by name of the program; None where it is not installed.

    Raises:
        ResourceError: they differ; of PyTorch, a build for other hardware (`+cpu`, `+cu128`) is no difference.
    """
    for program, wanted in here.items():
        found = there.get(program)
        if wanted is None or _public(program, found) == _public(program, wanted):
            continue
        had = f"has {program} {found}" if found is not None else f"has no {program}"
        raise ResourceError(
            f"node {name} {had}, and this process {program} {wanted}: expected the same everywhere, because other "
            f"versions train other weights. Install {program} {wanted} on that node and start Ray there again.",
            code="versions_differ",
        )


def _public(program: str, version: str | None) -> str | None:
    if version is None:
        return None
    if program == "Python":  # Ray and pickled work ask for the same minor version
        return ".".join(version.split(".")[:2])
    return version.partition("+")[0] if program == "torch" else version


def _probe() -> Callable[[], dict[str, str | None]]:
    """Return a function that tells versions, and needs nothing of Sagittal where it is called."""

    def versions() -> dict[str, str | None]:
        import hashlib  # noqa: PLC0415 - it runs on a node that gets this function and nothing around it
        import importlib.util  # noqa: PLC0415
        import platform  # noqa: PLC0415
        from importlib import metadata  # noqa: PLC0415
        from pathlib import Path  # noqa: PLC0415

        def version(package: str) -> str | None:
            try:
                return metadata.version(package)
            except metadata.PackageNotFoundError:
                return None

        spec, sagittal = importlib.util.find_spec("sagittal"), version("sagittal")
        if spec is not None and spec.origin is not None:
            # Two checkouts may call themselves by one version.
            folder, digest = Path(spec.origin).parent, hashlib.sha256()
            for path in sorted(folder.rglob("*.py")):
                digest.update(path.relative_to(folder).as_posix().encode() + b"\0" + path.read_bytes())
            sagittal = f"{sagittal} (sources {digest.hexdigest()[:12]})"
        return {
            "Python": platform.python_version(),
            "ray": version("ray"),
            "sagittal": sagittal if spec is not None else None,
            "torch": version("torch"),
        }

    return versions


def _begin(place: Place) -> bool:
    """Join the cluster, or start one here; tell whether it was started."""
    address = place.address
    if address is not None and address != LOCAL:
        _require_listener(place)
    settings: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    alone = {"include_dashboard": False, "object_store_memory": OBJECT_STORE_BYTES}
    with _own_signals():
        if address is None:
            try:
                _join(place, {"address": "auto", **settings})
            except ConnectionError:
                _join(place, {"address": LOCAL, **settings, **alone})
                return True
            return False
        _join(place, {"address": address, **settings, **(alone if address == LOCAL else {})})
    return address == LOCAL


def _join(place: Place, settings: Mapping[str, Any]) -> None:
    for left in reversed(range(STARTS)):
        try:
            _init(place, settings)
        except Exception as error:
            # Ray's own limit, 30 s for a node to come up, is too short for a machine that is busy; it has no type.
            if _LATE not in str(error):
                raise
            ray.shutdown()
            if not left:
                raise ResourceError(
                    f"--on {place}: Ray did not come up on this machine in {STARTS} tries (its own limits are 15 to "
                    "30 s). Expected a machine with processors to spare: look what else it does (`top`), and start "
                    "again.",
                    code="cluster_slow",
                ) from None
        else:
            return


def _init(place: Place, settings: Mapping[str, Any]) -> None:
    try:
        ray.init(**settings)
    except ConnectionError as error:
        if settings["address"] == "auto":
            raise
        raise _unreachable(place, error) from None
    except (ray.exceptions.AuthenticationError, RuntimeError, TimeoutError, OSError, ImportError, ValueError) as error:
        raise _unreachable(place, error) from None


def _unreachable(place: Place, error: Exception) -> ResourceError:
    client = place.address is not None and place.address.startswith("ray://")
    advice = (
        "Ray and Python must be of the versions here, and the client's server must run there (port 10001)."
        if client
        else "This machine must be a node of the cluster (ray start --address=HOST:PORT), with its head's versions; "
        "from elsewhere use ray://HOST:10001."
    )
    here = f"Ray {ray.__version__}, Python {platform.python_version()}"
    return ResourceError(
        f"--on {place}: can't work with that cluster ({type(error).__name__}: {_first_line(error)}); here: {here}. "
        f"{advice} Where the head asks for a token (`ray start` says so), this machine needs the same one: "
        "~/.ray/auth_token.",
        code="cluster_unreachable",
    )


def _require_listener(place: Place) -> None:
    """Make sure that something listens at the address; Ray itself would try for minutes."""
    assert place.address is not None
    host, _, port = place.address.removeprefix("ray://").rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=REACH_S).close()
    except OSError as error:
        raise ResourceError(
            f"--on {place}: nothing answers there ({error}). Expected the head of a Ray cluster: look whether "
            "`ray status` knows it, and whether a firewall lets this machine through.",
            code="cluster_unreachable",
        ) from None


@contextmanager
def _own_signals() -> Iterator[None]:
    """Keep this process's answer to SIGTERM, which Ray would replace by its own."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def sigterm_interrupts() -> Iterator[None]:
    """Let SIGTERM unwind the block as Ctrl-C does where this process's own handler raises, and then raise what it did.

    Ray calls handlers while it waits, and passes on a KeyboardInterrupt alone: any other exception of theirs becomes an
    error in Ray.
    """
    before = signal.getsignal(signal.SIGTERM)
    if threading.current_thread() is not threading.main_thread() or not callable(before):
        yield
        return
    raised: list[BaseException] = []

    def interrupt(number: int, frame: FrameType | None) -> None:
        try:
            before(number, frame)
        except BaseException as error:
            raised.append(error)
            raise KeyboardInterrupt from None

    signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    except KeyboardInterrupt:
        if not raised:
            raise
    finally:
        signal.signal(signal.SIGTERM, before)
    if raised:
        raise raised[0]


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), "no message")


def _told(cpus: int, gpus: int) -> str:
    said = f"{cpus} CPU" if cpus == 1 else f"{cpus} CPUs"
    if gpus:
        said += f" and {gpus} GPU" if gpus == 1 else f" and {gpus} GPUs"
    return said
