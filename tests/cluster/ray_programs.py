"""What the tests let run with a Ray cluster of three nodes on this machine, each in a process of its own.

Ray's own warnings and open files are no matter of ours, and pytest would count them as errors of the tests.
"""

from __future__ import annotations

import itertools
import json
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

from sagittal.cli import run
from sagittal.cluster.places import parse_place
from sagittal.cluster.ray_session import Needs, connected, require_same_versions  # before Ray: it reports to nobody

# isort: split
from patient_nodes import SYSTEM, agent_ports, patiently
from ray.cluster_utils import Cluster

from sagittal.cluster import ray_session
from sagittal.cluster.carried_folds import CarriedFolds
from sagittal.cluster.folds import require_seen
from sagittal.errors import ResourceError
from sagittal.testing.datasets import TINY_SETTINGS, write_tiny_dataset

STORE_BYTES = 80 * 1024**2
STEPS = 60
TINY = {**TINY_SETTINGS, "schedule.steps": STEPS, "schedule.validations": 0, "schedule.keep": "last"}


def settings_of(values: dict[str, Any]) -> list[str]:
    return [word for name, value in values.items() for word in ("--set", f"{name}={value}")]


@contextmanager
def three_nodes() -> Iterator[tuple[Cluster, list[Any]]]:
    head = {"num_cpus": 1, "object_store_memory": STORE_BYTES, "include_dashboard": False, "_system_config": SYSTEM}
    cluster = patiently(lambda: Cluster(initialize_head=True, head_node_args={**head, **agent_ports()}))
    try:
        size = {"num_cpus": 1, "object_store_memory": STORE_BYTES}
        yield cluster, [patiently(lambda: cluster.add_node(**size, **agent_ports())) for _ in range(2)]
    finally:
        cluster.shutdown()


def folds(root: Path) -> dict[str, Any]:
    """Train five folds here and on three nodes, of which one is killed while it trains; then ask for what can't be."""
    data = write_tiny_dataset(root / "data", cases=10)
    common = ["train", str(data), "--fold", "all", "--device", "cpu", "--deterministic", *settings_of(TINY)]
    codes = [run([*common, "--out", str(root / "here")])]
    killed: list[str] = []
    with three_nodes() as (cluster, nodes):
        killer = threading.Thread(target=_kill, args=(cluster, nodes, root / "there.run", killed), daemon=True)
        killer.start()
        cache = ["--cache", str(root / "here.run" / "cache"), "--checkpoint-every", "0.001s"]
        on = ["--on", f"ray:{cluster.address}", "--fold-cpus", "1"]
        codes.append(run([*common, "--out", str(root / "there"), *cache, *on]))
        killer.join(timeout=60)
        refused = _refusals(cluster.address, root)
        codes += [_sweep(data, root, on), _together(data, root, on), _carried(data, root, on)]
    return {"codes": codes, "killed": killed, "refused": refused}


def _sweep(data: Path, root: Path, on: list[str]) -> int:
    """Compare two networks on the two nodes that are left."""
    settings = settings_of({**TINY, "schedule.steps": 2})
    command = ["sweep", str(data), "--out", str(root / "sweep"), "--networks", "mednext-s,mednext-b", "--folds", "2"]
    return run([*command, "--budget", "10m", "--device", "cpu", *on, *settings])


def _together(data: Path, root: Path, on: list[str]) -> int:
    """Train one network by two processes, a node each, and by one."""
    settings = settings_of({**TINY, "schedule.steps": 3})
    command = ["train", str(data), "--fold", "none", "--device", "cpu", *settings]
    alone = run([*command, "--out", str(root / "alone")])
    return run([*command, "--out", str(root / "together"), *on, "--fold-processes", "2"]) or alone


def _carried(data: Path, root: Path, on: list[str]) -> int:
    """Train two folds here, and by a store on nodes from which data set and cache are taken away meanwhile."""
    data = data.rename(root / "driver")
    cache, settings = root / "cache", settings_of({**TINY, "schedule.steps": 3, "training.folds": 2})
    command = ["train", str(data), "--fold", "all", "--device", "cpu", "--deterministic", *settings]
    command += ["--cache", str(cache)]
    alone = run([*command, "--out", str(root / "not-carried")])
    begin, end = CarriedFolds.begin, CarriedFolds.end

    def begin_and_hide(*args: Any) -> None:
        begin(*args)
        for folder in (data, cache):
            folder.rename(folder.with_suffix(".away"))

    def show_and_end(*args: Any) -> None:
        for folder in (data, cache):
            folder.with_suffix(".away").rename(folder)
        end(*args)

    with mock.patch.multiple(CarriedFolds, begin=begin_and_hide, end=show_and_end):
        there = run([*command, "--out", str(root / "carried"), *on, "--store", str(root / "store")])
    return alone or there


def _kill(cluster: Cluster, nodes: list[Any], folder: Path, killed: list[str]) -> None:
    """Kill the node of the first fold that has some steps behind it, all its processes at once."""
    until = time.monotonic() + 900
    while time.monotonic() < until:
        for log in folder.glob("fold_*/output.log"):
            on = re.match(r"on \S+ (\w+)", log.read_text())
            # Of a fold that is nearly done the end may come before its node's.
            steps = [int(path.stem[-8:]) for path in log.parent.glob("checkpoint_*.sha256")]
            begun = 4 < max(steps, default=0) < STEPS // 2
            node = next((node for node in nodes if on is not None and node.node_id.startswith(on[1])), None)
            if begun and node is not None:
                cluster.remove_node(node, allow_graceful=False)
                killed.append(log.parent.name)
                return
        time.sleep(0.02)


def _refusals(address: str, root: Path) -> dict[str, str]:
    refused = {}
    with connected(parse_place(f"ray:{address}")) as session:
        nodes = session.nodes
        attempts: dict[str, Callable[[], None]] = {
            "too small": lambda: session.require(Needs(1, 1), "a fold"),
            "not shared": lambda: require_seen(nodes, (root / "there.run", root / "nowhere")),
            "versions": lambda: require_same_versions(nodes),
        }
        real, calls = ray_session._probe, itertools.count()
        # The first call is for the nodes, the second for this process.
        ray_session._probe = lambda: real() if next(calls) == 0 else lambda: {**real()(), "torch": "1.0.0"}
        for name, attempt in attempts.items():
            try:
                attempt()
            except ResourceError as error:
                refused[name] = error.message
    return refused


if __name__ == "__main__":
    program, folder = sys.argv[1:]
    outcome = globals()[program](Path(folder))
    (Path(folder) / "outcome.json").write_text(json.dumps(outcome))
