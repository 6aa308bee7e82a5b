"""Every verb as a user types it: what it prints, which code it ends with, and what it leaves behind."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import nibabel
import numpy as np
import pytest

from sagittal.cli import run
from sagittal.testing.datasets import TINY_SETTINGS

FAST = [part for name, value in TINY_SETTINGS.items() for part in ("--set", f"{name}={json.dumps(value)}")]


def _call(arguments: Sequence[str | Path]) -> int:
    return run([str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained bundle with one channel and three outputs."""
    folder = tmp_path_factory.mktemp("bundles") / "bundle"
    command = [sys.executable, "-m", "sagittal.testing.bundle", "--network", "segformer3d", "--classes", "3"]
    command += ["--out", str(folder), "--set", "patch.size=32,32,32"]
    subprocess.run(command, check=True)
    return folder


def test_help_lists_every_verb(capsys: pytest.CaptureFixture[str]) -> None:
    assert _call(["--help"]) == 0
    shown = capsys.readouterr().out
    verbs = "doctor plan train predict evaluate import-weights convert info networks datasets demo models offline"
    for verb in verbs.split():
        assert verb in shown


@pytest.mark.parametrize("verb", ["plan", "train"])
def test_help_offers_no_option_that_means_nothing(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert _call([verb, "--help"]) == 0
    shown = capsys.readouterr().out
    assert "--set" in shown
    assert "--empty" not in shown


def test_importing_the_package_or_its_command_line_does_not_import_torch() -> None:
    # pydantic and numpy are here for the half second that `sagittal --help` may take.
    heavy = ("torch", "nibabel", "scipy", "pydantic", "numpy")
    check = f"import sys, sagittal, sagittal.cli; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", check], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "[]"


def test_the_public_names_load_and_are_listed() -> None:
    import sagittal

    assert sorted(sagittal.__all__) == dir(sagittal)
    for name in sagittal.__all__:
        assert getattr(sagittal, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        sagittal.trian  # noqa: B018


@pytest.mark.parametrize(
    "arguments", [["trian"], ["train"], ["plan", "--nonsense"], ["train", "x", "--out", "y", "--fold", "7"]]
)
def test_wrong_usage_ends_with_two(arguments: list[str]) -> None:
    assert _call(arguments) == 2


def test_doctor_says_that_data_is_usable(tiny_dataset: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert _call(["doctor", tiny_dataset]) == 0
    assert "usable" in capsys.readouterr().out
    assert _call(["doctor", tiny_dataset, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["ok"] is True


def test_a_plan_is_written_with_reasons_and_overrides(
    tiny_dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "plan.json"
    command = ["plan", tiny_dataset, "--network", "segformer3d", "--out", out, "--memory-gib", "4"]
    assert _call([*command, "--set", "patch.size=16,32,16", "--explain"]) == 0
    plan = json.loads(out.read_text())
    assert plan["patch"]["size"] == [16, 32, 16]
    assert "--set" in plan["reasons"]["patch.size"]
    shown = capsys.readouterr().out
    assert "  patch.size = [16, 32, 16]\n      set by the user with --set; a step of 2 was measured at" in shown
    assert '  training.optimizer.kind = "adamw"' in shown


def test_a_plan_of_slices_by_a_preset_is_told_as_json_alone(
    tiny_dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "plan.json"
    command = ["plan", tiny_dataset, "--network", "segformer3d", "--preset", "nnunet", "--config", "2d"]
    assert _call([*command, "--set", "patch.size=1,32,32", "--out", out, "--json"]) == 0
    told = capsys.readouterr()
    shown = json.loads(told.out)
    fields = {field["name"]: field for field in shown["fields"]}
    assert shown["plan"] == str(out)
    assert fields["configuration"]["value"] == "2d"
    assert fields["preprocessing.orientation"] == {
        "name": "preprocessing.orientation",
        "value": "stored",
        "reason": "preset nnunet",
    }
    assert "check:" in told.err and "segformer3d 2d, patch 1x32x32" in told.err


def test_a_plan_that_is_given_excludes_what_a_plan_is_made_from(
    tiny_dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = tmp_path / "plan.json"
    assert _call(["plan", tiny_dataset, "--out", plan, *FAST]) == 0
    assert _call(["train", tiny_dataset, "--out", tmp_path / "b", "--plan", plan, "--config", "2d"]) == 2
    assert "exclude each other" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("setting", "told"),
    [
        ("patch.sise=16,16,16", "Did you mean 'size'"),
        ("patch.size", "FIELD=VALUE"),
        ("patch.size=16,16", "patch.size"),
        ("patch.size=a,b,c", "patch.size"),
        ("network=5", "group of fields"),
        ("network.kernel_size=4", "kernel_size"),
    ],
)
def test_a_wrong_setting_is_told_and_writes_no_plan(
    tiny_dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], setting: str, told: str
) -> None:
    # What is wrong whatever the data is told as wrong usage; the others show only when the plan is made.
    code = 1 if setting == "network.kernel_size=4" else 2
    assert _call(["plan", tiny_dataset, "--out", tmp_path / "p.json", "--set", setting]) == code
    assert told in capsys.readouterr().err
    assert not (tmp_path / "p.json").exists()


def test_an_unknown_network_is_told_with_the_closest_name(
    tiny_dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _call(["plan", tiny_dataset, "--network", "mednxt-s", "--out", tmp_path / "p.json"]) == 2
    assert "Did you mean 'mednext-s'" in capsys.readouterr().err


@pytest.mark.parametrize("budget", ["soon", "0s", "-5m", "15x", "500ms", "1h30"])
def test_a_wrong_budget_is_told(
    tiny_dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], budget: str
) -> None:
    assert _call(["train", tiny_dataset, "--out", tmp_path / "b", f"--budget={budget}"]) == 2
    assert "15m" in capsys.readouterr().err


def test_train_predict_evaluate_and_info_follow_each_other(
    tiny_dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = tmp_path / "bundle"
    assert _call(["train", tiny_dataset, "--out", bundle, "--fold", "none", "--device", "cpu", *FAST]) == 0
    assert _call(["predict", bundle, tiny_dataset / "imagesTs", "--out", tmp_path / "labels", "--no-mirror"]) == 0
    log = tmp_path / "bundle.run" / "fold_none" / "log.jsonl"
    score = ["evaluate", tmp_path / "labels", tiny_dataset / "labelsTs", "--out", tmp_path / "scores"]
    assert _call([*score, "--log", log]) == 0
    assert "Training loss" in (tmp_path / "scores" / "report.html").read_text()
    assert capsys.readouterr().out.strip().splitlines()[-1].startswith("report: ")
    written = {"metrics.json", "metrics.csv", "report.html", "summary.csv", "tables.md", "tables.tex"}
    assert {path.name for path in (tmp_path / "scores").iterdir()} == written
    for path, told in (
        (bundle, "verified"),
        (tiny_dataset, "bright: 1"),
        (tmp_path / "bundle.run" / "plan.json", "mednext-s"),
        (tiny_dataset / "imagesTr" / "case_0_0000.nii.gz", "18 x 22 x 20"),
        (tmp_path / "bundle.run", "step 3 of 3"),
    ):
        assert _call(["info", path]) == 0
        shown = capsys.readouterr().out
        assert told in shown and "go on with" not in shown

    run_json = tmp_path / "bundle.run" / "run.json"
    content = json.loads(run_json.read_text())
    content["attempts"][-1] |= {"outcome": "terminated", "command": ["sagittal", "train", "a " * 200, "--out", "b"]}
    run_json.write_text(json.dumps(content))
    assert _call(["info", tmp_path / "bundle.run"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"go on with: sagittal train '{'a ' * 200}' --out b --resume"


@pytest.mark.parametrize(
    ("verb", "wrong"),
    [
        ("train", ["--budget", "abc"]),
        ("train", ["--network", "mednxt-s"]),
        ("train", ["--preset", "nnunt"]),
        ("train", ["--log", "wandb"]),
        ("train", ["--device", "gpu"]),
        ("train", ["--fold", "all", "--devices", "cpu,gpu"]),
        ("train", ["--set", "patch.size=8,8,8", "--set", "patch.size=16,16,16"]),
        ("plan", ["--network", "mednxt-s"]),
        ("plan", ["--preset", "nnunt"]),
        ("plan", ["--set", "patch.size"]),
    ],
)
def test_slips_of_usage_are_told_before_the_data_is_looked_at(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], verb: str, wrong: list[str]
) -> None:
    # The data set is not there: a slip that was found later would end with 1 and its name.
    assert _call([verb, tmp_path / "absent", "--out", tmp_path / "out", *wrong]) == 2
    told = capsys.readouterr()
    assert "absent" not in told.err and "check:" not in told.out


@pytest.mark.parametrize("shape", ["128x128x128", "1x128x128xa", "0x8x8x8"])
def test_a_wrong_input_shape_is_told(capsys: pytest.CaptureFixture[str], shape: str) -> None:
    assert _call(["networks", "--input", shape]) == 2
    assert "1x128x128x128" in capsys.readouterr().err


def _edit_label(path: Path, change: str) -> None:
    image = nibabel.load(path)
    data = np.asarray(image.dataobj).copy()
    affine = image.affine.copy()
    if change == "undeclared":
        data[0, 0, 0] = 7
    elif change == "other grid":
        affine[0, 3] += 3
    nibabel.save(nibabel.Nifti1Image(data, affine), path)


def _break(dataset: Path, fault: str) -> None:
    image, labels = dataset / "imagesTr" / "case_2_0000.nii.gz", dataset / "labelsTr" / "case_2.nii.gz"
    loaded = nibabel.load(image)
    match fault:
        case "missing channel":
            image.unlink()
        case "other grid" | "undeclared":
            _edit_label(labels, fault)
        case "NaN":
            data = np.asarray(loaded.dataobj).copy()
            data[3, 3, 3] = np.nan
            nibabel.save(nibabel.Nifti1Image(data, loaded.affine), image)
        case "truncated":
            image.write_bytes(image.read_bytes()[:-2000])
        case "2D":
            nibabel.save(nibabel.Nifti1Image(np.zeros((20, 22), np.float32), np.eye(4)), image)
        case "no cases":
            for path in (*(dataset / "imagesTr").iterdir(), *(dataset / "labelsTr").iterdir()):
                path.unlink()


@pytest.mark.parametrize("fault", ["missing channel", "other grid", "undeclared", "NaN", "truncated", "2D", "no cases"])
def test_unusable_data_is_refused_by_doctor_plan_and_train_and_nothing_is_written(
    tiny_dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], fault: str
) -> None:
    _break(tiny_dataset, fault)
    assert _call(["doctor", tiny_dataset]) == 1
    capsys.readouterr()
    assert _call(["plan", tiny_dataset, "--out", tmp_path / "plan.json"]) == 1
    assert _call(["train", tiny_dataset, "--out", tmp_path / "bundle"]) == 1
    told = capsys.readouterr().err
    assert ("case_2" if fault != "no cases" else str(tiny_dataset)) in told
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tiny"]


def test_an_empty_folder_and_a_missing_one_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    for name in ("empty", "missing"):
        for verb in (["doctor"], ["plan"], ["info"], ["train", "--out", str(tmp_path / "b")]):
            assert _call([verb[0], tmp_path / name, *verb[1:]]) == 1
            assert name in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty"]


def test_a_bundle_with_a_changed_byte_is_refused(
    bundle: Path, tiny_dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import shutil

    copy = Path(shutil.copytree(bundle, tmp_path / "copy"))
    weights = next((copy / "weights").iterdir())
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert _call(["predict", copy, tiny_dataset / "imagesTs", "--out", tmp_path / "out"]) == 1
    assert weights.name in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_an_image_smaller_than_the_patch_and_a_bad_one_beside_it(
    bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    scans = tmp_path / "scans"
    scans.mkdir()
    rng = np.random.default_rng(0)
    nibabel.save(nibabel.Nifti1Image(rng.normal(size=(5, 6, 7)).astype(np.float32), np.eye(4)), scans / "a_0000.nii.gz")
    (scans / "b_0000.nii.gz").write_bytes(b"no scan")
    assert _call(["predict", bundle, scans, "--out", tmp_path / "out", "--no-mirror"]) == 1
    told = capsys.readouterr()
    assert "b: failed" in told.out
    assert "1 of 2 cases failed" in told.err and "b_0000.nii.gz" in told.err
    assert nibabel.load(tmp_path / "out" / "a.nii.gz").shape == (5, 6, 7)
    assert not (tmp_path / "out" / "b.nii.gz").exists()


def test_too_little_memory_is_refused_with_numbers(
    bundle: Path, tiny_dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    scan = tiny_dataset / "imagesTs" / "case_test_0000.nii.gz"
    assert _call(["predict", bundle, scan, "--out", tmp_path / "out", "--memory-gib", "0.0001"]) == 1
    assert "GiB" in capsys.readouterr().err


def test_errors_of_json_commands_have_the_one_shape(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert _call(["doctor", tmp_path / "missing", "--json"]) == 1
    error = json.loads(capsys.readouterr().out)["error"]
    assert set(error) == {"type", "code", "message"}
    assert "missing" in error["message"]


def test_the_folder_one_stands_in_can_be_the_bundle(
    tiny_dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert _call(["train", tiny_dataset, "--out", ".", "--fold", "none", "--device", "cpu", *FAST]) == 0
    assert (tmp_path / "here" / "manifest.json").exists()
    assert (tmp_path / "here.run" / "plan.json").exists()
    assert _call(["train", tiny_dataset, "--out", "/", "--device", "cpu", *FAST]) == 1
    assert "no folder for a bundle" in capsys.readouterr().err


def test_a_terminal_without_the_letters_of_a_path_is_no_reason_to_fail(tmp_path: Path) -> None:
    scan = tmp_path / "Sch\u00e4del.nii.gz"
    nibabel.save(nibabel.Nifti1Image(np.ones((5, 6, 7), np.float32), np.eye(4)), scan)
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    command = [sys.executable, "-m", "sagittal", "info", str(scan)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "Sch?del" in done.stdout.replace("\n", "").replace(" ", "")


def test_debug_shows_the_traceback(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert _call(["info", tmp_path / "missing", "--debug"]) == 1
    assert "Traceback" in capsys.readouterr().err


def test_a_reader_that_has_enough_is_no_crash() -> None:
    command = [sys.executable, "-m", "sagittal", "datasets", "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()
        assert "Traceback" not in process.stderr.read()
