"""Compare our fingerprint, target spacing and prepared arrays with nnU-Net's, case by case.

    python benchmarks/oracles/nnunet.py reference DATASET OUT [--spacing D,H,W]     (nnU-Net's own environment)
    python benchmarks/nnunet_parity.py DATASET OUT [--spacing D,H,W]                (ours)

Axes stay as the files store them (`orientation: stored`), as in nnU-Net. Printed are the largest differences: spacing
in mm, shapes in voxels, intensities of the fingerprint as shares of their range between percentiles, prepared images as
shares of the image's spread (percentile 99.5 minus 0.5), labels as the share of voxels that agree.
"""

import argparse
import json
from pathlib import Path

import numpy as np

from sagittal.data.cache import prepare_case
from sagittal.data.dataset import read_dataset
from sagittal.data.fingerprint import extract_fingerprint
from sagittal.data.label_index import label_index
from sagittal.planning import make_plan
from sagittal.planning.spacing import in_network_order, median_shape


def compare_fingerprint(ours, theirs: dict) -> dict[str, float]:
    """Return how far two fingerprints are apart."""
    shapes = np.abs(np.array(ours.shapes_vox) - np.array(theirs["shapes_after_crop"])).max()
    spacings = np.abs(np.array(ours.spacings_mm) - np.array(theirs["spacings"])).max()
    crop = abs(ours.median_relative_size_after_crop - theirs["median_relative_size_after_cropping"])
    found = {"shapes (voxels)": shapes, "spacings (mm)": spacings, "relative size after crop": crop}
    for channel, measured in enumerate(ours.intensities):
        reference = theirs["foreground_intensity_properties_per_channel"][str(channel)]
        spread = reference["percentile_99_5"] - reference["percentile_00_5"]
        for name in ("mean", "median", "std", "percentile_00_5", "percentile_99_5"):
            apart = abs(getattr(measured, name) - reference[name]) / spread
            found[f"{name} / spread"] = max(apart, found.get(f"{name} / spread", 0.0))
    return {name: float(value) for name, value in found.items()}


def compare_case(prepared, reference) -> dict[str, float]:
    """Return how far two prepared cases are apart."""
    data, seg = reference["data"], reference["seg"]
    if prepared.image.shape != data.shape:
        raise SystemExit(f"shapes differ: {prepared.image.shape} against {data.shape}")
    low, high = np.percentile(data, [0.5, 99.5], axis=(1, 2, 3))
    apart = np.abs(prepared.image - data).max(axis=(1, 2, 3)) / (high - low)
    # -1 marks what lies outside of the non-zero mask, which is background.
    agree = (prepared.labels == np.maximum(seg, 0)).mean()
    foreground = (prepared.labels > 0) | (seg > 0)
    dice = 2 * ((prepared.labels == seg) & foreground).sum() / ((prepared.labels > 0).sum() + (seg > 0).sum())
    return {"image / spread": float(apart.max()), "labels that differ": float(1 - agree), "1 - Dice": float(1 - dice)}


def main() -> None:
    """Read the command line, compare, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", type=Path)
    parser.add_argument("reference", type=Path)
    parser.add_argument("--spacing", type=lambda text: tuple(float(value) for value in text.split(",")))
    given = parser.parse_args()
    dataset = read_dataset(given.dataset)
    fingerprint = extract_fingerprint(dataset, workers=2, orientation="stored")
    settings = {"preprocessing.spacing_mm": list(given.spacing)} if given.spacing else {}
    plan = make_plan(fingerprint, dataset.spec, "mednext-s", settings=settings)
    theirs = json.loads((given.reference / "plans.json").read_text())
    configuration = theirs["configurations"]["3d_fullres"]
    found = compare_fingerprint(fingerprint, json.loads((given.reference / "fingerprint.json").read_text()))
    spacing = plan.preprocessing.network_spacing_mm
    found["target spacing (mm)"] = float(np.abs(np.array(spacing) - configuration["spacing"]).max())
    turned = in_network_order(fingerprint, plan.preprocessing.transpose)
    theirs_shape = configuration["median_image_size_in_voxels"]
    found["median shape (voxels)"] = float(np.abs(np.array(median_shape(turned, spacing)) - theirs_shape).max())
    print(f"transposition: {list(plan.preprocessing.transpose)} against {theirs['transpose_forward']}")
    index = label_index(dataset.spec)
    for case in dataset.cases:
        with np.load(given.reference / "cases" / f"{case.id}.npz") as reference:
            for name, value in compare_case(prepare_case(case, plan, index), reference).items():
                found[name] = max(value, found.get(name, 0.0))
    for name, value in found.items():
        print(f"{name:28} {value:.3g}")


if __name__ == "__main__":
    main()
