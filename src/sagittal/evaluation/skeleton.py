"""Centreline Dice: how much of the skeletons of two tubes lies within the other tube. Needs scikit-image."""

from __future__ import annotations

from importlib import import_module

import numpy as np
from jaxtyping import Bool

from sagittal.errors import ResourceError
from sagittal.evaluation.masks import check_masks
from sagittal.volumes.crop import bounding_box


def cldice(reference: np.ndarray, prediction: np.ndarray) -> float | None:
    """Return the centreline Dice of two boolean masks (D, H, W).

    The harmonic mean of two shares: of the prediction's skeleton that lies in the reference, and of the reference's
    skeleton that lies in the prediction. A skeleton is made of voxels: no spacing enters.

    Empty masks: one of the two: 0. Both: None.

    Raises:
        DataError: not two boolean masks of one shape.
        ResourceError: scikit-image is not installed.

    Source: S. Shit et al., clDice - a Novel Topology-Preserving Loss Function for Tubular Structure Segmentation, CVPR
        2021; the skeleton is T. C. Lee et al., Building skeleton models via 3-D medial surface/axis thinning (1994).
    """
    check_masks(reference, prediction)
    if not reference.any() or not prediction.any():
        return 0.0 if reference.any() or prediction.any() else None
    right, found = _share(prediction, reference), _share(reference, prediction)
    return 2 * right * found / (right + found) if right + found else 0.0


def _share(mask: Bool[np.ndarray, "D H W"], other: Bool[np.ndarray, "D H W"]) -> float:
    box = bounding_box(mask)
    assert box is not None
    thin = skeleton(mask[box.slices])
    return int(np.count_nonzero(thin & other[box.slices])) / int(np.count_nonzero(thin))


def skeleton(mask: Bool[np.ndarray, "D H W"]) -> Bool[np.ndarray, "D H W"]:
    """Thin a mask to lines one voxel wide; a mask that is thinned away altogether is its own skeleton.

    scikit-image 0.26 leaves nothing of some blocks two voxels thick.

    Raises:
        ResourceError: scikit-image is not installed.
    """
    try:
        morphology = import_module("skimage.morphology")
    except ImportError:
        raise ResourceError(
            "clDice needs scikit-image, which is not installed. Run: pip install 'sagittal[metrics]'",
            code="missing_extra",
        ) from None
    # Padded, for the method looks at neighbours: what touches the border must thin like what does not.
    thin: Bool[np.ndarray, "D H W"] = morphology.skeletonize(np.pad(mask, 1), method="lee")[1:-1, 1:-1, 1:-1] > 0
    return thin if thin.any() else mask
