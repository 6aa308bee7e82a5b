"""The options of `sagittal train`: what they mean, what they refuse, and that their help is shown."""

from __future__ import annotations

from pathlib import Path

import pytest

from sagittal.cli import run
from sagittal.cli.train_options import HowToRun
from sagittal.plan.plan import Plan
from sagittal.testing.datasets import TINY_SETTINGS


def test_every_option_has_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["train", "--help"]) == 0
    shown = " ".join(capsys.readouterr().out.replace("│", " ").split())
    for text in (
        "a plan made by sagittal plan",
        "folds are trained side by side, for example cuda:0,cuda:1",
        "bit-equal weights on the same machine",
        "tensorboard, mlflow or both",
        "threads that make training batches",
        "how many of them are kept",
    ):
        assert text in shown
    assert "--how" not in shown and "HowToRun" not in shown


def test_options_become_those_of_a_run() -> None:
    how = HowToRun(devices="cpu, cpu", log="tensorboard,mlflow", workers=0, keep_checkpoints=3, compile="off")
    options = how.options(say=print)
    assert options.devices == ("cpu", "cpu") and options.trackers == ("tensorboard", "mlflow")
    assert (options.loader_workers, options.keep_checkpoints, options.compile) == (0, 3, "off")
    assert HowToRun().options().devices == () and HowToRun().options().loader_workers is None


@pytest.mark.parametrize(
    "wrong", [["--workers", "-1"], ["--keep-checkpoints", "0"], ["--compile", "maybe"], ["--devices"]]
)
def test_values_that_make_no_sense_are_wrong_usage(wrong: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["train", "x", "--out", "y", *wrong]) == 2


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        (["--device", "cpu", "--devices", "cpu,cpu"], "exclude each other"),
        (["--devices", "cpu,cpu"], "--fold 0 is one network"),
        (["--fold", "all", "--devices", "cpu,gpu"], "'gpu' is not a device"),
        (["--log", "wandb"], "wandb"),
    ],
)
def test_options_that_can_not_be_followed_are_refused_before_anything_is_done(
    tiny_dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], wrong: list[str], told: str
) -> None:
    assert run(["train", str(tiny_dataset), "--out", str(tmp_path / "b"), *wrong]) == 2
    assert told in capsys.readouterr().err
    assert not (tmp_path / "b.run").exists()


def test_determinism_is_written_into_the_plan_with_its_origin(
    tiny_dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SAGITTAL_CACHE", str(tmp_path / "known"))
    settings = [part for name, value in TINY_SETTINGS.items() for part in ("--set", f"{name}={value}")]
    command = ["train", str(tiny_dataset), "--out", str(tmp_path / "b"), "--fold", "none", "--device", "cpu"]
    assert run([*command, "--deterministic", "--workers", "2", *settings]) == 0
    plan = Plan.read(tmp_path / "b" / "plan.json")
    assert plan.training.deterministic and "--set" in plan.reasons["training.deterministic"]


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        (["--store", "s3://bucket/x"], "--store belong to --on"),
        (["--on", "ray", "--store", "x", "--fold-processes", "2"], "--store and --fold-processes exclude each other"),
        (["--on", "slurm", "--store", "x"], "--store are Ray's"),
    ],
)
def test_a_store_is_for_folds_on_ray(
    tiny_dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], wrong: list[str], told: str
) -> None:
    assert run(["train", str(tiny_dataset), "--out", str(tmp_path / "b"), *wrong]) == 2
    assert told in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "b.run").exists()


def test_a_sweep_takes_no_store(tiny_dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["sweep", str(tiny_dataset), "--out", str(tmp_path / "b"), "--networks", "mednext-s,mednext-b"]
    assert run([*command, "--budget", "1m", "--on", "ray", "--store", "x"]) == 2
    assert "--store is for the folds of 'train'" in " ".join(capsys.readouterr().err.split())
