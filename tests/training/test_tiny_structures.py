"""A structure of thirty voxels in 128^3 is learned, where the same set makes other tools' classes collapse (N#3048)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sagittal.testing.datasets import write_lesion_dataset
from sagittal.training.run import train
from sagittal.training.stages import RunOptions
from sagittal.volumes import read_labels

SETTINGS: dict[str, Any] = {
    "network.channels": 8,
    "network.block_counts": [1] * 9,
    "patch.size": [32, 32, 32],
    "training.batch_size": 2,
    "schedule.steps": 500,
    "schedule.validations": 1,
    "inference.mirror_axes": [],
    "inference.overlap": 0.25,
}
"""A small network that sees a sixty-fourth of a scan, so that it learns in a minute; all else is as planned."""


@pytest.mark.slow
def test_a_lesion_of_thirty_voxels_is_found_in_whole_held_out_cases(tmp_path: Path) -> None:
    data = write_lesion_dataset(tmp_path / "data")
    for path in sorted((data / "labelsTr").iterdir()):
        labels, _ = read_labels(path)
        assert labels.shape == (128, 128, 128)
        assert 25 <= int(np.sum(labels == 2)) <= 35
    result = train(data, tmp_path / "bundle", settings=SETTINGS, options=RunOptions(device="cpu"))
    assert result.plan.training.class_balanced
    assert result.plan.training.loss.rare_class_power == 0.5
    assert "less than 0.002" in result.plan.reasons["training.loss.rare_class_power"]
    assert result.metrics["folds"]["0"]["held_out_cases"] == 2
    dice = result.metrics["dice"]
    assert set(dice) == {"organ", "lesion"}
    assert min(dice.values()) > 0.5, dice
