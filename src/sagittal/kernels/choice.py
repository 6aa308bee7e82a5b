"""Which form computes: the fused kernels or plain PyTorch; one switch for CPUs and GPUs.

The switch has three positions. `auto` is what users have: a CPU takes its compiled kernels wherever they can run; a
GPU takes its Triton kernels where three things hold, each found out once and kept: they run there at all, they gave
the plain form's numbers in a small trial, and the trial at the job's size took no longer than the plain form. `on`
leaves out trial and timing, `off` leaves out the kernels. The forms differ by rounding alone.

Nothing here knows what the kernels compute: whoever asks brings a `Trial`.
"""

import hashlib
import importlib.metadata
import importlib.util
import itertools
import json
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Final, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from sagittal.errors import ResourceError

Mode = Literal["auto", "on", "off"]
Way = Literal["eager", "graph"] | None
MODES: Final[tuple[Mode, ...]] = get_args(Mode)

MEASURED: Final[Mapping[tuple[tuple[int, int], str, str, int], bool]] = {}
"""(compute capability, operation, dtype, edge) to whether the kernels are the faster form, where that was measured and
is known; everything else is timed at its first use."""

_EDGES = (8, 16, 32, 64, 128)
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_LEAST_CAPABILITY = (8, 0)
_RUNS = 5
_CHECKED_SIZE = (5, 6, 7)
_SLACK = 4.0
_FLOOR: Final = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}
"""Relative errors that no form is blamed for."""


class Job(NamedTuple):
    """What is decided on; all of it is constant while a graph is compiled.

    `edge` is that of the cube that stands for volumes of about this size (`edge_of`); `details` are whatever else the
    operation's speed depends on: widths, kernel, stride; `training` is whether gradients are wanted.
    """

    operation: str
    device: str
    dtype: str
    edge: int
    details: tuple[int, ...]
    training: bool


class Rivals(NamedTuple):
    """Both forms of an operation, and tensors to call either with; those that require gradients get them."""

    kernels: Callable[..., Tensor]
    plain: Callable[..., Tensor]
    tensors: Sequence[Tensor]


Trial = Callable[[Job, tuple[int, int, int]], Rivals]
"""Makes the rivals for a job, with volumes of this size, in its dtype and on its device."""

_mode: Mode = "auto"
_interpreted = False
_verdicts: dict[Job, bool] = {}
_timed: set[Job] = set()
_checked: dict[Job, str | None] = {}
_told: set[str] = set()


def kernels_mode() -> Mode:
    """Return the position of the switch."""
    return _mode


@contextmanager
def use_kernels(mode: Mode, known: Path | None = None) -> Iterator[None]:
    """Set the switch for the whole process, all threads of it, and put it back at the end.

    Args:
        mode: `auto`, `on` or `off`.
        known: file that keeps what was timed on this machine from one process to the next, or None.

    Raises:
        ResourceError: another word.
    """
    global _mode
    if mode not in MODES:
        raise ResourceError(f"kernels={mode!r}: expected {', '.join(MODES)}.", code="kernels")
    before, _mode = _mode, mode
    if known is not None:
        read_verdicts(known)
    try:
        yield
    finally:
        _mode = before
        if known is not None:
            write_verdicts(known)


def require_kernels(device: torch.device | str, *, on_cpu: bool) -> None:
    """Refuse a device without kernels where they are switched on.

    Args:
        device: where it shall compute.
        on_cpu: whether the compiled CPU kernels are there.

    Raises:
        ResourceError: the switch is `on`, and nothing but plain PyTorch can run there.
    """
    if _mode != "on":
        return
    place = torch.device(device)
    reason = gpu_reason(place)
    if place.type == "cpu" and not _interpreted:
        reason = None if on_cpu else "the compiled CPU kernels were not built with this installation"
    if reason is not None:
        raise ResourceError(
            f"--kernels on: {reason} (device {place}). Choose --kernels auto, which computes the same with plain "
            "PyTorch, or another --device.",
            code="kernels",
        )


def gpu_reason(device: torch.device) -> str | None:
    """Return why the Triton kernels can't run on a device, None where they can."""
    if device.type == "cpu" and _interpreted:
        return None
    if device.type != "cuda":
        return f"there are no kernels for devices of type {device.type}"
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed (pip install 'sagittal[gpu]')"
    capability = torch.cuda.get_device_capability(device)
    if capability < _LEAST_CAPABILITY:
        has, needs = (".".join(map(str, pair)) for pair in (capability, _LEAST_CAPABILITY))
        return f"the GPU has compute capability {has}, and the kernels need {needs}"
    return None


def kernels_on(device: torch.device | str, *, on_cpu: bool) -> str:
    """Return what may compute there besides PyTorch, for a record of a run: `compiled`, `triton 3.6.0` or `torch`.

    Args:
        device: where it computes.
        on_cpu: whether the compiled CPU kernels are there.
    """
    place = torch.device(device)
    if _mode == "off":
        return "torch"
    if place.type == "cpu" and not _interpreted:
        return "compiled" if on_cpu else "torch"
    return "torch" if gpu_reason(place) is not None else f"triton {importlib.metadata.version('triton')}"


@contextmanager
def interpreted_on_cpu() -> Iterator[None]:
    """Let the Triton kernels compute what lies on the CPU, in Triton's interpreter (TRITON_INTERPRET=1): for tests."""
    global _interpreted
    before, _interpreted = _interpreted, True
    try:
        yield
    finally:
        _interpreted = before


def takes_cpu_kernels() -> bool:
    """Return whether the compiled CPU kernels may be used, where they are there."""
    return _mode != "off" and not _interpreted


def for_gpu_kernels(x: Tensor) -> bool:
    """Return whether `x` lies where the Triton kernels compute, if any do: on a GPU."""
    return x.is_cuda or (_interpreted and x.device.type == "cpu")


def edge_of(voxels: int) -> int:
    """Return the edge of the cube that stands for a volume of so many voxels: 8, 16, 32, 64 or 128."""
    for edge in _EDGES[:-1]:
        if voxels <= 3 * edge**3:  # about half way to the next, which has eight times as many
            return edge
    return _EDGES[-1]


def takes_kernels(x: Tensor) -> bool:
    """Return whether the Triton kernels may be used on what is like `x`; nothing is tried or timed for it."""
    if _mode == "off" or not for_gpu_kernels(x) or x.dtype not in _DTYPES or torch.compiler.is_exporting():
        return False
    return _available(str(x.device))


def way(x: Tensor, *others: Tensor | None) -> Way:
    """Return how the Triton kernels can be called on these now: at once, as operators of a graph, or not at all."""
    if not takes_kernels(x) or torch._C._are_functorch_transforms_active():
        return None
    plain_types = (Tensor, torch.nn.Parameter)
    if not all(
        type(tensor) in plain_types and tensor.device == x.device and tensor.dtype in _DTYPES and tensor.numel() > 0
        for tensor in (x, *others)
        if tensor is not None
    ):
        return None
    if torch.compiler.is_compiling():
        return "graph"
    # Someone watches the operators (counting, fake tensors), or a traced graph must hold what any runtime has.
    is_watched = torch._C._len_torch_dispatch_stack() or torch._C._get_tracing_state() is not None
    return None if is_watched else "eager"


def as_autocast(x: Tensor) -> Tensor:
    """Return `x` in the dtype that autocast asks for on GPUs, as a convolution would take it."""
    if not x.is_cuda or not torch.is_autocast_enabled("cuda"):
        return x
    return x.to(torch.get_autocast_dtype("cuda"))


def job_of(operation: str, x: Tensor, details: tuple[int, ...], others: Sequence[Tensor | None]) -> Job:
    """Return the job of an operation on x (N, C, ...) with these parameters."""
    training = torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in (x, *others))
    voxels = x.numel() // x.shape[1]
    return Job(operation, str(x.device), str(x.dtype).removeprefix("torch."), edge_of(voxels), details, training)


def _available(device: str) -> bool:
    reason = gpu_reason(torch.device(device))
    if reason is not None and reason not in _told:
        _tell(f"kernels: plain PyTorch computes on {device}, several times slower, because {reason}")
        _told.add(reason)
    return reason is None


def decide(job: Job, trial: Trial) -> bool:
    """Return whether the kernels do a job on a GPU; tried and timed at the first call, where the switch is `auto`.

    A trial that fails is told with a warning, and the plain form computes from then on.
    """
    if _mode != "auto":
        return _mode == "on"
    return _found(trial, *job)


def _found(trial: Trial, *words: Any) -> bool:
    """Do what `decide` does in `auto`; the job comes in parts, since to torch.compile a whole one is no constant."""
    job = Job(*words)
    if job not in _verdicts:
        _verdicts[job] = _judged(job, trial)
    return _verdicts[job]


def _constant(function: Callable[..., bool]) -> None:
    """Let torch.compile call a function while it traces, with constants, and keep its result in the graph."""
    # What `torch.compiler.assume_constant_result` does, which would import the compiler: three seconds.
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]


_constant(_available)
_constant(_found)


def _judged(job: Job, trial: Trial) -> bool:
    device = torch.device(job.device)
    small = job._replace(edge=0)
    if small not in _checked:
        _checked[small] = _failure(small, trial)
        if _checked[small] is not None:
            _tell(f"kernels: plain PyTorch computes {job.operation} {job.dtype} {job.details}: {_checked[small]}")
    if _checked[small] is not None:
        return False
    if device.type != "cuda" or torch.are_deterministic_algorithms_enabled():
        return True  # what a clock says differs from run to run, and so would the last bits
    known = MEASURED.get((torch.cuda.get_device_capability(device), job.operation, job.dtype, job.edge))
    if known is not None:
        return known
    if torch.cuda.is_current_stream_capturing():
        return True
    try:
        kernels, plain = _times(job, trial)
    except torch.OutOfMemoryError:
        return True  # beside a network there is no room for a race; the kernels take less
    _timed.add(job)
    return kernels <= plain


def _failure(job: Job, trial: Trial) -> str | None:
    """Return what is wrong with the kernels, compared with the plain form in float64 on a small volume, or None."""
    try:
        rivals = trial(job, _CHECKED_SIZE)
        truth = _results(rivals.plain, [_as_double(tensor) for tensor in rivals.tensors], job.training)
        plain = _results(rivals.plain, rivals.tensors, job.training)
        kernels = _results(rivals.kernels, rivals.tensors, job.training)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # a compiler that fails has many ways to say so
        return " ".join(f"{type(error).__name__}: {error}".split())[:300]
    floor = _FLOOR[rivals.tensors[0].dtype]
    for index, (exact, usual, ours) in enumerate(zip(truth, plain, kernels, strict=True)):
        allowed = max(_SLACK * relative_error(usual, exact), floor)
        found = relative_error(ours, exact)
        if not found <= allowed:  # also where it is not a number
            what = "the result" if index == 0 else f"gradient {index}"
            return f"in a trial {what} was off by {found:.1e} of its largest value, {allowed:.1e} was allowed"
    return None


def relative_error(x: Tensor, exact: Tensor) -> float:
    """Return the largest difference from `exact`, float64, relative to its largest value."""
    largest = exact.abs().max().clamp_min(torch.finfo(torch.float32).tiny)
    return float((x.double() - exact).abs().max() / largest)


def _as_double(tensor: Tensor) -> Tensor:
    return tensor.detach().double().requires_grad_(tensor.requires_grad)


def _results(form: Callable[..., Tensor], tensors: Sequence[Tensor], training: bool) -> list[Tensor]:
    """Return the result and, in training, the gradients of its weighted sum at all that require one."""
    with torch.autocast(tensors[0].device.type, enabled=False), torch.set_grad_enabled(training):
        y = form(*tensors)
        if not training:
            return [y]
        wanted = [tensor for tensor in tensors if tensor.requires_grad]
        steps = torch.linspace(-1, 1, y.numel(), dtype=torch.float64, device=y.device).view(y.shape)
        return [y.detach(), *torch.autograd.grad(y, wanted, steps.cos().to(y.dtype))]


def _times(job: Job, trial: Trial) -> tuple[float, float]:
    """Return the milliseconds of kernels and plain form, best of some interleaved runs, at the job's size."""
    rivals = trial(job, (job.edge, job.edge, job.edge))
    best = {form: float("inf") for form in (rivals.kernels, rivals.plain)}
    for number, form in itertools.product(range(_RUNS + 1), best):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        start.record()
        _results(form, rivals.tensors, job.training)
        end.record()
        end.synchronize()
        if number > 0:  # the first run compiles
            best[form] = min(best[form], start.elapsed_time(end))
    return best[rivals.kernels], best[rivals.plain]


def draw(shape: Sequence[int], job: Job, *, seed: int) -> Tensor:
    """Return normal numbers for a trial, the same at each call; no generator but its own moves."""
    generator = torch.Generator().manual_seed(seed)
    short = torch.randn(min(4099, max(1, torch.Size(shape).numel())), generator=generator)
    count = torch.Size(shape).numel()
    long = short.to(job.device).repeat((count + short.numel() - 1) // short.numel())[:count]
    return long.view(tuple(shape)).to(getattr(torch, job.dtype)).requires_grad_(job.training)


def _tell(line: str) -> None:
    warnings.warn(line, RuntimeWarning, stacklevel=3)


def read_verdicts(path: Path) -> None:
    """Take over what earlier processes found out on this machine; a file that is missing or damaged says nothing."""
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        found = [(_job(job), bool(faster)) for job, faster in stored[_software()]]
    except (OSError, ValueError, KeyError, TypeError, IndexError):
        return
    _verdicts.update(found)
    _timed.update(job for job, _ in found)


def write_verdicts(path: Path) -> None:
    """Keep for later processes what was timed on this machine, whole or not at all; where it can't, it is not kept."""
    kept = [(list(job), _verdicts[job]) for job in sorted(_timed)]
    if not kept:
        return
    part = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part.write_text(json.dumps({_software(): kept}), encoding="utf-8")
        part.replace(path)
    except OSError:
        with suppress(OSError):
            part.unlink(missing_ok=True)


def _job(stored: Sequence[Any]) -> Job:
    operation, device, dtype, edge, details, training = stored
    return Job(operation, device, dtype, int(edge), tuple(details), bool(training))


def _software() -> str:
    """Return what a verdict depends on besides the job: devices, PyTorch, and the kernels' own text."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    devices = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return ", ".join([*devices, f"torch {torch.__version__}", digest.hexdigest()[:16]])
