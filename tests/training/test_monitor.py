"""What a run tells: complete records, stable lines, alarms, a page; and the same after a resume."""

from __future__ import annotations

from dataclasses import replace
from io import StringIO
from pathlib import Path

import pytest
import torch
from rich.console import Console

from sagittal.errors import TrainingError
from sagittal.plan.plan import Plan
from sagittal.testing.plans import untrained_plan, untrained_spec
from sagittal.training import monitor as monitor_module
from sagittal.training.live import LiveTable
from sagittal.training.log import read_log
from sagittal.training.monitor import Monitor
from sagittal.training.progress_page import Watched
from sagittal.training.standing import Standing
from sagittal.training.step import StepResult
from sagittal.training.validation import Score


@pytest.fixture
def plan() -> Plan:
    settings = {"schedule.steps": 300, "schedule.early_stop_validations": 4}
    return untrained_plan("segformer3d", untrained_spec(3), patch_size=(32, 32, 32), settings=settings)


def watched(plan: Plan) -> Watched:
    return Watched(plan, "0", torch.device("cpu"), training_cases=4, held_out_cases=2)


def add_steps(monitor: Monitor, first: int, last: int) -> None:
    for step in range(first, last + 1):
        result = StepResult(loss=1 / step, gradient_norm=2.0)
        monitor.add_step(step, 300, result, rate=0.1, step_s=0.5, elapsed_s=0.5 * step, waited_s=0.01)


def score(one: float, two: float) -> Score:
    dice = {"class_1": one, "class_2": two}
    return Score(dice, (one + two) / 2, present={"class_1": 2, "class_2": 2}, by_case={"case_a": dice})


def validate(monitor: Monitor, step: int, standing: Standing, one: float, two: float) -> Standing:
    found = score(one, two)
    after = standing.after(step, found.mean_dice)
    monitor.add_validation(step, found, after, cases=2, seconds=1.0)
    return after


def test_records_are_complete(plan: Plan, tmp_path: Path) -> None:
    with Monitor(tmp_path, watched(plan), step=0, say=lambda line: None) as monitor:
        add_steps(monitor, 1, 2)
        validate(monitor, 2, Standing(), 0.5, 0.25)
    first, _, validation = read_log(tmp_path / "log.jsonl")
    assert first == {
        "kind": "step",
        "step": 1,
        "loss": 1.0,
        "learning_rate": 0.1,
        "gradient_norm": 2.0,
        "seconds": 0.5,
        "step_s": 0.5,
        "waited_s": 0.01,
    }
    assert validation == {
        "kind": "validation",
        "step": 2,
        "dice": {"class_1": 0.5, "class_2": 0.25},
        "mean_dice": 0.375,
        "cases": 2,
        "seconds": 1.0,
        "elapsed_s": 1.0,
        "present": {"class_1": 2, "class_2": 2},
        "by_case": {"case_a": {"class_1": 0.5, "class_2": 0.25}},
        "best_dice": 0.375,
        "best_step": 2,
        "stale": 0,
    }


def test_lines_tell_waiting_and_how_far_the_best_is(
    plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(monitor_module, "SAY_EVERY_S", 0.0)
    lines: list[str] = []
    with Monitor(tmp_path, watched(plan), step=0, say=lines.append) as monitor:
        add_steps(monitor, 1, 1)
        standing = validate(monitor, 1, Standing(), 0.5, 0.5)
        standing = validate(monitor, 2, standing, 0.5, 0.3)
        standing = validate(monitor, 3, standing, 0.4, 0.3)
        validate(monitor, 4, standing, 0.6, 0.6)
    assert lines == [
        "step 1/300  loss 1.000  rate 1.0e-01  0.50 s/step  waited 2.0 %  left 0:02:29",
        "step 1: Dice 0.500 on 2 whole held-out cases",
        "step 2: Dice 0.400 on 2 whole held-out cases; best 0.500 at step 1, 1 of 4 validations ago",
        "step 3: Dice 0.350 on 2 whole held-out cases; best 0.500 at step 1, 2 of 4 validations ago",
        "step 4: Dice 0.600 on 2 whole held-out cases, the best so far",
    ]


def test_an_alarm_is_said_once_logged_shown_and_over_when_the_class_is_back(plan: Plan, tmp_path: Path) -> None:
    lines: list[str] = []
    with Monitor(tmp_path, watched(plan), step=0, say=lines.append) as monitor:
        add_steps(monitor, 1, 100)
        for step in (100, 150, 200, 250):
            validate(monitor, step, Standing(), 0.7, 0.0)
        assert "class_2 is not found" in (tmp_path / "progress.html").read_text()
        validate(monitor, 300, Standing(), 0.7, 0.2)
    assert [line for line in lines if "ALARM" in line or "again" in line] == [
        next(line for line in lines if line.startswith("ALARM: class_2 is not found")),
        "step 300: class_2 is found again",
    ]
    records = [record for record in read_log(tmp_path / "log.jsonl") if record["kind"].startswith("alarm")]
    assert [(record["kind"], record["step"], record["label"]) for record in records] == [
        ("alarm", 200, "class_2"),
        ("alarm_over", 300, "class_2"),
    ]
    assert "class_2 is not found" not in (tmp_path / "progress.html").read_text()


def monitor_alarms(folder: Path) -> list[int]:
    return [record["step"] for record in read_log(folder / "log.jsonl") if record["kind"] == "alarm"]


def test_a_resumed_run_remembers_its_validations_and_is_not_alarmed_twice(plan: Plan, tmp_path: Path) -> None:
    with Monitor(tmp_path, watched(plan), step=0, say=lambda line: None) as monitor:
        add_steps(monitor, 1, 102)
        for step in (100, 101, 102):
            validate(monitor, step, Standing(), 0.7, 0.0)
        assert monitor_alarms(tmp_path) == [102]
    lines: list[str] = []
    with Monitor(tmp_path, watched(plan), step=102, say=lines.append) as monitor:
        add_steps(monitor, 103, 103)
        validate(monitor, 103, Standing(), 0.7, 0.0)
    assert not any("ALARM" in line for line in lines)
    assert monitor_alarms(tmp_path) == [102]


def test_the_page_is_written_at_the_end_of_an_epoch_and_says_how_the_run_ended(plan: Plan, tmp_path: Path) -> None:
    page = tmp_path / "progress.html"
    with Monitor(tmp_path, watched(plan), step=0, say=lambda line: None) as monitor:
        add_steps(monitor, 1, 249)
        assert not page.exists()
        add_steps(monitor, 250, 250)
        assert 'http-equiv="refresh"' in page.read_text()
        monitor.finish("finished")
    text = page.read_text()
    assert 'http-equiv="refresh"' not in text and ">finished<" in text


def test_an_error_ends_the_page_with_what_happened(plan: Plan, tmp_path: Path) -> None:
    with pytest.raises(TrainingError), Monitor(tmp_path, watched(plan), step=0, say=lambda line: None) as monitor:
        add_steps(monitor, 1, 1)
        raise TrainingError("the loss is nan\nand more")
    text = (tmp_path / "progress.html").read_text()
    assert "stopped by an error" in text and "the loss is nan" in text


def test_a_step_that_overflowed_is_null_in_the_log_and_no_part_of_a_mean(plan: Plan, tmp_path: Path) -> None:
    lines: list[str] = []
    skipped = StepResult(loss=float("nan"), gradient_norm=float("inf"), skipped=True, loss_scale=32768.0)
    with Monitor(tmp_path, watched(plan), step=0, say=lines.append) as monitor:
        add_steps(monitor, 1, 1)
        monitor.add_step(300, 300, skipped, rate=0.1, step_s=0.5, elapsed_s=1.0, waited_s=0.0)
    text = (tmp_path / "log.jsonl").read_text()
    assert "NaN" not in text and "Infinity" not in text
    last = read_log(tmp_path / "log.jsonl")[-1]
    assert (last["loss"], last["gradient_norm"], last["loss_scale"]) == (None, None, 32768.0)
    assert "loss 1.000" in lines[-1]
    with Monitor(tmp_path, watched(plan), step=300, say=lines.append):
        pass  # A resumed run reads the log of before.
    assert "<svg" in (tmp_path / "progress.html").read_text()


def test_a_run_resumed_at_its_end_may_validate_on_a_terminal(
    plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Monitor(tmp_path, watched(plan), step=0, say=lambda line: None) as monitor:
        add_steps(monitor, 1, 300)
    console = Console(file=StringIO(), force_terminal=True, width=100)
    monkeypatch.setattr(monitor_module, "LiveTable", lambda: LiveTable(console=console))
    live = replace(watched(plan), live=True)
    with Monitor(tmp_path, live, step=300, say=lambda line: None) as monitor:
        validate(monitor, 300, Standing(), 0.5, 0.5)
        assert monitor.step_s() == 0.5


def test_a_tracker_that_fails_does_not_end_training(
    plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Broken:
        calls = 0

        def log(self, step: int, values: object) -> None:
            self.calls += 1
            raise OSError("database is locked")

        def close(self) -> None:
            self.calls += 1

    broken = Broken()
    monkeypatch.setattr(monitor_module, "open_trackers", lambda *arguments, **options: (broken,))
    lines: list[str] = []
    with Monitor(tmp_path, watched(plan), step=0, say=lines.append) as monitor:
        add_steps(monitor, 1, 20)
    assert broken.calls == 1
    told = [line for line in lines if "Broken" in line]
    assert len(told) == 1 and "OSError: database is locked" in told[0] and "log.jsonl has everything" in told[0]
