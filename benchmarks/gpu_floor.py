"""Count what a pass of the networks moves through a GPU's memory: by the fused kernels, and at the least.

    PYTHONPATH=src python benchmarks/gpu_floor.py

Nothing is run: MedNeXt's blocks are known launch by launch (`launches`), other networks are followed on tensors that
hold no data, operator by operator (`operators`). Times are those of an H100 that copies 3 TB/s; a launch is taken for
4 microseconds, which is what a stream of small kernels takes each.

Letters: C channels, O outputs, V voxels of the block's input.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from math import prod
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sagittal.networks import MedNeXt, MedNeXtBlock, MedNeXtDownBlock, MedNeXtUpBlock, SegFormer3D, create_mednext

COPY_RATE = 3e12
LAUNCH_S = 4e-6
BF16 = 2

Block = MedNeXtBlock | MedNeXtDownBlock | MedNeXtUpBlock


class Launch(NamedTuple):
    """A kernel, with the names of the activations that it reads and writes; what no floor could spare is `needed`."""

    what: str
    reads: tuple[str, ...]
    writes: tuple[str, ...]
    needed: bool = True


def sizes(block: Block, shape: Sequence[int]) -> dict[str, int]:
    """Return the numbers in each activation of a block, given its input's shape (N, C, D, H, W)."""
    cases, channels, *size = shape
    outputs = block.out_channels
    doubles = isinstance(block, MedNeXtUpBlock)
    if doubles:
        inner = [2 * n - 1 if stride == 2 else n for n, stride in zip(size, block.strides, strict=True)]
        outer = [n * stride for n, stride in zip(size, block.strides, strict=True)]
    else:
        inner = outer = [-(-n // stride) for n, stride in zip(size, block.strides, strict=True)]
    small = min(prod(size), prod(outer))
    return {
        "x": cases * channels * prod(size),
        "h": cases * channels * prod(inner),
        "y": cases * outputs * prod(outer),
        "x strided": cases * channels * small,
        "path": cases * outputs * small,
    }


def launches(block: Block) -> tuple[list[Launch], list[Launch]]:
    """Return a block's launches forward and backward; weights, sums and statistics are too small to count."""
    grn = [Launch("response norms", ("h",), ())] if block.grn else []
    back = [Launch("gradient of the response norms", ("h", "y"), ())] if block.grn else []
    wide = max(block.in_channels, block.out_channels)
    one = wide <= 128 and block.conv2.out_channels * wide <= 8192
    back.append(Launch("tail", ("h", "y"), ("h",)))
    if not one:
        back.append(Launch("matrices' gradients", ("h", "y"), (), needed=False))
    if isinstance(block.norm, nn.GroupNorm):
        back.append(Launch("through the norm", ("h", "h"), ("h",)))
    weights = Launch("depthwise, kernel's gradient", ("x", "h"), ())
    if isinstance(block, MedNeXtDownBlock):
        forward = [
            Launch("depthwise", ("x",), ("h",)),
            *grn,
            Launch("residual path", ("x strided",), ("path",), needed=False),
            Launch("tail", ("h", "path"), ("y",)),
        ]
        back += [
            Launch("residual path, gather", ("x strided",), ("x strided",), needed=False),
            Launch("residual path, matrix", ("x strided", "path"), ()),
            Launch("residual path, data", ("path",), ("x strided",), needed=False),
            Launch("depthwise, data", ("h",), ("x",)),
            Launch("residual path, added", ("x strided", "x strided"), ("x strided",), needed=False),
            weights,
        ]
        return forward, back
    if isinstance(block, MedNeXtUpBlock):
        forward = [
            Launch("depthwise", ("x",), ("h",)),
            *grn,
            Launch("residual path", ("x",), ("path",), needed=False),
            Launch("tail", ("h", "y", "path"), ("y",)),
        ]
        back += [
            Launch("residual path, gather", ("path",), ("path",), needed=False),
            Launch("residual path, matrix", ("x", "path"), ()),
            Launch("residual path, data", ("path",), ("x",), needed=False),
            Launch("depthwise, data", ("h", "x"), ("x",)),
            weights,
        ]
        return forward, back
    forward = [Launch("depthwise", ("x",), ("h",)), *grn, Launch("tail", ("h", "x"), ("y",))]
    return forward, [*back, Launch("depthwise, data", ("h", "y"), ("x",)), weights]


def numbers(found: Sequence[Launch], activations: dict[str, int], *, floor: bool = False) -> int:
    """Return how many numbers launches move, or only those that nothing could spare."""
    return sum(activations[name] for each in found if each.needed or not floor for name in (*each.reads, *each.writes))


def blocks(network: MedNeXt, shape: Sequence[int]) -> Iterator[tuple[Block, tuple[int, ...]]]:
    """Yield each block of a MedNeXt with its input's shape, given the image's (N, C, D, H, W)."""
    seen: list[tuple[Block, tuple[int, ...]]] = []

    def note(block: Any, inputs: tuple[Tensor, ...]) -> None:
        seen.append((block, tuple(inputs[0].shape)))

    hooks = [
        module.register_forward_pre_hook(note)
        for module in network.modules()
        if isinstance(module, MedNeXtBlock | MedNeXtDownBlock | MedNeXtUpBlock)
    ]
    parameters = {name: part.detach().to("meta") for name, part in network.named_parameters()}
    was_training = network.training
    with torch.no_grad():
        torch.func.functional_call(network.eval(), parameters, (torch.empty(tuple(shape), device="meta"),))
    network.train(was_training)
    for hook in hooks:
        hook.remove()
    yield from seen


def network_bytes(
    network: MedNeXt, shape: Sequence[int], *, element: int = BF16, floor: bool = False
) -> tuple[int, int]:
    """Return the bytes that the blocks of a MedNeXt move in a forward pass, and in a training step.

    Stem, heads, loss and optimiser are left out.
    """
    forward = step = 0
    for block, given in blocks(network, shape):
        ours, back = (numbers(part, sizes(block, given), floor=floor) * element for part in launches(block))
        forward, step = forward + ours, step + ours + back
    return forward, step


class Counter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Adds up calls, bytes and multiply-adds of operators, by their kind."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found: dict[str, list[float]] = {}

    def add(self, kind: str, moved: int, multiply_adds: float = 0.0) -> None:
        """Count a call."""
        entry = self.found.setdefault(kind, [0.0, 0.0, 0.0])
        for index, value in enumerate((1, moved, multiply_adds)):
            entry[index] += value

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        made = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        if func.is_view or func.name().startswith(("aten::empty", "aten::_reshape_alias", "aten::detach")):
            return result
        kind = func.name().removeprefix("aten::").partition(".")[0]
        work = 0.0
        if kind == "convolution":
            weight, groups = args[1], args[8]
            kind = "depthwise convolution" if groups > 1 else f"convolution {weight.shape[2]}"
            work = float(result.numel()) * weight[0].numel()
        elif kind in ("mm", "addmm", "bmm", "baddbmm"):
            work = float(result.numel()) * given[-1].shape[-2]
        self.add(kind, sum(leaf.nbytes for leaf in (*given, *made)), work)
        return result


def operators(network: nn.Module, shape: Sequence[int]) -> dict[str, list[float]]:
    """Return for each kind of operator of a forward pass in bfloat16 its calls, bytes and multiply-adds."""
    counter = Counter()

    def attention(query: Tensor, key: Tensor, value: Tensor, **_: Any) -> Tensor:
        result = torch.empty_like(query)
        moved = 2 * query.nbytes + key.nbytes + value.nbytes
        counter.add("attention", moved, 2.0 * query.numel() * key.shape[-2])
        return result

    twin = network.to("meta", torch.bfloat16)
    image = torch.empty(tuple(shape), device="meta", dtype=torch.bfloat16)
    with (
        torch.no_grad(),
        mock.patch.object(nn.functional, "scaled_dot_product_attention", attention),
        counter,
    ):
        twin(image)
    return counter.found


def _print_blocks(edge: int) -> None:
    print("| block | forward | at the least | backward | at the least |\n|---|---|---|---|---|")
    kinds: list[tuple[str, Block]] = [
        ("same size, one chunk", MedNeXtBlock(32, 32, expansion_ratio=2)),
        ("same size", MedNeXtBlock(32, 32, expansion_ratio=12)),
        ("same size, GRN", MedNeXtBlock(32, 32, expansion_ratio=2, grn=True)),
        ("same size, layer norm", MedNeXtBlock(32, 32, expansion_ratio=2, norm="layer")),
        ("down", MedNeXtDownBlock(32, 64, expansion_ratio=4)),
        ("up, with the skip", MedNeXtUpBlock(64, 32, expansion_ratio=4)),
    ]
    for name, block in kinds:
        up = isinstance(block, MedNeXtUpBlock)
        shape = (1, block.in_channels, *((edge // 2 if up else edge),) * 3)
        unit = 32 * edge**3
        cells = [
            f"{numbers(part, sizes(block, shape), floor=floor) / unit:.2f}"
            for part in launches(block)
            for floor in (False, True)
        ]
        print(f"| {name} | {' | '.join(cells)} |")


def main() -> None:
    """Print passes for each kind of block, then bytes and times of the networks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--edge", type=int, default=128)
    edge = parser.parse_args().edge
    print(f"Passes over a fine activation of 32 channels, {32 * edge**3 * BF16 / 1e6:.0f} MB in bfloat16:\n")
    _print_blocks(edge)
    print("\n| network | forward MB | at the least | ms | step MB | at the least | ms |\n|---|---|---|---|---|---|---|")
    for size in ("S", "B", "M", "L"):
        with torch.device("meta"):
            network = create_mednext(size, in_channels=1, num_classes=3)  # type: ignore[arg-type]
        shape = (1, 1, edge, edge, edge)
        ours, least = (network_bytes(network, shape, floor=floor) for floor in (False, True))
        cells = [
            part for a, b in zip(ours, least, strict=True)
            for part in (f"{a / 1e6:.0f}", f"{b / 1e6:.0f}", f"{1e3 * a / COPY_RATE:.2f}")
        ]  # fmt: skip
        print(f"| MedNeXt-{size} | {' | '.join(cells)} |")
    for training in (False, True):
        with torch.device("meta"):
            segformer = SegFormer3D(1, 3).train(training)
        found = operators(segformer, (1, 1, edge, edge, edge))
        mode = "in train mode" if training else "at inference"
        print(f"\nSegFormer3D forward {mode}, plain:\n\n| operator | calls | MB | ms | GMAC |\n|---|---|---|---|---|")
        for kind, (calls, moved, work) in sorted(found.items(), key=lambda item: -item[1][1]):
            print(f"| {kind} | {calls:.0f} | {moved / 1e6:.1f} | {1e3 * moved / COPY_RATE:.3f} | {work / 1e9:.2f} |")
        calls, moved = (sum(entry[index] for entry in found.values()) for index in range(2))
        print(f"\nmemory {1e3 * moved / COPY_RATE:.2f} ms, {calls:.0f} launches {1e3 * calls * LAUNCH_S:.2f} ms")


if __name__ == "__main__":
    main()
