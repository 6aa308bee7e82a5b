"""What other tools make of the label maps of protocol_masks.py; each runs in an environment that has that tool.

    python protocols.py nnunet             nnunetv2 2.8: nnunetv2.evaluation.evaluate_predictions
    python protocols.py monai              monai 1.6: its metric classes with their defaults
    python protocols.py surface_distance   DeepMind's surface-distance 0.1 (numpy 1.23): the Decathlon

Printed is JSON: for each protocol the value of every metric by case and class, and the means where the tool takes
any; NaN and infinity as strings. tests/golden/metrics/protocols_TOOL.json holds what was printed. None is a
dependency of this project. What challenges run as scripts of their own: protocol_scripts.py.
"""

import json
import math
import sys
import tempfile
from pathlib import Path

import numpy as np
from protocol_masks import CASES, label_maps

NAMES = [case[0] for case in CASES]
VALUES = (1, 2, 3)
TOLERANCES_MM = (1.0, 2.4)


def nnunet() -> dict:
    """Score a folder, first with classes, then with an ignore label and a region."""
    import SimpleITK
    from nnunetv2.evaluation.evaluate_predictions import compute_metrics_on_folder
    from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO

    printed = {}
    with tempfile.TemporaryDirectory() as work:
        for name in NAMES:
            *maps, spacing = label_maps(name)
            for folder, labels in zip(("reference", "prediction"), maps, strict=True):
                image = SimpleITK.GetImageFromArray(labels)
                image.SetSpacing(spacing[::-1])
                path = Path(work) / folder / f"{name}.nii.gz"
                path.parent.mkdir(exist_ok=True)
                SimpleITK.WriteImage(image, str(path))
        folders = [str(Path(work) / folder) for folder in ("reference", "prediction")]
        for kind, regions, ignore in (("nnunet", list(VALUES), None), ("nnunet_ignore", [1, (1, 2)], 3)):
            found = compute_metrics_on_folder(*folders, None, SimpleITKIO(), ".nii.gz", regions, ignore, 1)
            cases = {
                Path(case["reference_file"]).name.removesuffix(".nii.gz"): {
                    str(region): case["metrics"][region] for region in regions
                }
                for case in found["metric_per_case"]
            }
            classes = {str(region): found["mean"][region] for region in regions}
            printed[kind] = {"cases": cases, "classes": classes, "overall": found["foreground_mean"]}
    return printed


def monai() -> dict:
    """Score every case with MONAI's metric classes, background left out, and reduce them in its two ways."""
    import torch
    from monai.metrics import DiceMetric, HausdorffDistanceMetric, SurfaceDiceMetric, SurfaceDistanceMetric

    metrics = {
        "dice": DiceMetric(include_background=False),
        "hd95_mm": HausdorffDistanceMetric(percentile=95),
        "asd_mm": SurfaceDistanceMetric(),
        **{f"nsd_{mm:g}mm": SurfaceDiceMetric(class_thresholds=[mm] * len(VALUES)) for mm in TOLERANCES_MM},
    }
    cases = {}
    for name in NAMES:
        *maps, spacing = label_maps(name)
        onehot = [torch.from_numpy(np.stack([labels == value for value in (0, *VALUES)])[None]) for labels in maps]
        cases[name] = {str(value): {} for value in VALUES}
        for key, metric in metrics.items():
            given = {} if key == "dice" else {"spacing": spacing}
            values = metric(onehot[1].float(), onehot[0].float(), **given)[0]
            for value, number in zip(VALUES, values.tolist(), strict=True):
                cases[name][str(value)][key] = number
    by_class = {key: metric.aggregate("mean_batch").tolist() for key, metric in metrics.items()}
    classes = {str(value): {key: by_class[key][at] for key in metrics} for at, value in enumerate(VALUES)}
    overall = {key: metric.aggregate("mean").item() for key, metric in metrics.items()}
    return {"monai": {"cases": cases, "classes": classes, "overall": overall}}


def surface_distance() -> dict:
    """Score every case with DeepMind's library, at two tolerances."""
    from surface_distance import metrics

    def msd(reference, prediction, spacing):
        distances = metrics.compute_surface_distances(reference, prediction, spacing)
        found = {"dice": metrics.compute_dice_coefficient(reference, prediction)}
        for mm in TOLERANCES_MM:
            found[f"nsd_{mm:g}mm"] = metrics.compute_surface_dice_at_tolerance(distances, mm)
        return found

    with np.errstate(invalid="ignore"):
        return {"msd": _table(msd, {str(value): (value,) for value in VALUES})}


def _table(score, classes: dict) -> dict:
    cases = {}
    for name in NAMES:
        reference, prediction, spacing = label_maps(name)
        cases[name] = {
            key: score(np.isin(reference, values), np.isin(prediction, values), spacing)
            for key, values in classes.items()
        }
    return {"cases": cases}


def _plain(value):
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    number = float(value)
    return number if math.isfinite(number) else str(number)


TOOLS = {tool.__name__: tool for tool in (nnunet, monai, surface_distance)}

if __name__ == "__main__":
    if sys.argv[1:] and sys.argv[1] in TOOLS:
        print(json.dumps(_plain(TOOLS[sys.argv[1]]()), indent=1))
    else:
        sys.exit(f"usage: python protocols.py {'|'.join(TOOLS)}")
