"""Networks by PyTorch: on CPU, CUDA and MPS, in bfloat16 and float16 on CUDA; numpy's float32 arrays in and out."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float32
from torch import Tensor, nn

from sagittal.bundle import Bundle
from sagittal.errors import BundleError, ResourceError
from sagittal.inference.device import resolve_device
from sagittal.inference.engines.cuda_graphs import WindowGraphs
from sagittal.inference.engines.engine import LinearHead, NetworkMemory, Precision
from sagittal.kernels import cpu_available
from sagittal.kernels.choice import kernels_mode, require_kernels
from sagittal.networks.build import build_network
from sagittal.networks.cost import step_memory_bytes
from sagittal.networks.half_precision import to_half_precision
from sagittal.networks.mednext import MedNeXt
from sagittal.networks.segformer3d import SegFormer3D
from sagittal.plan import Plan
from sagittal.plan.base import Triple

NETWORK_MARGIN = 1.25
"""Resident memory over the sum of live tensors, measured on MedNeXt at 64 and 96 voxels: 1.11 to 1.27."""
_FLOAT_BYTES = 4
_HALVES: dict[Precision, torch.dtype] = {"bf16": torch.bfloat16, "fp16": torch.float16}
_SEGFORMER3D_STRIDE = 4
"""Of its finest grid, by its first patch embedding."""


class TorchEngine:
    """Networks of one plan on one device; several are averaged.

    Args:
        plan: what the networks were trained with.
        networks: one per set of weights, on `device`; they are put into eval mode for each call and back afterwards.
        device: where they are.
        precision: fp32 with the networks that are given; bf16 or fp16 with copies, see `networks.half_precision`. What
            goes in and comes out is float32 all the same. `load` says on which devices.
    """

    name: Literal["torch"] = "torch"

    def __init__(
        self,
        plan: Plan,
        networks: Sequence[nn.Module],
        device: torch.device | str,
        *,
        precision: Precision = "fp32",
    ) -> None:
        assert networks, "an engine needs a network"
        assert precision == "fp32" or precision in _HALVES, f"PyTorch does not compute in {precision}"
        self.precision: Precision = precision
        self._dtype = _HALVES.get(precision, torch.float32)
        self._plan = plan
        self._networks = tuple(networks)
        if precision != "fp32":
            self._networks = tuple(to_half_precision(copy.deepcopy(network), self._dtype) for network in networks)
        self._device = torch.device(device)
        self._memory: dict[Triple, NetworkMemory] = {}
        self._graphs = WindowGraphs(self._device) if self._device.type == "cuda" else None

    @property
    def device(self) -> str:
        """Where: cpu, cuda:0, mps."""
        return str(self._device)

    @property
    def num_outputs(self) -> int:
        """K, the channels of the logits."""
        return self._plan.dataset.num_outputs

    @property
    def head(self) -> LinearHead | None:
        """The linear last layer of MedNeXt, for all networks' features side by side; None for other networks."""
        found = self.member_heads
        if found is None:
            return None
        count = np.float32(len(found))
        weight = np.concatenate([head.weight / count for head in found], axis=1)
        bias = np.asarray(sum(head.bias / count for head in found))
        return LinearHead(np.ascontiguousarray(weight), bias)

    @property
    def num_members(self) -> int:
        """M, how many networks are averaged."""
        return len(self._networks)

    @property
    def member_heads(self) -> tuple[LinearHead, ...] | None:
        """Each network's own head, for its part of `features`; None where `head` is None."""
        parts = [_head_of(network) for network in self._networks]
        found = tuple(LinearHead(*part) for part in parts if part is not None)
        return found if len(found) == len(parts) else None

    def logits(self, windows: Float32[np.ndarray, "N C D H W"]) -> Float32[np.ndarray, "N K D H W"]:
        """Return the logits of windows; several networks' mean.

        Raises:
            MemoryError: the device's memory does not suffice.
        """

        def run(given: Tensor) -> Tensor:
            first, *others = self._networks
            total: Tensor = first(given).float()
            for network in others:
                total = total + network(given)
            return total / len(self._networks) if others else total

        result = self._run("logits", run, windows)
        expected = (len(windows), self.num_outputs, *windows.shape[2:])
        assert result.shape == expected, f"the network gave {result.shape}, expected {expected}"
        return result

    def features(self, windows: Float32[np.ndarray, "N C D H W"]) -> Float32[np.ndarray, "N F D H W"]:
        """Return what `head` is applied to; only where there is one. Several networks' features side by side.

        Raises:
            MemoryError: the device's memory does not suffice.
        """
        assert self.head is not None, "these networks have no linear head"

        def run(given: Tensor) -> Tensor:
            found = [_without_head(network)(given).float() for network in self._networks]
            return found[0] if len(found) == 1 else torch.cat(found, dim=1)

        return self._run("features", run, windows)

    def coarse_stride(self, window: Triple) -> int:
        """Return by how much `coarse_logits` are coarser than a window of this shape; 1 where there are none."""
        can = all(
            isinstance(network, SegFormer3D) and network.spatial_dims == 3 and min(window) >= network.min_size
            for network in self._networks
        )
        return _SEGFORMER3D_STRIDE if can and all(size % _SEGFORMER3D_STRIDE == 0 for size in window) else 1

    def coarse_logits(self, windows: Float32[np.ndarray, "N C D H W"]) -> Float32[np.ndarray, "N K d h w"]:
        """Return the logits before SegFormer3D's last interpolation; several networks' mean.

        Raises:
            MemoryError: the device's memory does not suffice.
        """

        def run(given: Tensor) -> Tensor:
            first, *others = (_without_upsampling(network) for network in self._networks)
            total: Tensor = first(given).float()
            for network in others:
                total = total + network(given)
            return total / len(self._networks) if others else total

        return self._run("coarse", run, windows)

    def member_logits(
        self, windows: Float32[np.ndarray, "N C D H W"], *, coarse: bool = False
    ) -> Float32[np.ndarray, "N M K d h w"]:
        """Return the logits of each network, or what `coarse_logits` is the mean of.

        Raises:
            MemoryError: the device's memory does not suffice.
        """
        networks = [_without_upsampling(network) if coarse else network for network in self._networks]
        what = "members coarse" if coarse else "members"
        return self._run(
            what, lambda given: torch.stack([network(given).float() for network in networks], dim=1), windows
        )

    def memory(self, window: Triple) -> NetworkMemory:
        """Return what a call on windows of this shape takes of the host's memory, its result included.

        On a GPU that is the result alone: what CUDA graphs keep lies there too. Measured on tensors without data
        (`networks.cost`), once for each shape.
        """
        if window not in self._memory:
            self._memory[window] = self._measured(window)
        return self._memory[window]

    def _measured(self, window: Triple) -> NetworkMemory:
        head, stride = self.head, self.coarse_stride(window)
        voxels = math.prod(size // stride for size in window)
        measured, channels = self._networks[0], self.num_outputs
        if head is not None and head.weight.shape[1] < self.num_outputs:
            measured, channels = _without_head(measured), head.weight.shape[1]
        elif stride > 1:
            measured = _without_upsampling(measured)
        if self.precision != "fp32":
            measured = nn.Sequential(_Rounded(self._dtype), measured)
        result = channels * voxels * _FLOAT_BYTES
        if self._device.type != "cpu":
            return NetworkMemory(0, result)
        with _explained_out_of_memory(), _evaluating(self._networks):
            one, two = _steps(measured, (len(self._plan.dataset.channel_names), *window))
        others = len(self._networks) - 1
        weights = others * sum(each.nbytes for each in measured.parameters())
        # Of several networks one works at a time, beside the others' results.
        results = 2 * result if others else 0
        return NetworkMemory(
            fixed_bytes=int(NETWORK_MARGIN * max(0, 2 * one - two)) + weights,
            per_window_bytes=int(NETWORK_MARGIN * (two - one)) + results,
        )

    def _run(self, what: str, network: Callable[[Tensor], Tensor], windows: np.ndarray) -> np.ndarray:
        def computed(given: Tensor) -> Tensor:
            return network(given.to(self._dtype)).float()

        with _explained_out_of_memory(), _evaluating(self._networks), torch.inference_mode():
            given = torch.from_numpy(windows)
            if self._graphs is None:
                result = computed(given.to(self._device)).cpu()
            else:
                read = [part for each in self._networks for part in (*each.parameters(), *each.buffers())]
                result = self._graphs.call((what, kernels_mode()), computed, given, read)
            if self.precision == "fp16":
                self._require_in_range(result)
            return np.asarray(result.contiguous().numpy())

    def _require_in_range(self, result: Tensor) -> None:
        # An infinity or what follows from one is seen in the sum, at a fraction of looking at each number.
        if not math.isfinite(float(result.sum())):
            raise ResourceError(
                f"the network of '{self._plan.dataset.name}' left float16's range (65504) on {self.device}, or the "
                "scan has voxels that are no number. Use --precision bf16, whose range is float32's, or fp32.",
                code="precision",
            )


def load(
    bundle: Bundle,
    device: torch.device | str = "cpu",
    *,
    precision: Precision = "fp32",
    threads: int | None = None,
) -> TorchEngine:
    """Return the engine of a verified bundle, all folds of it.

    Args:
        bundle: verified.
        device: where it computes.
        precision: fp32; bf16 and fp16 on CUDA devices.
        threads: of the CPU, for all that PyTorch computes in this process; None leaves them as they are.

    Raises:
        BundleError: its weights do not fit its plan.
        ResourceError: no such device, one that has no kernels where they are switched `on`, or one without this
            precision.
    """
    target = resolve_device(device)
    require_precision(target, precision)
    require_kernels(target, on_cpu=cpu_available())
    if threads is not None:
        torch.set_num_threads(threads)
    networks = [network_of(bundle, name, target) for name in bundle.weight_names]
    return TorchEngine(bundle.plan, networks, target, precision=precision)


def require_precision(device: torch.device, precision: Precision) -> None:
    """Refuse what PyTorch does not compute in, or not on this device.

    Raises:
        ResourceError: half a precision elsewhere than on CUDA, bf16 on a GPU without it, or int8.
    """
    if precision == "fp32":
        return
    if precision not in _HALVES:
        raise ResourceError(f"PyTorch does not compute in {precision} here. Use --precision fp32.", code="precision")
    if device.type != "cuda":
        instead = "--engine openvino with --precision bf16, or " if device.type == "cpu" else ""
        raise ResourceError(
            f"PyTorch computes in {precision} on CUDA devices only, and the device is {device}. Use {instead}"
            "--precision fp32.",
            code="precision",
        )
    with torch.cuda.device(device):
        if precision == "bf16" and not torch.cuda.is_bf16_supported(including_emulation=False):
            raise ResourceError(
                f"{torch.cuda.get_device_name(device)} ({device}) has no units for bf16, which NVIDIA's GPUs have "
                "since compute capability 8.0. Use --precision fp16 or fp32.",
                code="precision",
            )


def network_of(bundle: Bundle, name: str, device: torch.device) -> nn.Module:
    """Return the network of the weights called `name`, in eval mode.

    Raises:
        BundleError: they do not fit the plan.
    """
    spec = bundle.plan.dataset
    # Building draws initial weights; the caller's random numbers must not depend on that.
    with torch.random.fork_rng(devices=[]):
        network = build_network(bundle.plan.network, len(spec.channel_names), spec.num_outputs)
    # A copy, since arrays over a file's bytes can't be written to.
    state = {key: torch.from_numpy(array.copy()) for key, array in bundle.weights(name).items()}
    try:
        network.load_state_dict(state)
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise BundleError(
            f"{bundle.path}: weights '{name}' do not fit the plan's network ({reason[:300]}). "
            "Get the bundle from its maker again.",
            code="weights_do_not_fit",
        ) from None
    return network.to(device).eval().requires_grad_(False)


def _head_of(network: nn.Module) -> tuple[np.ndarray, np.ndarray] | None:
    """Return weight (K, F) and bias (K,) of a network's linear last layer, None where it has none."""
    if not isinstance(network, MedNeXt) or network.spatial_dims != 3:
        return None
    layer = network.get_submodule("out_0.conv_out")
    weight, bias = (getattr(layer, name).detach().float().cpu().numpy() for name in ("weight", "bias"))
    # A transposed convolution's weight is (F, K, 1, 1, 1).
    return weight.reshape(weight.shape[:2]).T.copy(), bias.copy()


def _without_head(network: nn.Module) -> nn.Module:
    """Return the same network, weights shared, that ends before its head; the given one stays as it is."""
    twin = copy.copy(network)
    twin._modules = {**network._modules, "out_0": nn.Identity()}
    return twin


def _without_upsampling(network: nn.Module) -> nn.Module:
    """Return a SegFormer3D that ends before the interpolation to its input's grid, weights shared."""
    return nn.Sequential(network.get_submodule("segformer_encoder"), network.get_submodule("segformer_decoder"))


class _Rounded(nn.Module):
    """Round windows as `TorchEngine` does, so that its networks can be measured on windows in float32."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self._dtype = dtype

    def forward(self, windows: Tensor) -> Tensor:
        return windows.to(self._dtype)


def _steps(network: nn.Module, shape: tuple[int, ...]) -> tuple[int, int]:
    one, two = (step_memory_bytes(network, (batch, *shape), training=False) for batch in (1, 2))
    return one, two


@contextmanager
def _evaluating(networks: Sequence[nn.Module]) -> Iterator[None]:
    # Training validates with the network that it goes on training.
    modes = [network.training for network in networks]
    for network in networks:
        network.eval()
    try:
        yield
    finally:
        for network, was_training in zip(networks, modes, strict=True):
            network.train(was_training)


@contextmanager
def _explained_out_of_memory() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        # On the CPU torch raises a RuntimeError that only its text tells from others.
        if isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error):
            raise MemoryError(str(error)) from None
        raise
