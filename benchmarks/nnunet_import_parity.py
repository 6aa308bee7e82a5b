"""Compare predictions of imported nnU-Net models with nnU-Net's own, voxel by voxel.

    python benchmarks/oracles/nnunet_import.py OUT --dataset HIPPOCAMPUS        (nnU-Net's own environment)
    python benchmarks/nnunet_import_parity.py OUT [OUT ...]                     (ours)

Each OUT holds a model, scans and nnU-Net's predictions of them. The model is imported and predicts the same scans.
Printed are the share of voxels that agree, over all cases and in the worst case, and the Dice of the two predictions
per class: where most of a scan is background, agreement is easy, Dice is not.
"""

import argparse
import json
import tempfile
from pathlib import Path

import numpy as np

import sagittal
from sagittal.inference.folder import predict_folder
from sagittal.training.import_nnunet import import_nnunet


def compare(out: Path, theirs_in: str) -> dict[str, object]:
    """Import OUT's model, predict OUT's scans, and return how far nnU-Net's predictions are."""
    with tempfile.TemporaryDirectory() as folder:
        result = import_nnunet(out / "model", Path(folder) / "bundle")
        predictor = sagittal.load(result.bundle, device="cpu")
        predict_folder(predictor, out / "scans", Path(folder) / "labels")
        same, voxels, worst = 0, 0, 1.0
        overlap = np.zeros((2, len(result.plan.dataset.labels)))
        theirs = sorted((out / theirs_in).glob("*.nii.gz"))
        for path in theirs:
            expected = sagittal.read_volume(path).array
            given = sagittal.read_volume(Path(folder) / "labels" / path.name).array
            equal = given == expected
            same, voxels, worst = same + int(equal.sum()), voxels + equal.size, min(worst, float(equal.mean()))
            for number, label in enumerate(result.plan.dataset.labels):
                one, two = given == label.values[0], expected == label.values[0]
                overlap[:, number] += 2 * (one & two).sum(), one.sum() + two.sum()
    with np.errstate(invalid="ignore"):
        dice = overlap[0] / overlap[1]
    return {
        "model": out.name,
        "network": result.plan.network.kind,
        "cases": len(theirs),
        "voxels that agree": same / voxels,
        "in the worst case": worst,
        "Dice of the two": [round(float(value), 5) for value in dice],
        "share of the classes": [round(float(value) / 2 / voxels, 4) for value in overlap[1]],
    }


def main() -> None:
    """Read the command line, compare, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, nargs="+")
    parser.add_argument("--against", default="predictions", help="or predictions_alike")
    given = parser.parse_args()
    for out in given.out:
        print(json.dumps(compare(out, given.against)), flush=True)


if __name__ == "__main__":
    main()
