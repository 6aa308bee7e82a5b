"""What a prediction says of each label, beside what the reference says."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from sagittal.data.label_index import LabelIndex


def label_masks(logits: Tensor, reference: Tensor, index: LabelIndex) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield two masks (D, H, W) for each label in the order of the declaration: reference, prediction.

    One label at a time, for all of them together would need as many volumes. Ignored voxels are in neither.

    Args:
        logits: (K, D, H, W), outputs of the network.
        reference: (D, H, W), label indices.
        index: what the indices mean.
    """
    valid = (
        torch.ones_like(reference, dtype=torch.bool) if index.ignore_index is None else reference != index.ignore_index
    )
    membership = torch.from_numpy(index.membership).to(reference.device)
    winner = None if index.spec.has_regions else logits.argmax(0)
    for output in range(0 if index.spec.has_regions else 1, logits.shape[0]):
        wanted = membership[output][reference.where(valid, torch.zeros_like(reference))] & valid
        yield wanted, (logits[output] > 0 if winner is None else winner == output) & valid
