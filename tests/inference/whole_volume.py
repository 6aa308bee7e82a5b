"""The plain way from logits to labels, the whole volume at once, to compare with."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sagittal.data.label_index import LabelIndex
from sagittal.plan.base import Triple


def labels_on_grid(logits: Tensor, shape: Triple, index: LabelIndex) -> np.ndarray[Any, Any]:
    """Return label values (D, H, W) of logits (K, d, h, w) that cover the same space."""
    whole = nn.functional.interpolate(logits[None].double(), size=shape, mode="trilinear", align_corners=False)[0]
    values = index.values_of_classes()
    if not index.spec.has_regions:
        return np.asarray(values[whole.argmax(dim=0).numpy()])
    labels = np.zeros(shape, values.dtype)
    for value, region in zip(values, torch.sigmoid(whole).numpy(), strict=True):
        labels[region > 0.5] = value
    return labels
