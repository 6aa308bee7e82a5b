"""`sagittal predict --missing`, `--no-postprocessing` and `--fast` as a user types them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from sagittal.bundle import read_bundle, write_bundle
from sagittal.cli import run
from sagittal.plan import Plan
from sagittal.plan.postprocessing import MinimumVolume
from sagittal.testing.bundle import write_random_bundle
from sagittal.testing.plans import untrained_plan, untrained_spec
from sagittal.volumes import Volume, read_labels

SETTINGS = {
    "network.embed_dims": [4, 4, 8, 8],
    "network.num_heads": [1, 1, 2, 2],
    "network.depths": [1, 1, 1, 1],
    "network.decoder_dim": 8,
    "preprocessing.crop_to_nonzero": False,
}


def _plan(**settings: float) -> Plan:
    spec = untrained_spec(3, 2)
    return untrained_plan("segformer3d", spec, patch_size=(16, 18, 20), settings={**SETTINGS, **settings})


def _predict(*arguments: str | Path) -> int:
    return run(["predict", *map(str, arguments), "--device", "cpu", "--engine", "torch"])


@pytest.fixture
def scans(tmp_path: Path) -> Path:
    for channel in range(2):
        array = np.random.default_rng(channel).normal(size=(1, 11, 16, 14)).astype(np.float32)
        Volume(array, np.eye(4)[:, [2, 1, 0, 3]]).write(tmp_path / "in" / f"c_{channel:04d}.nii.gz")
    return tmp_path / "in"


def test_a_declared_missing_channel_is_accepted_where_training_left_channels_out(
    scans: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = {"training.augmentation.channel_dropout": 0.2}
    bundle = write_random_bundle(tmp_path / "b", _plan(**settings))
    (scans / "c_0000.nii.gz").unlink()
    assert _predict(bundle, scans, "--out", tmp_path / "out", "--missing", "channel_0") == 0
    assert (tmp_path / "out" / "c.nii.gz").is_file()
    assert _predict(bundle, scans, "--out", tmp_path / "whole") == 1
    assert "channel 0 (channel_0) is missing" in capsys.readouterr().err
    strict = write_random_bundle(tmp_path / "strict", _plan())
    assert _predict(strict, scans, "--out", tmp_path / "strictly", "--missing", "channel_0") == 1
    assert "channel_dropout" in capsys.readouterr().err and not (tmp_path / "strictly").exists()


def test_rules_can_be_left_out(scans: Path, tmp_path: Path) -> None:
    everything = tuple(MinimumVolume(label=label.name, volume_ml=1e6) for label in _plan().dataset.labels)
    bundle = write_random_bundle(tmp_path / "b", _plan().replace(postprocessing=everything))
    assert _predict(bundle, scans, "--out", tmp_path / "with") == 0
    assert _predict(bundle, scans, "--out", tmp_path / "without", "--no-postprocessing") == 0
    assert not read_labels(tmp_path / "with" / "c.nii.gz")[0].any()
    assert read_labels(tmp_path / "without" / "c.nii.gz")[0].any()


def test_fast_takes_the_second_model(scans: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan = _plan()
    low = plan.replace(configuration="3d-low", preprocessing=plan.preprocessing.replace(spacing_mm=(1.5, 2.0, 2.0)))
    main = read_bundle(write_random_bundle(tmp_path / "main", plan))
    second = read_bundle(write_random_bundle(tmp_path / "low", low))
    weights = {name: main.weights(name) for name in main.weight_names}
    both = write_bundle(tmp_path / "b", plan=plan, weights=weights, metrics={}, low=second)
    assert _predict(both, scans, "--out", tmp_path / "fast", "--fast") == 0
    told = capsys.readouterr().err
    assert "second model, which sees 1.5 x 2 x 2 mm" in told and "not measured" in told
    assert _predict(second.path, scans, "--out", tmp_path / "alone", "--no-mirror") == 0
    found, wanted = (read_labels(tmp_path / name / "c.nii.gz")[0] for name in ("fast", "alone"))
    np.testing.assert_array_equal(found, wanted)
    again = ["predict", str(both), str(scans), "--out", str(tmp_path / "several"), "--fast", "--engine", "torch"]
    # One case is shared by both devices in this process, two are dealt out to a process for each.
    for cases in ("c", "cd"):
        for path in scans.glob("c_*"):
            (scans / path.name.replace("c", cases[-1], 1)).write_bytes(path.read_bytes())
        assert run([*again, "--device", "cpu,cpu", "--overwrite"]) == 0
        for case in cases:
            np.testing.assert_array_equal(read_labels(tmp_path / "several" / f"{case}.nii.gz")[0], wanted)


def test_kernels_are_only_asked_for_where_pytorch_computes(
    scans: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("openvino")
    bundle = write_random_bundle(tmp_path / "b", _plan())
    told = ["predict", str(bundle), str(scans), "--out", str(tmp_path / "out"), "--kernels", "off"]
    assert run([*told, "--engine", "openvino"]) == 2
    assert "--engine torch" in capsys.readouterr().err
    assert run([*told, "--engine", "torch"]) == 0
