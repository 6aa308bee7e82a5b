"""The live table: what it shows, that printing goes on beside it, and that a pipe never sees it."""

from __future__ import annotations

import io

from rich.console import Console

from sagittal.training.live import LiveClass, LiveTable, Reading, duration, table

READING = Reading(
    title="Spleen: mednext-s, fold 0",
    step=30,
    end=120,
    left_s=3661.0,
    numbers={"loss": "0.500", "s/step": "0.2"},
    classes=[LiveClass("spleen", 0.81, 0.9, 20), LiveClass("[odd] name", None, None, 0)],
    alarms=["spleen is lost"],
)


def test_it_shows_progress_numbers_classes_and_alarms() -> None:
    console = Console(file=io.StringIO(), width=100, record=True)
    console.print(table(READING))
    text = console.export_text()
    for part in ("30/120", "left 1:01:01", "loss 0.500", "spleen", "0.810", "0.900", "20", "[odd] name", "! spleen is"):
        assert part in text


def test_lines_that_are_printed_meanwhile_are_kept() -> None:
    file = io.StringIO()
    live = LiveTable(console=Console(file=file, force_terminal=True, width=80))
    live.start()
    assert live.is_shown and live.due()
    live.show(READING)
    assert not live.due()
    print("step 3: Dice 0.5")  # noqa: T201 - what a user's `say` does
    live.stop()
    assert "step 3: Dice 0.5" in file.getvalue()
    assert not live.is_shown


def test_where_there_is_no_terminal_nothing_is_shown() -> None:
    file = io.StringIO()
    live = LiveTable(console=Console(file=file))
    live.start()
    live.show(READING)
    live.stop()
    assert not live.is_shown and file.getvalue() == ""


def test_duration() -> None:
    assert [duration(value) for value in (0.0, 59.9, 3600.0, -1.0)] == ["0:00:00", "0:00:59", "1:00:00", "0:00:00"]
