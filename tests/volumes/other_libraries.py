"""Scans as nibabel and SimpleITK read and write them: the oracles of the format tests."""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
import SimpleITK

LPS = np.diag([-1.0, -1.0, 1.0, 1.0])
REVERSED = np.eye(4)[[2, 1, 0, 3]]


def nibabel_values(image: nib.spatialimages.SpatialImage) -> tuple[np.ndarray, np.ndarray]:
    """Return (D, H, W) values and the (d, h, w, 1) -> RAS affine."""
    return np.asarray(image.dataobj).T, image.affine @ REVERSED


def itk_read(path: Path | list[str]) -> tuple[np.ndarray, np.ndarray]:
    """Return (D, H, W) values and the (d, h, w, 1) -> RAS affine; a list is a series of slices."""
    image = SimpleITK.ReadImage(path if isinstance(path, list) else str(path))
    affine = np.eye(4)
    affine[:3, :3] = np.reshape(image.GetDirection(), (3, 3)) * image.GetSpacing()
    affine[:3, 3] = image.GetOrigin()
    return SimpleITK.GetArrayFromImage(image), LPS @ affine @ REVERSED


def itk_write(path: Path, voxels: np.ndarray, affine: np.ndarray, packed: bool = True) -> Path:
    """Write (D, H, W) voxels on a (d, h, w, 1) -> RAS grid."""
    image = SimpleITK.GetImageFromArray(voxels)
    matrix = LPS @ affine @ REVERSED
    spacing = np.linalg.norm(matrix[:3, :3], axis=0)
    image.SetSpacing(spacing.tolist())
    image.SetDirection((matrix[:3, :3] / spacing).ravel().tolist())
    image.SetOrigin(matrix[:3, 3].tolist())
    SimpleITK.WriteImage(image, str(path), packed)
    return path


def itk_odd_scans(folder: Path, suffix: str) -> dict[str, tuple[Path, str]]:
    """Write what is no volume of real numbers, and say how it is to be refused."""
    real = np.zeros((3, 4, 5, 3), np.uint8)
    images = {
        "colours": (SimpleITK.GetImageFromArray(real, isVector=True), "RGB colours|several numbers"),
        "vectors": (SimpleITK.GetImageFromArray(real.astype(np.float32)[..., :2], isVector=True), "several|2 numbers"),
        "complex": (SimpleITK.GetImageFromArray(np.zeros((3, 4, 5), np.complex64)), "complex"),
        "series": (
            SimpleITK.GetImageFromArray(np.zeros((2, 3, 4, 5), np.int16), isVector=False),
            "4D image of 5 x 4 x 3 x 2",
        ),
        "slice": (SimpleITK.GetImageFromArray(np.zeros((4, 5), np.int16)), "2D image of 5 x 4"),
    }
    written = {}
    for name, (image, message) in images.items():
        written[name] = (folder / f"{name}{suffix}", message)
        SimpleITK.WriteImage(image, str(written[name][0]))
    return written
