"""The live table of a run on a terminal. Lines that are said meanwhile scroll by above it."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

REFRESH_S = 0.5


@dataclass(frozen=True)
class LiveClass:
    """One class in the last validation; None where there was none, or no case has it."""

    name: str
    dice: float | None
    best: float | None
    best_step: int


@dataclass(frozen=True)
class Reading:
    """What the table shows."""

    title: str
    step: int
    end: int
    left_s: float
    numbers: Mapping[str, str]
    classes: Sequence[LiveClass]
    alarms: Sequence[str] = ()


class LiveTable:
    """Shows readings in place; does nothing where standard output is no terminal.

    While it is shown, what is printed goes through it: `print` needs to know nothing of it.
    """

    def __init__(self, *, console: Console | None = None) -> None:
        self._console = console or Console()
        self._live: Live | None = None
        self._shown = 0.0

    @property
    def is_shown(self) -> bool:
        """Whether there is a terminal that shows it."""
        return self._live is not None

    def start(self) -> None:
        """Take the lower lines of the terminal."""
        if self._console.is_terminal and not self._console.is_dumb_terminal:
            # No thread of its own: it would take time from training, and a step may not be interrupted.
            self._live = Live(console=self._console, auto_refresh=False, transient=True)
            self._live.start()

    def due(self) -> bool:
        """Return whether it is time to show another reading."""
        return self._live is not None and time.monotonic() - self._shown >= REFRESH_S

    def show(self, reading: Reading) -> None:
        """Show a reading in the place of the one before."""
        if self._live is not None:
            self._shown = time.monotonic()
            self._live.update(table(reading), refresh=True)

    def stop(self) -> None:
        """Give the terminal back."""
        if self._live is not None:
            self._live.stop()
            self._live = None


def table(reading: Reading) -> Group:
    """Return what a terminal shows of a reading."""
    head = Table.grid(padding=(0, 1))
    head.add_row(
        Text(reading.title, style="bold"),
        ProgressBar(total=max(reading.end, 1), completed=reading.step, width=24),
        f"{reading.step}/{reading.end}",
        f"left {duration(reading.left_s)}",
    )
    numbers = Text("  ".join(f"{name} {value}" for name, value in reading.numbers.items()))
    parts: list[Table | Text] = [head, numbers]
    if any(one.best is not None for one in reading.classes):
        parts.append(_classes(reading.classes))
    parts += [Text(f"! {alarm}", style="bold red") for alarm in reading.alarms]
    return Group(*parts)


def duration(seconds: float) -> str:
    """Return a time as h:mm:ss."""
    whole = max(int(seconds), 0)
    return f"{whole // 3600}:{whole // 60 % 60:02d}:{whole % 60:02d}"


def _classes(classes: Sequence[LiveClass]) -> Table:
    shown = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    shown.add_column("class")
    for name in ("Dice", "best", "at step"):
        shown.add_column(name, justify="right")
    for one in classes:
        at = str(one.best_step) if one.best is not None else ""
        shown.add_row(Text(one.name), _number(one.dice), _number(one.best), at)
    return shown


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"
