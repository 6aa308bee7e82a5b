"""Reading one training case, image and label indices, with its name in every error."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from jaxtyping import Shaped, UInt

from sagittal.data.dataset import Case
from sagittal.data.label_index import LabelIndex
from sagittal.errors import DataError, ResourceError, SagittalError
from sagittal.volumes import Volume, read_labels, read_scans
from sagittal.volumes.volume import require_same_grid


def read_case(case: Case, index: LabelIndex) -> tuple[tuple[Volume, ...], UInt[np.ndarray, "D H W"]]:
    """Return the channels, a volume each, and the label indices (D, H, W), all in stored order.

    Raises:
        DataError: a file is missing or can't be read, the grids differ, intensities are not finite, or a label value is
            not declared.
    """
    if case.labels is None:
        raise DataError("no label file. Expected one per training case in labelsTr.", code="missing_labels")
    channels = read_scans(case.images)
    if not all(_is_finite(plane) for volume in channels for plane in volume.array[0]):
        raise DataError("the image holds NaN or infinity. Expected numbers everywhere. Repair it.", code="not_finite")
    values, geometry = read_labels(case.labels)
    require_same_grid(channels[0].geometry, geometry, "image and label")
    return channels, index.encode(values, source=case.labels.name)


def _is_finite(plane: Shaped[np.ndarray, "H W"]) -> bool:
    return plane.dtype.kind in "iu" or bool(np.isfinite(plane).all())


@contextmanager
def named(case: Case) -> Iterator[None]:
    """Put the case's id in front of the message of any error on purpose, and explain a lack of memory."""
    try:
        yield
    except SagittalError as error:
        raise type(error)(f"{case.id}: {error.message}", code=error.code) from None
    except MemoryError:
        raise ResourceError(
            f"{case.id}: does not fit into memory. Use fewer workers, or a machine with more.", code="memory"
        ) from None
