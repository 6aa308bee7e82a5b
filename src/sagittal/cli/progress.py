"""What the terminal shows while bytes arrive."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def download_bar() -> Iterator[Callable[[int, int | None], None]]:
    """Show a bar on a terminal, elsewhere a line at every tenth of the file; yield what is told of each piece."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn

    console = Console(stderr=True)
    if not console.is_terminal:
        told = -1

        def tell(got: int, total: int | None) -> None:
            nonlocal told
            if total and 10 * got // total != told:
                told = 10 * got // total
                console.print(f"{got} of {total} bytes", highlight=False)

        yield tell
        return
    with Progress(BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn(), console=console) as bars:
        task = bars.add_task("", total=None)
        yield lambda got, total: bars.update(task, completed=got, total=total)
