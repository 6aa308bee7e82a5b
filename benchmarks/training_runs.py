"""Training runs of equal time for the benchmarks: fitted on a quiet machine, made on any.

A run with a budget measures its step, fits its schedule to the time and writes the plan; there it is stopped. Trained
by that plan to its end, whatever the machine does meanwhile, it takes the same steps and gets the weights that the
quiet machine would have got in the time: on a CPU bit for bit with as many threads, with others up to rounding.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path

SETTLED_STEPS = 20
"""Steps after which a run is stopped once its plan is fitted: they show what a step takes."""


@dataclass(frozen=True)
class Fitted:
    """What a budget came to on the quiet machine."""

    plan: str
    minutes: float
    steps: int
    started_s: float
    """From the start of the command to its first step."""
    step_s: float
    """The fastest step."""
    step_processor_s: float
    """Processor time of a step, all threads together: other work on the machine hardly changes it."""


def command(dataset: Path, out: Path, *options: str) -> list[str]:
    """Return the command line of a training run."""
    start = [sys.executable, "-m", "sagittal", "train", str(dataset), "--out", str(out), "--fold", "0"]
    return [*start, "--cache", str(out.parent / "cache"), *options]


def fit_plan(dataset: Path, out: Path, name: str, minutes: float, options: tuple[str, ...]) -> None:
    """Let a run with a budget and these options fit its plan, then stop it; OUT/NAME.fitted.json tells what came."""
    target = out / f"{name}.fitted.json"
    if target.exists():
        return
    bundle = out / f"fit-{name}"
    log = bundle.with_name(bundle.name + ".run") / "fold_0" / "log.jsonl"
    began = time.monotonic()
    process = subprocess.Popen(command(dataset, bundle, "--budget", f"{minutes * 60:.0f}s", *options))
    seen = [(0, 0.0)]
    while process.poll() is None and seen[-1][0] < SETTLED_STEPS:
        time.sleep(0.1)
        done = len(_steps_of(log))
        if done > seen[-1][0]:
            seen.append((done, _processor_s(process.pid)))
    steps = _steps_of(log)
    started_s = time.monotonic() - began - steps[-1]["seconds"]
    process.send_signal(signal.SIGTERM)
    process.wait()
    plan = log.parent.parent / "plan.json"
    fitted = Fitted(
        plan=str(plan),
        minutes=minutes,
        steps=json.loads(plan.read_text())["schedule"]["steps"],
        started_s=round(started_s, 1),
        step_s=round(min(after["seconds"] - before["seconds"] for before, after in pairwise(steps)), 4),
        step_processor_s=round((seen[-1][1] - seen[2][1]) / (seen[-1][0] - seen[2][0]), 4),
    )
    target.write_text(json.dumps(asdict(fitted), indent=2) + "\n")


def facts_of(path: Path) -> Fitted:
    """Return what `fit_plan` wrote."""
    return Fitted(**json.loads(path.read_text()))


def train(
    dataset: Path, out: Path, name: str, seed: int, options: tuple[str, ...] = (), *, steps: int | None = None
) -> Path:
    """Train by the fitted plan to its end, going on where an earlier attempt stopped; return the bundle.

    `steps` takes the place of the plan's, where the machine was not quiet when that was fitted.
    """
    bundle = out / f"{name}-seed{seed}"
    if not (bundle / "metrics.json").exists() or mean_dice(bundle) is None:
        plan = facts_of(out / f"{name}.fitted.json").plan
        more = ("--plan", plan, "--set", f"training.seed={seed}", "--resume", "--checkpoint-every", "5m", *options)
        more += () if steps is None else ("--set", f"schedule.steps={steps}")
        subprocess.run(command(dataset, bundle, *more), check=True)
    return bundle


def metrics_of(bundle: Path) -> dict:
    """Return the metrics in a bundle."""
    return json.loads((bundle / "metrics.json").read_text())


def mean_dice(bundle: Path) -> float | None:
    """Return the mean over labels of the Dice of the held-out cases."""
    return metrics_of(bundle)["mean_dice"]


def _processor_s(pid: int) -> float:
    """Return the processor time in seconds that a process has used, all its threads together."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _steps_of(log: Path) -> list[dict]:
    if not log.exists():
        return []
    lines = log.read_text().splitlines(keepends=True)
    records = [json.loads(line) for line in lines if line.endswith("\n")]
    return [record for record in records if record["kind"] == "step"]
