"""A data set small enough to train on within a test."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from sagittal.plan.base import write_atomically
from sagittal.volumes import Volume

SHAPE = (18, 22, 20)
AFFINE = np.array([[0, 0, 1, -9], [0, 1.2, 0, 5], [2, 0, 0, 7], [0, 0, 0, 1]], np.float64)

TINY_SETTINGS: Mapping[str, Any] = {
    "network.channels": 4,
    "network.block_counts": [1] * 9,
    "patch.size": [16, 16, 16],
    "training.batch_size": 2,
    "schedule.steps": 3,
    "schedule.validations": 1,
}
"""Overrides of a MedNeXt's plan under which a step takes milliseconds."""


def write_tiny_case(folder: Path, name: str, seed: int, *, part: str = "Tr") -> None:
    """Write one case, (D, H, W) = (18, 22, 20) at 2 x 1.2 x 1 mm: noise, a bright box (1) and a dark box (2).

    Args:
        folder: data set.
        name: case id.
        seed: of the noise and of the boxes' places.
        part: `Tr` for training, `Ts` for test cases.
    """
    rng = np.random.default_rng(seed)
    image = rng.normal(100, 5, SHAPE).astype(np.float32)
    labels = np.zeros(SHAPE, np.uint8)
    for value, brightness, first in ((1, 60, 1), (2, -60, 10)):
        d, h, w = int(rng.integers(1, 11)), int(rng.integers(first, first + 5)), int(rng.integers(1, 13))
        box = (slice(d, d + 6), slice(h, h + 6), slice(w, w + 6))
        image[box] += brightness
        labels[box] = value
    Volume(image[None], AFFINE).write(folder / f"images{part}" / f"{name}_0000.nii.gz")
    Volume(labels[None], AFFINE).write(folder / f"labels{part}" / f"{name}.nii.gz")


def write_tiny_dataset(folder: Path, *, cases: int = 6) -> Path:
    """Write a data set in nnU-Net's layout with labels bright (1), dark (2) and one test case; return its folder."""
    for number in range(cases):
        write_tiny_case(folder, f"case_{number}", number)
    write_tiny_case(folder, "case_test", cases, part="Ts")
    declared = {
        "channel_names": {"0": "MR"},
        "labels": {"background": 0, "bright": 1, "dark": 2},
        "numTraining": cases,
        "file_ending": ".nii.gz",
    }
    write_atomically(folder / "dataset.json", json.dumps(declared, indent=2).encode())
    return folder
