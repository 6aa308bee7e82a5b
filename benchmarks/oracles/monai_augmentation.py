"""What MONAI makes of a small image, transform by transform, with fixed parameters.

    python benchmarks/oracles/monai_augmentation.py tests/golden/monai_augmentation.npz

Runs where MONAI 1.6 is installed beside this project, from which only the field of an elastic deformation is taken; the
numbers are MONAI's. tests/data/test_monai_augmentation.py holds ours against them, and says where a definition differs.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from monai.networks.blocks import Warp
from monai.networks.layers import GaussianFilter
from monai.transforms import (
    AdjustContrast,
    Affine,
    Flip,
    RandGaussianNoise,
    RandSimulateLowResolution,
    ScaleIntensity,
    ScaleIntensityFixedMean,
)
from monai.utils import set_determinism

from sagittal.data.elastic import Elastic, displacements, field

SHAPE = (10, 12, 9)
ROTATION_RAD = (0.3, -0.2, 0.5)
EXTENT = (1.25, 0.8, 1.1)
ELASTIC = Elastic(sigma=0.2, reach_vox=(1.5, 2.0, 1.0), seed=3)
SIGMA_VOX = (0.5, 0.8, 1.0)


def image() -> torch.Tensor:
    """Return a smooth image with some noise (1, D, H, W), positive and negative."""
    d, h, w = np.meshgrid(*(np.linspace(-1, 1, size) for size in SHAPE), indexing="ij")
    values = np.sin(3 * d + h) + h * w - np.cos(4 * w) + 0.2 * np.random.default_rng(0).standard_normal(SHAPE)
    return torch.from_numpy(values.astype(np.float32))[None]


def spatial(given: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return what MONAI's spatial transforms make of image and labels."""
    found = {}
    # MONAI turns about the middle axis the other way round.
    angles = (ROTATION_RAD[0], -ROTATION_RAD[1], ROTATION_RAD[2])
    ways = {"rotated": {"rotate_params": angles}, "scaled": {"scale_params": EXTENT}}
    ways["both"] = {**ways["rotated"], **ways["scaled"]}
    for name, parameters in ways.items():
        transform = Affine(**parameters, padding_mode="zeros", image_only=True)
        found[name] = transform(given, mode="bilinear")
        found[f"{name}_labels"] = transform(labels, mode="nearest")
    for axes in ((0,), (1,), (2,), (0, 2)):
        found["flipped_" + "".join(map(str, axes))] = Flip(spatial_axis=axes)(given)
    made = field(ELASTIC, SHAPE)
    weights = [torch.from_numpy(part).float()[None] for part in made.weights]
    moved = displacements(torch.from_numpy(made.knots).float()[None], tuple(weights), torch.tensor([ELASTIC.reach_vox]))
    found["bent"] = Warp(mode="bilinear", padding_mode="zeros")(given[None], moved)[0]
    return found


def intensity(given: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return what MONAI's intensity transforms make of the image."""
    smooth = GaussianFilter(3, SIGMA_VOX, truncated=3.0, approx="sampled")
    found = {"blurred": smooth(given[None])[0]}
    for factor in (0.75, 1.25):
        found[f"brightness_{factor}"] = ScaleIntensity(minv=None, maxv=None, factor=factor - 1)(given)
        found[f"contrast_{factor}"] = ScaleIntensityFixedMean(factor=factor - 1, preserve_range=True)(given)
    for gamma in (0.7, 1.5):
        found[f"gamma_{gamma}"] = AdjustContrast(gamma, retain_stats=True)(given)
        found[f"inverted_gamma_{gamma}"] = AdjustContrast(gamma, invert_image=True, retain_stats=True)(given)
    for zoom in (0.5, 0.7):
        coarse = RandSimulateLowResolution(prob=1.0, downsample_mode="nearest-exact", zoom_range=(zoom, zoom))
        found[f"low_resolution_{zoom}"] = coarse(given)
    return found


def noise_statistics() -> list[float]:
    """Return mean, deviation, skew and kurtosis of MONAI's noise of deviation 0.3."""
    transform = RandGaussianNoise(prob=1.0, std=0.3, sample_std=False)
    transform.set_random_state(0)
    noise = np.asarray(transform(torch.zeros(1, 60, 60, 60)), dtype=np.float64)
    scaled = (noise - noise.mean()) / noise.std()
    return [noise.mean(), noise.std(), (scaled**3).mean(), (scaled**4).mean()]


def main() -> None:
    """Write the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    options = parser.parse_args()
    set_determinism(0)
    given = image()
    labels = (given > 0).float() + (given > 1).float()
    found = {"image": given, "labels": labels, **spatial(given, labels), **intensity(given)}
    arrays = {name: np.asarray(value, dtype=np.float32)[0] for name, value in found.items()}
    for name, array in arrays.items():
        assert array.shape == SHAPE, f"{name}: {array.shape}"
    np.savez_compressed(options.out, **arrays, noise=np.array(noise_statistics()))


if __name__ == "__main__":
    main()
