"""What a machine without PyTorch can do: its packages are hidden, and the commands run as a user types them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sagittal.bundle import read_bundle
from sagittal.inference.engines.choice import load_engine
from sagittal.inference.predictor import Predictor
from sagittal.testing.bundle import write_untrained_bundle
from sagittal.testing.datasets import TINY_SETTINGS, write_tiny_dataset
from sagittal.volumes import read_volume

pytest.importorskip("openvino", reason="prediction without PyTorch needs OpenVINO")
TINY = {
    "mednext-s": {name: value for name, value in TINY_SETTINGS.items() if name.startswith(("network.", "patch."))},
    "segformer3d": {"patch.size": [32, 32, 32]},
}
HIDDEN = ("torch", "triton", "onnx", "onnxscript", "onnxruntime", "monai")
# Runs each command as `sagittal` does and prints, last of all, the exit codes and what was loaded all the same.
RUNNER = f"""
import json, sys

class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {HIDDEN}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Hidden())
from sagittal.cli import run
codes = [run(command) for command in json.loads(sys.argv[1])]
print()
print(json.dumps([codes, [name for name in {HIDDEN} if name in sys.modules]]))
"""


def run_hidden(*commands: list[Any]) -> tuple[list[int], str, str]:
    """Return the exit codes of commands that ran where the packages are hidden, and what they told."""
    texts = json.dumps([[str(part) for part in command] for command in commands])
    done = subprocess.run([sys.executable, "-c", RUNNER, texts], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    codes, loaded = json.loads(done.stdout.splitlines()[-1])
    assert loaded == []
    return codes, done.stdout, done.stderr


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_dataset(tmp_path_factory.mktemp("data") / "tiny", cases=2)


@pytest.mark.parametrize("network", ["mednext-s", "segformer3d"])
def test_a_scan_is_predicted_described_and_scored(network: str, dataset: Path, tmp_path: Path) -> None:
    bundle = write_untrained_bundle(tmp_path / "bundle", network, 3, settings=TINY[network])
    scan, out = dataset / "imagesTr" / "case_0_0000.nii.gz", tmp_path / "labels"
    codes, shown, told = run_hidden(
        ["predict", bundle, scan, "--out", out],
        ["info", bundle],
        ["evaluate", out / "case_0.nii.gz", dataset / "labelsTr" / "case_0.nii.gz", "--out", tmp_path / "report"],
    )
    assert codes == [0, 0, 0], shown + told
    assert "openvino" in told and network in shown
    assert (tmp_path / "report" / "report.html").stat().st_size > 0
    labels = read_volume(out / "case_0.nii.gz").array
    engine = load_engine(read_bundle(bundle), "cpu", "torch")
    with_torch = Predictor(engine=engine, plan=read_bundle(bundle).plan).predict(scan).array
    assert labels.shape == with_torch.shape
    assert np.mean(labels == with_torch) > 0.999


def test_help_and_messages_for_what_needs_torch(dataset: Path, tmp_path: Path) -> None:
    bundle = write_untrained_bundle(tmp_path / "bundle", "segformer3d", 3, settings=TINY["segformer3d"])
    scan = dataset / "imagesTr" / "case_0_0000.nii.gz"
    codes, shown, told = run_hidden(
        ["--help"],
        ["train", dataset, "--out", tmp_path / "trained"],
        ["train", dataset, "--out", tmp_path / "trained", "--json"],
        ["predict", bundle, scan, "--out", tmp_path / "labels", "--engine", "torch"],
    )
    assert codes[0] == 0 and 0 not in codes[1:]
    assert "predict" in shown and "offline" in shown
    assert "training needs PyTorch, which is not installed: pip install 'sagittal[torch]'." in told
    assert told.count("Traceback") == 0
    assert "sagittal[torch]" in told.splitlines()[-1]
    assert not (tmp_path / "trained").exists() and not list(tmp_path.glob("labels/*.nii.gz"))
