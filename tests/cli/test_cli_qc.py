from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from sagittal.cli import run
from sagittal.plan import DatasetSpec, Label
from sagittal.plan.volume_range import VolumeRange
from sagittal.testing.bundle import write_random_bundle
from sagittal.testing.plans import untrained_plan
from sagittal.volumes import Volume


def spec(*names: str) -> DatasetSpec:
    labels = tuple(Label(name=name, values=(value,)) for value, name in enumerate(names, start=1))
    return DatasetSpec(name="bodies", channel_names=("CT",), labels=labels, file_ending=".nii.gz")


@pytest.fixture
def predictions(tmp_path: Path) -> Path:
    out = tmp_path / "predicted"
    out.mkdir()
    for number in range(3):
        array = np.zeros((10, 11, 12), np.uint8)
        array[2:6, 3:7, 4:8] = 1
        array[7, 3:7, 4 : 8 if number else 4] = 2
        Volume(array[None], np.diag([2.0, 1.0, 1.0, 1.0])).write(out / f"case_{number}.nii.gz")
    (out / "dataset.json").write_text(json.dumps({"labels": {"background": 0, "liver": 1, "spleen": 2}}))
    return out


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    plan = untrained_plan("segformer3d", spec("liver", "spleen"), settings={"patch.size": [32, 32, 32]})
    volumes = tuple(VolumeRange.of([centre * (0.9 + 0.05 * step) for step in range(5)]) for centre in (0.128, 0.032))
    return write_random_bundle(tmp_path / "bundle", plan.replace(label_volumes=volumes))


def test_flags_are_told_and_exit_with_0(predictions: Path, bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["qc", str(predictions), "--bundle", str(bundle)]) == 0
    told = capsys.readouterr().out
    assert "3 cases, 1 flagged; compared with 5 training cases of bodies" in told
    assert "look at case_0 (suspicion 4.0)\n  spleen is absent; all 5 training cases have it." in told
    assert (predictions / "qc" / "qc.html").is_file()
    # The results lie in a folder of their own: a second run takes them for no label maps.
    assert run(["qc", str(predictions), "--bundle", str(bundle)]) == 0


def test_a_file_that_cannot_be_read_is_told_and_exits_with_1(predictions: Path, capsys, tmp_path: Path) -> None:
    (predictions / "case_1.nii.gz").write_bytes(b"no scan")
    assert run(["qc", str(predictions), "--out", str(tmp_path / "out"), "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert [failure["case"] for failure in found["failures"]] == ["case_1"]
    assert len(found["cases"]) == 2 and (tmp_path / "out" / "qc.csv").is_file()


def test_a_bundle_of_other_classes_is_refused(predictions: Path, tmp_path: Path, capsys) -> None:
    plan = untrained_plan("segformer3d", spec("heart"), settings={"patch.size": [32, 32, 32]})
    other = write_random_bundle(tmp_path / "other", plan)
    assert run(["qc", str(predictions), "--bundle", str(other)]) == 1
    assert "have no name in common" in capsys.readouterr().err


def test_a_bundle_that_knows_no_volumes_is_told(predictions: Path, tmp_path: Path, capsys) -> None:
    plan = untrained_plan("segformer3d", spec("liver", "spleen"), settings={"patch.size": [32, 32, 32]})
    assert run(["qc", str(predictions), "--bundle", str(write_random_bundle(tmp_path / "old", plan))]) == 0
    assert "does not say how large its classes were in training" in capsys.readouterr().out
