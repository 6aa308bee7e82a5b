"""What a network costs: parameters, multiply-adds, and the memory of a step, measured on tensors that hold no data.

The network runs for real, operator by operator, on fake tensors: they have shape, dtype and device but no memory, so
any network at any size is measured exactly, in about a second, on any machine. The caller's network is not changed.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from copy import deepcopy
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from sagittal.networks.segformer3d import SegFormer3D


class Work(NamedTuple):
    """The multiply-adds of one prediction, by what they are spent on."""

    products: int
    """Convolutions, transposed convolutions, linear layers and the two matrix products of attention."""
    products_as_published: int
    """What `products` would be if the network were computed the way that its paper describes.

    Only SegFormer3D differs: arXiv 2404.10156 upsamples the four maps of the decoder, concatenates them, and fuses them
    at the finest grid; `Decoder` has the same result from products at each map's own grid.
    """
    interpolation: int
    """Linear resampling from all the neighbours of a voxel at once: 8 per output voxel and channel of a
    trilinear one, 4 of a bilinear one; nearest neighbours are copied and cost none."""


def parameters(network: nn.Module) -> int:
    """Return the number of parameters, trainable or frozen; buffers such as BatchNorm's statistics do not count."""
    return sum(parameter.numel() for parameter in network.parameters())


def work(network: nn.Module, input_shape: Sequence[int]) -> Work:
    """Return the multiply-adds of one prediction (eval mode).

    Norms, activations, sums, biases and pooling do not count. A transposed convolution counts once per input voxel and
    kernel element.

    Args:
        network: any network; its device, dtype and mode do not matter.
        input_shape: (N, C, D, H, W), or (N, C, H, W) in 2D.
    """
    counter = FlopCounterMode(
        display=False,
        custom_mapping={
            torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops,
            **dict.fromkeys(_RESAMPLERS, _resampling_flops),
        },
    )
    with FakeTensorMode(), torch.no_grad():
        twin = _fake_twin(network).eval()
        surplus = _PublishedSurplus(twin)
        with counter:
            twin(_fake_input(twin, input_shape))
    interpolation = sum(counter.get_flop_counts()["Global"].get(operator, 0) for operator in _RESAMPLERS) // 2
    products = counter.get_total_flops() // 2 - interpolation
    return Work(products, products + surplus.multiply_adds, interpolation)


def multiply_adds(network: nn.Module, input_shape: Sequence[int]) -> int:
    """Return the multiply-adds of one prediction without interpolation: the `products` of `work`."""
    return work(network, input_shape).products


def step_memory_bytes(network: nn.Module, input_shape: Sequence[int], *, training: bool) -> int:
    """Return the highest number of bytes that live tensors take at any moment of one step.

    Counted, each storage once: the parameters and buffers, the input, every intermediate tensor from its making to its
    release, the logits, and in training what is kept for the backward pass, the gradients of activations and the
    parameters' `.grad` (the step is a forward pass in train mode, the mean square of all logits, and its backward
    pass). So one tensor of the parameters' size is in the figure in inference, two in training. Not counted: the
    optimiser's state (AdamW: twice the parameters), the loss's own intermediates and targets, scratch memory inside an
    operator, and what an allocator wastes.

    Measured on plain operators. On a CPU the resident memory of this very step came within 0.5 % of it (SegFormer3D,
    2 x 1 x 128^3: 1.038 GiB and 1.040; MedNeXt-S, 1 x 1 x 64^3: 1.847 and 1.850); whole training steps on a machine
    without the fused kernels took 1.4 to 1.8 times what was planned (docs/planning.md). The fused CPU
    kernels keep less for the backward pass, so there it is an upper bound (MedNeXt-S: 0.60 GiB resident). On a GPU it
    is a lower bound: cuDNN and cuBLAS take workspaces, and operators copy volumes whose layout they do not take, all
    inside the operator, where nothing is seen from outside (SegFormer3D as above: 1.43 GiB).

    Args:
        network: any network; tensors are taken in its parameters' dtype, as on a CPU.
        input_shape: (N, C, D, H, W), or (N, C, H, W) in 2D.
        training: a training step instead of a prediction (eval mode, no gradients).
    """
    return _measured_step(network, input_shape, training).peak


def activation_memory_bytes(network: nn.Module, input_shape: Sequence[int], *, training: bool) -> int:
    """Return the peak of a step's live bytes other than parameters, buffers and the parameters' gradients.

    What is left grows with the input: the image, the activations, what the backward pass needs of them, and their
    gradients. Measured, and close to real steps, as in `step_memory_bytes`; arguments as there.
    """
    return _measured_step(network, input_shape, training).activation_peak


def _measured_step(network: nn.Module, input_shape: Sequence[int], training: bool) -> _LiveBytes:
    with FakeTensorMode(), torch.set_grad_enabled(training):
        twin = _fake_twin(network).train(training)
        image = _fake_input(twin, input_shape)
        live = _LiveBytes()
        with live:
            for tensor in (*twin.parameters(), *twin.buffers()):
                live.set_apart(tensor)
                live.track(tensor)
            live.track(image)
            for parameter in twin.parameters():
                if training and parameter.requires_grad:
                    parameter.register_post_accumulate_grad_hook(live.set_gradient_apart)  # type: ignore[no-untyped-call]
            outputs = twin(image)
            if training:
                losses = [logits.square().mean() for logits in tree_leaves(outputs)]
                torch.autograd.backward(torch.stack(losses).sum())
    return live


class _PublishedSurplus:
    """Follow a SegFormer3D's maps into its decoder and keep what fusing them as published would take beside."""

    def __init__(self, network: nn.Module) -> None:
        self.multiply_adds = 0
        if isinstance(network, SegFormer3D):
            self._width = network.segformer_decoder.linear_pred.in_channels
            network.segformer_decoder.register_forward_pre_hook(self._see)

    def _see(self, _decoder: nn.Module, inputs: tuple[Sequence[Tensor], ...]) -> None:
        voxels = [grid[..., 0].numel() for grid in inputs[0]]
        self.multiply_adds += self._width**2 * (len(voxels) * max(voxels) - sum(voxels))


class _LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch leaves this class untyped
    """Follow the storages that operators make, from birth to release, and keep the highest sum of their bytes.

    Storages set apart (weights and their gradients) are in `peak` and not in `activation_peak`.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.current = 0
        self.peak = 0
        self.activation_peak = 0
        self._apart = 0
        self._known: weakref.WeakSet[torch.UntypedStorage] = weakref.WeakSet()
        self._set_apart: weakref.WeakSet[torch.UntypedStorage] = weakref.WeakSet()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self.track(leaf)
        return result

    def track(self, tensor: Tensor) -> None:
        """Count the storage of `tensor` until it is released; views share their base's."""
        storage = tensor.untyped_storage()
        if storage in self._known:
            return
        self._known.add(storage)
        size = int(storage.nbytes())
        self.current += size
        self.peak = max(self.peak, self.current)
        self.activation_peak = max(self.activation_peak, self.current - self._apart)
        weakref.finalize(storage, self._release, size).atexit = False

    def set_apart(self, tensor: Tensor) -> None:
        """From now on, take the storage of `tensor` for no activation."""
        storage = tensor.untyped_storage()
        if storage in self._set_apart:
            return
        self._set_apart.add(storage)
        size = int(storage.nbytes())
        self._apart += size
        weakref.finalize(storage, self._release_apart, size).atexit = False

    def set_gradient_apart(self, parameter: Tensor) -> None:
        """Set the gradient of `parameter` apart; autograd calls this when the gradient is there."""
        assert parameter.grad is not None
        self.set_apart(parameter.grad)

    def _release(self, size: int) -> None:
        self.current -= size

    def _release_apart(self, size: int) -> None:
        self._apart -= size


def _fake_twin(network: nn.Module) -> nn.Module:
    """Return a copy of `network` whose parameters and buffers are fake tensors; call it under a FakeTensorMode.

    A copy, not `functional_call`: activation checkpointing calls blocks again in the backward pass, after it has
    returned.
    """
    fakes: dict[int, object] = {}
    for parameter in network.parameters():
        fakes[id(parameter)] = nn.Parameter(_fake_like(parameter), requires_grad=parameter.requires_grad)
    for buffer in network.buffers():
        fakes[id(buffer)] = _fake_like(buffer)
    return deepcopy(network, fakes)


def _fake_like(tensor: Tensor) -> Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")


def _fake_input(network: nn.Module, shape: Sequence[int]) -> Tensor:
    dtype = next((tensor.dtype for tensor in network.parameters()), torch.float32)
    return torch.empty(tuple(shape), dtype=dtype, device="cpu")


def _attention_flops(
    query: Sequence[int], key: Sequence[int], value: Sequence[int], *_args: Any, **_kwargs: Any
) -> int:
    """Return twice the multiply-adds of query x key and of weights x value, from the shapes (N, h, tokens, width)."""
    batch, heads, tokens, width = query
    return 2 * batch * heads * tokens * key[2] * (width + value[3])


def _resampling_flops(_input: Sequence[int], *_args: Any, out_shape: tuple[int, ...], **_kwargs: Any) -> int:
    """Return twice the multiply-adds of a bilinear or trilinear resampling to `out_shape` (N, C, ...)."""
    return 2 * (1 << (len(out_shape) - 2)) * prod(out_shape)


_RESAMPLERS = (torch.ops.aten.upsample_trilinear3d, torch.ops.aten.upsample_bilinear2d)
