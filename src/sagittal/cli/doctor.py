"""`sagittal doctor`: is the data usable?"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter


def doctor(
    dataset: Path,
    *,
    json: Annotated[bool, Parameter(negative="")] = False,
    workers: int | None = None,
) -> int:
    """Check every scan and label of a data set; exit 1 where training would be refused.

    Parameters
    ----------
    dataset: folder in nnU-Net's layout (dataset.json, imagesTr, labelsTr)
    json: print the findings as JSON
    workers: files read at a time; by default one per core
    """
    from rich.console import Console
    from rich.table import Table

    from sagittal.data.dataset import read_dataset
    from sagittal.data.doctor import diagnose

    diagnosis = diagnose(read_dataset(dataset), workers=workers or os.cpu_count() or 1)
    if json:
        print(diagnosis.to_json())
        return 0 if diagnosis.ok else 1
    table = Table("", "code", "case", "finding", "what to do", title=str(dataset), show_lines=False)
    style = {"error": "bold red", "warning": "yellow", "fact": "dim"}
    for finding in diagnosis.findings:
        table.add_row(
            finding.level, finding.code, finding.case, finding.message, finding.fix, style=style[finding.level]
        )
    console = Console()
    console.print(table)
    console.print("usable" if diagnosis.ok else "not usable: training refuses it until the errors are mended")
    return 0 if diagnosis.ok else 1
