"""From a folder of scans to a bundle, and what happens when it is stopped, repeated or asked for the impossible."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import sagittal
from sagittal.data.label_index import label_index
from sagittal.data.loader import Batch
from sagittal.errors import BundleError, DataError, PlanError, ResourceError, TrainingError
from sagittal.plan.plan import Plan
from sagittal.testing.datasets import TINY_SETTINGS as TINY
from sagittal.testing.datasets import write_tiny_case
from sagittal.testing.plans import untrained_plan, untrained_spec
from sagittal.training import finish as finish_module
from sagittal.training import fold as fold_module
from sagittal.training import run as run_module
from sagittal.training.log import read_log
from sagittal.training.optimizers import new_optimizer
from sagittal.training.run import train
from sagittal.training.stages import RunOptions
from sagittal.training.state import TrainState
from sagittal.training.step import train_on_batch
from sagittal.volumes import read_volume

pytestmark = pytest.mark.filterwarnings("ignore:.*is not writable:UserWarning")


def _losses(out: Path, fold: str) -> list[float]:
    log = out.with_name(out.name + ".run") / f"fold_{fold}" / "log.jsonl"
    return [record["loss"] for record in read_log(log) if record["kind"] == "step"]


def test_a_fold_becomes_a_bundle_a_report_and_a_prediction(tiny_dataset: Path, tmp_path: Path) -> None:
    lines: list[str] = []
    result = train(tiny_dataset, tmp_path / "b", settings=TINY, options=RunOptions(device="cpu", say=lines.append))
    assert result.complete
    said = "\n".join(lines)
    for stage in ("check:", "plan:", "preprocess:", "train:", "validate:", "report:"):
        assert stage in said
    metrics = sagittal.read_bundle(tmp_path / "b").metrics
    assert metrics["folds"]["0"]["steps"] == 3
    assert set(metrics["dice"]) == {"bright", "dark"}
    fold = tmp_path / "b.run" / "fold_0"
    (link,) = re.findall(r'<a href="([^"]*)"', (fold / "progress.html").read_text())
    final = json.loads((fold / link).with_name("metrics.json").read_text())["summary"]["mean"]["dice"]
    assert f'<p class="figure num">{final:.3f}' in (fold / "progress.html").read_text()
    named = re.compile(r"case_\d|case_test")
    assert not any(named.search(path.read_text(errors="ignore")) for path in (tmp_path / "b").rglob("*.json"))

    scan = tiny_dataset / "imagesTs" / "case_test_0000.nii.gz"
    labels = sagittal.load(tmp_path / "b", device="cpu").predict(scan)
    assert labels.array.shape == read_volume(scan).array.shape
    assert np.array_equal(labels.affine, read_volume(scan).affine)
    assert set(np.unique(labels.array)) <= {0, 1, 2}


def test_a_baseline_goes_the_same_way(tiny_dataset: Path, tmp_path: Path) -> None:
    settings = {key: value for key, value in TINY.items() if "network" not in key}
    settings["network.features_per_stage"] = [4, 6, 8]
    options = RunOptions(device="cpu")
    result = train(tiny_dataset, tmp_path / "b", network="plainconvunet", settings=settings, options=options)
    assert result.complete
    bundle = sagittal.read_bundle(tmp_path / "b")
    assert bundle.plan.network.kind == "plainconvunet"
    assert "nnU-Net's rules for a patch" in bundle.plan.reasons["network.strides"]
    scan = tiny_dataset / "imagesTs" / "case_test_0000.nii.gz"
    labels = sagittal.load(tmp_path / "b", device="cpu").predict(scan)
    assert labels.array.shape == read_volume(scan).array.shape


def test_no_fold_uses_every_case_and_says_that_nothing_was_validated(tiny_dataset: Path, tmp_path: Path) -> None:
    result = train(tiny_dataset, tmp_path / "b", settings=TINY, fold="none", options=RunOptions(device="cpu"))
    assert result.metrics["folds"]["none"]["training_cases"] == 6
    assert result.metrics["mean_dice"] is None
    assert "every case was used" in result.metrics["validation"]
    assert sagittal.read_bundle(tmp_path / "b").weight_names == ("all",)


def test_all_folds_share_a_bundle_and_hold_out_every_case_once(tiny_dataset: Path, tmp_path: Path) -> None:
    settings = {**TINY, "schedule.steps": 1}
    result = train(tiny_dataset, tmp_path / "b", settings=settings, fold="all", options=RunOptions(device="cpu"))
    assert sagittal.read_bundle(tmp_path / "b").weight_names == tuple(f"fold_{number}" for number in range(5))
    cases = [case for entry in result.metrics["folds"].values() for case in entry["cases"]]
    assert len(cases) == len(set(cases)) == 6
    lines: list[str] = []
    again = RunOptions(device="cpu", resume=True, say=lines.append)
    assert train(tiny_dataset, tmp_path / "b", fold="all", options=again).metrics == result.metrics
    assert sum("finished already" in line for line in lines) == 5


def test_the_same_plan_gives_the_same_losses(tiny_dataset: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        train(tiny_dataset, tmp_path / name, settings=TINY, fold="none", options=RunOptions(device="cpu"))
    assert _losses(tmp_path / "a", "none") == _losses(tmp_path / "b", "none")
    first, second = (sagittal.read_bundle(tmp_path / name).weights("all") for name in ("a", "b"))
    assert all(np.array_equal(first[name], second[name]) for name in first)


class _StopAfter:
    """Pretend that Ctrl-C was pressed while step `step` was in progress."""

    def __init__(self, step: int, monkeypatch: pytest.MonkeyPatch) -> None:
        self.step, self.real = step, fold_module.train_on_batch
        monkeypatch.setattr(fold_module, "train_on_batch", self)

    def __call__(self, state: Any, batch: Any, plan: Plan, **more: Any) -> Any:
        if batch.step == self.step:
            os.kill(os.getpid(), 2)
        return self.real(state, batch, plan, **more)


@pytest.mark.parametrize("network", ["mednext-s", "segformer3d", "plainconvunet"])
def test_an_interrupted_run_leaves_a_usable_bundle_and_resumes_to_the_same_losses(
    tiny_dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, network: str
) -> None:
    settings = {key: value for key, value in TINY.items() if network == "mednext-s" or "network" not in key}
    settings["schedule.steps"] = 6
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    train(tiny_dataset, whole, network=network, settings=settings, fold="none", options=RunOptions(device="cpu"))
    with monkeypatch.context() as patch:
        _StopAfter(2, patch)
        result = train(
            tiny_dataset, cut, network=network, settings=settings, fold="none", options=RunOptions(device="cpu")
        )
    assert result.ended == "interrupted"
    assert sagittal.read_bundle(cut).metrics["folds"]["none"]["steps"] == 3
    sagittal.load(cut, device="cpu").predict(tiny_dataset / "imagesTs" / "case_test_0000.nii.gz")

    resumed = train(tiny_dataset, cut, fold="none", options=RunOptions(device="cpu", resume=True))
    assert resumed.complete
    assert _losses(cut, "none") == _losses(whole, "none")
    first, second = sagittal.read_bundle(whole).weights("all"), sagittal.read_bundle(cut).weights("all")
    assert all(np.array_equal(first[name], second[name]) for name in first)


def test_a_result_is_never_overwritten(tiny_dataset: Path, tmp_path: Path) -> None:
    train(tiny_dataset, tmp_path / "b", settings=TINY, fold="none", options=RunOptions(device="cpu"))
    before = (tmp_path / "b" / "manifest.json").read_bytes()
    with pytest.raises(TrainingError, match="--resume"):
        train(tiny_dataset, tmp_path / "b", settings=TINY, fold="none", options=RunOptions(device="cpu"))
    assert (tmp_path / "b" / "manifest.json").read_bytes() == before


def test_resume_without_a_checkpoint_says_that_it_starts_afresh(tiny_dataset: Path, tmp_path: Path) -> None:
    lines: list[str] = []
    options = RunOptions(device="cpu", resume=True, say=lines.append)
    assert train(tiny_dataset, tmp_path / "b", settings=TINY, fold="none", options=options).complete
    assert any("no checkpoint" in line and "afresh" in line for line in lines)


def test_resume_refuses_another_plan_and_changed_data(tiny_dataset: Path, tmp_path: Path) -> None:
    train(tiny_dataset, tmp_path / "b", settings=TINY, fold="0", options=RunOptions(device="cpu"))
    again = RunOptions(device="cpu", resume=True)
    with pytest.raises(PlanError, match=r"schedule\.steps"):
        train(tiny_dataset, tmp_path / "b", settings={"schedule.steps": 99}, fold="0", options=again)
    with pytest.raises(PlanError, match="mednext-s"):
        train(tiny_dataset, tmp_path / "b", network="segformer3d", fold="0", options=again)
    write_tiny_case(tiny_dataset, "case_3", 33)
    with pytest.raises(DataError, match="changed since"):
        train(tiny_dataset, tmp_path / "b", fold="0", options=again)


def test_a_plan_for_other_labels_is_refused(tiny_dataset: Path, tmp_path: Path) -> None:
    train(tiny_dataset, tmp_path / "b", settings=TINY, fold="none", options=RunOptions(device="cpu"))
    plan = Plan.read(tmp_path / "b.run" / "plan.json")
    declared = json.loads((tiny_dataset / "dataset.json").read_text())
    declared["labels"] = {"background": 0, "bright": 1, "shade": 2}
    (tiny_dataset / "dataset.json").write_text(json.dumps(declared))
    with pytest.raises(PlanError, match="shade"):
        train(tiny_dataset, tmp_path / "c", plan=plan, fold="none", options=RunOptions(device="cpu"))
    assert not (tmp_path / "c").exists()


def test_fp16_on_a_cpu_is_refused_before_anything_is_written(tiny_dataset: Path, tmp_path: Path) -> None:
    settings = {**TINY, "training.precision": "fp16"}
    with pytest.raises(PlanError, match=r"fp16.*for GPUs"):
        train(tiny_dataset, tmp_path / "b", settings=settings, options=RunOptions(device="cpu"))
    assert not (tmp_path / "b.run").exists()


def test_errors_in_the_data_stop_training_before_anything_is_written(tiny_dataset: Path, tmp_path: Path) -> None:
    write_tiny_case(tiny_dataset, "case_5", 5)
    (tiny_dataset / "labelsTr" / "case_5.nii.gz").write_bytes(b"")
    with pytest.raises(DataError, match="case_5"):
        train(tiny_dataset, tmp_path / "b", settings=TINY, options=RunOptions(device="cpu"))
    assert not (tmp_path / "b").exists()
    assert not (tmp_path / "b.run").exists()


def test_a_loss_that_is_not_finite_names_step_and_cases_and_keeps_the_checkpoint(
    tiny_dataset: Path, tmp_path: Path
) -> None:
    settings = {**TINY, "training.optimizer.learning_rate": 1e30, "schedule.steps": 50, "schedule.validations": 0}
    with pytest.raises(TrainingError, match=r"step \d+: the loss is .*case_\d"):
        train(tiny_dataset, tmp_path / "b", settings=settings, fold="none", options=RunOptions(device="cpu"))
    assert not (tmp_path / "b").exists()


def test_a_disk_that_fills_up_keeps_the_last_checkpoint(
    tiny_dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = RunOptions(device="cpu", checkpoint_every_s=0.0)
    settings = {**TINY, "schedule.steps": 5}
    real: Callable[[int], None] = os.fsync
    calls = 0

    def filling(descriptor: int) -> None:
        nonlocal calls
        calls += str(Path(f"/proc/self/fd/{descriptor}").readlink()).count("checkpoint_")
        if calls > written:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(descriptor)

    monkeypatch.setattr(os, "fsync", filling)
    # Not of run.json, which can't be written then either, and is written last.
    full, written = r"checkpoint_0000000{}\.safetensors: can't be written \(No space left on device\)\. .* ", 0
    with pytest.raises(ResourceError, match=full.format(1)[:-1] + "fold_none holds no whole checkpoint yet"):
        train(tiny_dataset, tmp_path / "b", settings=settings, fold="none", options=options)
    calls, written = 0, 4  # of two checkpoints, each with its hash
    with pytest.raises(ResourceError, match=full.format(3)) as caught:
        train(tiny_dataset, tmp_path / "b", settings=settings, fold="none", options=options)
    intact = tmp_path / "b.run" / "fold_none" / "checkpoint_00000002.safetensors"
    assert caught.value.message.endswith(f"{intact}, of step 2, is intact: --resume goes on from it.")
    monkeypatch.undo()
    assert not (tmp_path / "b").exists()
    assert not list((tmp_path / "b.run").rglob("*.part"))
    assert train(tiny_dataset, tmp_path / "b", fold="none", options=RunOptions(device="cpu", resume=True)).complete


@pytest.mark.slow
def test_a_budget_writes_its_schedule_with_its_reason_and_is_kept(tiny_dataset: Path, tmp_path: Path) -> None:
    settings = {key: value for key, value in TINY.items() if not key.startswith("schedule")}
    result = train(
        tiny_dataset, tmp_path / "b", settings=settings, fold="0", budget_s=25.0, options=RunOptions(device="cpu")
    )
    assert result.complete
    assert "--budget 25 s" in result.plan.reasons["schedule.steps"]
    assert result.plan.schedule.steps != 250_000
    entry = result.metrics["folds"]["0"]
    assert entry["steps"] == (entry["shortening"] or {"end": result.plan.schedule.steps})["end"]


def test_too_small_a_budget_is_refused_with_the_numbers(tiny_dataset: Path, tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="at least 10"):
        train(tiny_dataset, tmp_path / "b", settings=TINY, fold="0", budget_s=5.5, options=RunOptions(device="cpu"))


def test_what_had_passed_of_a_budget_before_the_call_counts(
    tiny_dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_module, "fit_budget", lambda *arguments, **options: pytest.fail("a step was measured"))
    options = RunOptions(device="cpu", passed_s=3600.0)
    with pytest.raises(PlanError, match=r"a budget of 3600 s was over before training"):
        train(tiny_dataset, tmp_path / "b", settings=TINY, fold="0", budget_s=3600.0, options=options)


def test_a_budget_that_is_over_before_training_is_refused_without_a_measurement(
    tiny_dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_module, "fit_budget", lambda *arguments, **options: pytest.fail("a step was measured"))
    with pytest.raises(PlanError, match=r"a budget of 1 s was over before training.*took \d+ s, 5 s are for") as caught:
        train(tiny_dataset, tmp_path / "b", settings=TINY, budget_s=1.0, options=RunOptions(device="cpu"))
    assert caught.value.code == "budget_too_small"


def test_the_same_command_resumes_a_run_with_a_plan_settings_and_a_budget(
    tiny_dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(tiny_dataset, tmp_path / "a", settings=TINY, fold="none", options=RunOptions(device="cpu"))
    plan = Plan.read(tmp_path / "a" / "plan.json")
    wanted = {"training.seed": 3, "schedule.steps": 4, "schedule.validations": 2}

    def again(resume: bool) -> sagittal.TrainResult:
        return train(
            tiny_dataset,
            tmp_path / "b",
            plan=plan,
            settings=wanted,
            budget_s=60.0,
            options=RunOptions(device="cpu", resume=resume),
        )

    with monkeypatch.context() as patch:
        _StopAfter(1, patch)
        assert again(resume=False).ended == "interrupted"
    result = again(resume=True)
    assert result.complete
    assert (result.plan.schedule.steps, result.plan.schedule.validations) == (4, 2)
    with pytest.raises(PlanError, match="plan given differs"):
        changed = plan.replace(training=plan.training.replace(gradient_clip_norm=1.0))
        train(tiny_dataset, tmp_path / "b", plan=changed, options=RunOptions(device="cpu", resume=True))


def test_a_plan_of_fewer_folds_trains_just_these(tiny_dataset: Path, tmp_path: Path) -> None:
    settings = {**TINY, "schedule.steps": 1, "training.folds": 2}
    options = RunOptions(device="cpu")
    with pytest.raises(PlanError, match="--fold 2: the plan has 2 folds"):
        train(tiny_dataset, tmp_path / "b", settings=settings, fold="2", options=options)
    assert not (tmp_path / "b.run").exists()
    train(tiny_dataset, tmp_path / "b", settings=settings, fold="all", options=options)
    assert sagittal.read_bundle(tmp_path / "b").weight_names == ("fold_0", "fold_1")


def test_a_later_fold_joins_the_bundle_by_its_plan_even_without_the_run_folder(
    tiny_dataset: Path, tmp_path: Path
) -> None:
    options = RunOptions(device="cpu")
    train(tiny_dataset, tmp_path / "b", settings={**TINY, "training.seed": 9}, fold="0", options=options)
    shutil.rmtree(tmp_path / "b.run")
    with pytest.raises(PlanError, match="segformer3d"):
        train(tiny_dataset, tmp_path / "b", network="segformer3d", fold="1", options=options)
    assert train(tiny_dataset, tmp_path / "b", fold="1", options=options).plan.training.seed == 9
    assert sagittal.read_bundle(tmp_path / "b").weight_names == ("fold_0", "fold_1")
    with pytest.raises(TrainingError, match="can't join"):
        train(tiny_dataset, tmp_path / "b", fold="none", options=RunOptions(device="cpu", resume=True))


def test_a_fold_that_was_stopped_stays_out_of_a_bundle_with_finished_ones(
    tiny_dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(tiny_dataset, tmp_path / "b", settings=TINY, fold="0", options=RunOptions(device="cpu"))
    with monkeypatch.context() as patch:
        _StopAfter(1, patch)
        result = train(tiny_dataset, tmp_path / "b", fold="1", options=RunOptions(device="cpu"))
    assert result.ended == "interrupted"
    assert sagittal.read_bundle(tmp_path / "b").weight_names == ("fold_0",)
    train(tiny_dataset, tmp_path / "b", fold="1", options=RunOptions(device="cpu", resume=True))
    assert sagittal.read_bundle(tmp_path / "b").weight_names == ("fold_0", "fold_1")


def test_a_stop_during_the_validation_of_a_fold_starts_no_other(
    tiny_dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = finish_module.evaluate

    def stopping(*arguments: Any, **options: Any) -> Any:
        os.kill(os.getpid(), 2)
        return real(*arguments, **options)

    monkeypatch.setattr(finish_module, "evaluate", stopping)
    result = train(tiny_dataset, tmp_path / "b", settings=TINY, fold="all", options=RunOptions(device="cpu"))
    assert result.ended == "interrupted"
    assert sagittal.read_bundle(tmp_path / "b").weight_names == ("fold_0",)


def test_a_validation_that_was_stopped_is_done_again_on_resume(
    tiny_dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = finish_module.Predictor.predict

    def stopping(*arguments: Any, **options: Any) -> Any:
        os.kill(os.getpid(), 2)
        return real(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(finish_module.Predictor, "predict", stopping)
        result = train(tiny_dataset, tmp_path / "b", settings=TINY, options=RunOptions(device="cpu"))
    assert result.ended == "interrupted"
    stopped = sagittal.read_bundle(tmp_path / "b")
    assert len(stopped.metrics["folds"]["0"]["cases"]) == 1
    result = train(tiny_dataset, tmp_path / "b", options=RunOptions(device="cpu", resume=True))
    assert result.complete
    whole = sagittal.read_bundle(tmp_path / "b")
    assert len(whole.metrics["folds"]["0"]["cases"]) == 2
    for name, values in whole.weights("fold_0").items():
        np.testing.assert_array_equal(values, stopped.weights("fold_0")[name])


def test_an_empty_folder_takes_a_bundle_and_any_other_is_refused(tiny_dataset: Path, tmp_path: Path) -> None:
    settings = {**TINY, "schedule.steps": 1}
    (tmp_path / "b").mkdir()
    train(tiny_dataset, tmp_path / "b", settings=settings, fold="none", options=RunOptions(device="cpu"))
    assert sagittal.read_bundle(tmp_path / "b").weight_names == ("all",)
    with pytest.raises(BundleError, match="tiny"):
        train(tiny_dataset, tiny_dataset, settings=settings, fold="none", options=RunOptions(device="cpu"))


def test_a_gradient_that_is_not_finite_leaves_the_weights_as_they_were() -> None:
    plan = untrained_plan("segformer3d", untrained_spec(3))
    network = torch.nn.Conv3d(1, plan.dataset.num_outputs, 1)
    network.weight.register_hook(lambda grad: grad * float("inf"))
    before = network.weight.detach().clone()
    batch = Batch(7, torch.rand(2, 1, 4, 5, 6), torch.zeros(2, 4, 5, 6, dtype=torch.int64), ("one", "two"))
    state = TrainState(network, new_optimizer(network, plan.training.optimizer), None, None)
    with pytest.raises(TrainingError, match=r"step 7: .*gradient (inf|nan).*one, two"):
        train_on_batch(state, batch, plan, rate_factor=1.0, index=label_index(plan.dataset))
    assert torch.equal(network.weight, before)
