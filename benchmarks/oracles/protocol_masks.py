"""Label maps on which other tools and our protocols are compared; numpy alone, so that it runs in any environment.

Every case is made from a seed with numpy's RandomState, whose stream never changes. They have anisotropic spacings,
structures that touch the border of the image, single voxels, shared borders, misses, false alarms, classes that both
lack and a case without anything.
"""

import numpy as np

SHAPE = (11, 19, 15)
CASES = (
    # name, seed, spacing in mm (D, H, W), values that the reference lacks, values that the prediction lacks
    ("blobs", 1, (3.0, 0.8, 1.25), (), ()),
    ("more", 2, (1.0, 1.0, 1.0), (), ()),
    ("missed", 3, (2.5, 0.7, 0.7), (), (3,)),
    ("false_alarm", 4, (0.9, 1.4, 2.2), (3,), ()),
    ("absent", 5, (3.0, 0.8, 1.25), (3,), (3,)),
    ("single", 6, (5.0, 0.75, 0.75), (), ()),
    ("nothing", 7, (1.5, 1.5, 3.0), (1, 2, 3), (1, 2, 3)),
    ("all_missed", 8, (1.0, 1.0, 1.0), (), (1, 2, 3)),
)


def label_maps(name: str) -> tuple[np.ndarray, np.ndarray, tuple[float, float, float]]:
    """Return reference and prediction (D, H, W), uint8 with values 0 to 3, and the spacing in mm."""
    seed, spacing, lacks_reference, lacks_prediction = next(case[1:] for case in CASES if case[0] == name)
    rng = np.random.RandomState(seed)
    reference, prediction = np.zeros(SHAPE, np.uint8), np.zeros(SHAPE, np.uint8)
    for value in (1, 2, 3):
        for _ in range(2):
            centre = [rng.randint(0, size) for size in SHAPE]
            radius = [rng.randint(2, 5) for _ in SHAPE]
            reference[_ellipsoid(centre, radius)] = value
            moved = [place + rng.randint(-2, 3) for place in centre]
            prediction[_ellipsoid(moved, [max(1, size + rng.randint(-1, 2)) for size in radius])] = value
    noise = rng.rand(*SHAPE)
    prediction[noise < 0.01] = 1
    prediction[noise > 0.98] = 0
    if name == "single":
        reference[reference == 3] = 0
        prediction[prediction == 3] = 0
        reference[5, 9, 7] = prediction[7, 4, 11] = 3
        prediction[prediction == 2] = 0
        prediction[reference == 2] = 2
    reference[np.isin(reference, lacks_reference)] = 0
    prediction[np.isin(prediction, lacks_prediction)] = 0
    return reference, prediction, spacing


LESION_SHAPE = (34, 46, 40)
LESION_CASES = (
    # name, seed, structures of the reference, spurious structures of the prediction
    ("several", 11, 5, 2),
    ("one", 12, 1, 0),
    ("false_alarms", 13, 0, 3),
    ("none", 14, 0, 0),
    ("crowd", 15, 9, 4),
    ("specks", 16, 2, 1),
)


def lesion_maps(name: str) -> tuple[np.ndarray, np.ndarray]:
    """Return reference and prediction (D, H, W), uint8 with BraTS's values 1, 2 and 3, of 1 mm voxels."""
    seed, lesions, spurious = next(case[1:] for case in LESION_CASES if case[0] == name)
    rng = np.random.RandomState(seed)
    reference, prediction = np.zeros(LESION_SHAPE, np.uint8), np.zeros(LESION_SHAPE, np.uint8)
    for number in range(lesions + spurious):
        centre = [rng.randint(0, size) for size in LESION_SHAPE]
        radius = 2 if number % 3 == 2 else rng.randint(4, 8)
        moved = [place + rng.randint(-1, 2) for place in centre]
        found = rng.rand() < 0.75
        for value, share in ((2, 1.0), (1, 0.8), (3, 0.65)):
            size = [max(1, round(radius * share))] * 3
            if number < lesions:
                reference[_ellipsoid(centre, size, LESION_SHAPE)] = value
            if number >= lesions or found:
                prediction[_ellipsoid(moved, size, LESION_SHAPE)] = value
    if name == "specks":
        # Found, missed and false ones about the smallest that metastases may be, 2 voxels, alone and beside others.
        reference[2, 3, 4] = prediction[2, 3, 4:6] = 3
        reference[31, 43, 5:7] = 3
        reference[31, 3, 30:33] = prediction[31, 4, 31:34] = 3
        reference[5, 41, 10:14] = 1
        reference[5, 43, 10:12] = prediction[5, 44, 11:14] = 3
        prediction[3, 40, 38] = prediction[32, 24, 1] = 3
    return reference, prediction


def _ellipsoid(centre: list[int], radius: list[int], shape: tuple[int, ...] = SHAPE) -> np.ndarray:
    grid = np.ogrid[tuple(slice(0, size) for size in shape)]
    return sum(((axis - place) / size) ** 2 for axis, place, size in zip(grid, centre, radius, strict=True)) <= 1
