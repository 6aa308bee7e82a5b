"""What a run folder tells, of runs in every state."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from sagittal.errors import DataError
from sagittal.testing.plans import untrained_plan, untrained_spec
from sagittal.training.run_folder import SILENT_S, FoldStanding, alone_with_bundle, is_run_folder, read_run

COMMAND = ["/usr/bin/sagittal", "train", "my data", "--resume", "--out", "b"]


def a_run(folder: Path, *attempts: Mapping[str, Any], logs: Mapping[str, list[dict[str, Any]]] | None = None) -> Path:
    folder.mkdir()
    plan = untrained_plan("segformer3d", untrained_spec(3), patch_size=(32, 32, 32), settings={"schedule.steps": 300})
    plan.write(folder / "plan.json")
    (folder / "run.json").write_text(json.dumps({"content_sha256": "0", "attempts": attempts}))
    for name, records in (logs or {}).items():
        (folder / f"fold_{name}").mkdir()
        lines = "".join(json.dumps(record) + "\n" for record in records)
        (folder / f"fold_{name}" / "log.jsonl").write_text(lines)
    return folder


def attempt(outcome: str | None, **more: Any) -> dict[str, Any]:
    return {"ended": None if outcome is None else "2026-01-01", "outcome": outcome, "command": COMMAND, **more}


def step(number: int) -> dict[str, Any]:
    return {"kind": "step", "step": number}


def test_folds_tell_their_steps_and_their_last_dice(tmp_path: Path) -> None:
    logs = {
        "0": [step(1), {"kind": "validation", "step": 1, "mean_dice": 0.5}, {"kind": "alarm", "step": 1}, step(2)],
        "1": [step(4), {"kind": "shortening", "step": 4, "end": 7}, {"kind": "shortening", "step": 4, "end": 6}],
    }
    run = read_run(a_run(tmp_path / "b.run", attempt("terminated"), logs=logs))
    assert run.folds == (FoldStanding("0", 2, 300, 0.5, 1), FoldStanding("1", 4, 6, None, None))


@pytest.mark.parametrize(
    ("outcome", "state", "resumable"),
    [
        ("finished", "finished", False),
        ("shortened", "finished, shortened by the clock", False),
        ("stale", "stopped early: no better validation", False),
        ("terminated", "terminated", True),
        ("interrupted", "interrupted", True),
        ("ResourceError", "failed (ResourceError)", True),
    ],
)
def test_the_last_attempt_tells_how_it_ended(tmp_path: Path, outcome: str, state: str, resumable: bool) -> None:
    run = read_run(a_run(tmp_path / "b.run", attempt("KeyError"), attempt(outcome)))
    assert (run.state, run.resumable) == (state, resumable)
    assert run.command == "sagittal train 'my data' --out b --resume"


def test_a_run_without_an_end_goes_on_or_was_killed(tmp_path: Path) -> None:
    folder = a_run(tmp_path / "b.run", attempt(None, processes=2), logs={"none": [step(1)]})
    assert read_run(folder).state.startswith("running, or killed a moment ago")
    assert read_run(folder).command.startswith("torchrun (as before, 2 processes) -m sagittal train 'my data'")
    long_ago = (folder / "run.json").stat().st_mtime - SILENT_S - 60
    os.utime(folder / "run.json", (long_ago, long_ago))
    assert read_run(folder).state.startswith("running")
    os.utime(folder / "fold_none" / "log.jsonl", (long_ago, long_ago))
    assert read_run(folder).state == "killed, or stuck: not heard of for 11 min" and read_run(folder).resumable


def test_a_run_that_was_stopped_before_training_or_begun_from_python(tmp_path: Path) -> None:
    folder = a_run(tmp_path / "b.run")
    (folder / "plan.json").unlink()
    run = read_run(folder)
    assert (run.plan, run.folds, run.resumable) == (None, (), False) and run.state.startswith("prepared")
    assert read_run(a_run(tmp_path / "c.run", attempt(None, command=["script.py"]))).command == ""


@pytest.mark.parametrize("text", ["{", "[]", "{}"])
def test_a_damaged_run_json_is_named(tmp_path: Path, text: str) -> None:
    assert not is_run_folder(tmp_path)
    (tmp_path / "run.json").write_text(text)
    assert is_run_folder(tmp_path)
    with pytest.raises(DataError, match=r"run.json: can't be read"):
        read_run(tmp_path)


def test_processes_that_change_a_bundle_wait_for_each_other(tmp_path: Path) -> None:
    held, order = threading.Event(), list[str]()

    def first() -> None:
        with alone_with_bundle(tmp_path / "b.run"):
            held.set()
            time.sleep(0.3)
            order.append("first")

    other = threading.Thread(target=first)
    other.start()
    assert held.wait(60)
    with alone_with_bundle(tmp_path / "b.run"):
        order.append("second")
    other.join()
    assert order == ["first", "second"]


def test_where_nothing_can_be_written_nothing_is_waited_for(tmp_path: Path) -> None:
    (tmp_path / "b.run").write_text("a file")
    with alone_with_bundle(tmp_path / "b.run"):
        pass
