"""bfloat16 on the CPU: whether the processor has it, and what autocast asks of the kernels.

Where `torch.autocast("cpu")` is active, the fused kernels run the matrix products of a MedNeXt block in bfloat16 with
float32 sums, and everything else in float32: depthwise convolutions, norms and activations, whose time the memory sets
and whose digits training needs. PyTorch's own depthwise convolutions in bfloat16 are never used: the gradient of their
weight on grids of one or two voxels holds memory that nobody wrote (PyTorch 2.13).
"""

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Concatenate, ParamSpec, TypeVar

import torch
from torch import Tensor

from sagittal.kernels import native

_Module = TypeVar("_Module")
_Options = ParamSpec("_Options")
_Result = TypeVar("_Result")


def cpu_bf16_reason() -> str | None:
    """Return why bfloat16 is of no use on this machine's CPU, or None where it makes MedNeXt faster."""
    if native.has_tiles():
        return None
    if not native.cpu_available():
        return "the compiled CPU kernels are not installed, and only they compute in bfloat16"
    if not torch.cpu._is_amx_tile_supported():
        return "the processor has no matrix unit for bfloat16 (AMX-BF16, in Intel Xeons since 2023)"
    return "the compiled CPU kernels were built without AMX, or the system does not let this process use it"


def autocasting(x: Tensor) -> bool:
    """Return whether `torch.autocast("cpu")` is active and `x` lies on the CPU."""
    return x.device.type == "cpu" and torch.is_autocast_enabled("cpu")


def products_in_bf16(x: Tensor) -> bool:
    """Return whether autocast asks for matrix products in bfloat16, and the kernels can give them."""
    return autocasting(x) and torch.get_autocast_dtype("cpu") == torch.bfloat16 and native.has_tiles()


def outside_autocast() -> torch.autocast:
    """Return a context in which nothing on the CPU is converted."""
    return torch.autocast("cpu", enabled=False)


def in_float32_on_cpus(
    method: Callable[Concatenate[_Module, Tensor, _Options], _Result],
) -> Callable[Concatenate[_Module, Tensor, _Options], _Result]:
    """Let autocast on the CPU change nothing in a network's method that takes an image.

    For networks of PyTorch's own convolutions: in bfloat16 on the CPU, the gradients of their weights on grids of few
    voxels hold memory that nobody wrote (PyTorch 2.13, with AMX and without).
    """

    @functools.wraps(method)
    def unconverted_method(self: _Module, x: Tensor, /, *args: _Options.args, **options: _Options.kwargs) -> _Result:
        if not (autocasting(x) and x.is_floating_point()):
            return method(self, x, *args, **options)
        with outside_autocast():
            return method(self, x.float(), *args, **options)

    return unconverted_method


def unconverted(x: Tensor) -> AbstractContextManager[object]:
    """Return `outside_autocast()` where that makes a difference to `x`: making one takes some microseconds."""
    return outside_autocast() if autocasting(x) else nullcontext()
