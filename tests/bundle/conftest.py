from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sagittal.bundle import write_bundle
from sagittal.plan import Plan
from sagittal.testing.plans import untrained_plan, untrained_spec

Weights = dict[str, dict[str, np.ndarray[Any, Any]]]


@pytest.fixture
def plan() -> Plan:
    return untrained_plan("segformer3d", untrained_spec(3), patch_size=(16, 24, 32))


@pytest.fixture
def weights() -> Weights:
    rng = np.random.default_rng(0)
    fold = {
        "stem.weight": rng.standard_normal((4, 1, 3, 3, 3)).astype(np.float32),
        "head.bias": rng.standard_normal(3).astype(np.float16),
        "norm.running_mean": np.zeros(4),
        "norm.num_batches_tracked": np.array(7),
    }
    return {"fold_0": fold, "fold_1": {name: array * 2 for name, array in fold.items()}}


@pytest.fixture
def metrics() -> dict[str, Any]:
    return {
        "dice": {"class_1": 0.875, "class_2": None},
        "mean_dice": 0.875,
        "validation": "4 cases of fold 0, which training never saw",
        "training_cases": 16,
    }


@pytest.fixture
def bundle_path(tmp_path: Path, plan: Plan, weights: Weights, metrics: dict[str, Any]) -> Path:
    return write_bundle(tmp_path / "models" / "model", plan=plan, weights=weights, metrics=metrics)
