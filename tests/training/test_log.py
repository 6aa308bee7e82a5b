"""The JSONL log: exact numbers, and nothing twice after a resume."""

from __future__ import annotations

from pathlib import Path

from sagittal.training.log import JsonlLog, read_log


def test_a_resumed_log_drops_what_comes_after_the_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    with JsonlLog(path, keep_to_step=0) as log:
        for step in (1, 2, 3):
            log.write("step", step, loss=step / 3)
    with JsonlLog(path, keep_to_step=2) as log:
        log.write("step", 3, loss=9.0)
    assert [(record["step"], record["loss"]) for record in read_log(path)] == [(1, 1 / 3), (2, 2 / 3), (3, 9.0)]


def test_a_line_cut_by_a_kill_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    path.write_text('{"kind": "step", "step": 1, "loss": 0.5}\n{"kind": "st')
    assert [record["step"] for record in read_log(path)] == [1]
    with JsonlLog(path, keep_to_step=5) as log:
        log.write("step", 2, loss=0.25)
    assert [record["step"] for record in read_log(path)] == [1, 2]


def test_no_log_is_an_empty_log(tmp_path: Path) -> None:
    assert read_log(tmp_path / "log.jsonl") == []
