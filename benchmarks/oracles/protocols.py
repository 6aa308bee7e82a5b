"""What other tools make of the label maps of protocol_masks.py; each runs in an environment that has that tool.

    python protocols.py nnunet             nnunetv2 2.8: nnunetv2.evaluation.evaluate_predictions
    python protocols.py monai              monai 1.6: its metric classes with their defaults
    python protocols.py medpy              medpy 0.5: BraTS 2021, nnFormer's Synapse, ACDC
    python protocols.py surface_distance   DeepMind's surface-distance 0.1 (numpy 1.23): the Decathlon
    python protocols.py brats2023          surface-distance 0.1, connected-components-3d: BraTS 2023, by lesion

Printed is JSON: for each protocol the value of every metric by case and class, and the means where the tool takes
any; NaN and infinity as strings. tests/golden/metrics/protocols_TOOL.json holds what was printed. None is a
dependency of this project. What the challenges' scripts do around the libraries, which is mostly what they do about
empty masks, is told here in a few lines, after CBICA/CaPTk (GetBraTSLabelStatistics), 282857341/nnFormer
(inference_synapse.py), the challenge's metrics_acdc.py and rachitsaluja/BraTS-2023-Metrics.
"""

import json
import math
import sys
import tempfile
from pathlib import Path

import numpy as np
from protocol_masks import CASES, LESION_CASES, label_maps, lesion_maps

NAMES = [case[0] for case in CASES]
VALUES = (1, 2, 3)
REGIONS = {"WT": (1, 2, 3), "TC": (1, 3), "ET": (3,)}
WORST_MM = math.sqrt(240**2 + 240**2 + 155**2)
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


def medpy() -> dict:
    """Score every case as three scripts do that call medpy."""
    from medpy.metric.binary import dc, hd, hd95, sensitivity, specificity

    def brats(reference, prediction, spacing):
        empty = [not mask.any() for mask in (reference, prediction)]
        return {
            "dice": 1.0 if all(empty) else dc(prediction, reference),
            "hd95_mm": 0.0 if all(empty) else WORST_MM if any(empty) else hd95(reference, prediction),
            "sensitivity": float(empty[1]) if empty[0] else sensitivity(prediction, reference),
            "specificity": 1.0 if all(empty) else specificity(prediction, reference),
        }

    def synapse(reference, prediction, spacing):
        empty = [not mask.any() for mask in (reference, prediction)]
        return {
            "dice": 1.0 if all(empty) else dc(prediction, reference),
            "hd95_vox": 0.0 if any(empty) else hd95(prediction, reference),
        }

    def acdc(reference, prediction, spacing):
        ml = np.prod(spacing) / 1000.0
        found = {
            "volume_ml": prediction.sum() * ml,
            "volume_error_ml": (prediction.sum() * 1.0 - reference.sum()) * ml,
        }
        if reference.any() or prediction.any():
            found["dice"] = dc(reference, prediction)
        if reference.any() and prediction.any():
            found["hd_mm"] = hd(reference, prediction, voxelspacing=spacing, connectivity=1)
        return found

    own = {str(value): (value,) for value in VALUES}
    return {
        "brats2021": _table(brats, REGIONS),
        "nnformer-synapse": _table(synapse, own),
        "acdc": _table(acdc, own),
    }


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


def brats2023() -> dict:
    """Score lesion by lesion with the parameters of adult glioma: 3 dilations, lesions above 50 voxels."""
    import cc3d
    from scipy import ndimage
    from surface_distance import metrics

    neighbours = ndimage.generate_binary_structure(3, 2)

    def dice(first, second):
        return 2.0 * (first & second).sum() / (first.sum() + second.sum())

    def hd95(reference, prediction):
        found = metrics.compute_robust_hausdorff(
            metrics.compute_surface_distances(reference, prediction, (1.0, 1.0, 1.0)), 95
        )
        return 374.0 if math.isinf(found) else found

    def score(reference, prediction):
        grown = ndimage.binary_dilation(reference, structure=neighbours, iterations=3)
        lesions = cc3d.connected_components(grown.astype(np.uint8), connectivity=26) * reference
        parts = cc3d.connected_components(prediction.astype(np.uint8), connectivity=26)
        dices, distances, hits, kept_hits, kept_misses = [], [], set(), 0, 0
        for number in range(1, int(lesions.max()) + 1):
            lesion = lesions == number
            around = ndimage.binary_dilation(lesion, structure=neighbours, iterations=3)
            touching = set(np.unique(parts[around]).tolist()) - {0}
            hits |= touching
            if lesion.sum() > 50:
                matched = np.isin(parts, list(touching))
                dices.append(dice(lesion, matched))
                distances.append(hd95(lesion, matched))
                kept_hits += bool(touching)
                kept_misses += not touching
        spurious = len(set(np.unique(parts).tolist()) - {0} - hits)
        count = len(dices) + spurious
        true_positive = (reference & prediction).sum()
        empty = not reference.any() and not prediction.any()
        outside = ~reference & ~prediction
        return {
            "lesion_dice": sum(dices) / count if count else 1.0,
            "lesion_hd95_mm": (sum(distances) + 374.0 * spurious) / count if count else 0.0,
            "lesions_tp": kept_hits,
            "lesions_fp": spurious,
            "lesions_fn": kept_misses,
            "dice": 1.0 if empty else dice(reference, prediction),
            "hd95_mm": 0.0 if empty else hd95(reference, prediction),
            "sensitivity": 1.0 if empty else true_positive / (reference.sum() + np.finfo(float).eps),
            "specificity": outside.sum() / ((~reference).sum() + np.finfo(float).eps),
        }

    cases = {}
    for name in [case[0] for case in LESION_CASES]:
        reference, prediction = lesion_maps(name)
        cases[name] = {
            key: score(np.isin(reference, values), np.isin(prediction, values)) for key, values in REGIONS.items()
        }
    return {"brats2023": {"cases": cases}}


def _plain(value):
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    number = float(value)
    return number if math.isfinite(number) else str(number)


TOOLS = {tool.__name__: tool for tool in (nnunet, monai, medpy, surface_distance, brats2023)}

if __name__ == "__main__":
    if sys.argv[1:] and sys.argv[1] in TOOLS:
        print(json.dumps(_plain(TOOLS[sys.argv[1]]()), indent=1))
    else:
        sys.exit(f"usage: python protocols.py {'|'.join(TOOLS)}")
