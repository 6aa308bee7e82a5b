"""`sagittal predict` as a user types it: exit codes, what is printed, and that a killed run goes on."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import held_prediction
import numpy as np
import pytest

from sagittal.bundle import read_bundle
from sagittal.cli import run
from sagittal.cli.progress import ProgressLines
from sagittal.inference.predictor import Predictor
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
}


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    plan = untrained_plan("segformer3d", untrained_spec(3), patch_size=(16, 18, 20), settings=SETTINGS)
    return write_random_bundle(tmp_path_factory.mktemp("model") / "bundle", plan)


@pytest.fixture
def scans(tmp_path: Path) -> Path:
    write_scans(tmp_path / "in", 3)
    return tmp_path / "in"


def write_scans(folder: Path, count: int) -> None:
    for number in range(count):
        array = np.random.default_rng(number).normal(size=(1, 9 + number % 5, 16, 14)).astype(np.float32)
        Volume(array, np.eye(4)[:, [2, 1, 0, 3]]).write(folder / f"c{number:02d}.nii.gz")


def predict(*arguments: str | Path) -> int:
    return run(["predict", *map(str, arguments)])


def test_a_run_tells_what_it_is_for_what_computes_and_where_it_can_be_read(
    bundle: Path, scans: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    extras = ("--preview", "--entropy", "--probabilities", "--quality")
    assert predict(bundle, scans, "--out", out, "--device", "cpu", "--subset", "CLASS_2", *extras) == 0
    told = capsys.readouterr()
    assert told.err.count("not a medical device") == 1 and " fp32 on cpu" in told.err
    assert [line.partition(":")[0] for line in told.out.splitlines() if line.startswith("c")] == ["c00", "c01", "c02"]
    labels, _ = read_labels(out / "c00.nii.gz")
    assert set(np.unique(labels)) <= {0, 2}
    names = sorted(path.relative_to(out).as_posix() for path in out.rglob("c00*"))
    assert names == ["c00.nii.gz", "c00.npz", "entropy/c00.nii.gz", "previews/c00.png"]
    report = FolderResult.read(out / "prediction.json")
    assert report.choices.subset == ("class_2",) and report.cases[0].quality is not None
    assert report.bundle == "bundle" and report.cases[0].volumes_ml.keys() == {"class_2"}
    assert predict(bundle, scans, "--out", out, "--device", "cpu", "--subset", "class_2") == 0
    assert capsys.readouterr().out.count("finished before") == 3


def test_folds_are_compared_where_nothing_is_mirrored(bundle: Path, scans: Path, tmp_path: Path) -> None:
    plan = read_bundle(bundle).plan
    folds = write_random_bundle(tmp_path / "folds", plan, folds=("fold_0", "fold_1"))
    options = ("--out", tmp_path / "out", "--device", "cpu", "--quality", "--no-mirror")
    assert predict(folds, scans / "c00.nii.gz", *options) == 0
    (case,) = FolderResult.read(tmp_path / "out" / "prediction.json").cases
    assert case.quality is not None and case.quality.agreement is not None and case.quality.agreement < 1


def test_json_is_one_object_a_line(
    bundle: Path, scans: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (scans / "c01.nii.gz").write_bytes(b"no scan")
    assert predict(bundle, scans, "--out", tmp_path / "out", "--device", "cpu", "--fast", "--json") == 1
    told = capsys.readouterr()
    *cases, summary = [json.loads(line) for line in told.out.splitlines()]
    assert {case["case"]: case["status"] for case in cases} == {"c00": "done", "c01": "failed", "c02": "done"}
    assert summary["summary"]["cases"] == 3 and summary["summary"]["failed"] == 1
    assert "fast: no mirroring, step 0.75" in told.err and "1 of 3 cases failed" in told.err
    assert cases[-1]["choices"]["mirror"] is False


@pytest.mark.parametrize(
    "wrong",
    [
        ["--engine", "opnvino"],
        ["--precision", "fp8"],
        ["--engine", "torch", "--precision", "bf16"],
        ["--device", "gpu"],
        ["--device", "cpu,gpu"],
        ["--subset", "class_9"],
        ["--step", "1.5"],
        ["--step", "0"],
        ["--memory-gib", "0"],
        ["--missing", "channel_9"],
        ["--quality", "--no-mirror"],
        ["--quality", "--fast"],
    ],
)
def test_slips_of_usage_end_with_two_and_write_nothing(
    bundle: Path, scans: Path, tmp_path: Path, wrong: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert predict(bundle, scans, "--out", tmp_path / "out", *wrong) == 2
    assert not (tmp_path / "out").exists()
    assert capsys.readouterr().err


def test_what_is_wrong_with_the_data_or_the_machine_ends_with_one(
    bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert predict(bundle, tmp_path / "absent", "--out", tmp_path / "out") == 1
    assert predict(tmp_path / "absent", tmp_path, "--out", tmp_path / "out") == 1
    assert "absent" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_an_output_folder_that_can_not_be_written_is_told_before_anything_is_computed(
    bundle: Path, scans: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def read_only(*_: object, **__: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    # Nothing keeps root, whom tests often run as, from writing, so the system is played.
    monkeypatch.setattr(tempfile, "mkstemp", read_only)
    monkeypatch.setattr(tempfile, "TemporaryFile", read_only)
    monkeypatch.setattr(Path, "mkdir", read_only)
    monkeypatch.setattr("sagittal.inference.predictor.Predictor.predict", lambda *_, **__: pytest.fail("computed"))
    assert predict(bundle, scans, "--out", tmp_path / "out", "--device", "cpu") == 1
    told = capsys.readouterr().err
    assert f"{tmp_path / 'out'}" in told and "Read-only file system" in told and "choose another folder" in told


def test_a_bundle_of_a_newer_version_says_what_to_do(
    bundle: Path, scans: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    newer = Path(shutil.copytree(bundle, tmp_path / "newer"))
    manifest = json.loads((newer / "manifest.json").read_text())
    manifest |= {"schema_version": 99, "sagittal_version": "99.1"}
    (newer / "manifest.json").write_text(json.dumps(manifest))
    assert predict(newer, scans, "--out", tmp_path / "out") == 1
    told = capsys.readouterr().err
    assert "schema_version 99 is newer" in told and "99.1" in told and "Update sagittal" in told
    assert not (tmp_path / "out").exists()


def test_a_scan_that_vanishes_while_another_is_computed_fails_alone(
    bundle: Path, scans: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = Predictor.predict

    def take_away(*given: Any, **options: Any) -> Volume:
        (scans / "c02.nii.gz").unlink(missing_ok=True)
        return whole(*given, **options)

    monkeypatch.setattr(Predictor, "predict", take_away)
    # A budget too small to read ahead: the scan is asked for when its turn comes.
    monkeypatch.setattr("sagittal.inference.pipeline.CasePipeline._has_room", lambda *_: False)
    assert predict(bundle, scans, "--out", tmp_path / "out", "--device", "cpu") == 1
    told = capsys.readouterr().err
    assert "1 of 3 cases failed" in told and "c02: " in told and "c02.nii.gz" in told
    assert sorted(path.name for path in (tmp_path / "out").glob("c*")) == ["c00.nii.gz", "c01.nii.gz"]


def command(bundle: Path, scans: Path, out: Path) -> list[str]:
    return [sys.executable, "-m", "sagittal", "predict", *map(str, (bundle, scans, "--out", out)), "--device", "cpu"]


def held(case: str, command: list[str]) -> list[str]:
    """Return a command that waits at a case for what ends it, however late that comes."""
    return [sys.executable, held_prediction.__file__, case, *command[3:]]


def wait_for(out: Path, names: Sequence[str], process: subprocess.Popen[str]) -> None:
    while process.poll() is None and not all((out / name).exists() for name in names):
        time.sleep(0.002)


@pytest.mark.kill
def test_a_killed_run_leaves_nothing_half_written_and_goes_on(bundle: Path, tmp_path: Path) -> None:
    write_scans(tmp_path / "in", 30)
    out, whole = tmp_path / "out", tmp_path / "whole"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
    for name in ("c02", "c07", "c15"):
        words = held("c22", command(bundle, tmp_path / "in", out))
        with subprocess.Popen(words, stdout=subprocess.PIPE, text=True, env=environment) as process:
            wait_for(out, [f"{name}.nii.gz"], process)
            process.send_signal(signal.SIGKILL)
        assert process.returncode == -signal.SIGKILL
        for path in out.glob("c*.nii.gz"):
            read_labels(path)
    last = subprocess.run(
        command(bundle, tmp_path / "in", out), env=environment, capture_output=True, text=True, check=True
    )
    assert last.stdout.count("finished before") >= 14
    subprocess.run(command(bundle, tmp_path / "in", whole), env=environment, capture_output=True, check=True)
    assert {path.name: path.read_bytes() for path in out.glob("*.nii.gz")} == {
        path.name: path.read_bytes() for path in whole.glob("*.nii.gz")
    }
    assert sorted(path.name for path in out.iterdir()) == sorted(path.name for path in whole.iterdir())
    assert FolderResult.read(out / "prediction.json").status == "finished"


@pytest.mark.kill
def test_a_stopped_run_says_how_to_go_on(bundle: Path, tmp_path: Path) -> None:
    write_scans(tmp_path / "in", 40)
    out = tmp_path / "out"
    words = held("c20", command(bundle, tmp_path / "in", out))
    with subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        wait_for(out, ["c00.nii.gz"], process)
        process.send_signal(signal.SIGTERM)
        said = process.communicate()[1]
    assert process.returncode == 75, said
    assert "go on with: sagittal predict" in said.splitlines()[-1] and "Traceback" not in said
    assert FolderResult.read(out / "prediction.json").status == "ended early"


def test_the_report_names_the_engine_and_the_precision_that_computed(bundle: Path, scans: Path, tmp_path: Path) -> None:
    assert predict(bundle, scans / "c00.nii.gz", "--out", tmp_path / "a", "--device", "cpu", "--engine", "torch") == 0
    assert FolderResult.read(tmp_path / "a" / "prediction.json").engine == "torch fp32"
    assert predict(bundle, scans / "c00.nii.gz", "--out", tmp_path / "b", "--device", "cpu") == 0
    report = FolderResult.read(tmp_path / "b" / "prediction.json")
    assert f"({report.engine.removesuffix(' fp32')})" in str(report.cases[0].device)


def test_debug_shows_where_a_mistake_of_ours_was_raised(
    bundle: Path, scans: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail_here(*arguments: object, **options: object) -> None:
        raise ZeroDivisionError("by mistake")

    monkeypatch.setattr("sagittal.inference.predictor.Predictor.predict", fail_here)
    assert predict(bundle, scans / "c00.nii.gz", "--out", tmp_path / "out", "--device", "cpu", "--debug") == 1
    told = capsys.readouterr().err
    assert "c00: ZeroDivisionError" in told and "in fail_here" in told
    assert predict(bundle, scans / "c01.nii.gz", "--out", tmp_path / "out", "--device", "cpu") == 1
    assert "in fail_here" not in capsys.readouterr().err


def test_a_long_run_says_how_far_it_is(
    bundle: Path, scans: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ProgressLines.__init__, "__defaults__", (0.0,))
    assert predict(bundle, scans, "--out", tmp_path / "out", "--device", "cpu") == 0
    lines = [line for line in capsys.readouterr().err.splitlines() if ": window " in line]
    assert lines[0].startswith("c00: window ") and "; 0 of 3 cases done; 0:00:0" in lines[0]
    assert "2 of 3 cases done" in lines[-1] or "1 of 3 cases done" in lines[-1]
