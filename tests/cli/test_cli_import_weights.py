"""`sagittal import-weights` and `train --init-from` as a user types them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import sagittal
from sagittal.cli import run
from sagittal.networks import MedNeXt
from sagittal.testing.datasets import TINY_SETTINGS

FAST = [part for name, value in TINY_SETTINGS.items() for part in ("--set", f"{name}={json.dumps(value)}")]


def test_a_file_is_imported_and_trained_further(
    tiny_dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    network = MedNeXt(1, 3, channels=4, block_counts=(1,) * 9)
    torch.save({"model_state_dict": network.state_dict()}, tmp_path / "w.pth")
    command = ["import-weights", str(tmp_path / "w.pth"), "--network", "mednext-s", "--out", str(tmp_path / "a")]
    assert run([*command, "--dataset", str(tiny_dataset), *FAST]) == 0
    told = capsys.readouterr().out
    assert "1 channel, 3 outputs" in told and told.endswith(f"bundle: {tmp_path / 'a'}\n")
    assert run(["info", str(tmp_path / "a")]) == 0
    assert "not validated" in capsys.readouterr().out

    command = ["train", str(tiny_dataset), "--out", str(tmp_path / "b"), "--init-from", str(tmp_path / "a")]
    command += ["--device", "cpu", "--fold", "none", *FAST]
    assert run([*command, "--network", "mednext-s-k5", "--set", "training.initialization.freeze_encoder_steps=1"]) == 0
    told = capsys.readouterr().out
    assert "init: fold none starts from all of mednext-s" in told and "17 interpolated" in told
    assert "step 1: the encoder is trained from here on" in told
    assert sagittal.read_bundle(tmp_path / "b").plan.training.initialization is not None


def test_errors_end_with_one_and_say_what_to_do(
    tiny_dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "w.pkl").write_bytes(b"")
    assert run(["import-weights", str(tmp_path / "w.pkl"), "--network", "mednext-s", "--out", str(tmp_path / "a")]) == 1
    assert "not a weights file by its ending" in capsys.readouterr().err
    train = ["train", str(tiny_dataset), "--out", str(tmp_path / "b"), "--device", "cpu"]
    assert run([*train, "--freeze-encoder", "3"]) == 1
    assert "--init-from BUNDLE" in capsys.readouterr().err
    assert run([*train, "--init-from", str(tiny_dataset)]) == 1
    assert "manifest.json" in capsys.readouterr().err
    assert not (tmp_path / "b.run").exists()
