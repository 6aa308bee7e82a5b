"""Check and time the GPU kernels: correctness, single kernels, whole networks, where a step's time goes.

    PYTHONPATH=src python benchmarks/gpu.py --out gpu.jsonl

Five minutes on one GPU, from a source tree alone: it needs torch (2.11 and newer), triton (3.6 and newer), numpy and
safetensors, no network and no installed package. Parts, in this order: `correct`, `copy`, `operations`, then networks
by name (`mednext-b-k3` ... `segformer3d`), `losses` and `profile`.

    --only correct,mednext-b-k3,profile   some parts only
    --forms plain,kernels                 some forms only; also 'kernels graph' (CUDA graphs), 'kernels compiled',
                                          'plain compiled' and 'monai'
    --quick                               three networks and short runs: two minutes
    --limit 600                           seconds for everything; compiled forms take most of it, and come last
    --device cpu                          a smoke run in Triton's interpreter with tiny sizes, to try the script

Each part that fails is told with its traceback, and the next one begins; rows are printed and written (--out, lines of
JSON) as they are found, and tables end the output. Exit code 1 where a part failed or a kernel was not correct.
"""

import os
import sys

if "--device" in sys.argv and "cpu" in sys.argv:
    os.environ["TRITON_INTERPRET"] = "1"  # Triton reads it where a kernel is defined: before any import of one

import argparse
import platform
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from gpu_measure import Report, copy_rate, peak_mib, release, steady_ms, table
from gpu_networks import FORMS, NETWORKS, Runs, Scale, floor_bytes, losses
from gpu_operations import Case, checked_cases, conv, errors, tail, whole
from torch import Tensor

from sagittal.kernels.choice import gpu_reason, interpreted_on_cpu, use_kernels

LOSS_STEPS = 10
LOSS_BOUNDS = {"fp32": 1e-5, "bf16": 1e-3}
COMPILE_LIMIT_S = 100.0
PROFILED = ("mednext-b-k3", "segformer3d")


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


def correctness(report: Report, scale: Scale) -> None:
    """Compare each operation and its gradients with float64, outputs poisoned."""
    worst: dict[tuple[str, str], list[float]] = {}
    bad = 0
    for case in checked_cases(scale.tiny):
        for dtype in (torch.float32, torch.bfloat16, torch.float16)[: 2 if scale.tiny else 3]:
            name = str(dtype).removeprefix("torch.")
            where = f"{case.name} {case.shapes[0]} {name}"
            try:
                ours, plain, good = errors(case, dtype, scale.device)
            except Exception as error:  # a kernel that fails is a finding, and the others are still to be tried
                bad += 1
                report.say(f"correct: {where}: FAILED, {type(error).__name__}: {str(error).strip()[:400]}")
                continue
            kept = worst.setdefault((case.name, name), [0.0, 0.0])
            worst[case.name, name] = [max(kept[0], ours), max(kept[1], plain)]
            if not good:
                bad += 1
                report.say(f"correct: {where}: WRONG, off by {ours:.2e}, the plain form by {plain:.2e}")
    for (name, dtype_name), (ours, plain) in worst.items():
        report.add("correct", operation=name, dtype=dtype_name, kernels_error=ours, plain_error=plain)
    assert not bad, f"{bad} checks failed, see above"


def operations(report: Report, scale: Scale, rate: float, seconds: float) -> None:
    """Time single operations at the sizes of MedNeXt's levels, against their floor and the plain form."""
    levels = ((0, 32), (1, 64), (2, 128))[: 1 if scale.tiny else 3]
    cases: list[Case] = []
    for level, channels in levels:
        size = (scale.edge >> level,) * 3
        kernels = (3, 5) if level or scale.tiny else (3, 5, 7)
        cases += [conv(channels, size, kernel) for kernel in kernels]
        cases += [tail(channels, size, 2), whole(channels, size, 3, 2), whole(channels, size, 5, 2)]
        if level == 0 and not scale.tiny:
            cases += [conv(channels, size, 3, stride=2), conv(64, (scale.edge // 2,) * 3, 3, stride=3)]
    for case in cases:
        for form in ("kernels", "plain"):
            with report.part(f"{case.name} {form}", given_limit(scale)):
                forward_ms, both_ms = _times(case, form, scale, seconds)
                bytes_each = case.activation * scale.dtype.itemsize
                values: dict[str, Any] = {"forward_ms": forward_ms, "backward_ms": both_ms - forward_ms}
                for part, passes in zip(("forward", "backward"), case.passes, strict=True):
                    floor_ms = 1e3 * passes * bytes_each / rate
                    values[f"{part}_floor_ms"] = floor_ms
                    values[f"{part}_share_of_copy"] = floor_ms / max(values[f"{part}_ms"], 1e-9)
                report.add("operation", name=case.name, shape=list(case.shapes[0]), form=form, **values)


def given_limit(scale: Scale) -> float:
    """Return the seconds that one operation in one form may take; the interpreter is slow."""
    return 200.0 if scale.tiny else 30.0


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


def network(report: Report, name: str, form: str, scale: Scale, rate: float | None, seconds: float) -> None:
    """Time inference and a training step of a network in one form, and measure their memory."""
    runs = Runs(name, form, scale)
    values: dict[str, Any] = {}
    for part, run in (("forward", runs.forward), ("step", runs.step)):
        timed: Callable[[], object] = runs.captured(run) if form.endswith("graph") else run
        values[f"{part}_ms"] = steady_ms(timed, scale.device, seconds=seconds)
        values[f"{part}_peak_mib"] = 0.0 if scale.tiny else peak_mib(run, scale.device)
        del timed
        release()
    if rate is not None and name.startswith("mednext") and form != "monai":
        for part, floor in zip(("forward", "step"), floor_bytes(runs.network, scale.edge), strict=True):
            values[f"{part}_floor_ms"] = 1e3 * floor / rate
    report.add("network", name=name, form=form, edge=scale.edge, **values)


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


def tables(report: Report) -> None:
    """Print what was found as tables."""
    rows = [row for row in report.rows if row["section"] == "operation"]
    if rows:
        heading = ["operation", "shape", "form", "forward ms", "of copy rate", "backward ms", "of copy rate"]
        body = [
            [row["name"], "x".join(map(str, row["shape"][1:])), row["form"], f"{row['forward_ms']:.3f}",
             f"{row['forward_share_of_copy']:.0%}", f"{row['backward_ms']:.3f}", f"{row['backward_share_of_copy']:.0%}"]
            for row in rows
        ]  # fmt: skip
        print("\n" + table([heading, *body]))
    rows = [row for row in report.rows if row["section"] == "network"]
    if rows:
        plain = {row["name"]: row for row in rows if row["form"] == "plain"}
        heading = [
            "network",
            "form",
            "forward ms",
            "against plain",
            "MiB",
            "step ms",
            "against plain",
            "MiB",
            "of plain",
        ]
        print("\n" + table([[*heading, "step floor ms"], *(_network_row(row, plain.get(row["name"])) for row in rows)]))
        _print_kernel_sizes(rows)
    if report.failures:
        print("\nfailed or left out:\n" + "\n".join(f"- {failure}" for failure in report.failures))


def _network_row(row: dict[str, Any], plain: dict[str, Any] | None) -> list[str]:
    faster = ["", "", ""]
    if plain is not None and row is not plain:
        faster = [f"{plain[f'{part}_ms'] / row[f'{part}_ms']:.2f} x" for part in ("forward", "step")]
        faster.append(f"{row['step_peak_mib'] / plain['step_peak_mib']:.2f}" if plain["step_peak_mib"] else "")
    floor = f"{row['step_floor_ms']:.2f}" if "step_floor_ms" in row else ""
    return [
        row["name"], row["form"], f"{row['forward_ms']:.2f}", faster[0], f"{row['forward_peak_mib']:.0f}",
        f"{row['step_ms']:.2f}", faster[1], f"{row['step_peak_mib']:.0f}", faster[2], floor,
    ]  # fmt: skip


def _print_kernel_sizes(rows: Sequence[dict[str, Any]]) -> None:
    """Print the time of k = 5 over that of k = 3."""
    steps = {(row["name"], row["form"]): row["step_ms"] for row in rows}
    for (name, form), milliseconds in steps.items():
        small = steps.get((name.replace("k5", "k3"), form))
        if name.endswith("k5") and small is not None:
            print(f"{name} {form}: a step takes {milliseconds / small:.2f} times that of k = 3")


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
    given = parser.parse_args(words)
    parts = ["correct", "copy", "operations", *NETWORKS, "losses", "profile"]
    quick = ["correct", "copy", "operations", *list(NETWORKS)[:4], "losses", "profile"]
    given.parts = [part for part in given.only.split(",") if part] or (quick if given.quick else parts)
    given.chosen = [form for form in given.forms.split(",") if form] or list(FORMS[:3] if given.quick else FORMS)
    for word, known in [*((part, parts) for part in given.parts), *((form, FORMS) for form in given.chosen)]:
        if word not in known:
            parser.error(f"{word}: expected one of {', '.join(known)}")
    return given


def measure(given: argparse.Namespace, report: Report, scale: Scale) -> None:
    """Do all parts."""
    seconds = 0.0 if scale.tiny else 0.3 if given.quick else 0.6
    rate: float | None = None
    with report.part("environment"):
        environment(report, scale)
    if "correct" in given.parts:
        with report.part("correct", 0.35 * given.limit), exact_fp32():
            correctness(report, scale)
    with report.part("copy", 30):
        rate = copy_rate(scale.device, 8 if scale.tiny else 1024)
        report.add("copy", gb_per_s=rate / 1e9)
    if "operations" in given.parts:
        with report.part("operations", 0.3 * given.limit):
            operations(report, scale, rate or float("nan"), seconds)
    if "losses" in given.parts:
        with report.part("losses", 10 * given_limit(scale) if scale.tiny else 60), exact_fp32():
            compare_losses(report, scale)
    if "profile" in given.parts:
        for name in PROFILED:
            with report.part(f"profile {name}", 2 * given_limit(scale)):
                profile(report, name, "kernels", scale)
    for form in given.chosen:
        for name in given.parts:
            if name in NETWORKS and not (form == "monai" and NETWORKS[name].size is None):
                limit = given.compile_limit if "compiled" in form or scale.tiny else 45
                with report.part(f"{name} {form}", limit):
                    network(report, name, form, scale, rate, seconds)
                if "compiled" in form:
                    torch.compiler.reset()


def main() -> int:
    """Run what the command line asks for and return the exit code."""
    given = parsed()
    device = torch.device(given.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        print("no CUDA device here; --device cpu runs the script in Triton's interpreter", file=sys.stderr)
        return 2
    tiny = device.type == "cpu"
    scale = Scale(given.edge or (8 if tiny else 128), tiny, device)
    torch.backends.cudnn.benchmark = True
    report = Report(given.out, given.limit)
    with interpreted_on_cpu() if tiny else nullcontext():
        measure(given, report, scale)
    tables(report)
    report.say("done")
    return 1 if any("no time" not in failure and "stopped" not in failure for failure in report.failures) else 0


if __name__ == "__main__":
    sys.exit(main())
