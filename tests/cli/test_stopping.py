"""Training stopped from outside, in a process of its own: kill -9, Ctrl-C, SIGTERM."""

from __future__ import annotations

import json
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import held_training
import sagittal
from sagittal import cli
from sagittal.testing.datasets import TINY_SETTINGS
from sagittal.training import run
from sagittal.training.log import read_log

STEPS = 12
SETTINGS = [part for name, value in TINY_SETTINGS.items() for part in ("--set", f"{name}={json.dumps(value)}")]


def _command(dataset: Path, out: Path, *more: str) -> list[str]:
    settings = [*SETTINGS, "--set", f"schedule.steps={STEPS}"]
    settings = [
        part
        for pair in zip(settings[::2], settings[1::2], strict=True)
        if pair[1] != "schedule.steps=3"
        for part in pair
    ]
    command = [sys.executable, "-m", "sagittal", "train", str(dataset), "--out", str(out), "--fold", "none"]
    return [*command, "--device", "cpu", "--checkpoint-every", "0.001s", *settings, *more]


def _held(step: int, command: list[str]) -> list[str]:
    """Return a command whose training waits from a step on for what ends it, however late that comes."""
    return [sys.executable, held_training.__file__, str(step), *command[3:]]


def _log(out: Path) -> Path:
    return out.with_name(out.name + ".run") / "fold_none" / "log.jsonl"


def _stop_after(steps: int, process: subprocess.Popen[str], out: Path, number: signal.Signals) -> None:
    """Send a signal as soon as the log holds `steps` steps."""
    while process.poll() is None and sum(record["kind"] == "step" for record in read_log(_log(out))) < steps:
        time.sleep(0.005)
    process.send_signal(number)


def _losses(out: Path) -> list[float]:
    return [record["loss"] for record in read_log(_log(out)) if record["kind"] == "step"]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 75)])
def test_a_stop_before_the_first_step_is_told_and_leaves_nothing_half_written(
    tiny_dataset: Path, tmp_path: Path, number: signal.Signals, code: int
) -> None:
    command = _held(0, _command(tiny_dataset, tmp_path / "out"))
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stderr is not None
        assert process.stdout.readline().startswith("check:")
        process.send_signal(number)
        told = process.stderr.read()
    assert process.returncode == code, told
    assert "begin again with: sagittal train" in told and "Traceback" not in told
    assert not (tmp_path / "out").exists()


def test_a_stop_while_torch_is_being_imported_is_a_stop_before_anything_was_begun(tmp_path: Path) -> None:
    stopped_by_import = """
import os, signal, sys, sagittal.cli
class Stop:
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            os.kill(os.getpid(), signal.SIGTERM)
sys.meta_path.insert(0, Stop())
sagittal.cli.main()
"""
    command = [sys.executable, "-c", stopped_by_import, "train", "absent", "--out", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 75, done.stderr
    assert done.stderr.startswith("stopped; nothing was begun; begin again with: sagittal train absent --out ")
    assert not list(tmp_path.iterdir())


def test_a_second_ctrl_c_in_training_tells_of_resume(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def at_once(dataset: Path, out: Path, **wishes: object) -> None:
        if with_checkpoint:
            fold = out.with_name(f"{out.name}.run") / "fold_0"
            fold.mkdir(parents=True)
            (fold / "checkpoint_00000100.safetensors").touch()
        raise KeyboardInterrupt

    monkeypatch.setattr(run, "train", at_once)
    command = ["train", "absent", "--out", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", ["sagittal", *command])
    with_checkpoint = False
    assert cli.run(command) == 130
    assert f"begin again with: sagittal {shlex.join(command)}\n" in capsys.readouterr().err
    with_checkpoint = True
    assert cli.run(command) == 130
    assert f"go on with: sagittal {shlex.join(command)} --resume\n" in capsys.readouterr().err


@pytest.mark.kill
def test_killed_runs_resume_to_the_losses_and_weights_of_an_undisturbed_one(tiny_dataset: Path, tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    subprocess.run(_command(tiny_dataset, whole), check=True, capture_output=True)
    for attempt, steps in enumerate((3, 7, 9)):
        more = ("--resume",) if attempt else ()
        command = _held(steps + 2, _command(tiny_dataset, killed, *more))
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            _stop_after(steps, process, killed, signal.SIGKILL)
        assert process.returncode == -signal.SIGKILL
        assert not killed.exists()
    subprocess.run(_command(tiny_dataset, killed, "--resume"), check=True, capture_output=True)
    assert _losses(killed) == _losses(whole)
    assert len(_losses(whole)) == STEPS
    first, second = sagittal.read_bundle(whole).weights("all"), sagittal.read_bundle(killed).weights("all")
    assert all(np.array_equal(first[name], second[name]) for name in first)


@pytest.mark.kill
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 75)])
def test_a_stopped_run_ends_cleanly_and_says_how_to_go_on(
    tiny_dataset: Path, tmp_path: Path, number: signal.Signals, code: int
) -> None:
    out = tmp_path / "out"
    command = _held(5, _command(tiny_dataset, out))
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        _stop_after(2, process, out, number)
        said = process.communicate()[0]
    assert process.returncode == code, said
    assert "--resume" in said.splitlines()[-1]
    assert sagittal.read_bundle(out).metrics["folds"]["none"]["ended"] in ("interrupted", "terminated")
    scan = tiny_dataset / "imagesTs" / "case_test_0000.nii.gz"
    subprocess.run([sys.executable, "-m", "sagittal", "predict", out, scan, "--out", tmp_path / "labels"], check=True)
