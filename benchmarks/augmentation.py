"""Time augmentation on the CPU, and count what it would ask of an accelerator.

    python benchmarks/augmentation.py [--before REVISION] [--repeats 5] [--steps 6]

For two kinds of batch: seconds per batch with one thread and with two, averaged over some batches, the best of some
repeats. With `--before` the same is measured for the augmentation of another revision of this repository, in turns with
this one's, and the ratio printed. The last table counts the operations of a batch by its size, changed
at once, as on an accelerator, and one by one, as on the CPU.
"""

import argparse
import importlib.util
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from sagittal.data.augmentation import augment, spatial_draw
from sagittal.data.spatial import box_size
from sagittal.plan.augmentation import Augmentation

BATCHES = ((4, 1, (48, 64, 48)), (2, 4, (96, 96, 96)))
SPACING_MM = (1.0, 1.0, 1.0)
MODULES = ("draws", "spatial", "intensity", "augmentation")
VIEWS = {"slice", "view", "select", "split", "unsqueeze", "expand", "detach", "unbind", "alias", "permute", "transpose"}
NOT_COUNTED = {"rand", "randint", "randn", "_local_scalar_dense", "normal_", "pow_", "empty"}
"""What is drawn on the processor, and what an accelerator does in one operation, but the CPU in parts."""

Boxes = tuple[list[torch.Tensor], list[torch.Tensor], list[int]]


def earlier_augment(revision: str) -> Callable[..., object]:
    """Return `augment` of another revision, whose modules are loaded under names of their own.

    The revision's four modules must need nothing else of the repository that has changed since.
    """
    root = Path(__file__).resolve().parents[1]
    with tempfile.TemporaryDirectory() as folder:
        for name in MODULES:
            path = f"src/sagittal/data/{name}.py"
            text = subprocess.check_output(["git", "show", f"{revision}:{path}"], cwd=root, text=True)
            for other in MODULES:
                text = text.replace(f"sagittal.data.{other} ", f"earlier_{other} ")
            (Path(folder) / f"earlier_{name}.py").write_text(text)
            spec = importlib.util.spec_from_file_location(f"earlier_{name}", Path(folder) / f"earlier_{name}.py")
            assert spec is not None and spec.loader is not None
            module = importlib.util.module_from_spec(spec)
            sys.modules[f"earlier_{name}"] = module
            spec.loader.exec_module(module)
    return sys.modules["earlier_augmentation"].augment


def boxes_of(samples: int, channels: int, patch: tuple[int, int, int], step: int, config: Augmentation) -> Boxes:
    """Return the boxes and seeds of one batch."""
    seeds = list(range(samples * step, samples * (step + 1)))
    sizes = [box_size(spatial_draw(seed, config, patch), patch, SPACING_MM) for seed in seeds]
    images = [torch.randn(channels, *size) for size in sizes]
    return images, [torch.randint(0, 4, size, dtype=torch.int16) for size in sizes], seeds


def best_times(runs: Sequence[Callable[[], object]], repeats: int) -> list[float]:
    """Return the best time of each in seconds, the runs interleaved so that a busy moment hits all alike."""
    best = [float("inf")] * len(runs)
    for run in runs:
        run()
    for _ in range(repeats):
        for index, run in enumerate(runs):
            start = time.perf_counter()
            run()
            best[index] = min(best[index], time.perf_counter() - start)
    return best


class Counting(TorchDispatchMode):
    """Count operations that are more than another view of the same memory."""

    def __init__(self):
        super().__init__()
        self.calls = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name not in VIEWS:
            self.calls[name] += 1
        return func(*args, **(kwargs or {}))


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", help="revision to compare with")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--steps", type=int, default=6, help="batches that a time is the mean of")
    options = parser.parse_args()
    config = Augmentation()
    ways = {"now": augment} | ({"before": earlier_augment(options.before)} if options.before else {})
    print(f"{'batch':<22}{'threads':>8}" + "".join(f"{way + ', ms':>12}" for way in ways) + "   now/before")
    for samples, channels, patch in BATCHES:
        batches = [boxes_of(samples, channels, patch, step, config) for step in range(options.steps)]
        for threads in (1, 2):
            torch.set_num_threads(threads)

            def run(way: Callable[..., object], batches=batches, patch=patch) -> None:
                for images, labels, seeds in batches:
                    way(images, labels, config, patch, seeds, spacing_mm=SPACING_MM)

            times = best_times([lambda way=way: run(way) for way in ways.values()], options.repeats)
            shape = f"{samples} x {channels} x " + "x".join(map(str, patch))
            row = "".join(f"{1e3 * seconds / options.steps:>12.1f}" for seconds in times)
            print(f"{shape:<22}{threads:>8}{row}" + (f"{times[0] / times[1]:>13.2f}" if len(times) > 1 else ""))
    print_operations()


def print_operations() -> None:
    """Print how many operations a batch takes by its size, everything switched on."""
    torch.set_num_threads(1)
    switches = {name: 1.0 for name in Augmentation.model_fields if name.endswith("_probability")}
    # A fixed blur and lattice, since a longer blur takes more operations.
    config = Augmentation(**switches, blur_sigma_vox=(1.0, 1.0), elastic_sigma=(0.15, 0.15))
    patch = (16, 20, 16)
    print("\nsamples   at once   one by one   (4 channels; operations but for noise, drawn channel by channel)")
    for samples in (1, 2, 4, 8, 16):
        images, labels, seeds = boxes_of(samples, 4, patch, 0, config)
        counts = []
        for at_once in (True, False):
            with Counting() as counting:
                augment(images, labels, config, patch, seeds, spacing_mm=SPACING_MM, at_once=at_once)
            counts.append(sum(calls for name, calls in counting.calls.items() if name not in NOT_COUNTED))
        print(f"{samples:>7}{counts[0]:>10}{counts[1]:>13}")


if __name__ == "__main__":
    main()
