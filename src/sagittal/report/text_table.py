"""A table of short texts with footnotes, for documents in Markdown and for terminals."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class TextTable:
    """Rows below a header; the columns named in `numeric` are aligned to the right."""

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    numeric: frozenset[str] = frozenset()
    notes: tuple[str, ...] = ()
    """Printed below, numbered from 1."""

    def markdown(self) -> str:
        """Return a heading sentence, the table, and its notes, as GitHub reads them."""
        rule = ["---:" if name in self.numeric else "---" for name in self.header]
        lines = [self.title, "", *(_line(row) for row in (self.header, rule, *self.rows))]
        if self.notes:
            lines += ["", *(f"{number}. {note}" for number, note in enumerate(self.notes, 1))]
        return "\n".join(lines)


class Notes:
    """Footnotes in the order of their first use."""

    def __init__(self) -> None:
        self._texts: list[str] = []

    def refer(self, texts: Sequence[str]) -> str:
        """Return the numbers of `texts`, for example `1, 3`; new texts get the next numbers."""
        for text in texts:
            if text not in self._texts:
                self._texts.append(text)
        return ", ".join(str(self._texts.index(text) + 1) for text in texts)

    @property
    def texts(self) -> tuple[str, ...]:
        """All texts that were referred to, the first numbered 1."""
        return tuple(self._texts)


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", r"\|") for cell in cells) + " |"
