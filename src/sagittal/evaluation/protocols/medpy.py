"""Metrics as medpy computes them, which nnFormer, TransUNet, CaPTk and the evaluation of ACDC call.

medpy pools the distances of both directions before it takes the 95th percentile; its surface voxels are ours. Without
`voxelspacing` a distance is in voxels, whatever their size.

Source: medpy 0.5, medpy.metric.binary.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from sagittal.evaluation.pair import MaskPair


def dice_or_one(pair: MaskPair) -> float:
    """Return Dice; 1 where both masks are empty."""
    value = pair.counts.dice
    return 1.0 if value is None else value


def hd95_vox(pair: MaskPair) -> float | None:
    """Return the 95th percentile of the distances of both directions, in voxels; None where a mask is empty."""
    distances = replace(pair, spacing_mm=(1.0, 1.0, 1.0)).distances
    return None if distances is None else float(np.percentile(np.concatenate(distances), 95))
