"""Where the folds of many machines stand: one table on a terminal, lines elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from sagittal.cluster.board import Said


class FoldTable:
    """Shows the last line of each fold and where it is trained; the other lines are in fold_N/output.log.

    Args:
        say: receives every line where there is no terminal.
        console: of standard output.
    """

    def __init__(self, say: Callable[[str], None], *, console: Console | None = None) -> None:
        self._say, self._console = say, console or Console()
        self._last: dict[str, Said] = {}
        self._live: Live | None = None

    @contextmanager
    def shown(self) -> Iterator[None]:
        """Take the lower lines of the terminal while the block runs; what is printed meanwhile scrolls by above."""
        if not self._console.is_terminal or self._console.is_dumb_terminal:
            yield
            return
        with Live(console=self._console, auto_refresh=False) as self._live:
            yield
        self._live = None

    def take(self, said: Said) -> None:
        """Show a line of a fold."""
        self._last[said.name] = said
        if self._live is None:
            self._say(f"fold {said.name} | {said.line}")
        else:
            self._live.update(self.table(), refresh=True)

    def table(self) -> Table:
        """Return a row for each fold that has said something."""
        table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
        for name in ("fold", "node", "last heard"):
            table.add_column(name, overflow="ellipsis", no_wrap=True)
        for name in sorted(self._last):
            said = self._last[name]
            table.add_row(name, Text(said.node), Text(said.line.strip()))
        return table
