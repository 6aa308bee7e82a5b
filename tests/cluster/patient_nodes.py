"""Nodes of a Ray cluster on this machine that may take their time to come up, while the loss of one is noticed soon.

Ray gives a node up after 30 s, which are too few beside the other tests on a busy machine: it joins all the same
afterwards, and then there is one too many. And a node waits 15 s for its agents to say at which ports they are, and
ends where they are slower, unless it was told the ports.
"""

from __future__ import annotations

import os
import socket
import sys
import time
from collections.abc import Callable
from typing import Any

STARTS_S = 150.0
TRIES = 3
SYSTEM = {
    "health_check_period_ms": 500,
    "health_check_timeout_ms": 20_000,
    "health_check_failure_threshold": 3,
    "agent_register_timeout_ms": int(STARTS_S * 1000),
}
"""For the head. A node that was killed refuses the checks at once, so its loss is noticed within two seconds, not
fifteen; one that is slow, or stands still for a while, is not lost."""


AGENTS = ("metrics_agent_port", "metrics_export_port", "dashboard_agent_listen_port", "runtime_env_agent_port")
_held: list[socket.socket] = []
"""Kept from other programs until this one ends; agents may listen there, as both sides allow it."""


def agent_ports() -> dict[str, int]:
    """Return settings of a node: the ports of its agents."""
    ports = {}
    for name in AGENTS:
        one = socket.socket()
        one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        one.bind(("", 0))
        _held.append(one)
        ports[name] = one.getsockname()[1]
    return ports


def patiently(start: Callable[[], Any]) -> Any:
    """Start something of Ray's, and wait for its node as long as it lives; of one that ended nothing stays."""
    for _ in range(TRIES - 1):
        try:
            return _waited_for(start)
        except Exception as error:  # Ray raises plain ones here
            sys.stderr.write(f"a node did not come up: {error}\n")
    return _waited_for(start)


def _waited_for(start: Callable[[], Any]) -> Any:
    # Not before the program that wants it has said what Ray may report.
    from ray._private import services
    from ray._private.node import Node

    os.environ["RAY_gcs_server_port_wait_time_s"] = str(int(STARTS_S))  # noqa: SIM112 - Ray spells it so
    ask, begin, begun = services.get_node, Node.start_ray_processes, list[Any]()

    def begin_and_note(node: Any) -> None:
        begun.append(node)
        begin(node)

    def wait(address: str, node_id: str) -> Any:
        end = time.monotonic() + STARTS_S
        while True:
            try:
                return ask(address, node_id)
            except RuntimeError:
                if "raylet" in dict(begun[-1].dead_processes()):
                    raise OSError("it ended") from None
                if time.monotonic() > end:
                    raise
                time.sleep(0.1)

    services.get_node, Node.start_ray_processes = wait, begin_and_note
    try:
        return start()
    except Exception:
        for node in begun:
            node.kill_all_processes(check_alive=False, allow_graceful=False)
        raise
    finally:
        services.get_node, Node.start_ray_processes = ask, begin
