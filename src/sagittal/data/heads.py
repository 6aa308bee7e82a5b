"""The demonstration's data set: deformed heads with tissue labels, made on the spot from one real MR template.

nilearn's wheel brings the MNI152 T1 template (an average of 152 real MR scans without skull) and its grey and white
matter maps, so real MR is there after an ordinary installation, offline. Every case is that head moved, bent and shown
with another contrast. The label maps move along, so they are right by construction. Test cases take contrasts from
ranges that no training case was drawn from: a network that only learned grey values fails on them.
"""

from __future__ import annotations

import json
import math
import os
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float32, Float64, UInt8
from scipy import ndimage
from torch.nn import functional

from sagittal.errors import DataError, ResourceError
from sagittal.evaluation.overlap import dice
from sagittal.plan.base import Frozen, Triple, write_atomically
from sagittal.volumes import Volume, read_labels, read_volume
from sagittal.volumes.crop import crop, nonzero_box
from sagittal.volumes.resampling import axis_weights

SPACING_MM = 3.0
SMOOTHING_SHARE = 0.4
"""Deviation of the blur before the template is sampled at `SPACING_MM`, as a share of it: no aliasing."""
SHAPE: Triple = (66, 78, 62)
CENTRE_MM = (0.0, -17.0, 5.0)
"""Middle of the template's brain and of every case's grid, x, y, z."""

ROTATION_DEGREES = 15.0
SCALE = (0.85, 1.15)
DISPLACEMENT_MM = (8.0, 12.0)
"""Range that the largest displacement of a case is drawn from."""
DISPLACEMENT_KNOT_MM = 36.0
"""Distance of the control points: small enough to bend gyri, large enough not to fold tissue."""

CONTRAST_KNOTS = 6
TRAIN_LOG_SLOPE = (0.0, 0.6)
TEST_LOG_SLOPE = (0.7, 1.1)
"""How far the slope of the contrast curve strays from even, as |ln|, at each knot."""
BIAS_LOG = 0.25
"""The bias field multiplies by up to e to this power."""
BIAS_KNOT_MM = 80.0
NOISE_STD = (0.01, 0.04)
"""Share of the intensity range."""

LABELS = {"background": 0, "cerebrospinal fluid": 1, "grey matter": 2, "white matter": 3}
SOURCE = (
    "MNI ICBM152 2009a nonlinear symmetric T1 template with its grey and white matter maps, as shipped in nilearn's "
    "wheel (nilearn.github.io)"
)
LICENCE = (
    "nilearn, which ships the template: BSD-3-Clause. The template itself: nilearn's description gives its licence as "
    "unknown; ask the McConnell Brain Imaging Centre (MNI) before you pass the heads on."
)

_FILES = "mni_icbm152_{}_tal_nlin_sym_09a_converted.nii.gz"
_TEMPLATE_MAX = 255.0
_DARKEST, _BRIGHTEST = 0.1, 0.95
_STORED_OFFSET, _STORED_RANGE = 200.0, 1000.0


class HeadsDescription(Frozen):
    """What the cases were made of and how, for the report; ranges are those that each case was drawn from."""

    seed: int
    train_cases: int
    test_cases: int
    shape_vox: Triple = SHAPE
    spacing_mm: float = SPACING_MM
    rotation_degrees: float = ROTATION_DEGREES
    scale: tuple[float, float] = SCALE
    displacement_mm: tuple[float, float] = DISPLACEMENT_MM
    train_contrast_log_slope: tuple[float, float] = TRAIN_LOG_SLOPE
    test_contrast_log_slope: tuple[float, float] = TEST_LOG_SLOPE
    bias_log: float = BIAS_LOG
    noise_std: tuple[float, float] = NOISE_STD
    source: str = SOURCE
    licence: str = LICENCE

    def sentences(self) -> str:
        """Return the description as plain English, for people who have not seen the code."""
        return (
            f"{self.train_cases} training and {self.test_cases} held-out cases made from one real head, seed "
            f"{self.seed}: rotated by up to {self.rotation_degrees:g} degrees about each axis, scaled by "
            f"{self.scale[0]:g} to {self.scale[1]:g}, bent smoothly by up to {self.displacement_mm[1]:g} mm, shown "
            f"through a random monotone contrast curve (inverted in every second case), with a bias field of up to "
            f"{100 * (math.exp(self.bias_log) - 1):.0f} % and noise of {100 * self.noise_std[0]:g} to "
            f"{100 * self.noise_std[1]:g} % of the range, at {self.spacing_mm:g} mm. Held-out cases have contrast "
            "curves steeper and flatter than any in training."
        )


def make_heads(folder: str | os.PathLike[str], *, train: int = 20, test: int = 6, seed: int = 0) -> HeadsDescription:
    """Write a data set of `train` + `test` cases in nnU-Net's layout; the same seed gives the same bytes.

    The folder gets dataset.json, imagesTr, labelsTr, imagesTs and labelsTs.

    Raises:
        ResourceError: nilearn is not installed, or the folder can't be written.
    """
    folder = Path(folder)
    tissues = _read_template()
    description = HeadsDescription(seed=seed, train_cases=train, test_cases=test)
    for index in range(train + test):
        rng = np.random.default_rng(np.random.SeedSequence((seed, index)))
        part, log_slope = ("Tr", TRAIN_LOG_SLOPE) if index < train else ("Ts", TEST_LOG_SLOPE)
        image, labels = _make_case(tissues, rng, log_slope, inverted=index % 2 == 1)
        name = f"head_{index:03d}"
        Volume(image[None], _grid_affine()).write(folder / f"images{part}" / f"{name}_0000.nii.gz")
        Volume(labels[None], _grid_affine()).write(folder / f"labels{part}" / f"{name}.nii.gz")
    declared = {
        "name": "Heads",
        "description": description.sentences(),
        "reference": SOURCE,
        "licence": LICENCE,
        "channel_names": {"0": "MR"},
        "labels": LABELS,
        "numTraining": train,
        "file_ending": ".nii.gz",
    }
    write_atomically(folder / "dataset.json", (json.dumps(declared, indent=2) + "\n").encode())
    return description


def mean_label_map_dice(folder: str | os.PathLike[str]) -> float:
    """Return the mean foreground Dice of a guess that looks at no image: the floor that a network has to beat.

    The guess is, voxel by voxel, the commonest label of the training cases. It is scored on the test cases of a data
    set whose cases share one grid, as those of `make_heads` do.

    Raises:
        DataError: no label maps, or label maps of different shapes.
    """
    folder = Path(folder)
    train, test = (_read_label_maps(folder / part) for part in ("labelsTr", "labelsTs"))
    if len({labels.shape for labels in (*train, *test)}) > 1:
        raise DataError(f"{folder}: label maps of different shapes. Expected one grid for all. A mean needs that.")
    values = sorted({int(value) for labels in train for value in np.unique(labels)})
    counts = np.stack([np.sum([labels == value for labels in train], axis=0) for value in values])
    guess = np.asarray(values)[counts.argmax(axis=0)]
    scores = [dice(labels == value, guess == value) for labels in test for value in values if value > 0]
    return float(np.mean([score for score in scores if score is not None]))


def _read_label_maps(folder: Path) -> list[np.ndarray]:
    paths = sorted(folder.glob("*.nii.gz"))
    if not paths:
        raise DataError(f"{folder}: no label maps. Expected files ending in .nii.gz. Make the data set first.")
    return [read_labels(path)[0] for path in paths]


def _read_template() -> Volume:
    """Return intensity and the shares of fluid, grey and white matter of the template, smoothed for `SPACING_MM`."""
    # Importing nilearn takes seconds and is not needed: only the place of its files is asked for.
    spec = find_spec("nilearn")
    folder = None if spec is None else Path(next(iter(spec.submodule_search_locations or [""]))) / "datasets" / "data"
    if folder is None or not all((folder / _FILES.format(kind)).is_file() for kind in ("t1", "gm", "wm")):
        raise ResourceError(
            "the MNI152 template is missing. Expected it in the package nilearn, which the demonstration's heads are "
            "made from. Run: pip install 'sagittal[demo]'",
            code="missing_package",
        )
    template, grey, white = (read_volume(folder / _FILES.format(kind)).reoriented() for kind in ("t1", "gm", "wm"))
    box = nonzero_box(template.array)
    template, grey, white = (crop(volume, box) for volume in (template, grey, white))
    intensity, grey_share, white_share = (volume.array[0] / _TEMPLATE_MAX for volume in (template, grey, white))
    brain = intensity > 0
    fluid_share = np.clip(1.0 - grey_share - white_share, 0.0, 1.0)
    shares = [intensity, fluid_share * brain, grey_share * brain, white_share * brain]
    sigma = SMOOTHING_SHARE * SPACING_MM / np.asarray(template.spacing_mm)
    smooth = np.stack([ndimage.gaussian_filter(share, sigma, mode="constant", truncate=2.5) for share in shares])
    # The blur darkens the rim of the brain by the empty surroundings; dividing by its share takes that back.
    inside = smooth[1:].sum(axis=0)
    smooth[0] = np.where(inside > 0.1, smooth[0] / np.maximum(inside, 0.1), 0.0)
    return template.with_array(smooth)


def _grid_affine() -> Float64[np.ndarray, "4 4"]:
    affine = np.zeros((4, 4))
    for axis in range(3):
        affine[2 - axis, axis] = SPACING_MM
        affine[2 - axis, 3] = CENTRE_MM[2 - axis] - SPACING_MM * (SHAPE[axis] - 1) / 2
    affine[3, 3] = 1.0
    return affine


def _make_case(
    tissues: Volume, rng: np.random.Generator, log_slope: tuple[float, float], *, inverted: bool
) -> tuple[Float32[np.ndarray, "D H W"], UInt8[np.ndarray, "D H W"]]:
    points = _deformed_points(rng)
    intensity, *shares = _sampled(tissues, points)
    brain = np.sum(shares, axis=0) > 0.5
    labels = np.where(brain, 1 + np.argmax(np.stack(shares), axis=0), 0).astype(np.uint8)
    curve = _contrast_curve(rng, log_slope)
    knots = np.linspace(_DARKEST, _BRIGHTEST, len(curve))
    shown = np.interp(intensity, knots, 1.0 - curve if inverted else curve)
    bias = _smooth_field(rng, BIAS_KNOT_MM)
    shown = shown * np.exp(BIAS_LOG * bias / np.abs(bias).max())
    shown += rng.normal(0.0, rng.uniform(*NOISE_STD), SHAPE)
    # Kept well above 0: outside the brain there is exactly 0, as after skull stripping.
    stored = np.maximum(_STORED_OFFSET + _STORED_RANGE * shown, 1.0)
    return np.where(brain, np.round(stored), 0.0).astype(np.float32), labels


def _deformed_points(rng: np.random.Generator) -> Float64[np.ndarray, "3 D H W"]:
    """Return for each voxel of a case the place (x, y, z in mm) in the template that it shows."""
    affine = _grid_affine()
    index = np.stack(np.meshgrid(*(np.arange(size, dtype=np.float64) for size in SHAPE), indexing="ij"))
    world = np.einsum("ij,jdhw->idhw", affine[:3, :3], index) + affine[:3, 3].reshape(3, 1, 1, 1)
    centre = np.asarray(CENTRE_MM).reshape(3, 1, 1, 1)
    matrix = np.eye(3) / rng.uniform(*SCALE)
    for axis in range(3):
        angle = math.radians(rng.uniform(-ROTATION_DEGREES, ROTATION_DEGREES))
        first, second = (other for other in range(3) if other != axis)
        turn = np.eye(3)
        turn[first, first] = turn[second, second] = math.cos(angle)
        turn[first, second], turn[second, first] = -math.sin(angle), math.sin(angle)
        matrix = matrix @ turn
    bend = np.stack([_smooth_field(rng, DISPLACEMENT_KNOT_MM) for _ in range(3)])
    bend *= rng.uniform(*DISPLACEMENT_MM) / np.sqrt((bend**2).sum(axis=0).max())
    return np.asarray(np.einsum("ij,jdhw->idhw", matrix, world - centre) + centre + bend)


def _smooth_field(rng: np.random.Generator, knot_mm: float) -> Float64[np.ndarray, "D H W"]:
    """Return cubic interpolation between random values on a coarse grid of `knot_mm`."""
    counts = [math.ceil(size * SPACING_MM / knot_mm) + 1 for size in SHAPE]
    coarse = rng.uniform(-1.0, 1.0, counts)
    to_d, to_h, to_w = (axis_weights(count, size, 3) for count, size in zip(counts, SHAPE, strict=True))
    return np.asarray(np.einsum("abc,da,hb,wc->dhw", coarse, to_d, to_h, to_w, optimize=True))


def _contrast_curve(rng: np.random.Generator, log_slope: tuple[float, float]) -> Float64[np.ndarray, " knots"]:
    """Return a rising curve from 0 to 1 whose steps stray from even by factors of e to the power of `log_slope`."""
    signs = rng.choice([-1.0, 1.0], CONTRAST_KNOTS - 1)
    steps = np.exp(signs * rng.uniform(*log_slope, CONTRAST_KNOTS - 1))
    return np.concatenate([[0.0], np.cumsum(steps) / steps.sum()])


def _sampled(volume: Volume, points: Float64[np.ndarray, "3 D H W"]) -> Float32[np.ndarray, "C D H W"]:
    """Return the channels at world `points`, trilinear; 0 outside the volume."""
    inverse = np.linalg.inv(volume.affine)
    index = np.einsum("ij,jdhw->idhw", inverse[:3, :3], points) + inverse[:3, 3].reshape(3, 1, 1, 1)
    sizes = np.asarray(volume.array.shape[1:]).reshape(3, 1, 1, 1)
    # grid_sample counts axes from fast to slow and wants -1..1 from edge to edge.
    grid = torch.from_numpy(np.moveaxis((2 * index + 1) / sizes - 1, 0, -1)[..., ::-1].astype(np.float32))
    source = torch.from_numpy(np.ascontiguousarray(volume.array, dtype=np.float32))
    return np.asarray(functional.grid_sample(source[None], grid[None], align_corners=False)[0].numpy())
