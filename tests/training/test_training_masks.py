"""Masks of a prediction are those of the label map that is written."""

from __future__ import annotations

import numpy as np
import torch

from sagittal.data.label_index import label_index
from sagittal.plan import DatasetSpec, Label
from sagittal.training.masks import label_masks


def _masks(spec: DatasetSpec, logits: torch.Tensor, reference: torch.Tensor) -> list[tuple[list[bool], list[bool]]]:
    found = label_masks(logits, reference, label_index(spec))
    return [(wanted.flatten().tolist(), predicted.flatten().tolist()) for wanted, predicted in found]


def test_regions_are_those_of_the_written_values_also_where_outputs_disagree() -> None:
    labels = (
        Label(name="whole", values=(1, 2, 4)),
        Label(name="core", values=(1, 4)),
        Label(name="active", values=(4,)),
    )
    spec = DatasetSpec(
        name="tumour", channel_names=("T1",), labels=labels, regions_class_order=(2, 1, 4), file_ending=".nii.gz"
    )
    # Voxels: nothing, the whole, the core alone, the active part alone, all three.
    signs = np.array([[-1, 1, -1, -1, 1], [-1, -1, 1, -1, 1], [-1, -1, -1, 1, 1]], np.float32)
    logits = torch.from_numpy(signs)[:, None, None]
    written = label_index(spec).decode(logits.numpy())
    assert written.flatten().tolist() == [0, 2, 1, 4, 4]

    masks = _masks(spec, logits, torch.zeros((1, 1, 5), dtype=torch.int64))
    assert [predicted for _, predicted in masks] == [
        np.isin(written, label.values).flatten().tolist() for label in labels
    ]


def test_ignored_voxels_are_in_no_mask() -> None:
    spec = DatasetSpec(
        name="organ",
        channel_names=("MR",),
        labels=(Label(name="organ", values=(7,)),),
        ignore_value=9,
        file_ending=".mha",
    )
    logits = torch.tensor([[-1.0, -1.0, 1.0], [1.0, 1.0, -1.0]])[:, None, None]
    reference = torch.from_numpy(label_index(spec).encode(np.array([[[7, 9, 7]]])).astype(np.int64))
    assert _masks(spec, logits, reference) == [([True, False, True], [True, False, False])]
