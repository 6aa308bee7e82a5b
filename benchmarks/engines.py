"""Time what computes a prediction on the CPU: `python benchmarks/engines.py [--size 128] [--json FILE]`.

For each network, in one process, with the same weights and the same window, interleaved:

- plain: PyTorch's operators on contiguous volumes (see `networks.py`);
- torch: what Sagittal's PyTorch engine runs, with its compiled kernels where they were built;
- OpenVINO fp32 and bf16, the latter where the processor has it;
- OpenVINO int8 where a bundle is given that 8-bit networks were made for.

Seconds are the best of the repeats; "ratio" is the plain form's time over that of the form, "apart" the largest
difference of a logit from the plain form's in units of the largest logit. "of rate" is the time that the network's
multiply-adds would take at the rate of a 2048^3 matrix product of the same number type, by PyTorch in the same process,
over the time measured.
"""

import argparse
import json
import os
import platform
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import numpy as np
import torch

from networks import plain
from sagittal.bundle import Bundle, read_bundle
from sagittal.errors import ResourceError
from sagittal.inference.engines import openvino_engine, openvino_int8, torch_engine
from sagittal.inference.engines.engine import Engine, Precision
from sagittal.kernels import cpu_available, keep_freed_memory
from sagittal.networks.build import build_network
from sagittal.networks.cost import multiply_adds
from sagittal.testing.bundle import write_untrained_bundle

CHANNELS = {"mednext-b": 1, "mednext-b-k5": 1, "mednext-s": 1, "mednext-s-k5": 1, "segformer3d": 4}
DEFAULT = "mednext-b,mednext-b-k5,segformer3d"
CLASSES = 3
RATES: dict[str, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16}

Array = np.ndarray[Any, Any]


@dataclass
class Row:
    """One form of a network: what it took and how far it is from the plain form."""

    network: str
    form: str
    precision: Precision
    seconds: float = float("inf")
    ratio: float = 1.0
    apart: float = 0.0
    of_rate: float | None = None


def matrix_rate(dtype: torch.dtype) -> float:
    """Return the multiply-adds per second of a 2048^3 matrix product."""
    a, times = torch.randn(2048, 2048).to(dtype), []
    for _ in range(5):
        start = time.perf_counter()
        a @ a
        times.append(time.perf_counter() - start)
    return 2048**3 / min(times)


@contextmanager
def bundles(names: Sequence[str], given: Sequence[Path], size: int) -> Iterator[list[Bundle]]:
    """Give untrained bundles of these networks, and those that were asked for by folder."""
    with tempfile.TemporaryDirectory() as folder:
        made = [
            read_bundle(
                write_untrained_bundle(
                    Path(folder, name), name, CLASSES, channels=CHANNELS[name], settings={"patch.size": [size] * 3}
                )
            )
            for name in names
        ]
        yield made + [read_bundle(path) for path in given]


def plain_form(bundle: Bundle) -> Callable[[Array], Array]:
    """Return the mean of the folds' networks by PyTorch's operators alone."""
    spec, networks = bundle.plan.dataset, []
    for name in bundle.weight_names:
        network = build_network(bundle.plan.network, len(spec.channel_names), spec.num_outputs).eval()
        network.load_state_dict({key: torch.from_numpy(array.copy()) for key, array in bundle.weights(name).items()})
        networks.append(network)

    @torch.no_grad()
    def run(window: Array) -> Array:
        with plain():
            total: Array = sum(network(torch.from_numpy(window)).numpy() for network in networks)
        return total / len(networks)

    return run


def engines(bundle: Bundle, threads: int) -> dict[str, Engine]:
    """Return the engines that can compute the bundle here."""
    found: dict[str, Engine] = {"torch": torch_engine.load(bundle, "cpu")}
    found["OpenVINO fp32"] = openvino_engine.load(bundle, threads=threads)
    try:
        found["OpenVINO bf16"] = openvino_engine.load(bundle, precision="bf16", threads=threads)
    except ResourceError as error:
        print(error.message)
    if openvino_int8.folder_of(bundle).is_dir():
        found["OpenVINO int8"] = openvino_int8.load(bundle, threads=threads)
    return found


def measure(bundle: Bundle, window: Array, repeats: int, threads: int) -> list[Row]:
    """Return the rows of one network, the forms interleaved, after a round that does not count."""
    first = plain_form(bundle)
    runs: dict[str, Callable[[Array], Array]] = {"plain": first}
    rows = {"plain": Row(bundle.plan.network_name, "plain", "fp32")}
    for name, engine in engines(bundle, threads).items():
        runs[name] = engine.logits
        rows[name] = Row(bundle.plan.network_name, name, engine.precision)
    expected = first(window)
    for repeat in range(repeats + 1):
        for name, run in runs.items():
            start = time.perf_counter()
            logits = run(window)
            taken = time.perf_counter() - start
            if repeat:
                rows[name].seconds = min(rows[name].seconds, taken)
            rows[name].apart = float(np.abs(logits - expected).max() / np.abs(expected).max())
    return list(rows.values())


def complete(rows: Sequence[Row], products: int, rates: dict[str, float]) -> None:
    """Fill in what follows from the times of one network's rows, the plain one first."""
    for row in rows:
        row.ratio = rows[0].seconds / row.seconds
        if row.precision in rates:
            row.of_rate = products / rates[row.precision] / row.seconds


def as_table(rows: Sequence[Row]) -> str:
    """Return the rows as a Markdown table."""
    lines = ["| network | form | seconds | ratio | of rate | apart |", "| --- | --- | --- | --- | --- | --- |"]
    for row in rows:
        share = "" if row.of_rate is None else f"{row.of_rate:.0%}"
        lines.append(
            f"| {row.network} | {row.form} | {row.seconds:.3f} | {row.ratio:.2f} | {share} | {row.apart:.1e} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", default=DEFAULT, help=f"any of {', '.join(CHANNELS)}; default {DEFAULT}")
    parser.add_argument("--bundle", type=Path, action="append", default=[], help="a trained bundle as well")
    parser.add_argument("--size", type=int, default=128, help="voxels along each axis of the window; default 128")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--json", type=Path, help="write the numbers to this file as well")
    options = parser.parse_args()
    names = [name for name in options.networks.split(",") if name]
    if unknown := sorted(set(names) - set(CHANNELS)):
        parser.error(f"no such network: {', '.join(unknown)}. Known: {', '.join(CHANNELS)}")
    torch.set_num_threads(options.threads)
    keep_freed_memory()
    every: list[Row] = []
    rates: dict[str, float] = {}
    with bundles(names, options.bundle, options.size) as found:
        for bundle in found:
            shape = (1, len(bundle.plan.dataset.channel_names), *bundle.plan.patch.size)
            window = np.random.default_rng(0).normal(size=shape).astype(np.float32)
            rows = measure(bundle, window, options.repeats, options.threads)
            for name, dtype in RATES.items():
                rates[name] = max(rates.get(name, 0.0), matrix_rate(dtype))
            network = build_network(bundle.plan.network, shape[1], bundle.plan.dataset.num_outputs)
            products = multiply_adds(network.eval(), shape) * len(bundle.weight_names)
            complete(rows, products, rates)
            every += rows
    machine = {
        "size": options.size,
        "threads": options.threads,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "kernels": cpu_available(),
    }
    print(", ".join(f"{key} {value}" for key, value in machine.items()))
    print("matrix product: " + ", ".join(f"{name} {rate / 1e9:.0f} GMAC/s" for name, rate in rates.items()))
    print(as_table(every))
    if options.json:
        rows_as_json = [asdict(row) for row in every]
        options.json.write_text(json.dumps({**machine, "matrix_rates": rates, "rows": rows_as_json}, indent=2) + "\n")


if __name__ == "__main__":
    main()
