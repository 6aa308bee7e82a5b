"""Compare the memory that a plan is made with against the memory of a real training step on the CPU.

    python benchmarks/step_memory.py mednext-s 64,64,64 [--batch 2] [--set network.checkpointing=expansion]

Printed are what planning measures on tensors without data (`planning.memory`), how far the resident memory of a process
rises above what it has once libraries are loaded and a small step is done, while it makes the network, the optimiser
and two whole steps with the loss, and the seconds of a step.
"""

import argparse
import gc
import json
import threading
import time
from pathlib import Path

import torch

from sagittal.data.label_index import label_index
from sagittal.data.loader import Batch
from sagittal.kernels.native import cpu_available
from sagittal.plan import Plan
from sagittal.plan.overrides import parse_settings
from sagittal.planning.memory import training_step
from sagittal.testing.plans import untrained_plan, untrained_spec
from sagittal.training.state import new_state
from sagittal.training.step import train_on_batch

OUTPUTS = 3
GIB = 2**30


def resident_bytes() -> int:
    """Return this process's resident memory (Linux)."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


class Watch:
    """Follows the resident memory in a thread and keeps its peak."""

    def __init__(self) -> None:
        self.peak = resident_bytes()
        self._on = True
        self._thread = threading.Thread(target=self._follow, daemon=True)
        self._thread.start()

    def _follow(self) -> None:
        while self._on:
            self.peak = max(self.peak, resident_bytes())
            time.sleep(0.001)

    def stop(self) -> int:
        """Return the peak."""
        self._on = False
        self._thread.join()
        return self.peak


def steps(plan: Plan, batch_size: int, count: int) -> float:
    """Make network and optimiser, do some steps on noise, and return the seconds of the last."""
    state = new_state(plan, torch.device("cpu"))
    seconds = 0.0
    for number in range(count):
        began = time.perf_counter()
        images = torch.randn(batch_size, 1, *plan.patch.size)
        labels = torch.randint(0, OUTPUTS, (batch_size, *plan.patch.size))
        batch = Batch(number, images, labels, ("noise",) * batch_size)
        train_on_batch(state, batch, plan, rate_factor=1e-3, index=label_index(plan.dataset))
        seconds = time.perf_counter() - began
    return seconds


def main() -> None:
    """Read the command line, measure, print JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("network")
    parser.add_argument("patch", type=lambda text: tuple(int(edge) for edge in text.split(",")))
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--set", action="append", default=[])
    given = parser.parse_args()
    spec = untrained_spec(OUTPUTS)
    plan = untrained_plan(given.network, spec, patch_size=given.patch, settings=parse_settings(given.set))
    planned = training_step(plan.network, 1, OUTPUTS).memory_bytes(plan.patch.size, given.batch)
    steps(plan.replace(patch=plan.patch.replace(size=(16, 16, 16))), given.batch, 1)
    gc.collect()
    before, watch = resident_bytes(), Watch()
    seconds = steps(plan, given.batch, 2)
    found = {
        "planned_gib": round(planned / GIB, 3),
        "resident_gib": round((watch.stop() - before) / GIB, 3),
        "fused_kernels": cpu_available(),
        "seconds": round(seconds, 2),
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
