"""When the page of a run is written, and what it says: a run's history, put into words."""

from __future__ import annotations

import platform
import time
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from sagittal.plan.plan import Plan
from sagittal.report.cuts import CutCase
from sagittal.report.page import versions
from sagittal.report.training import ClassStanding, Final, TrainingPage, Warned, WorstCases, write_training_page
from sagittal.training.history import History
from sagittal.training.live import duration

SHARE = 0.01
"""Share of the time that pages may take."""


@dataclass(frozen=True)
class Watched:
    """The fold that is watched; nothing of it changes while it is trained."""

    plan: Plan
    fold: str
    device: torch.device
    training_cases: int
    held_out_cases: int
    trackers: tuple[str, ...] = ()
    live: bool = False
    """Whether a terminal shows a table in place."""

    @property
    def title(self) -> str:
        """Data set, network and fold."""
        fold = "all cases" if self.fold == "none" else f"fold {self.fold}"
        return f"{self.plan.dataset.name}: {self.plan.network_name}, {fold}"


@dataclass(frozen=True)
class Moment:
    """How far the run is."""

    step: int
    end: int
    elapsed_s: float
    left_s: float
    state: str = "running"
    running: bool = True
    notes: tuple[str, ...] = ()
    worst_step: int = 0
    worst: tuple[CutCase, ...] = field(default=(), repr=False)
    memory_mib: float | None = None
    final: Final | None = None


class ProgressPage:
    """Writes `progress.html` of a fold, as often as is cheap."""

    def __init__(self, path: Path, watched: Watched) -> None:
        self._path, self._watched = path, watched
        self._spent_s, self._began = 0.0, time.monotonic()

    def affordable(self) -> bool:
        """Return whether pages have taken less than their share of the time so far."""
        return self._spent_s <= SHARE * (time.monotonic() - self._began)

    def write(self, history: History, moment: Moment) -> None:
        """Write the page.

        Raises:
            ResourceError: the disk is full.
        """
        began = time.monotonic()
        write_training_page(self._path, page_of(self._watched, history, moment))
        self._spent_s += time.monotonic() - began


def page_of(watched: Watched, history: History, moment: Moment) -> TrainingPage:
    """Return the page of a moment."""
    plan, checked = watched.plan, history.validations
    last = checked[-1] if checked else None
    best = max(checked, key=lambda record: float(record["mean_dice"])) if checked else None
    series = history.series()
    return TrainingPage(
        title=watched.title,
        state=moment.state,
        running=moment.running,
        step=moment.step,
        end=moment.end,
        elapsed=duration(moment.elapsed_s),
        left=duration(moment.left_s),
        numbers=_numbers(history, moment),
        mean_dice=None if last is None else float(last["mean_dice"]),
        best_dice=None if best is None else float(best["mean_dice"]),
        best_step=None if best is None else int(best["step"]),
        classes=class_standings(plan, history),
        series=series,
        validations=checked,
        alarms=[Warned(alarm.text, alarm.advice) for alarm in history.alarms],
        notes=moment.notes,
        final=moment.final,
        facts=_facts(watched),
        worst=WorstCases(
            moment.worst_step,
            _drawable(plan, moment.worst),
            plan.preprocessing.network_spacing_mm,
            sides_known=plan.preprocessing.orientation == "RAS" and plan.preprocessing.transpose == (0, 1, 2),
        ),
    )


def _drawable(plan: Plan, cases: tuple[CutCase, ...]) -> list[CutCase]:
    # Where each case keeps the distance of its slices, the plan does not know how far they are apart.
    return [replace(case, cuts=case.cuts[:1]) if plan.preprocessing.keeps_slices else case for case in cases]


def class_standings(plan: Plan, history: History) -> list[ClassStanding]:
    """Return how each class stands after the last validation."""
    last = history.validations[-1] if history.validations else None
    warned = {alarm.label for alarm in history.alarms}
    found = []
    for label in plan.dataset.labels:
        best = history.best(label.name)
        found.append(
            ClassStanding(
                name=label.name,
                dice=None if last is None else last["dice"].get(label.name),
                best=None if best is None else best[0],
                best_step=None if best is None else best[1],
                references=None if last is None else last.get("present", {}).get(label.name),
                alarm=label.name in warned or "" in warned,
            )
        )
    return found


def _numbers(history: History, moment: Moment) -> dict[str, str]:
    if not history.series()["step"].size:
        return {}
    numbers = {
        "loss, mean of 50 steps": f"{history.recent('loss'):.3f}",
        "seconds per step": f"{history.recent('step_s'):.3g}",
        "of the time waiting for data": f"{100 * history.waited_share():.1f} %",
    }
    if moment.memory_mib is not None:
        numbers["GiB of GPU memory at most"] = f"{moment.memory_mib / 1024:.1f}"
    else:
        numbers["learning rate"] = f"{history.recent('learning_rate', 1):.1e}"
    return numbers


def _facts(watched: Watched) -> dict[str, dict[str, object]]:
    plan, device = watched.plan, watched.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} threads"
    optimizer, schedule = plan.training.optimizer, plan.schedule
    return {
        "Plan": {
            "network": plan.network_name,
            "patch (D, H, W)": " × ".join(map(str, plan.patch.size)),
            "spacing in mm (D, H, W)": " × ".join(f"{value:.3g}" for value in plan.preprocessing.network_spacing_mm),
            "batch": plan.training.batch_size,
            "optimiser": f"{optimizer.kind}, peak rate {optimizer.learning_rate:g}",
            "schedule": f"{schedule.steps} steps, warm-up {schedule.warmup_steps}, power {schedule.power:g}",
            "result": "best validation" if schedule.keep == "best" else "last weights",
            "early stop": f"after {schedule.early_stop_validations} validations without a better one"
            if schedule.early_stop_validations
            else "never",
            "seed": plan.training.seed,
        },
        "Run": {
            "device": f"{device} ({name})",
            "precision": plan.training.precision,
            "training cases": watched.training_cases,
            "held-out cases": watched.held_out_cases,
            "machine": platform.platform(),
        },
        "Versions": {**versions(), "torch": torch.__version__},
    }
