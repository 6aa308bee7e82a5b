"""What a prediction says of each label, beside what the reference says."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from sagittal.data.label_index import LabelIndex


def label_masks(logits: Tensor, reference: Tensor, index: LabelIndex) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield two masks (D, H, W) for each label in the order of the declaration: reference, prediction.

    A region is predicted where the label map that is written has one of its values: a voxel of a core alone gets the
    core's value, and so is in the whole that the core is a part of. One label at a time, for all of them together would
    need as many volumes. Ignored voxels are in neither.

    Args:
        logits: (K, D, H, W), outputs of the network.
        reference: (D, H, W), label indices.
        index: what the indices mean.
    """
    valid = (
        torch.ones_like(reference, dtype=torch.bool) if index.ignore_index is None else reference != index.ignore_index
    )
    membership = torch.from_numpy(index.membership).to(reference.device)
    decided = _decided(logits, index)
    for output in range(0 if index.spec.has_regions else 1, logits.shape[0]):
        wanted = membership[output][reference.where(valid, torch.zeros_like(reference))] & valid
        yield wanted, membership[output][decided] & valid


def _decided(logits: Tensor, index: LabelIndex) -> Tensor:
    """Return the index of the value that is written for each voxel (D, H, W); background for what no region holds."""
    order = index.spec.regions_class_order
    if order is None:
        return logits.argmax(0)
    decided = torch.zeros(logits.shape[1:], dtype=torch.int64, device=logits.device)
    for value, region in zip(order, logits, strict=True):
        decided[region > 0] = index.values.index(value) if value in index.values else 0
    return decided
