"""Time the preparation of one large case beside nnU-Net's: seconds and peak memory, alternating in one run.

    python benchmarks/preprocess.py --nnunet-python NNUNET_ENV/bin/python [--shape 300,512,512] [--repeats 3]

A synthetic CT of `shape` voxels with four labels is written twice, with two spacings: one close to the target's, and
one whose slices are more than three times thicker than their pixels, which both programs resample apart from the plane.
Each preparation runs in a process of its own, with one worker, from files to files, by the same plan: crop, normalise
by clip and z-score, resample the image by cubic splines and the labels linearly, find the voxels of each label, write.
nnU-Net runs in its own environment (benchmarks/oracles/nnunet.py). Peak memory is the process's, libraries included.
`--threads 1` keeps our matrix products on one core as nnU-Net's worker is; the default is what users get.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

CASES = {
    "slices like the target's": ((1.0, 0.7, 0.7), (1.25, 0.8, 0.8)),
    "thick slices": ((4.0, 0.7, 0.7), (3.0, 0.8, 0.8)),
}
"""Spacing and target spacing, mm, D, H, W."""


def write_case(folder: Path, shape: tuple[int, ...], spacing_mm: tuple[float, ...]) -> None:
    """Write a data set of one case: smooth anatomy with noise, three labels of different size."""
    import nibabel as nib
    from scipy import ndimage

    random = np.random.default_rng(0)
    coarse = ndimage.gaussian_filter(random.standard_normal([max(2, size // 8) for size in shape]), 2)
    coarse /= coarse.std()
    field = ndimage.zoom(coarse, [size / small for size, small in zip(shape, coarse.shape, strict=True)], order=1)
    image = (200 * field + random.normal(0, 30, shape)).astype(np.int16)
    labels = np.select([field > 1.8, field > 1.0, field < -1.8], [2, 1, 3], 0).astype(np.uint8)
    affine = np.diag([*spacing_mm[::-1], 1.0])
    for name, array in (("imagesTr/case_0000.nii.gz", image), ("labelsTr/case.nii.gz", labels)):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        nib.save(nib.Nifti1Image(array.T, affine), folder / name)
    declared = {
        "channel_names": {"0": "CT"},
        "labels": {"background": 0, "a": 1, "b": 2, "c": 3},
        "numTraining": 1,
        "file_ending": ".nii.gz",
    }
    (folder / "dataset.json").write_text(json.dumps(declared))


def prepare_ours(folder: Path, out: Path, target_mm: tuple[float, ...], threads: int | None) -> None:
    """Prepare the case as training does and write what it took; runs in a process of its own."""
    import torch

    from sagittal.data.cache import build_cache
    from sagittal.data.dataset import read_dataset
    from sagittal.kernels import keep_freed_memory
    from sagittal.plan.plan import CTNormalization, Preprocessing
    from sagittal.testing.plans import untrained_plan

    if threads is not None:
        torch.set_num_threads(threads)
    keep_freed_memory()  # as `sagittal train` does before it prepares the cases
    dataset = read_dataset(folder)
    scheme = CTNormalization(lower=-400.0, upper=400.0, mean=0.0, std=200.0)
    preprocessing = Preprocessing(orientation="stored", spacing_mm=target_mm, normalization=(scheme,))
    plan = untrained_plan("mednext-s", dataset.spec).replace(preprocessing=preprocessing)
    with tempfile.TemporaryDirectory(dir=folder) as cache:
        began = time.perf_counter()
        build_cache(dataset, plan, cache, workers=1)
        seconds = time.perf_counter() - began
    out.write_text(json.dumps({"seconds": seconds, "peak_mib": peak_mib()}))


def peak_mib() -> float:
    """Return the most memory that this process ever held; `ru_maxrss` would count what its parent held."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024


def run(command: list[str], out: Path) -> dict[str, float]:
    """Run a preparation and return what it wrote."""
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env={**os.environ, "OMP_WAIT_POLICY": "passive"})
    return json.loads(out.read_text())


def main() -> None:
    """Read the command line, write the cases, run both programs in turn, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nnunet-python", type=Path)
    parser.add_argument(
        "--shape", type=lambda text: tuple(int(size) for size in text.split(",")), default=(300, 512, 512)
    )
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--ours", nargs=3, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.ours:
        folder, out, target = given.ours
        prepare_ours(Path(folder), Path(out), tuple(float(value) for value in target.split(",")), given.threads)
        return
    oracle = Path(__file__).parent / "oracles" / "nnunet.py"
    threads = [] if given.threads is None else ["--threads", str(given.threads)]
    print(f"{'case':28}{'program':12}{'seconds':>9}{'peak MiB':>10}")
    for name, (spacing, target) in CASES.items():
        with tempfile.TemporaryDirectory() as work:
            folder, out, told = Path(work) / "data", Path(work) / "out.json", ",".join(map(str, target))
            write_case(folder, given.shape, spacing)
            ours, theirs = [], []
            for _ in range(given.repeats):
                ours.append(run([sys.executable, __file__, *threads, "--ours", str(folder), str(out), told], out))
                if given.nnunet_python is not None:
                    theirs.append(
                        run([str(given.nnunet_python), str(oracle), "time", str(folder), str(out), told], out)
                    )
            for program, results in (("Sagittal", ours), ("nnU-Net", theirs)):
                if results:
                    best, peak = min(each["seconds"] for each in results), max(each["peak_mib"] for each in results)
                    print(f"{name:28}{program:12}{best:9.2f}{peak:10.0f}")
            if theirs:
                faster = min(each["seconds"] for each in theirs) / min(each["seconds"] for each in ours)
                smaller = max(each["peak_mib"] for each in theirs) / max(each["peak_mib"] for each in ours)
                print(f"{name:28}{'ratio':12}{faster:9.1f}{smaller:10.1f}")


if __name__ == "__main__":
    main()
