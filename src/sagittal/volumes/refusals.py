"""What no format may hand over, said in the same words by every reader: colours, complex numbers, time series."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sagittal.errors import DataError


def not_3d(path: Path, sizes: Sequence[int]) -> DataError:
    """Return the error for a file of two axes, or of more than three; `sizes` in the file's order."""
    written = " x ".join(str(size) for size in sizes)
    if len(sizes) < 3:
        text = f"a {len(sizes)}D image of {written} voxels. Expected a 3D volume. Stack the slices into one file."
    else:
        text = (
            f"a {len(sizes)}D image of {written} voxels (a time series, or channels in one file). "
            "Expected a 3D volume. Save each time point or channel as a file of its own."
        )
    return DataError(f"{path}: {text}", code="not_3d")


def no_scalar(path: Path, what: np.dtype[Any] | str) -> DataError:
    """Return the error for voxels that are not one real number each; `what` is their type, or words for it."""
    if isinstance(what, str):
        kind = what
    elif what.names is not None:
        kind = "RGB colours" if what.names[:3] == ("R", "G", "B") else f"records of {', '.join(what.names)}"
    else:
        kind = "complex numbers" if what.kind == "c" else f"type {what}"
    return DataError(
        f"{path}: voxels are {kind}. Expected one real number per voxel. Save one component, or the magnitude.",
        code="not_3d",
    )


def unusable_affine(path: Path, affine: NDArray[Any]) -> DataError:
    """Return the error for a grid that gives its voxels no place of their own."""
    return DataError(
        f"{path}: the header's affine is not usable ({affine[:3].tolist()}). Expected finite numbers and three "
        "independent axes. Export the scan again, or set its sform.",
        code="unreadable",
    )
