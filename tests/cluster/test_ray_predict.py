"""A cohort on a Ray cluster of three nodes, one lost and one added in the middle: what one machine makes of it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("ray", reason="no Ray: pip install 'sagittal[ray]'")
pytest.importorskip("openvino", reason="OpenVINO starts faster than PyTorch, and these tests start many workers")
PROGRAM = Path(__file__).with_name("cohort_on_ray.py")
POISON, DAMAGED = "c05", "c20"

pytestmark = [pytest.mark.slow, pytest.mark.kill, pytest.mark.timeout(1800)]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What each part of the program found."""
    work = tmp_path_factory.mktemp("cohort")
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    ran = subprocess.run([sys.executable, str(PROGRAM), str(work)], env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr[-4000:]
    result: dict[str, Any] = json.loads((work / "found.json").read_text())
    return result


def test_each_case_is_told_once_though_nodes_go_and_come(found: dict[str, Any]) -> None:
    told = found["nodes_lost_and_added"]["told"]
    assert sorted(told) == [f"c{number:02d}" for number in range(30)]
    said = "\n".join(found["nodes_lost_and_added"]["said"])
    assert "is gone; what its workers held goes to others" in said and "joined" in said


def test_outputs_are_those_of_one_machine_byte_for_byte(found: dict[str, Any]) -> None:
    assert found["nodes_lost_and_added"]["sums"] == found["alone"], "after the second run, which the poison survived"
    assert found["nodes_lost_and_added"]["parts"] == []


def test_a_scan_that_ends_its_workers_is_named_and_harms_no_other(found: dict[str, Any]) -> None:
    failed = found["nodes_lost_and_added"]["failed"]
    assert set(failed) == {POISON, DAMAGED}
    assert failed[POISON][0] == "poison" and "workers, on" in failed[POISON][1]
    assert failed[DAMAGED][0] == "unreadable"
    begun = found["nodes_lost_and_added"]["begun"]
    assert 2 <= begun[POISON] <= 3, "twice, and once more where the first node was lost"
    assert sum(begun.values()) <= 30 + 2 + 4 * 2, "only what lost workers held was begun again"


def test_the_same_command_goes_on_with_what_failed_alone(found: dict[str, Any]) -> None:
    assert sorted(found["nodes_lost_and_added"]["again"]) == sorted([POISON, DAMAGED])


def test_nodes_that_share_only_an_object_store_give_the_same(found: dict[str, Any]) -> None:
    part = found["by_store"]
    assert sorted(part["told"]) == ["c00", "c01", "c02", "c03"] and part["failed"] == []
    assert part["sums"] == {f"{case}.nii.gz": found["alone"][f"{case}.nii.gz"] for case in sorted(part["told"])}
    assert part["again"] == [], "the report knows the scans by this machine's paths"
    assert part["left_in_store"] == 0


def test_what_a_node_does_not_see_or_have_is_told_with_its_name(found: dict[str, Any]) -> None:
    refused = found["refused"]
    assert refused["bundle"][0] == "not_shared" and "this node does not see the bundle" in refused["bundle"][1]
    assert "--store" in refused["bundle"][1] and refused["bundle"][1].startswith("node ")
    assert refused["size"][0] == refused["gpu"][0] == "cluster_too_small"
    assert "64 CPUs" in refused["size"][1] and "1 GPU" in refused["gpu"][1]


def test_a_node_whose_workers_end_while_they_load_is_named(found: dict[str, Any]) -> None:
    code, message = found["refused"]["start"]
    assert code == "worker_start" and message.startswith("node ") and "end while they load" in message


def test_no_more_is_held_than_workers_can_begin(found: dict[str, Any]) -> None:
    """Three workers at a time and one that was lost, with three items each, whatever the number of scans."""
    assert found["nodes_lost_and_added"]["most_held"] <= 4 * 3


def test_the_command_line_predicts_and_scores_there(found: dict[str, Any]) -> None:
    part = found["command_line"]
    assert part["codes"] == [0, 0]
    assert part["sums"] == found["by_store"]["sums"]
    assert part["report"]["status"] == "finished" and len(part["report"]["cases"]) == 4
    assert all(case["device"] == "cpu (openvino)" for case in part["report"]["cases"])
    assert part["out"].count(": done in") == 4 and "ray: joined, 3 nodes with 3 CPUs" in part["err"]
    assert part["scores"] == part["scores_here"] and part["scores"]["summary"]["cases"] == 4
