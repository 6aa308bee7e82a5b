"""A table for the terminal whose columns stand in several tables, one below the other, where the window is too narrow.

Rich cuts what does not fit down to `0.7…`, which is worse than no number.
"""

from __future__ import annotations

from collections.abc import Sequence

from rich.cells import cell_len
from rich.console import Console
from rich.markup import escape
from rich.table import Table

_FRAME = 3
"""Characters beside the text of a column: a space on either side and a line."""
_MAX_NAME = 30
"""Characters of the first column; longer names go on in the next line."""


def print_wide(
    header: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    title: str,
    caption: str = "",
    bold: frozenset[tuple[int, int]] = frozenset(),
    console: Console | None = None,
) -> None:
    """Print a table; the first column stands in every part of it.

    Args:
        header: names of the columns; they break between words.
        rows: cells, as many as columns; they break where they have a line break.
        title: above the first part.
        caption: below the last part.
        bold: row and column of the cells to stress.
        console: where to; by itself standard output.
    """
    console = console or Console()
    widths = [_width(name, [row[place] for row in rows]) for place, name in enumerate(header)]
    widths[0] = min(max([widths[0], *(cell_len(row[0]) for row in rows)]), _MAX_NAME)
    room = console.width - widths[0] - _FRAME - 1
    parts = _parts(widths[1:], room)
    console.print(escape(title), style="italic", highlight=False)
    for part in parts:
        # Given as they are: where Rich has to shrink columns it goes below what it was told is the least.
        table = Table()
        table.add_column(escape(header[0]), width=widths[0], overflow="fold")
        spare = room - sum(widths[place] + _FRAME for place in part)
        for place in part:
            # In one line where there is room, within the window where there is too little.
            wanted = min(max(0, cell_len(header[place]) - widths[place]), max(0, spare))
            spare -= wanted
            width = min(widths[place] + wanted, max(1, room - _FRAME))
            table.add_column(escape(header[place]), width=width, overflow="fold", justify="right")
        for line, row in enumerate(rows):
            cells = ((place, escape(row[place])) for place in (0, *part))
            table.add_row(*(f"[bold]{cell}[/bold]" if (line, place) in bold else cell for place, cell in cells))
        console.print(table)
    if caption:
        console.print(escape(caption), style="dim italic", highlight=False)


def _width(name: str, cells: Sequence[str]) -> int:
    words = name.split()
    lines = [line for cell in cells for line in cell.split("\n")]
    return max((cell_len(text) for text in (*words, *lines)), default=1)


def _parts(widths: Sequence[int], room: int) -> list[list[int]]:
    """Return the places of the columns after the first, in parts that fit into `room`; a part has one at least."""
    parts: list[list[int]] = [[]]
    used = 0
    for place, width in enumerate(widths, start=1):
        if parts[-1] and used + width + _FRAME > room:
            parts.append([])
            used = 0
        parts[-1].append(place)
        used += width + _FRAME
    return parts
