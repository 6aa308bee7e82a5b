"""A made-up body in Hounsfield units: big enough to look at, small enough to compute."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np

from sagittal.volumes import Volume

SHAPE = (40, 72, 88)
AFFINE = np.array([[0, 0, -3.0, 130], [0, -3.0, 0, 110], [5.0, 0, 0, -100], [0, 0, 0, 1]])
"""Voxels run towards the feet's opposite, the back and the right's opposite, as those of most CT scans."""
NAMES = ("liver", "spleen", "left kidney", "right kidney")


class Body(NamedTuple):
    """Files of the phantom."""

    image: Path
    labels: Path
    other: Path


def write_phantom(folder: Path, *, scale: float = 1.0, is_doll: bool = False) -> Body:
    """Write the scan, its labels and a second opinion of them.

    Args:
        folder: to write to.
        scale: 2 doubles each side of the array.
        is_doll: make voxels of a millimetre or two, so that a network's windows are few.
    """
    shape = tuple(round(side * scale) for side in SHAPE)
    affine = AFFINE.copy()
    affine[:3, :3] /= 2.5 if is_doll else scale
    grids = np.meshgrid(*(np.linspace(-1, 1, side) for side in shape), indexing="ij")

    def ball(d: float, h: float, w: float, sizes: tuple[float, float, float]) -> np.ndarray:
        parts = zip(grids, (d, h, w), sizes, strict=True)
        return np.asarray(sum(((grid - centre) / size) ** 2 for grid, centre, size in parts) < 1)

    rng = np.random.default_rng(0)
    hu = np.full(shape, -1000.0)
    hu[ball(0, 0, 0, (1.6, 0.78, 0.88))] = -90
    hu[ball(0, 0, 0, (1.6, 0.7, 0.8))] = 45
    hu[ball(0, 0.42, 0, (3, 0.15, 0.12))] = 420
    for side in (-1, 1):
        hu[ball(0.85, -0.05, side * 0.4, (0.45, 0.5, 0.3))] = -820
    organs = (
        ball(0.05, -0.1, -0.38, (0.5, 0.45, 0.36)),
        ball(0.1, 0.05, 0.52, (0.32, 0.25, 0.17)),
        ball(-0.3, 0.3, 0.34, (0.35, 0.14, 0.13)),
        ball(-0.36, 0.32, -0.34, (0.35, 0.14, 0.13)),
    )
    labels = np.zeros(shape, np.uint8)
    for value, (organ, level) in enumerate(zip(organs, (110, 125, 160, 160), strict=True), 1):
        hu[organ] = level
        labels[organ] = value
    hu += rng.normal(0, 12, shape)
    other = np.roll(labels, (1, 2, -2), axis=(0, 1, 2))
    scan = Volume(np.rint(hu).astype(np.int16)[None], affine)
    return Body(
        scan.write(folder / "abdomen.nii.gz"),
        scan.with_array(labels[None]).write(folder / "first_reader.nii.gz"),
        scan.with_array(other[None]).write(folder / "second_reader.nii.gz"),
    )
