"""A cache of small cases written by hand, and a plan for it: what sampling and loading are tested on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from sagittal.data.cache import Cache, Entry, image_path, labels_path, locations_path
from sagittal.plan import DatasetSpec, Label, Plan, SegFormer3DConfig
from sagittal.plan.augmentation import Augmentation
from sagittal.plan.base import Triple
from sagittal.plan.loss import Loss
from sagittal.plan.optimizers import AdamW
from sagittal.plan.plan import Inference, Patch, Preprocessing, ZScore
from sagittal.plan.schedule import Schedule
from sagittal.plan.training import Training

UNCHANGED = Augmentation(
    rotation_probability=0.0,
    scaling_probability=0.0,
    mirror_axes=(),
    noise_probability=0.0,
    blur_probability=0.0,
    brightness_probability=0.0,
    contrast_probability=0.0,
    low_resolution_probability=0.0,
    gamma_probability=0.0,
    gamma_inverted_probability=0.0,
)


def write_cache(folder: Path, cases: Mapping[str, tuple[np.ndarray, np.ndarray]]) -> Cache:
    """Write images (C, D, H, W) and label indices (D, H, W) as preprocessing lays them out."""
    for part in ("images", "labels", "locations"):
        (folder / part).mkdir(parents=True)
    entries = tuple(Entry(name, name, name) for name in cases)
    for entry, (image, labels) in zip(entries, cases.values(), strict=True):
        np.save(image_path(folder, entry), image.astype(np.float16))
        np.save(labels_path(folder, entry), labels.astype(np.uint8))
        found = {str(index): np.argwhere(labels == index).astype(np.int32) for index in (1, 2)}
        np.savez(locations_path(folder, entry), **found)
    return Cache(folder, entries)


def blocks(shape: Triple, seed: int, indices: Sequence[int] = (1, 2)) -> tuple[np.ndarray, np.ndarray]:
    """Return a noisy image (1, D, H, W) and labels with one small block per index, in opposite corners."""
    rng = np.random.default_rng(seed)
    labels = np.zeros(shape, dtype=np.uint8)
    for index in indices:
        corner = [1 if index == 1 else size - 4 for size in shape]
        labels[tuple(slice(start, start + 3) for start in corner)] = index
    image = rng.normal(0, 0.1, shape) + labels
    return image[np.newaxis], labels


def make_plan(
    patch_size: Triple,
    *,
    batch_size: int = 2,
    steps: int = 12,
    seed: int = 0,
    share: float = 0.33,
    augmentation: Augmentation = UNCHANGED,
    nonzero_only: bool = False,
) -> Plan:
    """Return a plan for one channel and the classes 1 and 2."""
    return Plan(
        network_name="segformer3d",
        dataset=DatasetSpec(
            name="blocks",
            channel_names=("MR",),
            labels=(Label(name="first", values=(1,)), Label(name="second", values=(2,))),
            file_ending=".nii.gz",
        ),
        fingerprint_sha256="0" * 64,
        preprocessing=Preprocessing(spacing_mm=(2.0, 1.0, 1.0), normalization=(ZScore(nonzero_only=nonzero_only),)),
        patch=Patch(size=patch_size),
        network=SegFormer3DConfig(),
        training=Training(
            batch_size=batch_size,
            optimizer=AdamW(learning_rate=1e-3, weight_decay=0.0),
            loss=Loss(),
            augmentation=augmentation,
            foreground_oversampling=share,
            seed=seed,
        ),
        schedule=Schedule(steps=steps),
        inference=Inference(),
        reasons={},
    )
