"""A GPU trains as the CPU does, within rounding, and what it leaves behind serves on either."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import sagittal
from sagittal.data.label_index import label_index
from sagittal.plan.dataset import DatasetSpec, Label
from sagittal.plan.loss import Loss
from sagittal.plan.plan import Plan
from sagittal.testing.datasets import TINY_SETTINGS as TINY
from sagittal.training import fold as fold_module
from sagittal.training.log import read_log
from sagittal.training.losses import segmentation_loss
from sagittal.training.run import train
from sagittal.training.stages import RunOptions

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

# With one voxel at its coarsest grid SegFormer3D's batch norm turns rounding into far more than that, step by step.
TOLERANCE = {"mednext-s": 5e-3, "segformer3d": 0.05}
UNCHANGED = {
    f"training.augmentation.{name}_probability": 0.0
    for name in (
        *("rotation", "scaling", "noise", "blur", "brightness", "contrast"),
        *("low_resolution", "gamma", "gamma_inverted"),
    )
}


def _losses(out: Path) -> list[float]:
    log = out.with_name(out.name + ".run") / "fold_none" / "log.jsonl"
    return [record["loss"] for record in read_log(log) if record["kind"] == "step"]


def _settings(network: str, **changes: Any) -> dict[str, Any]:
    kept = {key: value for key, value in TINY.items() if network == "mednext-s" or "network" not in key}
    return {**kept, "schedule.steps": 6, **changes}


def _stop_after(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    real = fold_module.train_on_batch

    def stopping(state: Any, batch: Any, plan: Plan, **more: Any) -> Any:
        if batch.step == step:
            os.kill(os.getpid(), 2)
        return real(state, batch, plan, **more)

    monkeypatch.setattr(fold_module, "train_on_batch", stopping)


@pytest.mark.parametrize("network", ["mednext-s", "segformer3d"])
def test_losses_are_the_cpus(tiny_dataset: Path, tmp_path: Path, network: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    settings = _settings(network, **UNCHANGED)
    for device in ("cpu", "cuda"):
        options = RunOptions(device=device)
        train(tiny_dataset, tmp_path / device, network=network, settings=settings, fold="none", options=options)
    assert _losses(tmp_path / "cuda") == pytest.approx(_losses(tmp_path / "cpu"), rel=TOLERANCE[network])


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("network", ["mednext-s", "segformer3d"])
def test_an_interrupted_run_goes_on_where_it_stopped(
    tiny_dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, network: str, precision: str
) -> None:
    settings = _settings(network, **{"training.precision": precision})
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    train(tiny_dataset, whole, network=network, settings=settings, fold="none", options=RunOptions(device="cuda"))
    with monkeypatch.context() as patch:
        _stop_after(2, patch)
        stopped = train(
            tiny_dataset, cut, network=network, settings=settings, fold="none", options=RunOptions(device="cuda")
        )
    assert stopped.ended == "interrupted"
    resumed = train(tiny_dataset, cut, fold="none", options=RunOptions(device="cuda", resume=True))
    assert resumed.complete
    # Sums on a GPU come in no fixed order, so the last bits differ from run to run.
    assert _losses(cut) == pytest.approx(_losses(whole), rel=TOLERANCE[network] * (4 if precision == "bf16" else 1))
    assert sagittal.read_bundle(cut).metrics["folds"]["none"]["device"].startswith("cuda")


def test_a_bundle_trained_on_a_gpu_predicts_the_same_on_the_cpu(tiny_dataset: Path, tmp_path: Path) -> None:
    settings = {**TINY, "schedule.steps": 40, "training.optimizer.learning_rate": 0.005}
    result = train(tiny_dataset, tmp_path / "b", settings=settings, fold="0", options=RunOptions(device="cuda"))
    assert result.complete
    assert result.metrics["mean_dice"] is not None
    scan = tiny_dataset / "imagesTs" / "case_test_0000.nii.gz"
    labels = [sagittal.load(tmp_path / "b", device=device).predict(scan).array for device in ("cuda", "cpu")]
    assert np.mean(labels[0] == labels[1]) > 0.99


@pytest.mark.parametrize("regions", [False, True])
def test_the_loss_of_regions_and_ignored_voxels_is_the_cpus(regions: bool) -> None:
    spec = DatasetSpec(
        name="x",
        channel_names=("MR",),
        labels=(Label(name="whole", values=(1, 2) if regions else (1,)), Label(name="core", values=(2,))),
        ignore_value=3,
        regions_class_order=(1, 2) if regions else None,
        file_ending=".nii.gz",
    )
    index = label_index(spec)
    logits = [torch.randn(2, spec.num_outputs, 12 >> scale, 10 >> scale, 14 >> scale) for scale in range(2)]
    targets = torch.randint(4, (2, 12, 10, 14))
    config = Loss(deep_supervision_weights=(0.6, 0.4))
    expected = segmentation_loss(logits, targets, index, config)
    loss = segmentation_loss([output.cuda() for output in logits], targets.cuda(), index, config)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4)
