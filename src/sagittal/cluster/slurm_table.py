"""The folds of a run in SLURM's queue, in one table in place; lines that are said scroll by above it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from sagittal.training.run_folder import FoldStanding


@dataclass(frozen=True)
class FoldRow:
    """A fold: its job, what the queue says of it, and how far it is; None before its first line."""

    name: str
    job: str
    state: str
    standing: FoldStanding | None


class FoldTable:
    """Shows rows in place; does nothing where standard output is no terminal, or it is not wanted."""

    def __init__(self, *, shown: bool, console: Console | None = None) -> None:
        self._console = console or Console()
        self._live: Live | None = None
        if shown and self._console.is_terminal and not self._console.is_dumb_terminal:
            self._live = Live(console=self._console, auto_refresh=False, transient=True)
            self._live.start()

    def show(self, rows: Sequence[FoldRow]) -> None:
        """Show rows in the place of those before."""
        if self._live is not None:
            self._live.update(table(rows), refresh=True)

    def stop(self) -> None:
        """Give the terminal back."""
        if self._live is not None:
            self._live.stop()
            self._live = None


def table(rows: Sequence[FoldRow]) -> Table:
    """Return what a terminal shows."""
    shown = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    for name in ("fold", "job", "state", "steps", "", "Dice"):
        shown.add_column(name)
    for row in rows:
        standing = row.standing
        if standing is None:
            shown.add_row(row.name, row.job, Text(row.state), "", "", "")
            continue
        steps = f"{standing.step} of {standing.end}"
        bar = ProgressBar(total=max(standing.end, 1), completed=standing.step, width=16)
        dice = "" if standing.dice is None else f"{standing.dice:.3f} at {standing.dice_step}"
        shown.add_row(row.name, row.job, Text(row.state), steps, bar, dice)
    return shown
