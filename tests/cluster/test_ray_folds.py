"""Folds on three nodes, one of which is killed in the middle: the same weights as one machine's, and no fold lost."""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from rich.console import Console

import sagittal
from sagittal.cluster.board import Board, Said, obeying
from sagittal.cluster.fold_table import FoldTable
from sagittal.cluster.folds import needs_of_a_fold
from sagittal.cluster.ray_session import Needs, Node
from sagittal.training.log import read_log
from sagittal.training.signals import StopFlag

PROGRAMS = Path(__file__).parent / "ray_programs.py"


def outcome_of(program: str, folder: Path) -> tuple[dict[str, Any], str]:
    """Run one of the programs, with one thread as each fold has; return what it says of itself and what it printed."""
    command = [sys.executable, str(PROGRAMS), program, str(folder)]
    one_thread = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=1700, check=False, env=one_thread)
    said = done.stdout + done.stderr
    assert done.returncode == 0, said
    outcome: dict[str, Any] = json.loads((folder / "outcome.json").read_text())
    return outcome, said


@pytest.mark.slow
@pytest.mark.kill
@pytest.mark.timeout(1800)
def test_five_folds_outlive_a_killed_node_and_are_those_of_one_machine(tmp_path: Path) -> None:
    outcome, said = outcome_of("folds", tmp_path)
    assert outcome["codes"] == [0, 0, 0, 0, 0], said
    (killed,) = outcome["killed"]
    assert f"{killed.replace('_', ' ')}: its node was lost; it goes on elsewhere from its last checkpoint" in said
    assert "raylet" not in said  # Ray's own words at the loss of a node, which it would print among ours
    log = (tmp_path / "there.run" / killed / "output.log").read_text()
    assert log.count("on ") >= 2 and "goes on after step" in log
    assert len({line for line in log.splitlines() if line.startswith("on ")}) == 2
    here, there = (sagittal.read_bundle(tmp_path / name) for name in ("here", "there"))
    assert there.weight_names == tuple(f"fold_{fold}" for fold in range(5))
    assert there.metrics["missing_folds"] == [] and "failed_folds" not in there.metrics
    assert there.metrics["out_of_fold"] == here.metrics["out_of_fold"]
    for fold in range(5):
        one, other = (tmp_path / name / "weights" / f"fold_{fold}.safetensors" for name in ("here", "there"))
        assert one.read_bytes() == other.read_bytes()
    refused = outcome["refused"]
    assert "a fold needs 1 CPU and 1 GPU on one node" in refused["too small"]
    assert "has 1 CPU;" in refused["too small"]
    assert "nowhere" in refused["not shared"] and "file system that all machines share" in refused["not shared"]
    assert "this process torch 1.0.0" in refused["versions"] and "start Ray there again" in refused["versions"]
    _require_a_sweep(tmp_path / "sweep", said)
    _require_equal_up_to_rounding(tmp_path)
    _require_carried(tmp_path, said)


def _require_a_sweep(out: Path, said: str) -> None:
    standing = json.loads((out / "sweep.json").read_text())
    finished = [name for name, scores in standing["scores"].items() if len(scores) == 2]
    assert set(standing["scores"]) == {"mednext-s", "mednext-b"} and standing["failed"] == {}
    assert set(finished) | set(standing["stopped"]) == {"mednext-s", "mednext-b"}
    best = max(finished, key=lambda name: standing["scores"][name][-1])
    winner = sagittal.read_bundle(out / "winner")
    assert winner.plan.network_name == best and winner.weight_names == ("fold_0", "fold_1")
    compared = out / ("compared" if len(finished) == 2 else "compared-first-folds")
    assert (compared / "comparison.html").is_file() and "View detailed results" not in said
    assert not list(out.glob(".tune-*"))


def _require_carried(root: Path, said: str) -> None:
    here, there = (sagittal.read_bundle(root / name) for name in ("not-carried", "carried"))
    assert there.weight_names == ("fold_0", "fold_1") and there.metrics["out_of_fold"] == here.metrics["out_of_fold"]
    for fold in range(2):
        one, other = (bundle.path / "weights" / f"fold_{fold}.safetensors" for bundle in (here, there))
        assert one.read_bytes() == other.read_bytes()
        log = (root / "carried.run" / f"fold_{fold}" / "output.log").read_text()
        assert log.startswith("on ") and str(root / "carried.run" / f"fold_{fold}" / "report") in log
    assert "parts of the data from the store" in said
    assert not list((root / "store").iterdir())
    assert not list(Path(tempfile.gettempdir()).glob(f"sagittal-{_name_in_store(said)}-*")), "nodes kept their copies"


def _name_in_store(said: str) -> str:
    (name,) = set(re.findall(r"train-[0-9a-f]{32}", said))
    return name


def _require_equal_up_to_rounding(root: Path) -> None:
    alone, together = (sagittal.read_bundle(root / name) for name in ("alone", "together"))
    assert alone.metrics["folds"]["none"]["made_with"]["processes"] == 1
    assert together.metrics["folds"]["none"]["made_with"]["processes"] == 2
    logs = [read_log(root / f"{name}.run" / "fold_none" / "log.jsonl") for name in ("alone", "together")]
    wanted, found = ([record["loss"] for record in log if record["kind"] == "step"] for log in logs)
    assert len(wanted) == 3
    np.testing.assert_allclose(found, wanted, rtol=1e-5)


def test_the_board_hears_the_newest_attempt_and_stops_the_others() -> None:
    board = Board()
    board.begin("0", 0)
    board.say("0", 0, "a", "first")
    board.begin("0", 1)
    board.say("0", 0, "a", "from a node that was cut off")
    assert board.take() == [Said("0", "a", "first")] and board.take() == []
    assert board.verdict("0", 0) == "terminated" and board.verdict("0", 1) is None
    board.stop("interrupted")
    assert board.verdict("0", 1) == "interrupted"


def test_a_signal_that_comes_while_the_board_is_asked_is_not_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    stop, asked = StopFlag(), threading.Event()

    def verdict(name: str, attempt: int) -> None:
        stop.reason = "terminated"
        asked.set()

    monkeypatch.setattr("sagittal.cluster.board.ray.get", lambda answer, timeout: answer)
    with obeying(SimpleNamespace(verdict=SimpleNamespace(remote=verdict)), "0", 0, stop):
        assert asked.wait(60)
    assert stop.reason == "terminated"


def test_a_fold_takes_a_gpu_where_there_are_some_and_its_share_of_the_node() -> None:
    plain, small = Node("a", "a", cpus=8, gpus=0), Node("b", "b", cpus=3, gpus=0)
    head, quick = Node("c", "c", cpus=0, gpus=0), Node("d", "d", cpus=16, gpus=4)
    assert needs_of_a_fold([plain, small, head], cpus=None, gpus=None) == Needs(3, 0)
    assert needs_of_a_fold([plain, quick], cpus=None, gpus=None) == Needs(4, 1)
    assert needs_of_a_fold([plain, quick], cpus=2, gpus=0) == Needs(2, 0)
    assert needs_of_a_fold([head], cpus=None, gpus=None) == Needs(1, 0)


def test_folds_stand_in_one_table_on_a_terminal_and_in_lines_elsewhere() -> None:
    lines: list[str] = []
    plain = FoldTable(lines.append, console=Console(file=io.StringIO()))
    screen = io.StringIO()
    shown = FoldTable(lines.append, console=Console(file=screen, force_terminal=True, width=80, _environ={}))
    for table in (plain, shown):
        with table.shown():
            table.take(Said("1", "node b", "step 3/60"))
            table.take(Said("0", "node a", "step 1/60"))
            table.take(Said("1", "node b", "  step 4/60"))
    assert lines == ["fold 1 | step 3/60", "fold 0 | step 1/60", "fold 1 |   step 4/60"]
    page = Console(file=io.StringIO(), width=80)
    page.print(shown.table())
    assert isinstance(page.file, io.StringIO)
    rows = [line.split() for line in page.file.getvalue().splitlines()]
    assert rows[1:] == [["0", "node", "a", "step", "1/60"], ["1", "node", "b", "step", "4/60"]]
    assert "step 4/60" in screen.getvalue()
