"""The networks that benchmarks/gpu.py times, the forms they run in, and the blocks that they are made of."""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property

import torch
from gpu_floor import Block, blocks
from torch import Tensor, nn
from torch.nn import functional as F

from sagittal.kernels.choice import use_kernels
from sagittal.networks import MedNeXt, MedNeXtUpBlock, SegFormer3D, create_mednext
from sagittal.networks.half_precision import to_half_precision

CLASSES = 3
FORMS = ("plain", "kernels", "kernels graph", "kernels compiled", "plain compiled", "monai")
"""In the order in which they are timed: what may take minutes comes last."""


@dataclass(frozen=True)
class Scale:
    """How big everything is: the real sizes, or those of a smoke run in the interpreter."""

    edge: int
    tiny: bool
    device: torch.device
    amp: bool = True

    @property
    def dtype(self) -> torch.dtype:
        """What autocast computes in."""
        return torch.bfloat16

    def autocast(self) -> torch.autocast:
        """Return the context of a forward pass; a CPU's kernels have rules of their own for it, so there is none."""
        enabled = self.amp and self.device.type == "cuda"
        return torch.autocast(self.device.type, self.dtype, enabled=enabled, cache_enabled=False)


@dataclass(frozen=True)
class Network:
    """A network by name; `monai` is its twin there, where there is one."""

    make: Callable[[bool], nn.Module]
    size: str | None = None
    kernel: int = 3

    def monai(self) -> nn.Module:
        """Return MONAI's, with the same widths, blocks and ratios.

        Raises:
            ImportError: MONAI is not installed, or too old.
            LookupError: it has no such network.
        """
        if self.size is None:
            raise LookupError("MONAI has no such network")
        from monai.networks.nets.mednext import create_mednext as theirs

        network: nn.Module = theirs(
            variant=self.size, spatial_dims=3, in_channels=1, out_channels=CLASSES, kernel_size=self.kernel
        )
        return network


def _mednext(size: str, kernel: int) -> Network:
    def make(tiny: bool) -> nn.Module:
        if tiny:
            strides = ((2, 2, 2), (1, 1, 1), (1, 1, 1), (1, 1, 1))
            return MedNeXt(
                1, CLASSES, channels=2, kernel_size=kernel, block_counts=(1,) * 9, expansion_ratio=2, strides=strides
            )
        return create_mednext(size, in_channels=1, num_classes=CLASSES, kernel_size=kernel, checkpointing=False)

    return Network(make, size, kernel)


def _segformer(tiny: bool) -> nn.Module:
    return SegFormer3D(1, CLASSES)


NETWORKS: Mapping[str, Network] = {
    "mednext-b-k3": _mednext("B", 3),
    "mednext-l-k3": _mednext("L", 3),
    "mednext-b-k5": _mednext("B", 5),
    "segformer3d": Network(_segformer),
    "mednext-l-k5": _mednext("L", 5),
    "mednext-s-k3": _mednext("S", 3),
    "mednext-m-k3": _mednext("M", 3),
    "mednext-s-k5": _mednext("S", 5),
    "mednext-m-k5": _mednext("M", 5),
}
"""Those that the targets are about first."""


class Runs:
    """A network in one form, ready to be timed: `forward` for inference and `step` for training.

    Inference is under autocast, but for `kernels graph`, where it is what `sagittal predict --precision bf16` records:
    converted weights, windows and logits in float32.

    Args:
        name: of NETWORKS.
        form: of FORMS.
        scale: sizes and device.
    """

    def __init__(self, name: str, form: str, scale: Scale) -> None:
        torch.manual_seed(0)
        given = NETWORKS[name]
        self._scale, self.form = scale, form
        self.network = (given.monai() if form == "monai" else given.make(scale.tiny)).to(scale.device)
        # MONAI's networks refuse what they halve to a single voxel.
        shape = (max(scale.edge, 32) if form == "monai" else scale.edge,) * 3
        self.image = torch.randn(1, 1, *shape, device=scale.device)
        self.labels = torch.randint(0, CLASSES, (1, *shape), device=scale.device)
        fused = {"fused": True, "capturable": "graph" in form} if scale.device.type == "cuda" else {}
        self._optimizer = torch.optim.AdamW(self.network.parameters(), lr=1e-4, **fused)
        backend = "inductor" if scale.device.type == "cuda" else "aot_eager"
        compiles = form.endswith("compiled")
        self._call = torch.compile(self.network, dynamic=False, backend=backend) if compiles else self.network

    def forward(self) -> Tensor:
        """Return logits without gradients."""
        if self.form == "kernels graph":
            with self.switched(), torch.inference_mode():
                return self._engines(self.image.to(self._scale.dtype)).float()
        self.network.eval()
        with self.switched(), torch.inference_mode(), self._scale.autocast():
            return self._call(self.image)

    @cached_property
    def _engines(self) -> nn.Module:
        """The network as the engine of predictions has it."""
        return to_half_precision(copy.deepcopy(self.network).eval().requires_grad_(False), self._scale.dtype)

    def step(self) -> Tensor:
        """Do a training step and return its loss."""
        self.network.train()
        self._optimizer.zero_grad(set_to_none=True)
        with self.switched():
            with self._scale.autocast():
                logits = self._call(self.image)
            loss = F.cross_entropy(logits.float(), self.labels)
            loss.backward()
        self._optimizer.step()
        return loss.detach()

    @contextmanager
    def switched(self) -> Iterator[None]:
        """Set the kernels' switch as the form has it."""
        with use_kernels("on" if self.form.startswith("kernels") else "off"):
            yield

    def captured(self, run: Callable[[], Tensor]) -> Callable[[], object]:
        """Return the replay of a run recorded as a CUDA graph."""
        device = self._scale.device
        if device.type != "cuda":
            return run
        side = torch.cuda.Stream(device)
        side.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(side):
            for _ in range(3):
                run()
        torch.cuda.current_stream(device).wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run()
        return graph.replay


def losses(name: str, form: str, scale: Scale, steps: int) -> list[float]:
    """Return the losses of some training steps on one image; every form starts from the same weights."""
    runs = Runs(name, form, scale)
    return [float(runs.step()) for _ in range(steps)]


Key = tuple[object, ...]


def distinct_blocks(names: Sequence[str], scale: Scale) -> list[tuple[Block, tuple[int, ...]]]:
    """Return the blocks of networks that differ in what is compiled for them, each with its input's shape."""
    found: dict[Key, tuple[Block, tuple[int, ...]]] = {}
    for name in names:
        with torch.device("meta"):
            network = NETWORKS[name].make(scale.tiny)
        if isinstance(network, MedNeXt):
            for block, shape in blocks(network, (1, 1, *(scale.edge,) * 3)):
                key = (type(block), block.out_channels, block.conv2.out_channels, block.kernel_size, shape)
                found.setdefault(key, (block, shape))
    return list(found.values())


def compile_block(block: Block, shape: tuple[int, ...], scale: Scale, dtype: torch.dtype) -> None:
    """Run a block forward and backward once, so that its kernels lie in Triton's cache for later processes."""
    block = block.to_empty(device=scale.device)
    for part in block.parameters():
        torch.nn.init.normal_(part, std=0.1)
    given = [torch.randn(shape, device=scale.device, dtype=dtype).requires_grad_()]
    if isinstance(block, MedNeXtUpBlock):
        size = (n * stride for n, stride in zip(shape[2:], block.strides, strict=True))
        given.append(torch.randn(1, block.out_channels, *size, device=scale.device, dtype=dtype).requires_grad_())
    with use_kernels("on"):
        block(*given).sum().backward()
        with torch.inference_mode():
            block(*given)
            # Programs are compiled for the dtypes of the weights too, and a prediction's are converted.
            to_half_precision(block, dtype)(*given)
