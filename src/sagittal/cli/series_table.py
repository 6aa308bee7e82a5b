"""The series of a DICOM study as a table or JSON, for `sagittal info`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sagittal.volumes.dicom_catalogue import SeriesInfo


def print_series(path: Path, found: Sequence[SeriesInfo], as_json: bool) -> None:
    """Print a line per series, what it is and whether it can be read, or one JSON object.

    Args:
        path: of the study.
        found: its series.
        as_json: print JSON.
    """
    if as_json:
        print(json.dumps({"series": [asdict(info) for info in found]}, indent=2))
        return
    from rich.cells import cell_len
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    studies = list(dict.fromkeys(info.study_uid for info in found))
    header = ("number", "modality", "description", "slices", "shape (D, H, W)", "spacing (D, H, W) in mm", "usable")
    console = Console()
    # A narrower window would break numbers in the middle; a terminal scrolls, a file does not care.
    console.width = max(console.width, 120)
    console.print("DICOM study" if len(studies) == 1 else f"{len(studies)} DICOM studies", highlight=False)
    for study in studies:
        rows = [info for info in found if info.study_uid == study]
        title = rows[0].study_description or str(path)
        table = Table(title=escape(title), title_justify="left")
        for name in header:
            table.add_column(name, justify="right" if name == "slices" else "left", overflow="fold")
        for info in rows:
            table.add_row(*(escape(cell) for cell in _row(info)))
        console.print(table)
    longest = max((cell_len(_number(info)) for info in found), default=1)
    for info in found:
        if info.series_uid:
            print(f"{_number(info):>{longest}}  {info.series_uid}")


def _row(info: SeriesInfo) -> tuple[str, ...]:
    what = ", ".join(text for text in (info.description, info.part) if text)
    spacing = "" if info.spacing_mm is None else " x ".join(f"{value:.4g}" for value in info.spacing_mm)
    usable = "yes" if info.usable else f"no: {info.why_not}"
    if info.lossy:
        usable += f" (compressed with loss: {info.transfer_syntax})"
    shape = "" if info.shape is None else " x ".join(map(str, info.shape))
    return (_number(info), info.modality, what, str(info.frames), shape, spacing, usable)


def _number(info: SeriesInfo) -> str:
    part = info.series_uid.partition("@")[2]
    number = "-" if info.series_number is None else str(info.series_number)
    return f"{number}@{part}" if part else number
