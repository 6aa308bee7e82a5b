"""What a network costs: parameters, multiply-adds, and the memory of a step, measured on tensors that hold no data.

The network runs for real, operator by operator, on fake tensors: they have shape, dtype and device but no memory, so
any network at any size is measured exactly, in about a second, on any machine. The caller's network is not changed.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode


def parameters(network: nn.Module) -> int:
    """Return the number of parameters, trainable or frozen; buffers such as BatchNorm's statistics do not count."""
    return sum(parameter.numel() for parameter in network.parameters())


def multiply_adds(network: nn.Module, input_shape: Sequence[int]) -> int:
    """Return the multiply-adds of one prediction (eval mode).

    Convolutions, transposed convolutions, linear layers and the two matrix products of attention count; interpolation,
    norms, activations, sums and biases do not. A transposed convolution counts once per input voxel and kernel
    element.

    Args:
        network: any network; its device, dtype and mode do not matter.
        input_shape: (N, C, D, H, W), or (N, C, H, W) in 2D.
    """
    counter = FlopCounterMode(
        display=False,
        custom_mapping={torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops},
    )
    with FakeTensorMode(), torch.no_grad():
        twin = _fake_twin(network).eval()
        with counter:
            twin(_fake_input(twin, input_shape))
    return counter.get_total_flops() // 2


def step_memory_bytes(network: nn.Module, input_shape: Sequence[int], *, training: bool) -> int:
    """Return the highest number of bytes that live tensors take at any moment of one step.

    Counted, each storage once: the parameters and buffers, the input, every intermediate tensor from its making to its
    release, the logits, and in training what is kept for the backward pass, the gradients of activations and the
    parameters' `.grad` (the step is a forward pass in train mode, the mean square of all logits, and its backward
    pass). So one tensor of the parameters' size is in the figure in inference, two in training. Not counted: the
    optimiser's state (AdamW: twice the parameters), the loss's own intermediates and targets, scratch memory inside an
    operator, and what an allocator wastes.

    Measured on plain operators. The fused CPU kernels keep less for the backward pass, so there the figure is an upper
    bound.

    Args:
        network: any network; tensors are taken in its parameters' dtype, as on a CPU.
        input_shape: (N, C, D, H, W), or (N, C, H, W) in 2D.
        training: a training step instead of a prediction (eval mode, no gradients).
    """
    with FakeTensorMode(), torch.set_grad_enabled(training):
        twin = _fake_twin(network).train(training)
        image = _fake_input(twin, input_shape)
        live = _LiveBytes()
        with live:
            for tensor in (*twin.parameters(), *twin.buffers(), image):
                live.track(tensor)
            outputs = twin(image)
            if training:
                losses = [logits.square().mean() for logits in tree_leaves(outputs)]
                torch.autograd.backward(torch.stack(losses).sum())
    return live.peak


class _LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch leaves this class untyped
    """Follow the storages that operators make, from birth to release, and keep the highest sum of their bytes."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.current = 0
        self.peak = 0
        self._known: weakref.WeakSet[torch.UntypedStorage] = weakref.WeakSet()

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
        weakref.finalize(storage, self._release, size).atexit = False

    def _release(self, size: int) -> None:
        self.current -= size


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
