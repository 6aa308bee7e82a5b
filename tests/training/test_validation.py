"""Whole cases from the cache are predicted and scored."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from sagittal.data.label_index import label_index
from sagittal.testing.plans import untrained_plan, untrained_spec
from sagittal.training.validation import validate_on_cache


def test_a_case_that_is_cached_as_float32_and_mapped_read_only_is_scored_without_a_warning() -> None:
    spec = untrained_spec(2)
    image = np.where(np.arange(20) < 5, 1, -1).astype(np.float32) * np.ones((1, 16, 18, 20), np.float32)
    labels = (image[0] > 0).astype(np.uint8)
    image.setflags(write=False)
    cache: Any = SimpleNamespace(case_ids=("a",), image=lambda case: image, labels=lambda case: labels)
    network = torch.nn.Conv3d(1, 2, 1)
    with torch.no_grad():
        network.weight.copy_(torch.tensor([0.0, 1.0]).reshape(2, 1, 1, 1, 1))
        torch.nn.init.zeros_(network.bias)
    score = validate_on_cache(
        network, cache, (0,), untrained_plan("mednext-s", spec, patch_size=(16, 16, 16)), label_index(spec)
    )
    assert score.mean_dice == 1.0
