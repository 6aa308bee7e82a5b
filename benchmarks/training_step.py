"""Time a whole training step and a forward pass on the CPU: `python benchmarks/training_step.py [--size 48x64x48]`.

Three forms of the same network, with the same weights and input, in one process and interleaved:

- plain: PyTorch's operators on contiguous volumes, as anyone would write the network down;
- channels-last: PyTorch's operators on channels-last volumes;
- Sagittal: what runs when you train, with the compiled kernels where they fit.

Seconds are the best of the repeats; the ratio is the plain form's time over that of the form. The last line is the
rate of a 2048^3 matrix product in the same process: the bound on any of it.
"""

import argparse
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from unittest.mock import patch

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch

from sagittal.kernels import cpu_available, keep_freed_memory, native
from sagittal.networks import create_mednext, create_segformer3d

NETWORKS: dict[str, Callable[[], torch.nn.Module]] = {
    "mednext-s": lambda: create_mednext("S", in_channels=1, num_classes=3, deep_supervision=True),
    "mednext-s-k5": lambda: create_mednext("S", in_channels=1, num_classes=3, kernel_size=5, deep_supervision=True),
    "segformer3d": lambda: create_segformer3d(in_channels=1, num_classes=3),
}


@contextmanager
def plain() -> Iterator[None]:
    """Run the networks as for an export, which is plain PyTorch on contiguous volumes."""
    with patch.object(native, "usable", return_value=False), patch("torch.compiler.is_exporting", return_value=True):
        yield


@contextmanager
def channels_last() -> Iterator[None]:
    """Run the networks without the compiled kernels."""
    with patch.object(native, "usable", return_value=False):
        yield


@contextmanager
def ours() -> Iterator[None]:
    """Run the networks as they are."""
    yield


def train_step(network: torch.nn.Module, x: torch.Tensor) -> None:
    """Forward and backward of a loss that touches every output."""
    output = network(x)
    outputs = output if isinstance(output, list) else [output]
    torch.stack([scale.square().mean() for scale in outputs]).sum().backward()
    network.zero_grad(set_to_none=True)


@torch.no_grad()
def forward(network: torch.nn.Module, x: torch.Tensor) -> None:
    """A forward pass without gradients."""
    network(x)


def seconds(name: str, x: torch.Tensor, repeats: int) -> dict[str, list[float]]:
    """Return per form the best seconds of a training step and of a forward pass."""
    torch.manual_seed(0)
    network = NETWORKS[name]()
    best = {form.__name__: [float("inf"), float("inf")] for form in (plain, channels_last, ours)}
    for repeat in range(repeats + 1):
        for form in (plain, channels_last, ours):
            for column, (work, mode) in enumerate(((train_step, True), (forward, False))):
                network.train(mode)
                with form():
                    start = time.perf_counter()
                    work(network, x)
                    took = time.perf_counter() - start
                if repeat:
                    best[form.__name__][column] = min(best[form.__name__][column], took)
    return best


def matrix_rate() -> float:
    """Return the GFLOP/s of a float32 matrix product."""
    a, times = torch.randn(2048, 2048), []
    for _ in range(5):
        start = time.perf_counter()
        a @ a
        times.append(time.perf_counter() - start)
    return 2 * 2048**3 / min(times) / 1e9


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", default=",".join(NETWORKS))
    parser.add_argument("--size", default="48x64x48")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    keep_freed_memory()
    x = torch.randn(options.batch, 1, *map(int, options.size.split("x")))
    print(
        f"input {tuple(x.shape)}, torch {torch.__version__}, {torch.get_num_threads()} threads, "
        f"kernels {cpu_available()}"
    )
    print(f"{'network':14} {'form':14} {'training step':>20} {'forward':>20}")
    for name in options.networks.split(","):
        times = seconds(name, x, options.repeats)
        for form, (step, ahead) in times.items():
            ratios = times["plain"][0] / step, times["plain"][1] / ahead
            print(f"{name:14} {form:14} {step:9.3f} s {ratios[0]:6.2f} x {ahead:9.3f} s {ratios[1]:6.2f} x", flush=True)
    print(f"matrix product: {matrix_rate():.0f} GFLOP/s")


if __name__ == "__main__":
    main()
