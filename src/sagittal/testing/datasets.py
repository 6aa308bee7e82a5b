"""Data sets made up for tests: one small enough to train on in seconds, one with a structure of thirty voxels."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy.ndimage import gaussian_filter

from sagittal.plan.base import Triple, write_atomically
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


LESION_SHAPE = (128, 128, 128)
_LESION_RADIUS_VOX = 1.95
"""A ball of about thirty voxels."""


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


def write_lesion_case(folder: Path, name: str, seed: int, *, shape: Triple = LESION_SHAPE) -> None:
    """Write one case at 1 mm: an organ (1) of some 100 000 voxels and a lesion (2) of about 30, in or beside it.

    The noise is half fine, half coarse and has a standard deviation of about 14; the organ is 40 brighter than what
    surrounds it, the lesion 100 brighter, wherever it lies.

    Args:
        folder: data set.
        name: case id.
        seed: of everything that is random.
        shape: D, H, W, large enough for the organ's radii of up to 34 voxels.
    """
    rng = np.random.default_rng(seed)
    places = np.indices(shape, dtype=np.float32)
    coarse = gaussian_filter(rng.normal(0, 1, shape).astype(np.float32), 2.0)
    image = 100 + rng.normal(0, 10, shape).astype(np.float32) + coarse * (10 / coarse.std())
    radii, centre = rng.uniform(24, 34, 3), [float(rng.uniform(0.35, 0.65) * size) for size in shape]
    organ = _ellipsoid(places, centre, radii)
    labels = organ.astype(np.uint8)
    lesion = _ellipsoid(places, [float(rng.uniform(12, size - 12)) for size in shape], [_LESION_RADIUS_VOX] * 3)
    image += 40.0 * organ + 100.0 * lesion
    labels[lesion] = 2
    Volume(image[None], np.eye(4)).write(folder / "imagesTr" / f"{name}_0000.nii")
    Volume(labels[None], np.eye(4)).write(folder / "labelsTr" / f"{name}.nii")


def write_lesion_dataset(folder: Path, *, cases: int = 10) -> Path:
    """Write a data set of 128^3 voxels with a large organ and a tiny lesion in nnU-Net's layout; return its folder."""
    for number in range(cases):
        write_lesion_case(folder, f"case_{number:02d}", number)
    declared = {
        "channel_names": {"0": "MR"},
        "labels": {"background": 0, "organ": 1, "lesion": 2},
        "numTraining": cases,
        "file_ending": ".nii",
    }
    write_atomically(folder / "dataset.json", json.dumps(declared, indent=2).encode())
    return folder


def _ellipsoid(places: np.ndarray, centre: Sequence[float], radii: Sequence[float] | np.ndarray) -> np.ndarray:
    """Return where (3, D, H, W) voxel coordinates lie in an ellipsoid along the axes."""
    distances = [((places[axis] - centre[axis]) / radii[axis]) ** 2 for axis in range(3)]
    return np.asarray(sum(distances) <= 1.0)
