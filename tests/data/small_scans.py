"""Small labelled data sets on disk: what fingerprint, cache and planning are tested on."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from sagittal.data.dataset import Dataset, read_dataset
from sagittal.plan import DatasetSpec, Label
from sagittal.volumes import Volume

AXES_RAS = np.array([[0, 0, 1], [0, 1, 0], [1, 0, 0]], dtype=float)
"""World direction (x, y, z) of D, H, W, as columns: head, front, right."""


def affine_of(spacing_mm: tuple[float, float, float], axes: np.ndarray = AXES_RAS) -> np.ndarray:
    """An affine over (d, h, w) whose axes point along the columns of `axes`."""
    affine = np.eye(4)
    affine[:3, :3] = axes * np.array(spacing_mm)
    affine[:3, 3] = (-12.0, 7.5, 30.0)
    return affine


def ball_case(
    shape: tuple[int, int, int], seed: int, *, channels: int = 1, border: int = 2
) -> tuple[np.ndarray, np.ndarray]:
    """A noisy image (C, D, H, W), zero within `border` voxels of the edge, and labels 1 and 2 in its middle."""
    rng = np.random.default_rng(seed)
    labels = np.zeros(shape, np.uint8)
    d, h, w = (size // 2 for size in shape)
    labels[d - 2 : d + 2, h - 2 : h + 2, w - 3 : w] = 1
    labels[d - 2 : d + 2, h - 2 : h + 1, w : w + 3] = 2
    image = np.zeros((channels, *shape), np.float32)
    inside = tuple(slice(border, size - border) for size in shape)
    image[:, *inside] = 10 + rng.normal(size=(channels, *shape))[:, *inside] + 5 * labels[inside]
    return image, labels


def write_dataset(
    folder: Path,
    cases: Mapping[str, tuple[np.ndarray, np.ndarray]],
    *,
    affine: np.ndarray | None = None,
    channel_names: tuple[str, ...] = ("MR",),
    labels: Mapping[str, Any] | None = None,
    **entries: Any,
) -> Dataset:
    """Write images (C, D, H, W) and labels (D, H, W) in nnU-Net's layout and read the data set back."""
    affine = affine_of((1.0, 1.0, 1.0)) if affine is None else affine
    for part in ("imagesTr", "labelsTr"):
        (folder / part).mkdir(parents=True)
    for name, (image, label) in cases.items():
        for channel, voxels in enumerate(image):
            Volume(voxels[None], affine).write(folder / "imagesTr" / f"{name}_{channel:04d}.nii.gz")
        Volume(label[None], affine).write(folder / "labelsTr" / f"{name}.nii.gz")
    content = {
        "name": "small",
        "channel_names": {str(i): name for i, name in enumerate(channel_names)},
        "labels": labels or {"background": 0, "first": 1, "second": 2},
        "numTraining": len(cases),
        "file_ending": ".nii.gz",
        **entries,
    }
    (folder / "dataset.json").write_text(json.dumps(content))
    return read_dataset(folder)


def spec_of(*names: str, ignore: int | None = None, values: tuple[int, ...] | None = None) -> DatasetSpec:
    """A data set of classes with these names."""
    values = values or tuple(range(1, len(names) + 1))
    return DatasetSpec(
        name="small",
        channel_names=("MR",),
        labels=tuple(Label(name=name, values=(value,)) for name, value in zip(names, values, strict=True)),
        ignore_value=ignore,
        file_ending=".nii.gz",
    )
