"""The compiled CPU kernels: find the library, share PyTorch's threads, and call it on tensors.

The library (`_cpu.c`) is optional: it is built with the package where a C compiler is at hand and loaded with ctypes,
so it needs no Python or PyTorch headers. Without it every caller falls back to plain PyTorch.

All functions here take dense channels-last memory, (N, D, H, W, C) or (N, voxels, C), float32 on the CPU, C a
multiple of 16; the callers (depthwise.py, block.py) see to that.
"""

import ctypes
import importlib.machinery
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import torch
from torch import Tensor

from sagittal.kernels import choice

LANES: Final = 16
SWEPT: Final = (3, 5, 7)  # the kernel sizes of `sweep`
TRANSPOSED: Final = 3  # the mode of `depthwise` beside the strides 1 and 2

_POINTER, _LONG, _INT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
_LONGS = ctypes.POINTER(ctypes.c_int64)
_SIGNATURES: Final = {
    "sagittal_start": (_INT, [_POINTER, _INT]),
    "sagittal_start_amx": (_INT, []),
    "sagittal_pack_pairs": (None, [_POINTER, _POINTER, _LONG, _LONG, _INT]),
    "sagittal_depthwise": (None, [_POINTER] * 5 + [_LONGS, _INT, _INT]),
    "sagittal_depthwise_weight_space": (_LONG, [_LONGS]),
    "sagittal_depthwise_weight": (None, [_POINTER] * 4 + [_LONGS, _INT, _INT]),
    "sagittal_moments_space": (_LONG, [_LONG] * 3),
    "sagittal_moments": (None, [_POINTER] * 4 + [_LONG] * 3 + [ctypes.c_double, _INT]),
    "sagittal_sweep_space": (None, [_LONGS, _LONGS, _INT]),
    "sagittal_sweep": (
        None,
        [ctypes.POINTER(_POINTER), _POINTER, ctypes.POINTER(_POINTER), _POINTER, _LONGS, ctypes.c_double, _INT, _INT],
    ),
    "sagittal_forward_space": (None, [_LONGS, _LONGS]),
    "sagittal_forward": (None, [ctypes.POINTER(_POINTER)] + [_POINTER] * 3 + [_LONGS, _INT]),
    "sagittal_stem": (None, [ctypes.POINTER(_POINTER), _POINTER, _LONGS, _INT]),
    "sagittal_tail_space": (None, [_LONGS, _LONGS]),
    "sagittal_tail_forward": (None, [ctypes.POINTER(_POINTER), _POINTER, _POINTER, _LONGS, _INT]),
    "sagittal_tail_backward": (None, [ctypes.POINTER(_POINTER)] + [_POINTER] * 4 + [_LONGS, _INT]),
    "sagittal_norm_backward": (None, [_POINTER, _POINTER, ctypes.POINTER(_POINTER)] + [_LONG] * 3 + [_INT]),
    "sagittal_gelu": (None, [_POINTER, _POINTER, _LONG, _INT]),
}


def _openmp_entry() -> int | None:
    """Return the address of GOMP_parallel in the OpenMP runtime that PyTorch loaded, or None."""
    candidates: list[str | None] = [None]
    bundled = Path(torch.__file__).parent / "lib"
    candidates += [
        str(path) for pattern in ("libgomp*.so*", "libiomp5*.so*", "libomp*.so*") for path in bundled.glob(pattern)
    ]
    for name in candidates:
        try:
            # RTLD_NOLOAD: only what is loaded already; a second OpenMP runtime would be a second pool of threads
            library = ctypes.CDLL(name, mode=0x4) if name else ctypes.CDLL(None)
            return ctypes.cast(library.GOMP_parallel, ctypes.c_void_p).value
        except (OSError, AttributeError, TypeError):
            continue
    return None


def _load() -> ctypes.CDLL | None:
    if not sys.platform.startswith("linux"):
        return None
    for suffix in importlib.machinery.EXTENSION_SUFFIXES:
        path = Path(__file__).with_name("_cpu" + suffix)
        if path.exists():
            break
    else:
        return None
    try:
        library = ctypes.CDLL(str(path))
        for name, (result, arguments) in _SIGNATURES.items():
            function = getattr(library, name)
            function.restype, function.argtypes = result, arguments
    except (OSError, AttributeError):  # built for another machine, or by another version
        return None
    library.sagittal_start(_openmp_entry(), 2)
    return library


_library: ctypes.CDLL | None = _load()
_tiles: bool = _library is not None and bool(_library.sagittal_start_amx())


def cpu_available() -> bool:
    """Return whether the compiled CPU kernels were found; without them everything runs as plain PyTorch."""
    return _library is not None


def limit_instruction_set(level: int) -> int:
    """Use at most this instruction set (0 portable, 1 AVX2, 2 AVX-512); return the one used, -1 for none."""
    return -1 if _library is None else int(_library.sagittal_start(_openmp_entry(), level))


def has_tiles() -> bool:
    """Return whether matrix products can run in bfloat16, on AMX tiles."""
    return _library is not None and _tiles


def usable(*tensors: Tensor | None) -> bool:
    """Return whether the kernels can take these now: the library is there, and `eager`."""
    return _library is not None and choice.takes_cpu_kernels() and eager(*tensors)


def eager(*tensors: Tensor | None) -> bool:
    """Return whether these are plain eager float32 on the CPU: no autocast, compiling or tracing, nobody watching."""
    if torch.compiler.is_compiling():
        return False
    if torch._C._len_torch_dispatch_stack() or torch._C._are_functorch_transforms_active():
        return False  # someone watches the operators, or transforms them: counting, fake tensors, vmap
    if torch._C._get_tracing_state() is not None:
        return False  # a traced graph must hold operators that any runtime has
    return _fit(tensors)


def usable_in_graph(*tensors: Tensor | None) -> bool:
    """Return whether a graph that torch.compile builds now can call the kernels, as operators of their own.

    An exported graph cannot: it must hold operators that any runtime has. Nor can a transform inside the graph.
    """
    if _library is None or not choice.takes_cpu_kernels():
        return False
    if not torch.compiler.is_compiling() or torch.compiler.is_exporting():
        return False
    return not torch._C._are_functorch_transforms_active() and _fit(tensors)


def _fit(tensors: Sequence[Tensor | None]) -> bool:
    return not torch.is_autocast_enabled("cpu") and all(
        type(tensor) in (Tensor, torch.nn.Parameter)
        and tensor.dtype == torch.float32
        and tensor.device.type == "cpu"
        and tensor.numel() > 0
        for tensor in tensors
        if tensor is not None
    )


def keep_freed_memory() -> bool:
    """Let the C allocator keep big blocks that are freed, for the whole process; return whether it can (glibc).

    By default every big tensor is mapped afresh and the system zeroes its pages one by one, which takes longer than
    most kernels here; a training step asks for the same sizes again and again. The price: memory once used stays
    with the process.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):  # another C library; Windows has no name for the process itself
        return False
    map_max, trim_threshold = -4, -1  # M_MMAP_MAX, M_TRIM_THRESHOLD
    return bool(mallopt(map_max, 0)) and bool(mallopt(trim_threshold, 2**31 - 1))


def channels_last(x: Tensor) -> Tensor:
    """Return (N, C, D, H, W) as dense (N, D, H, W, C), without a copy where the memory already lies so."""
    return x.permute(0, 2, 3, 4, 1).contiguous()


def _call() -> ctypes.CDLL:
    assert _library is not None, "callers ask `usable` first"
    return _library


def _longs(values: Sequence[int]) -> ctypes.Array[ctypes.c_int64]:
    return (ctypes.c_int64 * len(values))(*values)


def _pointers(tensors: Sequence[Tensor | None]) -> ctypes.Array[ctypes.c_void_p]:
    return (ctypes.c_void_p * len(tensors))(*map(_pointer, tensors))


def _pointer(tensor: Tensor | None) -> int | None:
    if tensor is None:
        return None
    assert tensor.is_contiguous(), "the kernels would read or write beyond a strided or expanded tensor"
    return tensor.data_ptr()


def depthwise(
    x: Tensor,
    taps: Tensor,
    bias: Tensor | None,
    kernel: tuple[int, int],
    mode: int,
    out: tuple[int, int, int],
    add: Tensor | None = None,
) -> Tensor:
    """Return the depthwise convolution of x (N, D, H, W, C) as (N, *out, C), plus `add` of that shape.

    taps (kernel_d * k * k, C); kernel (kernel_d, k); mode is the stride 1 or 2, or `TRANSPOSED`.
    """
    y = x.new_empty((x.shape[0], *out, x.shape[4]))
    bias = None if bias is None else bias.contiguous()
    shape = _longs((x.shape[0], x.shape[4], *x.shape[1:4], *out, *kernel))
    _call().sagittal_depthwise(
        _pointer(x), _pointer(taps), _pointer(bias), _pointer(add), _pointer(y), shape, mode, torch.get_num_threads()
    )
    return y


def depthwise_weight_grad(x: Tensor, grad: Tensor, kernel: tuple[int, int], stride: int) -> tuple[Tensor, Tensor]:
    """Return the gradients of taps (taps, C) and bias (C); x the input, grad at the output, both (N, D, H, W, C)."""
    channels, taps = x.shape[4], kernel[0] * kernel[1] ** 2
    shape = _longs((x.shape[0], channels, *x.shape[1:4], *grad.shape[1:4], *kernel))
    partial = x.new_zeros(_call().sagittal_depthwise_weight_space(shape))
    total = x.new_empty((taps + 1, channels))
    _call().sagittal_depthwise_weight(
        _pointer(x), _pointer(grad), _pointer(partial), _pointer(total), shape, stride, torch.get_num_threads()
    )
    return total[:taps], total[taps]


def moments(h: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return each sample's and channel's mean and reciprocal standard deviation, (N, C) each, of h (N, voxels, C)."""
    samples, voxels, channels = h.shape
    mean, scale = h.new_empty((samples, channels)), h.new_empty((samples, channels))
    partial = h.new_empty(_call().sagittal_moments_space(samples, voxels, channels))
    _call().sagittal_moments(
        _pointer(h),
        _pointer(partial),
        _pointer(mean),
        _pointer(scale),
        samples,
        voxels,
        channels,
        eps,
        torch.get_num_threads(),
    )
    return mean, scale


def sweep(
    x: Tensor,
    taps: Tensor,
    bias: Tensor | None,
    kernel: tuple[int, int],
    mode: int,
    out: tuple[int, int, int],
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return what `depthwise` does, h (N, *out, C), and h's `moments`, which are taken on the way.

    kernel (kernel_d, k), k one of `SWEPT`; mode 1 or `TRANSPOSED`.
    """
    samples, channels, is_up = x.shape[0], x.shape[4], int(mode == TRANSPOSED)
    shape, sizes = _longs((samples, channels, *x.shape[1:4], *out, *kernel)), _longs((0, 0))
    _call().sagittal_sweep_space(shape, sizes, is_up)
    threads, h = torch.get_num_threads(), x.new_empty((samples, *out, channels))
    mean, scale = x.new_empty((samples, channels)), x.new_empty((samples, channels))
    scratch, partial = x.new_empty(threads * sizes[0]), x.new_empty(sizes[1])
    _call().sagittal_sweep(
        _pointers([x, taps, None if bias is None else bias.contiguous()]),
        _pointer(h),
        _pointers([mean, scale, partial]),
        _pointer(scratch),
        shape,
        eps,
        is_up,
        threads,
    )
    return h, mean, scale


def stem(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return x (N, C, D, H, W), channels first, times weight (O, C) plus bias as (N, D, H, W, O)."""
    shape = _longs((x.shape[0], x[0, 0].numel(), x.shape[1], weight.shape[0]))
    y = x.new_empty((x.shape[0], *x.shape[2:], weight.shape[0]))
    inputs = [x.contiguous(), weight.t().contiguous(), None if bias is None else bias.contiguous()]
    _call().sagittal_stem(_pointers(inputs), _pointer(y), shape, torch.get_num_threads())
    return y


def forward(inputs: Sequence[Tensor | None], size: tuple[int, int, int] | None = None) -> Tensor:
    """Return residual + contract(gelu(expand((h - mean) * scale))) as (N, voxels, O).

    Inputs: h (N, voxels, C), mean, scale, expand (R, C), the norm's weight (C), the expansion's bias with that of the
    norm in it, contract (O, R), its bias, residual (N, voxels, O) or None, odd or None.

    Args:
        inputs: dense, see above.
        size: D, H, W of h where it is an up block's: the result has 2n voxels along an axis where h has 2n - 1, with a
            plane of zeros in front, and so has the residual; odd (N, n * n * n, O) is added to the odd voxels.
    """
    h, expand, contract = inputs[0], inputs[3], inputs[6]
    assert h is not None and expand is not None and contract is not None
    samples, voxels, channels = h.shape
    threads, outputs = torch.get_num_threads(), contract.shape[0]
    shape, sizes = _longs((samples, voxels, channels, *expand.shape[:1], outputs, *(size or (0, 0, 0)))), _longs((0, 0))
    _call().sagittal_forward_space(shape, sizes)
    placed = voxels if size is None else (size[0] + 1) * (size[1] + 1) * (size[2] + 1)
    y, scratch, weights = (
        h.new_empty((samples, placed, outputs)),
        h.new_empty(threads * sizes[0]),
        h.new_empty(sizes[1]),
    )
    _call().sagittal_forward(_pointers(inputs), _pointer(y), _pointer(scratch), _pointer(weights), shape, threads)
    return y


def _tail_space(shape: ctypes.Array[ctypes.c_int64]) -> list[int]:
    sizes = (ctypes.c_int64 * 4)()
    _call().sagittal_tail_space(shape, sizes)
    return list(sizes)


def pairs(weight: Tensor) -> Tensor:
    """Return weight (depth, columns) rounded to bfloat16, two rows to a word: int32 (depth / 2, columns).

    The depth is padded with zeros to a multiple of 32. So lie the right operands of products on AMX tiles.
    """
    depth, columns = weight.shape
    packed = weight.new_empty(((depth + 31) // 32 * 16, columns), dtype=torch.int32)
    _call().sagittal_pack_pairs(_pointer(weight), _pointer(packed), depth, columns, torch.get_num_threads())
    return packed


def tail_forward_bf16(inputs: Sequence[Tensor | None]) -> Tensor:
    """Return (N, voxels, O) with the products in bfloat16; `forward` is the same in float32.

    Inputs: h, mean, scale, expand_t (C, R) as `pairs`, its bias, contract_t (R, O) as `pairs`, bias, residual or None.
    """
    h, expand_t, contract_t = inputs[0], inputs[3], inputs[5]
    assert h is not None and expand_t is not None and contract_t is not None
    samples, voxels, channels = h.shape
    outputs, threads = contract_t.shape[1], torch.get_num_threads()
    shape = _longs((samples, voxels, channels, expand_t.shape[1], outputs, True))
    y, scratch = h.new_empty((samples, voxels, outputs)), h.new_empty(threads * _tail_space(shape)[0])
    _call().sagittal_tail_forward(_pointers(inputs), _pointer(y), _pointer(scratch), shape, threads)
    return y


def tail_backward(inputs: Sequence[Tensor], *, bf16: bool = False) -> tuple[Tensor, list[Tensor]]:
    """Return the gradient at the affine norm's output (N, voxels, C), and each sample's sums over its voxels.

    The sums: normed x hidden gradient (N, C, R), hidden x output gradient (N, R, O), hidden gradient (N, R), output
    gradient (N, O). Inputs: h, mean, scale, expand_t (C, R), its bias, expand (R, C), contract (O, R), grad_y; with
    `bf16` the three matrices are `pairs` of what they are else.
    """
    h, expand_t, grad_y = inputs[0], inputs[3], inputs[7]
    (samples, voxels, channels), hidden, outputs = h.shape, expand_t.shape[1], grad_y.shape[2]
    threads = torch.get_num_threads()
    shape = _longs((samples, voxels, channels, hidden, outputs, bf16))
    scratch_size, partial_size, part_size, _ = _tail_space(shape)
    grad_a, scratch = torch.empty_like(h), h.new_empty(threads * scratch_size)
    totals, partial = h.new_empty((samples, part_size)), h.new_empty(partial_size)
    _call().sagittal_tail_backward(
        _pointers(inputs), _pointer(grad_a), _pointer(totals), _pointer(partial), _pointer(scratch), shape, threads
    )
    sizes = [channels * hidden, hidden * outputs, hidden, outputs]
    expand, contract, hidden_sum, output_sum = torch.split(totals, sizes, dim=1)
    if bf16:
        contract_sum = contract.view(samples, outputs, hidden).transpose(1, 2)
    else:
        contract_sum = contract.view(samples, hidden, outputs)
    return grad_a, [expand.view(samples, channels, hidden), contract_sum, hidden_sum, output_sum]


def norm_backward_(grad: Tensor, h: Tensor, coefficients: Sequence[Tensor]) -> Tensor:
    """Set grad = scale_a * grad + scale_h * (h - mean) + shift; coefficients mean, scale_a, scale_h, shift, (N, C)."""
    samples, voxels, channels = h.shape
    _call().sagittal_norm_backward(
        _pointer(grad), _pointer(h), _pointers(coefficients), samples, voxels, channels, torch.get_num_threads()
    )
    return grad


def gelu_(u: Tensor, grad: Tensor | None = None) -> Tensor:
    """Set u = gelu(u) in place and, where given, grad = grad * gelu'(u); dense, a multiple of 16 elements."""
    assert u.numel() % LANES == 0
    _call().sagittal_gelu(_pointer(u), _pointer(grad), u.numel(), torch.get_num_threads())
    return u
