"""What MONAI makes of the masks of metric_masks.py: Dice, IoU, HD, HD95, ASSD and the NSD of voxels.

    python benchmarks/oracles/monai_metrics.py > tests/golden/metrics/monai_metrics.json

Runs where MONAI 1.6 is installed, which computes in float32. Printed is JSON; NaN and infinity are strings: what MONAI
says where a mask is empty is not what Sagittal says.
"""

import json
import math

import numpy as np
import torch
from metric_masks import PAIRS, TOLERANCES_MM, pair
from monai import __version__
from monai.metrics import (
    compute_average_surface_distance,
    compute_dice,
    compute_hausdorff_distance,
    compute_iou,
    compute_surface_dice,
)


def told(value: torch.Tensor) -> float | str:
    """Return a value as JSON can hold it."""
    number = float(value)
    return number if math.isfinite(number) else str(number)


def measure(name: str) -> dict:
    """Return all numbers of one pair."""
    reference, prediction, spacing = pair(name)
    given = [torch.from_numpy(mask[None, None].astype(np.float32)) for mask in (prediction, reference)]
    tensors, surfaces = {"y_pred": given[0], "y": given[1]}, {"include_background": True, "spacing": spacing}
    return {
        "dice": told(compute_dice(**tensors)),
        "iou": told(compute_iou(**tensors)),
        "hd_mm": told(compute_hausdorff_distance(**tensors, **surfaces)),
        "hd95_mm": told(compute_hausdorff_distance(**tensors, **surfaces, percentile=95)),
        "assd_mm": told(compute_average_surface_distance(**tensors, **surfaces, symmetric=True)),
        "nsd": {
            f"{tolerance:g}": told(compute_surface_dice(**tensors, **surfaces, class_thresholds=[tolerance]))
            for tolerance in TOLERANCES_MM
        },
    }


if __name__ == "__main__":
    print(json.dumps({"monai": __version__, "pairs": {name: measure(name) for name in PAIRS}}, indent=1))
