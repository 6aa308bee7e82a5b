"""Networks whose results are known, with plans and scans to match."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sagittal.inference.engines.torch_engine import TorchEngine
from sagittal.inference.predictor import Predictor
from sagittal.plan import DatasetSpec, Plan
from sagittal.testing.plans import untrained_plan, untrained_spec
from sagittal.volumes import Volume

# Small enough that a prediction takes milliseconds.
TINY: dict[str, Any] = {
    "network.embed_dims": [4, 4, 8, 8],
    "network.num_heads": [1, 1, 2, 2],
    "network.depths": [1, 1, 1, 1],
    "network.decoder_dim": 8,
    "preprocessing.normalization": [{"kind": "none"}],
}


class Threshold(nn.Module):
    """Class 1 where the first channel exceeds one half, class 2 where it is larger still: the result is known."""

    def forward(self, x: Tensor) -> Tensor:
        first = x[:, :1]
        return torch.cat([0.5 - first, 1.5 - (first - 1.5).abs(), 1.5 * (first - 1)], dim=1)

    @staticmethod
    def expected(image: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        logits = Threshold()(torch.from_numpy(image.astype(np.float32))[None])
        labels: np.ndarray[Any, Any] = logits[0].argmax(dim=0).numpy()
        return labels


def tiny_plan(spec: DatasetSpec | None = None, **settings: Any) -> Plan:
    spec = spec or untrained_spec(3)
    none = [{"kind": "none"}] * len(spec.channel_names)
    changes = {**TINY, "preprocessing.normalization": none, "preprocessing.crop_to_nonzero": False, **settings}
    return untrained_plan("segformer3d", spec, patch_size=(16, 18, 20), settings=changes)


def scan_of(shape: tuple[int, int, int], affine: np.ndarray[Any, Any] | None = None, seed: int = 0) -> Volume:
    array = np.random.default_rng(seed).uniform(0, 3, (1, *shape)).astype(np.float32)
    return Volume(array, np.eye(4)[:, [2, 1, 0, 3]] if affine is None else affine)


def predictor_of(plan: Plan, *networks: nn.Module) -> Predictor:
    return Predictor(plan, TorchEngine(plan, networks, "cpu"))
