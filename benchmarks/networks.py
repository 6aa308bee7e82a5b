"""Time a training step and a forward pass of our networks on the CPU: `python benchmarks/networks.py [--json FILE]`.

Forms of the same network, in one process, with the same input, interleaved:

- plain: PyTorch's operators on contiguous volumes, as anyone would write the network down from its paper; SegFormer3D's
  decoder upsamples, concatenates and fuses at the finest grid;
- channels-last: PyTorch's operators on channels-last volumes, SegFormer3D's fuse at the coarse grids;
- Sagittal: what runs when you train and predict;
- MONAI: MONAI's MedNeXt of the same size and kernel, where MONAI is installed. S has the same weights; B has down
  blocks of other shapes, so there MONAI's own weights run, and its own multiply-adds.

All forms with the same weights must agree first. Seconds are the best of the repeats; "ratio" is the plain form's time
over that of the form. "of rate" is the time that the network's multiply-adds would take at the rate of a 2048^3 float32
matrix product, measured in the same process, over the time measured. They count once for a forward pass and three times
for a training step; for all forms with the same weights as few as ours needs, so that these percentages compare too.
"""

import argparse
import json
import os
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch
from torch import Tensor, nn

from sagittal.kernels import cpu_available, keep_freed_memory, native
from sagittal.networks import create_mednext, create_segformer3d, load_official_weights
from sagittal.networks.cost import multiply_adds
from sagittal.networks.segformer3d_decoder import Decoder

CLASSES = 3
MEDNEXTS = {"mednext-s": ("S", 3), "mednext-s-k5": ("S", 5), "mednext-b": ("B", 3), "mednext-b-k5": ("B", 5)}
NETWORKS = (*MEDNEXTS, "segformer3d")
DEFAULT = "mednext-s,mednext-s-k5,mednext-b,segformer3d"


def build(name: str, channels: int) -> nn.Module:
    """Return our network of that name."""
    if name == "segformer3d":
        return create_segformer3d(in_channels=channels, num_classes=CLASSES)
    size, kernel = MEDNEXTS[name]
    return create_mednext(
        size, in_channels=channels, num_classes=CLASSES, kernel_size=kernel, deep_supervision=True, checkpointing=False
    )


def build_monai(name: str, channels: int) -> nn.Module | None:
    """Return MONAI's network of that name, or None where there is none."""
    if name not in MEDNEXTS:
        return None
    try:
        from monai.networks.nets import mednext
    except ImportError:
        return None
    size, kernel = MEDNEXTS[name]
    network: nn.Module = mednext.create_mednext(
        size, in_channels=channels, out_channels=CLASSES, kernel_size=kernel, deep_supervision=True
    )
    return network


def published_decoder(decoder: Decoder, grids: Sequence[Tensor]) -> Tensor:
    """Run SegFormer3D's decoder as its paper writes it: upsample, concatenate stages 4 to 1, fuse."""
    maps = []
    for stage in (4, 3, 2, 1):
        volume = decoder.get_submodule(f"linear_c{stage}")(grids[stage - 1]).movedim(-1, 1).contiguous()
        if stage > 1:
            size = grids[0].shape[1:4]
            volume = nn.functional.interpolate(volume, size=size, mode="trilinear", align_corners=False)
        maps.append(volume)
    fused = torch.relu(decoder.linear_fuse(torch.cat(maps, dim=1)))
    return decoder.linear_pred(fused)  # type: ignore[no-any-return]


@contextmanager
def plain() -> Iterator[None]:
    """Run the networks as for an export, which is plain PyTorch on contiguous volumes, and with the published fuse."""
    with (
        channels_last(),
        patch("torch.compiler.is_exporting", return_value=True),
        patch.object(Decoder, "forward", published_decoder),
    ):
        yield


@contextmanager
def channels_last() -> Iterator[None]:
    """Run the networks on PyTorch's operators alone."""
    with (
        patch.object(native, "eager", return_value=False),
        patch.object(native, "usable", return_value=False),
    ):
        yield


@contextmanager
def as_it_is() -> Iterator[None]:
    """Run the networks as they are."""
    yield


@dataclass
class Form:
    """One form of a network, and its best times in seconds."""

    name: str
    network: nn.Module
    context: Callable[[], AbstractContextManager[None]]
    multiply_adds: int
    same_weights: bool
    train_s: float = float("inf")
    forward_s: float = float("inf")


def forms(name: str, x: Tensor) -> list[Form]:
    """Return the forms of the network `name`, the plain one first."""
    torch.manual_seed(0)
    ours, monai = build(name, x.shape[1]), build_monai(name, x.shape[1])
    same = monai is not None and name.startswith("mednext-s")
    if monai is not None and same:
        load_official_weights(ours, monai.state_dict())
    count = multiply_adds(ours, tuple(x.shape))
    found = [
        Form("plain", ours, plain, count, True),
        Form("channels-last", ours, channels_last, count, True),
        Form("Sagittal", ours, as_it_is, count, True),
    ]
    if monai is not None:
        found.append(Form("MONAI", monai, as_it_is, count if same else multiply_adds(monai, tuple(x.shape)), same))
    return found


def training_step(network: nn.Module, x: Tensor) -> None:
    """Forward and backward of a loss that touches every output."""
    output = network(x)
    outputs = [output] if isinstance(output, Tensor) else output
    torch.stack([scale.square().mean() for scale in outputs]).sum().backward()
    network.zero_grad(set_to_none=True)


@torch.no_grad()
def forward(network: nn.Module, x: Tensor) -> Tensor:
    """A forward pass without gradients."""
    logits: Tensor = network(x)
    return logits


def largest_difference(found: Sequence[Form], x: Tensor) -> float:
    """Return how far the forms of the same weights are apart, in units of the largest logit."""
    outputs = []
    for form in found:
        if form.same_weights:
            with form.context():
                outputs.append(forward(form.network.eval(), x))
    return max(((logits - outputs[0]).abs().max() / outputs[0].abs().max()).item() for logits in outputs)


def measure(found: Sequence[Form], x: Tensor, repeats: int) -> None:
    """Note the best times of each form, in turn, after a round that does not count."""
    for repeat in range(repeats + 1):
        for form in found:
            with form.context():
                form.network.train()
                start = time.perf_counter()
                training_step(form.network, x)
                between = time.perf_counter()
                form.network.eval()
                ready = time.perf_counter()
                forward(form.network, x)
                end = time.perf_counter()
            if repeat:
                form.train_s = min(form.train_s, between - start)
                form.forward_s = min(form.forward_s, end - ready)


def matrix_rate() -> float:
    """Return the multiply-adds per second of a float32 matrix product."""
    a, times = torch.randn(2048, 2048), []
    for _ in range(5):
        start = time.perf_counter()
        a @ a
        times.append(time.perf_counter() - start)
    return 2048**3 / min(times)


def parse_input(text: str) -> tuple[int, ...]:
    """Return (N, C, D, H, W) from NxDxHxW or NxCxDxHxW."""
    sizes = tuple(int(part) for part in text.split("x"))
    if len(sizes) not in (4, 5) or min(sizes) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: expected NxDxHxW or NxCxDxHxW, for example 2x48x64x48")
    return sizes if len(sizes) == 5 else (sizes[0], 1, *sizes[1:])


def row(form: Form, first: Form, rate: float) -> dict[str, object]:
    """Return a form's numbers for the table and for JSON."""
    return {
        "form": form.name,
        "same_weights": form.same_weights,
        "multiply_adds": form.multiply_adds,
        "train_s": form.train_s,
        "train_ratio": first.train_s / form.train_s,
        "train_of_rate": 3 * form.multiply_adds / rate / form.train_s,
        "forward_s": form.forward_s,
        "forward_ratio": first.forward_s / form.forward_s,
        "forward_of_rate": form.multiply_adds / rate / form.forward_s,
    }


def report(name: str, found: Sequence[Form], rate: float, difference: float) -> dict[str, object]:
    """Print the rows of a network and return its numbers."""
    rows = [row(form, found[0], rate) for form in found]
    for form in rows:
        print(
            f"{name:13} {form['form']:14} {form['train_s']:8.3f} s {form['train_ratio']:6.2f} x"
            f" {form['train_of_rate']:6.0%} {form['forward_s']:9.3f} s {form['forward_ratio']:6.2f} x"
            f" {form['forward_of_rate']:6.0%}" + ("" if form["same_weights"] else "   other weights"),
            flush=True,
        )
    if len(found) < 4:
        print(f"{name:13} MONAI          {'not installed' if name in MEDNEXTS else 'has no such network'}")
    print(
        f"{'':13} {found[0].multiply_adds / 1e9:.2f} GMAC forward; forms apart by {difference:.1e} of the largest logit"
    )
    return {"network": name, "largest_difference": difference, "matrix_rate": rate, "forms": rows}


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", default=DEFAULT, help=f"any of {', '.join(NETWORKS)}; default {DEFAULT}")
    parser.add_argument("--input", type=parse_input, default="2x48x64x48", help="NxDxHxW or NxCxDxHxW")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path, help="write the numbers to this file as well")
    options = parser.parse_args()
    names = options.networks.split(",")
    if unknown := sorted(set(names) - set(NETWORKS)):
        parser.error(f"no such network: {', '.join(unknown)}. Known: {', '.join(NETWORKS)}")
    keep_freed_memory()
    x = torch.randn(options.input, generator=torch.Generator().manual_seed(0))
    machine = {
        "input": list(x.shape),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
        "kernels": cpu_available(),
    }
    print(", ".join(f"{key} {value}" for key, value in machine.items()))
    print(f"{'network':13} {'form':14} {'training step':>19} {'of rate':>7} {'forward':>20} {'of rate':>7}")
    numbers = []
    for name in names:
        found = forms(name, x)
        difference = largest_difference(found, x)
        rate = matrix_rate()
        measure(found, x, options.repeats)
        rate = max(rate, matrix_rate())
        numbers.append(report(name, found, rate, difference))
        print(f"{'':13} matrix product: {rate / 1e9:.0f} GMAC/s = {2 * rate / 1e9:.0f} GFLOP/s", flush=True)
    if options.json:
        options.json.write_text(json.dumps({**machine, "networks": numbers}, indent=2) + "\n")


if __name__ == "__main__":
    main()
