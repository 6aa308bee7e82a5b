"""Memory and time of a whole prediction with many classes, beside nnU-Net's exporter and MONAI's sliding window.

    python benchmarks/predict.py --shape 800,512,512 --classes 117 --network mednext-b --memory-gib 6
    python benchmarks/predict.py --shape 128,160,160 --classes 30 --network mednext-s --set patch.size=32,32,32 \\
        --set network.channels=4 --nnunet PYTHON --monai PYTHON

Makes a scan of random blobs in air and a bundle with random weights, runs `sagittal predict` on them in a process of
its own, and samples the proportional memory (PSS) of that process and its children. Printed is the peak, the wall time
and where it went; with --nnunet and --monai (the Python of an environment that has them) also what these take at the
same number of classes and `--other-shape`. Linux only.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np

from sagittal.plan.overrides import parse_settings
from sagittal.testing.bundle import write_untrained_bundle
from sagittal.volumes import Volume

GIB = 1 << 30
ORACLE = Path(__file__).parent / "oracles" / "predict.py"


def write_scan(path: Path, shape: tuple[int, ...], spacing_mm: tuple[float, ...]) -> None:
    """Write an int16 scan like a CT: a noisy body in air."""
    rng = np.random.default_rng(0)
    scan = np.full(shape, -1000, np.int16)
    d, h, w = (np.linspace(-1, 1, size, dtype=np.float32) for size in shape)
    plane = h[:, None] ** 2 / 0.8 + w**2 / 0.9
    for row in range(shape[0]):
        body = plane + 0.2 * d[row] ** 2 < 1
        scan[row][body] = rng.normal(40, 120, int(body.sum())).astype(np.int16)
    affine = np.diag([*spacing_mm, 1.0])[:, [2, 1, 0, 3]]
    Volume(scan[None], affine).write(path)


class PeakMemory:
    """The most memory that a process and its children had at once, in bytes, sampled while the block runs."""

    def __init__(self, pid: int, every_s: float = 0.1) -> None:
        self.peak, self._pid, self._every_s = 0, pid, every_s
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)

    def __enter__(self) -> "PeakMemory":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _sample(self) -> None:
        while not self._done.wait(self._every_s):
            self.peak = max(self.peak, sum(pss_bytes(pid) for pid in tree(self._pid)))


def tree(pid: int) -> list[int]:
    """Return a process and all its descendants."""
    try:
        children = [int(child) for task in Path(f"/proc/{pid}/task").iterdir() for child in _children(task)]
    except OSError:
        return [pid]
    return [pid, *(found for child in children for found in tree(child))]


def _children(task: Path) -> list[str]:
    try:
        return (task / "children").read_text().split()
    except OSError:
        return []


def pss_bytes(pid: int) -> int:
    """Return a process's memory, its part of shared pages included; 0 where it is gone."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:")), 0)


def run(command: list[str]) -> tuple[str, dict[str, float]]:
    """Run a command; return what it prints, and what it took: all cores' seconds tell more on a busy machine."""
    began, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process, PeakMemory(process.pid) as memory:
        printed, _ = process.communicate()
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    taken = {
        "peak_gib": round(memory.peak / GIB, 3),
        "seconds": round(time.perf_counter() - began, 1),
        "cpu_seconds": round(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, 1),
    }
    return f"failed with exit code {process.returncode}" if process.returncode else printed, taken


def predict(given: argparse.Namespace, work: Path) -> dict[str, object]:
    """Return what a prediction takes."""
    bundle, scan, out = work / "bundle", work / "in" / "scan.nii.gz", work / "out"
    write_untrained_bundle(bundle, given.network, given.classes, settings=parse_settings(given.set))
    scan.parent.mkdir()
    write_scan(scan, given.shape, given.spacing)
    command = [sys.executable, "-m", "sagittal", "predict", str(bundle), str(scan), "--out", str(out)]
    command += ["--engine", given.engine, "--mirror" if given.mirror else "--no-mirror"]
    command += ["--precision", given.precision]
    command += [] if given.memory_gib is None else ["--memory-gib", str(given.memory_gib)]
    printed, taken = run(command)
    result: dict[str, object] = {**taken}
    report = out / "prediction.json"
    if not report.exists():
        return {**result, "printed": printed}
    (case,) = json.loads(report.read_text())["cases"]
    result |= {key: case[key] for key in ("status", "message") if case.get(key)}
    phases = case.get("phases_s", {})
    result["phases_s"] = phases
    if "network" in phases:
        result["outside_network"] = round(1 - phases["network"] / case["seconds"], 3)
    return result


def main() -> None:
    """Read the command line, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", type=_sizes, default=(800, 512, 512), help="of the scan, D,H,W")
    parser.add_argument("--spacing", type=_lengths, default=(1.0, 1.0, 1.0), help="of the scan in mm, D,H,W")
    parser.add_argument("--classes", type=int, default=117)
    parser.add_argument("--network", default="mednext-b")
    parser.add_argument("--engine", default="auto")
    parser.add_argument("--precision", default="fp32", help="fp32, bf16 or int8")
    parser.add_argument("--mirror", action="store_true")
    parser.add_argument("--memory-gib", type=float)
    parser.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE", help="change the plan")
    parser.add_argument("--nnunet", help="the Python of an environment with nnU-Net 2.8")
    parser.add_argument("--monai", help="the Python of an environment with MONAI")
    parser.add_argument("--other-shape", type=_sizes, help="a size that these survive; --shape where it is left out")
    parser.add_argument("--other-scale", type=float, default=1.5, help="nnU-Net's voxels in those of the scan")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        report = {"sagittal": predict(given, Path(folder))}
    shape = ",".join(map(str, given.other_shape or given.shape))
    for name, python, number in (("nnunet", given.nnunet, given.other_scale), ("monai", given.monai, 128)):
        if python is not None:
            printed, taken = run([python, str(ORACLE), name, shape, str(given.classes), str(number)])
            report[name] = {"shape": shape, **taken, "printed": printed.strip()}
    print(json.dumps({"shape": given.shape, "classes": given.classes, "cores": os.cpu_count(), **report}, indent=2))


def _sizes(text: str) -> tuple[int, ...]:
    return tuple(int(size) for size in text.split(","))


def _lengths(text: str) -> tuple[float, ...]:
    return tuple(float(length) for length in text.split(","))


if __name__ == "__main__":
    main()
