"""Time and memory of Dice, HD95, NSD and ASSD of 15 classes on 512 x 512 x 300 voxels, here and by MONAI.

    python benchmarks/metrics.py
    python benchmarks/metrics.py --shape 150,256,256 --classes 15 --repeat 3 --oracle-python OTHER/bin/python

Each side runs in a process of its own, on one thread; its time is that of the scoring alone (processor time, which
other work on the machine changes little), its memory the peak of the whole process. MONAI is given what suits it best:
one class after the other, as masks; all classes at once as a one-hot tensor need several times the memory. Both get the
same label maps from a seeded generator: 15 blobs of very different size, and predictions whose outlines are off by some
voxels. The values must be the same to MONAI's float32. MONAI's Python needs MONAI 1.6; by itself it is the one that
runs.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

TOLERANCE_MM = 2.0
SPACING_MM = (1.5, 0.8, 0.8)
KEYS = ("dice", "hd95_mm", "assd_mm", "nsd_2mm")
ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")


def label_maps(shape: tuple[int, int, int], classes: int) -> tuple[np.ndarray, np.ndarray]:
    """Return reference and prediction (D, H, W), uint8: blobs whose radius runs from 4 % to 23 % of the image."""
    rng = np.random.default_rng(0)
    maps = np.zeros((2, *shape), np.uint8)
    for value in range(1, classes + 1):
        radius = np.array(shape) * np.geomspace(0.23, 0.04, classes)[value - 1]
        centre = radius + rng.random(3) * (np.array(shape) - 2 * radius)
        for labels, move in zip(maps, (0.0, 0.03), strict=True):
            _paint(labels, value, centre + move * radius * rng.standard_normal(3), radius, rng)
    return maps[0], maps[1]


def _paint(labels: np.ndarray, value: int, centre: np.ndarray, radius: np.ndarray, rng: np.random.Generator) -> None:
    """Paint a ball with waves on its surface into `labels`, within its box."""
    starts = np.maximum(0, np.floor(centre - 1.3 * radius)).astype(int)
    stops = np.minimum(labels.shape, np.ceil(centre + 1.3 * radius)).astype(int)
    box = tuple(slice(start, stop) for start, stop in zip(starts, stops, strict=True))
    axes = [
        ((np.arange(start, stop) - middle) / size).astype(np.float32)
        for start, stop, middle, size in zip(starts, stops, centre, radius, strict=True)
    ]
    d, h, w = np.meshgrid(*axes, indexing="ij", sparse=True)
    waves = sum(
        0.05 * np.sin(k * d + phase) * np.sin(k * h - phase) * np.cos(k * w) for k, phase in rng.random((3, 2)) * 9
    )
    labels[box][np.sqrt(d**2 + h**2 + w**2) + waves < 1] = value


def ours(reference: np.ndarray, prediction: np.ndarray, classes: int) -> tuple[float, dict[str, list[float]]]:
    """Score with Sagittal; return processor seconds and values by metric."""
    from sagittal.evaluation import ClassSet, EvaluationSettings, evaluate_case

    settings = EvaluationSettings(metrics=("dice", "hd95_mm", "assd_mm", "nsd"), tolerances_mm=(TOLERANCE_MM,))
    began = time.process_time()
    names = ClassSet.of_values(range(1, classes + 1))
    score = evaluate_case(reference, prediction, SPACING_MM, names, settings=settings)
    seconds = time.process_time() - began
    return seconds, {key: [found.metrics[key] for found in score.classes.values()] for key in KEYS}


def monai(reference: np.ndarray, prediction: np.ndarray, classes: int) -> tuple[float, dict[str, list[float]]]:
    """Score with MONAI, class by class; return processor seconds and values by metric."""
    import torch
    from monai.metrics import (
        compute_average_surface_distance,
        compute_dice,
        compute_hausdorff_distance,
        compute_surface_dice,
    )

    torch.set_num_threads(1)
    found: dict[str, list[float]] = {key: [] for key in KEYS}
    began = time.process_time()
    for value in range(1, classes + 1):
        masks = [torch.from_numpy((labels == value)[None, None]) for labels in (prediction, reference)]
        tensors, options = {"y_pred": masks[0], "y": masks[1]}, {"include_background": True, "spacing": SPACING_MM}
        found["dice"].append(float(compute_dice(**tensors)))
        found["hd95_mm"].append(float(compute_hausdorff_distance(**tensors, **options, percentile=95)))
        found["assd_mm"].append(float(compute_average_surface_distance(**tensors, **options, symmetric=True)))
        found["nsd_2mm"].append(float(compute_surface_dice(**tensors, **options, class_thresholds=[TOLERANCE_MM])))
    return time.process_time() - began, found


def measure(side: str, folder: Path, classes: int) -> None:
    """Score in this process and print seconds, peak memory and values as JSON."""
    # Read from a file: memory that making the maps took is not the scoring's.
    reference, prediction = (np.load(folder / f"{name}.npy") for name in ("reference", "prediction"))
    seconds, values = (ours if side == "ours" else monai)(reference, prediction, classes)
    peak_mib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps({"seconds": seconds, "peak_mib": peak_mib, "values": values}))


def run(python: str, side: str, folder: Path, classes: int) -> dict:
    """Score in a process of its own."""
    command = [python, __file__, "--side", side, "--folder", str(folder), "--classes", str(classes)]
    done = subprocess.run(command, check=True, capture_output=True, text=True, env={**os.environ, **ONE_THREAD})
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    """Measure both sides in turns, check that they agree, and print a line for each and the ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="300,512,512", help="D,H,W")
    parser.add_argument("--classes", type=int, default=15)
    parser.add_argument("--repeat", type=int, default=1, help="turns; the best time and the least memory count")
    parser.add_argument("--oracle-python", default=sys.executable, help="a Python with MONAI")
    parser.add_argument("--side", choices=("ours", "monai"), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.side:
        measure(given.side, given.folder, given.classes)
        return
    depth, height, width = (int(size) for size in given.shape.split(","))
    with tempfile.TemporaryDirectory() as work:
        folder = Path(work)
        maps = label_maps((depth, height, width), given.classes)
        for name, labels in zip(("reference", "prediction"), maps, strict=True):
            np.save(folder / f"{name}.npy", labels)
        del maps
        turns: dict[str, list[dict]] = {"ours": [], "monai": []}
        for _ in range(given.repeat):
            turns["ours"].append(run(sys.executable, "ours", folder, given.classes))
            turns["monai"].append(run(given.oracle_python, "monai", folder, given.classes))
    for key in KEYS:
        mine, theirs = (np.array(turns[side][0]["values"][key], float) for side in ("ours", "monai"))
        np.testing.assert_allclose(mine, theirs, rtol=1e-6, atol=1e-6, err_msg=key)
    seconds, peaks = (
        {side: min(turn[field] for turn in turns[side]) for side in turns} for field in ("seconds", "peak_mib")
    )
    print(f"{given.classes} classes on {given.shape} voxels, Dice + HD95 + ASSD + NSD, one thread, the same values")
    for side, name in (("ours", "Sagittal"), ("monai", "MONAI")):
        print(f"{name:10} {seconds[side]:8.2f} s  {peaks[side]:8.0f} MiB at the peak")
    print(f"time {seconds['ours'] / seconds['monai']:.3f}, memory {peaks['ours'] / peaks['monai']:.2f} of MONAI's")


if __name__ == "__main__":
    main()
