"""What is checked of a Ray cluster before work is given to it; with a cluster, `test_ray_folds`."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import ray

from sagittal.cli.stopping import STOPPED, sigterm_raises
from sagittal.cluster.places import parse_place
from sagittal.cluster.ray_session import Needs, Node, compare_versions, connected, sigterm_interrupts
from sagittal.errors import ResourceError

HERE = {"Python": "3.11.9", "ray": "2.60.0", "sagittal": "0.1.0 (sources 0123456789ab)", "torch": "2.11.0+cpu"}


@pytest.mark.parametrize(
    ("there", "says"),
    [
        ({"torch": "2.10.0+cpu"}, "torch 2.10.0"),
        ({"ray": "2.59.1"}, "ray 2.59.1"),
        ({"Python": "3.12.1"}, "Python 3.12.1"),
        ({"sagittal": "0.1.0 (sources ba9876543210)"}, "ba9876543210"),
        ({"sagittal": None}, "has no sagittal"),
    ],
)
def test_a_node_with_another_version_is_named_with_both(there: dict[str, str | None], says: str) -> None:
    with pytest.raises(ResourceError, match="node far-away") as told:
        compare_versions("far-away", here=HERE, there={**HERE, **there})
    program = next(iter(there))
    assert says in told.value.message
    assert f"this process {program} {HERE[program]}" in told.value.message


def test_builds_for_other_hardware_and_fixes_of_python_are_no_other_version() -> None:
    compare_versions("a", here=HERE, there={**HERE, "torch": "2.11.0+cu128", "Python": "3.11.2"})
    compare_versions("a", here={**HERE, "torch": None}, there={**HERE, "torch": "2.9.0"})


def test_sigterm_is_an_interrupt_where_ray_waits_and_what_the_command_makes_of_it_outside() -> None:
    """Ray makes an error of its own, and an exit code of 1, of what is no KeyboardInterrupt."""
    inside: list[BaseException] = []
    before = [(number, signal.getsignal(number)) for number in (signal.SIGTERM, signal.SIGINT)]
    # What a shell starts in the background ignores Ctrl-C.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(SystemExit) as caught, sigterm_raises(lambda: SystemExit(STOPPED)), sigterm_interrupts():
            try:
                signal.raise_signal(signal.SIGTERM)
            except BaseException as error:
                inside.append(error)
                raise
        assert caught.value.code == STOPPED and [type(error) for error in inside] == [KeyboardInterrupt]
        with pytest.raises(KeyboardInterrupt), sigterm_raises(lambda: SystemExit(STOPPED)), sigterm_interrupts():
            signal.raise_signal(signal.SIGINT)
        noted: list[int] = []
        signal.signal(signal.SIGTERM, lambda number, frame: noted.append(number))
        with sigterm_interrupts():
            signal.raise_signal(signal.SIGTERM)
        assert noted == [signal.SIGTERM]
    finally:
        for number, handler in before:
            signal.signal(number, handler)


def test_work_fits_by_its_scarcest_need() -> None:
    node = Node("id", "name", cpus=9, gpus=2)
    assert [node.fits(needs) for needs in (Needs(4), Needs(2, 1), Needs(0, 1), Needs(1, 3))] == [2, 2, 2, 0]
    assert str(Needs(4, 1)) == "4 CPUs and 1 GPU"


@pytest.mark.parametrize("scheme", ["ray:", "ray://"])
def test_a_cluster_that_does_not_answer_is_told_at_once(scheme: str) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        place = parse_place(f"{scheme}127.0.0.1:{closed.getsockname()[1]}")
        with pytest.raises(ResourceError, match="nothing answers there") as told, connected(place):
            pass
    assert told.value.code == "cluster_unreachable"


@pytest.mark.parametrize(
    "refusal",
    [ray.exceptions.AuthenticationError("no token found"), ConnectionError("Failed to connect to Ray cluster")],
)
def test_a_head_that_asks_for_a_token_is_told_of_with_where_it_lies(
    monkeypatch: pytest.MonkeyPatch, refusal: Exception
) -> None:
    """Ray itself says what lacks only in its log, and ends with a ConnectionError."""

    def refused(**settings: object) -> None:
        raise refusal

    monkeypatch.setattr(ray, "init", refused)
    with socket.create_server(("127.0.0.1", 0)) as head:
        place = parse_place(f"ray:127.0.0.1:{head.getsockname()[1]}")
        with pytest.raises(ResourceError, match=r"~/\.ray/auth_token") as told, connected(place):
            pass
    assert told.value.code == "cluster_unreachable"


def test_ray_reports_its_use_to_nobody() -> None:
    program = (
        "import os; os.environ['RAY_USAGE_STATS_ENABLED'] = '1'\n"
        "import sagittal.cluster.ray_session\n"
        "from ray._common.usage.usage_lib import usage_stats_enabled\n"
        "print(usage_stats_enabled())"
    )
    said = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert said.stdout.strip() == "False"


@pytest.mark.parametrize(
    ("held", "chosen", "mode"), [(True, None, "token"), (False, None, "None"), (True, "disabled", "disabled")]
)
def test_a_token_of_this_machine_is_shown_to_heads_that_ask(
    tmp_path: Path, held: bool, chosen: str | None, mode: str
) -> None:
    if held:
        (tmp_path / ".ray").mkdir()
        (tmp_path / ".ray" / "auth_token").write_text("0" * 64)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_AUTH")}
    environment |= {"HOME": str(tmp_path)} | ({} if chosen is None else {"RAY_AUTH_MODE": chosen})
    program = "import os, sagittal.cluster; print(os.environ.get('RAY_AUTH_MODE'))"
    said = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    assert said.stdout.strip() == mode
