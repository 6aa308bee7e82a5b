"""Check and time the GPU kernels: correctness, single kernels, whole networks, where a step's time goes.

    PYTHONPATH=src python benchmarks/gpu.py --out gpu.jsonl

Five minutes on one GPU, from a source tree alone: it needs torch (2.11 and newer), triton (3.6 and newer), numpy and
safetensors, no network and no installed package. Parts, in this order: `correct` (and, beside it, compiling what the
networks need, in as many processes as there are cores), `copy`, then networks by name (`mednext-b-k3` ...
`segformer3d`), plain and with kernels, `losses`, `operations`, `profile`, and the networks' other forms.

    --only correct,mednext-b-k3,profile   some parts only
    --forms plain,kernels                 some forms only; also 'kernels graph' (CUDA graphs), 'kernels compiled',
                                          'plain compiled' and 'monai'
    --quick                               four networks and short runs: two minutes
    --limit 600                           seconds for everything; compiled forms take most of it, and come last
    --device cpu                          a smoke run in Triton's interpreter with tiny sizes, to try the script

The parts run in processes of their own (`gpu_supervisor`): one that fails, dies or hangs is told, and the next one
begins. Rows are printed and written (--out, lines of JSON) as they are found, and tables end the output. Exit code 1
where a part failed or a kernel was not correct.
"""

import os
import sys

if "--device" in sys.argv and "cpu" in sys.argv:
    os.environ["TRITON_INTERPRET"] = "1"  # Triton reads it where a kernel is defined: before any import of one

import argparse
import platform
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from gpu_floor import network_bytes
from gpu_measure import Report, copy_rate, peak_mib, release, steady_ms
from gpu_networks import FORMS, NETWORKS, Runs, Scale, compile_block, distinct_blocks, losses
from gpu_operations import Case, checked_cases, conv, errors, tail, whole
from gpu_supervisor import read_rows, supervise, supervise_all, worker_command
from gpu_tables import print_tables
from torch import Tensor

from sagittal.kernels.choice import gpu_reason, interpreted_on_cpu, use_kernels
from sagittal.networks import MedNeXt, MedNeXtBlock, MedNeXtDownBlock, MedNeXtUpBlock

LOSS_STEPS = 10
LOSS_BOUNDS = {"fp32": 1e-5, "bf16": 1e-3}
COMPILE_LIMIT_S = 100.0
PROFILED = ("mednext-b-k3", "segformer3d")
CHECK_SHARE = 0.45
"""Of the time, for correctness and compiling at the most."""
MOST_SHARDS = 12


class Job(NamedTuple):
    """A part: its name, the seconds that it may take, and the work."""

    name: str
    limit_s: float
    work: Callable[[], object]


def environment(report: Report, scale: Scale) -> None:
    """Say what this runs on."""
    versions: dict[str, Any] = {"python": platform.python_version(), "torch": torch.__version__}
    try:
        import triton

        versions["triton"] = triton.__version__
    except ImportError:
        versions["triton"] = "missing"
    if scale.device.type == "cuda":
        versions["device"] = torch.cuda.get_device_name(scale.device)
        versions["capability"] = list(torch.cuda.get_device_capability(scale.device))
        versions["memory_gib"] = round(torch.cuda.get_device_properties(scale.device).total_memory / 2**30, 1)
    report.add("environment", **versions, kernels=gpu_reason(scale.device) or "usable")


@contextmanager
def exact_fp32() -> Iterator[None]:
    """Let the plain form compute float32 in float32, where PyTorch's default on GPUs is TF32 in convolutions."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


def check(report: Report, scale: Scale, case: Case) -> None:
    """Compare an operation and its gradients with float64 in each precision, outputs poisoned."""
    bad = []
    for dtype in (torch.float32, torch.bfloat16, torch.float16)[: 1 if scale.tiny else 3]:
        name = str(dtype).removeprefix("torch.")
        try:
            with exact_fp32():
                ours, plain, good = errors(case, dtype, scale.device)
        except Exception as error:  # a precision that fails is a finding, and the others are still to be tried
            bad.append(f"{name}: {type(error).__name__}: {str(error).strip()[:300]}")
            continue
        shape = list(case.shapes[0])
        report.add(
            "correct", operation=case.name, shape=shape, dtype=name, kernels_error=ours, plain_error=plain, good=good
        )
        if not good:
            bad.append(f"{name}: off by {ours:.2e}, the plain form by {plain:.2e}")
    assert not bad, "; ".join(bad)


def timed_cases(scale: Scale) -> list[Case]:
    """Return the operations that are timed by themselves, at the sizes of MedNeXt's levels."""
    cases: list[Case] = []
    for level, channels in ((0, 32), (1, 64), (2, 128))[: 1 if scale.tiny else 3]:
        size = (scale.edge >> level,) * 3
        coarse = (scale.edge >> (level + 1),) * 3
        if scale.tiny:
            return [conv(channels, size, 3), whole(MedNeXtUpBlock, 4, (2, 2, 2))]
        cases += [conv(channels, size, kernel) for kernel in ((3, 5) if level else (3, 5, 7))]
        cases += [tail(channels, size, 2), *(whole(MedNeXtBlock, channels, size, kernel, 2) for kernel in (3, 5))]
        cases += [whole(MedNeXtDownBlock, channels, size, 3, 3), whole(MedNeXtUpBlock, 2 * channels, coarse, 3, 3)]
        if level == 0:
            cases += [conv(channels, size, 3, stride=2), conv(64, coarse, 3, stride=3)]
            cases.append(whole(MedNeXtBlock, channels, size, 3, 2, grn="v2"))
    return cases


def operation(report: Report, case: Case, form: str, scale: Scale, rate: float, seconds: float) -> None:
    """Time an operation in a form, against its floor."""
    forward_ms, both_ms = _times(case, form, scale, seconds)
    bytes_each = case.activation * scale.dtype.itemsize
    values: dict[str, Any] = {"forward_ms": forward_ms, "backward_ms": both_ms - forward_ms}
    for part, passes in zip(("forward", "backward"), case.passes, strict=True):
        floor_ms = 1e3 * passes * bytes_each / rate
        values[f"{part}_floor_ms"] = floor_ms
        values[f"{part}_share_of_copy"] = floor_ms / max(values[f"{part}_ms"], 1e-9)
    report.add("operation", name=case.name, shape=list(case.shapes[0]), form=form, **values)


def _times(case: Case, form: str, scale: Scale, seconds: float) -> tuple[float, float]:
    """Return the milliseconds of a forward pass, and of a forward and backward pass."""
    tensors = case.tensors(scale.dtype, scale.device)
    if form == "plain":
        # What it is fastest with: contiguous volumes, and weights that need no conversion.
        tensors = [
            tensor.detach().to(scale.dtype).contiguous().requires_grad_(tensor.requires_grad) for tensor in tensors
        ]
    wanted = [tensor for tensor in tensors if tensor.requires_grad]
    with use_kernels("on" if form == "kernels" else "off"):
        with torch.no_grad():
            grad = torch.randn_like(case.run(*tensors))
            forward_ms = steady_ms(lambda: case.run(*tensors), scale.device, seconds=seconds)

        def both() -> tuple[Tensor, ...]:
            return torch.autograd.grad(case.run(*tensors), wanted, grad)

        return forward_ms, steady_ms(both, scale.device, seconds=seconds)


def network(report: Report, name: str, form: str, scale: Scale, rate: float, seconds: float) -> None:
    """Time inference and a training step of a network in one form, and measure their memory."""
    runs = Runs(name, form, scale)
    values: dict[str, Any] = {}
    for part, run in (("forward", runs.forward), ("step", runs.step)):
        timed: Callable[[], object] = runs.captured(run) if form.endswith("graph") else run
        values[f"{part}_ms"] = steady_ms(timed, scale.device, seconds=seconds)
        values[f"{part}_peak_mib"] = 0.0 if scale.tiny else peak_mib(run, scale.device)
        del timed
        release()
    if isinstance(runs.network, MedNeXt):
        shape = (1, 1, *(scale.edge,) * 3)
        for what, is_floor in (("moved", False), ("floor", True)):
            found = network_bytes(runs.network, shape, floor=is_floor)
            for part, count in zip(("forward", "step"), found, strict=True):
                values[f"{part}_{what}_ms"] = 1e3 * count / rate
    report.add("network", name=name, form=form, edge=scale.edge, **values)
    if form.endswith("compiled"):
        torch.compiler.reset()


def compare_losses(report: Report, scale: Scale) -> None:
    """Train some steps with and without the kernels and compare the losses."""
    wrong = []
    for precision, bound in LOSS_BOUNDS.items():
        if precision == "bf16" and scale.device.type == "cpu":
            continue
        chosen = Scale(min(scale.edge, 64), scale.tiny, scale.device, amp=precision == "bf16")
        steps = 2 if scale.tiny else LOSS_STEPS
        ours, plain = (losses("mednext-s-k3", form, chosen, steps) for form in ("kernels", "plain"))
        apart = max(abs(a - b) / abs(b) for a, b in zip(ours, plain, strict=True))
        report.add("losses", precision=precision, steps=steps, apart=apart, bound=bound, last=ours[-1])
        if not apart <= bound:
            wrong.append(f"{precision}: {apart:.1e} apart, {bound:.0e} allowed")
    assert not wrong, "; ".join(wrong)


def profile(report: Report, name: str, form: str, scale: Scale) -> None:
    """Print the fifteen kernels in which a training step spends most of its time."""
    runs = Runs(name, form, scale)
    for _ in range(0 if scale.tiny else 2):
        runs.step()
    activities = [torch.profiler.ProfilerActivity.CPU]
    if scale.device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    steps = 1 if scale.tiny else 3
    with torch.profiler.profile(activities=activities) as profiler:
        for _ in range(steps):
            runs.step()
        if scale.device.type == "cuda":
            torch.cuda.synchronize(scale.device)
    spent: dict[str, list[float]] = {}
    for event in profiler.events():
        on_gpu = event.device_type == torch.autograd.DeviceType.CUDA
        if on_gpu == (scale.device.type == "cuda"):
            entry = spent.setdefault(event.name, [0.0, 0.0])
            entry[0] += (event.time_range.elapsed_us() if on_gpu else event.self_cpu_time_total) / steps / 1e3
            entry[1] += 1 / steps
    total = sum(milliseconds for milliseconds, _ in spent.values())
    top = sorted(spent.items(), key=lambda item: -item[1][0])[:15]
    report.add("profile", name=name, form=form, total_ms=total, kernels=round(sum(n for _, n in spent.values())))
    for kernel, (milliseconds, count) in top:
        report.add("profile kernel", name=name, form=form, kernel=kernel[:90], ms=milliseconds, calls=round(count, 1))


def parsed(words: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the command line's values."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--only", default="")
    parser.add_argument("--forms", default="")
    parser.add_argument("--edge", type=int, default=None)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--limit", type=float, default=300.0)
    parser.add_argument("--compile-limit", type=float, default=COMPILE_LIMIT_S)
    parser.add_argument("--out", type=Path, default=None)
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--rows", type=Path, default=None, help=argparse.SUPPRESS)
    parser.add_argument("--after", default="", help=argparse.SUPPRESS)
    parser.add_argument("--shard", default="", help=argparse.SUPPRESS)
    given = parser.parse_args(words)
    parts = ["correct", "copy", *NETWORKS, "losses", "operations", "profile"]
    quick = ["correct", "copy", *list(NETWORKS)[:4], "losses", "operations", "profile"]
    given.parts = [part for part in given.only.split(",") if part] or (quick if given.quick else parts)
    given.chosen = [form for form in given.forms.split(",") if form] or list(FORMS[:3] if given.quick else FORMS)
    for word, known in [*((part, parts) for part in given.parts), *((form, FORMS) for form in given.chosen)]:
        if word not in known:
            parser.error(f"{word}: expected one of {', '.join(known)}")
    return given


def checking_jobs(given: argparse.Namespace, report: Report, scale: Scale) -> list[Job]:
    """Return this shard's part of correctness, and of what is to be compiled for the networks."""
    shard, shards = map(int, given.shard.split("/"))
    checks: list[Job] = []
    if "correct" in given.parts:
        for case in checked_cases(scale.tiny):
            checks.append(Job(f"correct {case.name} {case.shapes[0]}", 60, partial(check, report, scale, case)))
    compiles: list[Job] = []
    names = [name for name in given.parts if name in NETWORKS]
    if "kernels" in {form.partition(" ")[0] for form in given.chosen} and not scale.tiny:
        for block, shape in distinct_blocks(names, scale):
            name = f"compile {type(block).__name__} {block.conv2.out_channels} {block.kernel_size[0]} {shape}"
            compiles.append(Job(name, 60, partial(compile_block, block, shape, scale, torch.bfloat16)))
    return checks[shard::shards] + compiles[shard::shards]


def measuring_jobs(given: argparse.Namespace, report: Report, scale: Scale, rate: float) -> Iterator[Job]:
    """Yield all parts that take the GPU for themselves, the most wanted first."""
    seconds = 0.0 if scale.tiny else 0.3 if given.quick else 0.5
    one = 200.0 if scale.tiny else 30.0
    pairs = [(form, name) for name in given.parts if name in NETWORKS for form in given.chosen]

    def networks(*chosen: str) -> Iterator[Job]:
        for form, name in pairs:
            if form in chosen and not (form == "monai" and NETWORKS[name].size is None):
                limit = given.compile_limit if "compiled" in form or scale.tiny else 60
                yield Job(f"{name} {form}", limit, partial(network, report, name, form, scale, rate, seconds))

    yield from networks("plain", "kernels")
    if "losses" in given.parts:
        yield Job("losses", 10 * one if scale.tiny else 60, partial(_losses_exactly, report, scale))
    if "operations" in given.parts:
        for case in timed_cases(scale):
            for form in ("kernels", "plain"):
                work = partial(operation, report, case, form, scale, rate, seconds)
                yield Job(f"{case.name} {case.shapes[0]} {form}", one, work)
    if "profile" in given.parts:
        for name in PROFILED:
            yield Job(f"profile {name}", 2 * one, partial(profile, report, name, "kernels", scale))
    yield from networks("kernels graph")
    yield from networks("kernels compiled", "plain compiled")
    yield from networks("monai")


def _losses_exactly(report: Report, scale: Scale) -> None:
    with exact_fp32():
        compare_losses(report, scale)


def work(given: argparse.Namespace, scale: Scale) -> int:
    """Do a worker's parts."""
    torch.backends.cudnn.benchmark = True
    report = Report(given.rows, given.limit, given.after)
    with interpreted_on_cpu() if scale.tiny else nullcontext():
        if given.shard:
            for job in checking_jobs(given, report, scale):
                report.do(*job)
            return 0
        report.do("environment", 30, partial(environment, report, scale))
        report.do(
            "copy", 30, lambda: report.add("copy", bytes_per_s=copy_rate(scale.device, 8 if scale.tiny else 1024))
        )
        rates = [row["bytes_per_s"] for row in read_rows(given.rows) if row["section"] == "copy"]
        for job in measuring_jobs(given, report, scale, rates[-1] if rates else float("nan")):
            report.do(*job)
    return 0


def main() -> int:
    """Run what the command line asks for and return the exit code."""
    given = parsed()
    device = torch.device(given.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        print("no CUDA device here; --device cpu runs the script in Triton's interpreter", file=sys.stderr)
        return 2
    tiny = device.type == "cpu"
    if given.worker:
        return work(given, Scale(given.edge or (8 if tiny else 128), tiny, device))
    end = time.monotonic() + given.limit
    command = worker_command(__file__, sys.argv[1:])
    with tempfile.TemporaryDirectory() as folder:
        rows = given.out or Path(folder) / "rows.jsonl"
        rows.parent.mkdir(parents=True, exist_ok=True)
        rows.write_text("")
        checking_end = time.monotonic() + (1.0 if tiny else CHECK_SHARE) * given.limit
        supervise_all(command, rows, checking_end, 1 if tiny else min(MOST_SHARDS, os.cpu_count() or 1))
        supervise(command, rows, end)
        found = read_rows(rows)
    print_tables(found)
    late = ("no time was left", "stopped after")
    return 1 if any(row["section"] == "failure" and not row["why"].startswith(late) for row in found) else 0


if __name__ == "__main__":
    sys.exit(main())
