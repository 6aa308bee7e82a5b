"""Networks by PyTorch: on CPU, CUDA and MPS; numpy's arrays in and out."""

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
from sagittal.errors import BundleError
from sagittal.inference.device import resolve_device
from sagittal.inference.engines.engine import LinearHead, NetworkMemory, Precision
from sagittal.kernels import cpu_available
from sagittal.kernels.choice import require_kernels
from sagittal.networks.build import build_network
from sagittal.networks.cost import step_memory_bytes
from sagittal.networks.mednext import MedNeXt
from sagittal.networks.segformer3d import SegFormer3D
from sagittal.plan import Plan
from sagittal.plan.base import Triple

NETWORK_MARGIN = 1.25
"""Resident memory over the sum of live tensors, measured on MedNeXt at 64 and 96 voxels: 1.11 to 1.27."""
_FLOAT_BYTES = 4
_SEGFORMER3D_STRIDE = 4
"""Of its finest grid, by its first patch embedding."""


class TorchEngine:
    """Networks of one plan on one device; several are averaged.

    Args:
        plan: what the networks were trained with.
        networks: one per set of weights, on `device`; they are put into eval mode for each call and back afterwards.
        device: where they are.
    """

    name: Literal["torch"] = "torch"
    precision: Precision = "fp32"

    def __init__(self, plan: Plan, networks: Sequence[nn.Module], device: torch.device | str) -> None:
        assert networks, "an engine needs a network"
        self._plan = plan
        self._networks = tuple(networks)
        self._device = torch.device(device)
        self._memory: dict[Triple, NetworkMemory] = {}

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

        result = self._run(run, windows)
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

        return self._run(run, windows)

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

        return self._run(run, windows)

    def member_logits(
        self, windows: Float32[np.ndarray, "N C D H W"], *, coarse: bool = False
    ) -> Float32[np.ndarray, "N M K d h w"]:
        """Return the logits of each network, or what `coarse_logits` is the mean of.

        Raises:
            MemoryError: the device's memory does not suffice.
        """
        networks = [_without_upsampling(network) if coarse else network for network in self._networks]
        return self._run(lambda given: torch.stack([network(given).float() for network in networks], dim=1), windows)

    def memory(self, window: Triple) -> NetworkMemory:
        """Return what a call on windows of this shape takes of the host's memory, its result included.

        On a GPU that is the result alone. Measured on tensors without data (`networks.cost`), once for each shape.
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

    def _run(self, network: Callable[[Tensor], Tensor], windows: np.ndarray) -> np.ndarray:
        with _explained_out_of_memory(), _evaluating(self._networks), torch.inference_mode():
            result = network(torch.from_numpy(windows).to(self._device))
            return np.asarray(result.cpu().contiguous().numpy())


def load(bundle: Bundle, device: torch.device | str = "cpu", *, threads: int | None = None) -> TorchEngine:
    """Return the engine of a verified bundle, all folds of it.

    Args:
        bundle: verified.
        device: where it computes.
        threads: of the CPU, for all that PyTorch computes in this process; None leaves them as they are.

    Raises:
        BundleError: its weights do not fit its plan.
        ResourceError: no such device, or one that has no kernels where they are switched `on`.
    """
    target = resolve_device(device)
    require_kernels(target, on_cpu=cpu_available())
    if threads is not None:
        torch.set_num_threads(threads)
    return TorchEngine(bundle.plan, [network_of(bundle, name, target) for name in bundle.weight_names], target)


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
