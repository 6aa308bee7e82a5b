"""Time the CPU kernels against plain PyTorch at MedNeXt-S's shapes: `python benchmarks/kernels_cpu.py [--levels
0,1,2]`.

Each row is one operation at one level of a 2 x 1 x 48 x 64 x 48 input: plain contiguous, plain channels_last_3d,
ours, in milliseconds (best of some interleaved runs, all threads). The last table is the rate of the matrix product,
the bound on any of it.
"""

import argparse
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from sagittal.kernels import TailWeights, cpu_available, depthwise_conv, mednext_block

SPATIAL = (48, 64, 48)
CHANNELS = 32
MATRICES = (
    (294912, 32, 64),
    (8192, 32, 64),
    (36864, 64, 128),
    (4608, 128, 256),
    (576, 256, 512),
    (2048, 2048, 2048),
)


def best_times(runs: Sequence[Callable[[], object]], repeats: int) -> list[float]:
    """Return the best time of each in milliseconds, the runs interleaved so that a busy moment hits all alike."""
    best = [float("inf")] * len(runs)
    for run in runs:
        run()
    for _ in range(repeats):
        for index, run in enumerate(runs):
            start = time.perf_counter()
            run()
            best[index] = min(best[index], 1e3 * (time.perf_counter() - start))
    return best


def plain_depthwise(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The framework's depthwise convolution."""
    return F.conv3d(x, weight, bias, padding=weight.shape[-1] // 2, groups=x.shape[1])


def plain_block(x: Tensor, weight: Tensor, bias: Tensor, *rest: Tensor) -> Tensor:
    """A MedNeXt block from the framework's modules, as the official code has it."""
    norm_weight, norm_bias, expand, expand_bias, contract, contract_bias = rest
    h = F.group_norm(plain_depthwise(x, weight, bias), x.shape[1], norm_weight, norm_bias)
    return x + F.conv3d(F.gelu(F.conv3d(h, expand, expand_bias)), contract, contract_bias)


def our_block(x: Tensor, weight: Tensor, bias: Tensor, *rest: Tensor) -> Tensor:
    """The fused block."""
    return mednext_block(x, weight, bias, TailWeights(*rest))


def inputs(level: int, kernel: int) -> list[Tensor]:
    """Return x and the weights of one block of MedNeXt-S."""
    channels = CHANNELS << level
    shapes = [
        (2, channels, *(size >> level for size in SPATIAL)),
        (channels, 1, kernel, kernel, kernel),
        (channels,),
        (channels,),
        (channels,),
        (2 * channels, channels, 1, 1, 1),
        (2 * channels,),
        (channels, 2 * channels, 1, 1, 1),
        (channels,),
    ]
    return [torch.randn(shape) for shape in shapes]


def forward(operation: Callable[..., Tensor], tensors: list[Tensor], channels_last: bool) -> Callable[[], object]:
    """Return a run of the operation without gradients."""
    given = [tensors[0].contiguous(memory_format=torch.channels_last_3d) if channels_last else tensors[0], *tensors[1:]]

    def run() -> None:
        with torch.no_grad():
            operation(*given)

    return run


def backward(operation: Callable[..., Tensor], tensors: list[Tensor], channels_last: bool) -> Callable[[], object]:
    """Return a run of the operation's gradients at all its inputs (the forward pass is not timed)."""
    layout = torch.channels_last_3d if channels_last else torch.contiguous_format
    given = [
        tensors[0].contiguous(memory_format=layout).requires_grad_(),
        *(t.clone().requires_grad_() for t in tensors[1:]),
    ]
    y = operation(*given)
    grad = torch.randn(y.shape).contiguous(memory_format=layout)
    return lambda: torch.autograd.grad(y, given, grad, retain_graph=True)


def compare(levels: Sequence[int], repeats: int) -> None:
    """Print the table of operations."""
    print(f"{'level':>5} {'operation':<22} {'contiguous':>11} {'ch. last':>9} {'ours':>8} {'ratio':>6} {'ratio':>6}")
    pairs: list[tuple[str, Callable[..., Tensor], Callable[..., Tensor], int]] = [
        ("depthwise", plain_depthwise, depthwise_conv, 3),
        ("block", plain_block, our_block, 9),
    ]
    for level in levels:
        for name, plain, ours, count in pairs:
            for kernel in (3, 5):
                tensors = inputs(level, kernel)[:count]
                for direction, timed in (("fwd", forward), ("bwd", backward)):
                    runs = [timed(plain, tensors, False), timed(plain, tensors, True), timed(ours, tensors, True)]
                    first, second, ours_ms = best_times(runs, repeats)
                    times = f"{first:11.1f} {second:9.1f} {ours_ms:8.2f} {first / ours_ms:6.1f} {second / ours_ms:6.1f}"
                    print(f"{level:>5} {f'{name} k={kernel} {direction}':<22} {times}")


def matrix_rates() -> None:
    """Print the rate of the framework's matrix product at the shapes that occur."""
    print("\nmatrix product (voxels, K) x (K, N), GFLOP/s: float32, bfloat16")
    for voxels, depth, width in MATRICES:
        rates = []
        for dtype in (torch.float32, torch.bfloat16):
            left, right = torch.randn(voxels, depth).to(dtype), torch.randn(depth, width).to(dtype)
            out = torch.empty(voxels, width, dtype=dtype)
            (milliseconds,) = best_times([lambda left=left, right=right, out=out: torch.mm(left, right, out=out)], 5)
            rates.append(2e-6 * voxels * depth * width / milliseconds)
        print(f"{voxels:>7} x {depth:>4} x {width:>4} {rates[0]:8.0f} {rates[1]:8.0f}")


def main() -> None:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--levels", default="0,1,2,3,4")
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, compiled kernels: {cpu_available()}")
    compare([int(level) for level in arguments.levels.split(",")], arguments.repeats)
    matrix_rates()


if __name__ == "__main__":
    main()
