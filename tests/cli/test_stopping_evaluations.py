"""Evaluations that are told how far they are, and that end by SIGTERM without a trace."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from sagittal.cli.progress import CountLines
from sagittal.cli.stopping import TERMINATED, ended_by_sigterm
from sagittal.volumes import Volume

CASES = 60
"""So many that they are not through before the signal comes; they are one file, and few of them are read."""


def test_lines_come_now_and_then_with_the_method_that_they_are_of(capsys: pytest.CaptureFixture[str]) -> None:
    lines = CountLines("scored", every_s=0.0)
    lines(3, 10)
    lines(4, 10, "ours")
    CountLines("scored")(5, 10)
    told = capsys.readouterr()
    assert told.out == "" and told.err == "3 of 10 cases scored; 0:00:00\nours: 4 of 10 cases scored; 0:00:00\n"


def test_a_verb_ends_with_143_and_says_that_nothing_can_be_gone_on_from(capsys: pytest.CaptureFixture[str]) -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as caught, ended_by_sigterm():
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(5)
    assert caught.value.code == TERMINATED == 143
    assert "nothing is kept to go on from; begin again with: sagittal" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGTERM) == before


@pytest.mark.parametrize("verb", ["evaluate", "compare"])
def test_sigterm_leaves_no_file_half_written(tmp_path: Path, verb: str) -> None:
    array = np.zeros((60, 200, 210), np.uint8)
    array[10:50, 20:180, 20:180] = np.random.default_rng(0).integers(1, 5, (40, 160, 160))
    for folder in ("set", "A", "B"):
        (tmp_path / folder).mkdir()
        Volume(array[None], np.diag([1.0, 1.0, 2.0, 1.0])).write(tmp_path / folder / "case_0.nii.gz")
        for number in range(1, CASES):
            os.link(tmp_path / folder / "case_0.nii.gz", tmp_path / folder / f"case_{number}.nii.gz")
    arguments = {"evaluate": ["A", "set"], "compare": ["A", "B", "--reference", "set"]}[verb]
    command = [sys.executable, "-m", "sagittal", verb, *arguments, "--out", "out", "--workers", "1"]
    with subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True) as process:
        # The folder is made when the arguments have been checked, right before the first case.
        while process.poll() is None and not (tmp_path / "out").is_dir():
            time.sleep(0.01)
        process.send_signal(signal.SIGTERM)
        assert process.stderr is not None
        told = process.stderr.read()
    assert process.returncode == TERMINATED, told
    assert "begin again with: sagittal" in told and "Traceback" not in told
    assert list((tmp_path / "out").iterdir()) == []
