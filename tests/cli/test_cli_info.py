"""`sagittal info`: what it shows of names."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sagittal.cli import run
from sagittal.testing.datasets import write_tiny_dataset


def test_names_are_shown_whole_brackets_and_all(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    dataset = write_tiny_dataset(tmp_path / "set [post]", cases=2)
    declared = json.loads((dataset / "dataset.json").read_text())
    name = "[/core]_of_the_bright_part_and_of_nothing_else_in_the_whole_scan"
    declared |= {"labels": {"background": 0, name: 1, "dark [left]": 2}, "channel_names": {"0": "T1 [post]"}}
    (dataset / "dataset.json").write_text(json.dumps(declared))
    assert run(["info", str(dataset)]) == 0
    shown = capsys.readouterr().out
    told = "".join(line.split("│")[2].strip() for line in shown.splitlines() if line.startswith("│"))
    assert all(part in told for part in (f"{name}: 1", "dark [left]: 2", "T1 [post]", "set [post]"))
