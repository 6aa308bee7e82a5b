"""Prediction on a GPU gives the CPU's label maps, and its memory does not count as the host's."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from sagittal.inference.predictor import load
from sagittal.plan import DatasetSpec, Label
from sagittal.testing.bundle import write_random_bundle
from sagittal.testing.plans import untrained_plan, untrained_spec
from sagittal.volumes import Volume

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

SETTINGS = {
    "patch.size": [16, 32, 16],
    "network.channels": 8,
    "network.block_counts": [1] * 9,
    "preprocessing.spacing_mm": [1.5, 1.0, 1.2],
}
REGIONS = DatasetSpec(
    name="regions",
    channel_names=("MR",),
    labels=(Label(name="whole", values=(1, 2)), Label(name="core", values=(2,))),
    regions_class_order=(1, 2),
    file_ending=".nii.gz",
)


def _scan() -> Volume:
    rng = np.random.default_rng(0)
    coarse = rng.normal(100, 20, (1, 6, 8, 5)).astype(np.float32)
    return Volume(np.kron(coarse, np.ones((1, 5, 6, 5), np.float32)), np.diag([1.0, 1.0, 1.0, 1.0]))


@pytest.mark.parametrize("spec", [untrained_spec(4), REGIONS], ids=["classes", "regions"])
def test_labels_are_the_cpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spec: DatasetSpec) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    plan = untrained_plan("mednext-s", spec, settings=SETTINGS)
    bundle = write_random_bundle(tmp_path / "b", plan, folds=("fold_0", "fold_1"))
    expected = load(bundle, device="cpu", engine="torch").predict(_scan())
    labels = load(bundle, device="cuda").predict(_scan(), memory_gib=4.0)
    assert labels.array.shape == _scan().array.shape
    assert len(np.unique(expected.array)) > 1
    assert np.mean(labels.array == expected.array) > 0.999
