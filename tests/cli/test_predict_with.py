"""`sagittal predict A SCANS --with B`: several bundles averaged, as a user types it."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import sagittal
from sagittal.bundle import pack, read_bundle, write_bundle
from sagittal.cli import run
from sagittal.inference import averaging
from sagittal.inference.run_report import FolderResult
from sagittal.testing.bundle import write_random_bundle
from sagittal.testing.plans import untrained_plan, untrained_spec
from sagittal.volumes import Volume, read_labels

SETTINGS = {
    "network.embed_dims": [4, 4, 8, 8],
    "network.num_heads": [1, 1, 2, 2],
    "network.depths": [1, 1, 1, 1],
    "network.decoder_dim": 8,
    "preprocessing.crop_to_nonzero": False,
    "inference.mirror_axes": [],
}
Make = Callable[..., Path]


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Make:
    folder = tmp_path_factory.mktemp("bundles")

    def bundle(name: str, classes: int = 3, **settings: Any) -> Path:
        spec = untrained_spec(classes)
        plan = untrained_plan("segformer3d", spec, patch_size=(12, 16, 16), settings={**SETTINGS, **settings})
        return write_random_bundle(folder / name, plan)

    bundle("first")
    bundle("coarse", **{"preprocessing.spacing_mm": [1.5, 2.0, 1.0]})
    bundle("turned", **{"preprocessing.transpose": [2, 1, 0], "preprocessing.orientation": "stored"})
    bundle("other_labels", 4)
    return lambda name: folder / name


@pytest.fixture
def scans(tmp_path: Path) -> Path:
    for number in range(2):
        array = np.random.default_rng(number).normal(size=(1, 9 + number, 14, 12)).astype(np.float32)
        Volume(array, np.eye(4)[:, [2, 1, 0, 3]]).write(tmp_path / "in" / f"c{number}.nii.gz")
    return tmp_path / "in"


def predict(*arguments: str | Path, device: str = "cpu") -> int:
    return run(["predict", *map(str, arguments), "--device", device, "--engine", "torch"])


def test_bundles_and_packages_are_averaged_and_a_rerun_knows_them(
    make: Make, scans: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    packed, out = pack(make("turned"), tmp_path / "turned.sagittal"), tmp_path / "out"
    three = (make("first"), scans, "--out", out, "--with", make("coarse"), "--with", packed)
    assert predict(*three, "--quality", "--entropy", "--probabilities") == 0
    told = capsys.readouterr()
    assert told.err.count("torch fp32 on cpu") == 1 and "agreement" in told.out
    model = sagittal.load([make("first"), make("coarse"), make("turned")], device="cpu", engine="torch")
    expected = model.predict(scans / "c1.nii.gz").array[0]
    np.testing.assert_array_equal(read_labels(out / "c1.nii.gz")[0], expected)
    with np.load(out / "c1.npz") as content:
        shares = content["probabilities"].astype(np.float32)
    assert (shares.argmax(axis=0) == expected).mean() > 0.98
    report = FolderResult.read(out / "prediction.json")
    others = sorted(read_bundle(make(name)).manifest.manifest_sha256 for name in ("coarse", "turned"))
    assert report.choices.averaged_with == tuple(others) and report.cases[0].choices == report.choices
    assert report.bundle.startswith("first + coarse + ") and report.cases[0].device == "cpu (torch)"
    assert sorted(path.name for path in out.iterdir()) == [
        *("c0.nii.gz", "c0.npz", "c1.nii.gz", "c1.npz", "dataset.json", "entropy", "prediction.json"),
    ]
    swapped = (make("first"), scans, "--out", out, "--with", make("turned"), "--with", make("coarse"))
    assert predict(*swapped) == 0 and capsys.readouterr().out.count("finished before") == 2
    assert predict(*three[:-2]) == 0 and "finished before" not in capsys.readouterr().out
    assert predict(make("first"), scans, "--out", out) == 0 and "finished before" not in capsys.readouterr().out
    assert FolderResult.read(out / "prediction.json").choices.averaged_with == ()


def test_bundles_that_do_not_fit_are_refused_by_name(
    make: Make, scans: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for wrong, told in (("other_labels", "other_labels: its labels are"), ("first", "holds the same bundle as")):
        assert predict(make("first"), scans, "--out", tmp_path / "out", "--with", make(wrong)) == 2
        assert told in capsys.readouterr().err and not (tmp_path / "out").exists()
    assert predict(make("first"), scans, "--out", tmp_path / "out", "--with", tmp_path / "absent") == 1


def test_a_case_without_room_on_the_disk_fails_alone(
    make: Make, scans: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # 2 bytes x 3 classes x 14 x 12 voxels in 9 and 10 planes.
    usage = shutil.disk_usage(tmp_path)._replace(free=2 * 3 * 14 * 12 * 9)
    monkeypatch.setattr(averaging.shutil, "disk_usage", lambda _: usage)
    assert predict(make("first"), scans, "--out", tmp_path / "out", "--with", make("coarse")) == 1
    told = capsys.readouterr()
    assert "c0: done" in told.out and "averaging 2 bundles on this scan needs" in told.err


@pytest.mark.slow
def test_processes_average_as_one_does(make: Make, scans: Path, tmp_path: Path) -> None:
    both = (make("first"), scans, "--with", make("coarse"))
    assert predict(*both, "--out", tmp_path / "two", device="cpu,cpu") == 0
    assert predict(*both, "--out", tmp_path / "one") == 0
    for name in ("c0", "c1"):
        found, expected = (read_labels(tmp_path / where / f"{name}.nii.gz")[0] for where in ("two", "one"))
        np.testing.assert_array_equal(found, expected)


def test_fast_takes_second_models_only_where_every_bundle_has_one(
    make: Make, scans: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main, second = read_bundle(make("first")), read_bundle(make("coarse"))
    low = second.plan.replace(configuration="3d-low")
    coarse = read_bundle(write_random_bundle(tmp_path / "low", low))
    weights = {name: main.weights(name) for name in main.weight_names}
    both = [
        write_bundle(tmp_path / name, plan=main.plan, weights=weights, metrics={"note": name}, low=coarse)
        for name in ("b1", "b2")
    ]
    assert predict(both[0], scans, "--out", tmp_path / "x", "--fast", "--with", both[1]) == 0
    assert "second model" in capsys.readouterr().err
    assert FolderResult.read(tmp_path / "x" / "prediction.json").choices.step is None
    assert predict(both[0], scans, "--out", tmp_path / "y", "--fast", "--with", make("turned")) == 0
    assert "fast: no mirroring, step 0.75" in capsys.readouterr().err
    assert FolderResult.read(tmp_path / "y" / "prediction.json").choices.step == 0.75
