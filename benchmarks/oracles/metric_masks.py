"""Pairs of masks on which other tools and our metrics are compared; numpy alone, so that it runs in any environment.

Every pair is made from a seed with numpy's RandomState, whose stream never changes.
"""

import numpy as np

PAIRS = {
    # name: seed, shape (D, H, W), spacing in mm (D, H, W), kind
    "noise": (1, (9, 13, 11), (3.0, 0.8, 1.25), "noise"),
    "sparse": (2, (9, 12, 10), (1.0, 1.0, 1.0), "sparse"),
    "blobs": (3, (14, 22, 17), (2.5, 0.7, 0.7), "blobs"),
    "thick_slices": (4, (7, 25, 21), (5.0, 0.75, 0.9), "blobs"),
    "at_the_border": (5, (8, 11, 9), (1.3, 2.1, 0.6), "border"),
    "single_voxels": (6, (9, 10, 12), (4.0, 0.9, 0.5), "single"),
    "voxel_and_blob": (7, (10, 13, 12), (0.9, 1.4, 2.2), "voxel_and_blob"),
    "one_slice": (8, (1, 16, 13), (5.0, 0.8, 0.8), "blobs"),
    "same": (9, (8, 9, 10), (1.5, 1.0, 0.5), "same"),
    "missed": (10, (6, 9, 7), (2.0, 1.0, 0.5), "missed"),
    "false_alarm": (11, (6, 9, 7), (2.0, 1.0, 0.5), "false_alarm"),
}
TOLERANCES_MM = (0.5, 1.0, 2.0, 3.7)


def pair(name: str) -> tuple[np.ndarray, np.ndarray, tuple[float, float, float]]:
    """Return reference and prediction (D, H, W), boolean, and the spacing in mm."""
    seed, shape, spacing, kind = PAIRS[name]
    rng = np.random.RandomState(seed)
    if kind in ("noise", "sparse"):
        share = 0.5 if kind == "noise" else 0.03
        return rng.rand(*shape) < share, rng.rand(*shape) < share, spacing
    reference, prediction = _blob(rng, shape), _blob(rng, shape)
    if kind == "border":
        reference[:, :4], prediction[:5, :, 3:] = True, True
        reference[5:, 2:], prediction[:, 8:] = False, False
    if kind in ("single", "voxel_and_blob"):
        reference[:] = False
        reference[2, 3, 4] = True
    if kind == "single":
        prediction[:] = False
        prediction[6, 9, 11] = True
    if kind == "same":
        prediction = reference.copy()
    if kind == "missed":
        prediction[:] = False
    if kind == "false_alarm":
        reference[:] = False
    return reference, prediction, spacing


def _blob(rng: np.random.RandomState, shape: tuple[int, ...]) -> np.ndarray:
    grid = np.stack(np.meshgrid(*[np.arange(size) for size in shape], indexing="ij"), axis=-1)
    mask = np.zeros(shape, bool)
    for _ in range(3):
        centre = [size * (0.35 + 0.3 * rng.rand()) for size in shape]
        radius = [max(1.0, size * (0.15 + 0.2 * rng.rand())) for size in shape]
        mask |= (((grid - centre) / radius) ** 2).sum(-1) < 1
    return mask ^ (rng.rand(*shape) < 0.01)
