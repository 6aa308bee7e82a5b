"""Measure how fast training batches are made, and which share of a step would be spent waiting for them.

    python benchmarks/loader.py [--device cuda] [--patch 128,128,128] [--batch 2] [--threads 0,1,2,4] [--step-s 0.25]

Large cases are made up and cached in a temporary folder; batches are then read, augmented by nnU-Net's probabilities
and moved to the device, by each number of threads. Printed are the seconds per batch where nothing else is done, and,
with `--step-s`, the share of the time that a consumer which computes for so long between two batches waits for them.
On a GPU the step is imitated by multiplying matrices on it, so that augmentation has to share it.
"""

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from sagittal.data.cache import Cache, Entry, foreground_locations, image_path, labels_path, locations_path
from sagittal.data.loader import TrainingBatches
from sagittal.plan import Plan
from sagittal.plan.overrides import override
from sagittal.testing.plans import untrained_plan, untrained_spec

WARM_UP = 3


def large_cases(folder: Path, *, cases: int, edge: int) -> Cache:
    """Write cases of edge^3 voxels, one channel and two classes as preprocessing does."""
    rng = np.random.default_rng(0)
    entries = tuple(Entry(*[f"case_{number}"] * 3) for number in range(cases))
    for part in ("images", "labels", "locations"):
        (folder / part).mkdir()
    for entry in entries:
        labels = np.zeros((edge, edge, edge), np.uint8)
        labels[edge // 4 : edge // 2, edge // 4 : edge // 2, edge // 3 : edge // 2] = 1
        labels[5:9, 5:9, 5:9] = 2
        np.save(image_path(folder, entry), rng.standard_normal((1, edge, edge, edge), np.float32).astype(np.float16))
        np.save(labels_path(folder, entry), labels)
        found = {str(index): voxels for index, voxels in foreground_locations(labels, 3).items()}
        np.savez(locations_path(folder, entry), **found)
    return Cache(folder, entries)


def synchronize(device: torch.device) -> None:
    """Wait for what the device has still to do."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds_per_batch(cache: Cache, plan: Plan, device: torch.device, threads: int) -> float:
    """Return the mean time between two batches where nothing else is done."""
    with TrainingBatches(cache, range(len(cache.entries)), plan, workers=threads, device=device) as batches:
        for _ in range(WARM_UP):
            next(batches)
        synchronize(device)
        began, count = time.perf_counter(), 0
        for _ in batches:
            count += 1
        synchronize(device)
        return (time.perf_counter() - began) / count


def compute(device: torch.device, seconds: float, matrix: torch.Tensor) -> None:
    """Keep the device busy, or the processor asleep, for about so long."""
    if device.type != "cuda":
        time.sleep(seconds)
        return
    began = time.perf_counter()
    while time.perf_counter() - began < seconds:
        for _ in range(4):
            matrix @ matrix
        synchronize(device)


def waiting_share(cache: Cache, plan: Plan, device: torch.device, threads: int, step_s: float) -> float:
    """Return the share of the time that a consumer whose steps take `step_s` waits for batches."""
    matrix = torch.randn(4096 if device.type == "cuda" else 1, 4096, device=device)
    with TrainingBatches(cache, range(len(cache.entries)), plan, workers=threads, device=device) as batches:
        for _ in range(WARM_UP):
            next(batches)
            compute(device, step_s, matrix)
        began, waited_before = time.perf_counter(), batches.waited_s
        for _ in batches:
            compute(device, step_s, matrix)
        return (batches.waited_s - waited_before) / (time.perf_counter() - began)


def numbers(text: str) -> list[int]:
    """Return the numbers of a list with commas."""
    return [int(part) for part in text.split(",")]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--network", default="mednext-s")
    parser.add_argument("--patch", type=numbers, default=[128, 128, 128])
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--threads", type=numbers, default=[0, 1, 2, 4])
    parser.add_argument("--batches", type=int, default=20, help="how many are timed")
    parser.add_argument("--cases", type=int, default=4)
    parser.add_argument("--edge", type=int, default=200, help="voxels of a case along each axis")
    parser.add_argument("--step-s", type=float, help="seconds that a training step takes between two batches")
    given = parser.parse_args()
    device = torch.device(given.device)
    settings = {
        "patch.size": given.patch,
        "training.batch_size": given.batch,
        "training.class_balanced": True,
        "schedule.steps": WARM_UP + given.batches,
    }
    plan = override(untrained_plan(given.network, untrained_spec(3)), settings, origin="this measurement")
    print(f"patch {given.patch}, batch {given.batch}, {given.cases} cases of {given.edge}^3, {device}")
    with tempfile.TemporaryDirectory() as folder:
        cache = large_cases(Path(folder), cases=given.cases, edge=given.edge)
        for threads in given.threads:
            line = f"{threads} threads: {seconds_per_batch(cache, plan, device, threads):.3f} s per batch"
            if given.step_s is not None:
                share = waiting_share(cache, plan, device, threads, given.step_s)
                line += f"; beside steps of {given.step_s:g} s, {share:.1%} of the time is spent waiting"
            print(line, flush=True)


if __name__ == "__main__":
    main()
