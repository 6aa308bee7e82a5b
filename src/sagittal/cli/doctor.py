"""`sagittal doctor`: is the data usable?"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from sagittal.cli.options import Workers
from sagittal.errors import DataError

if TYPE_CHECKING:
    from sagittal.data.doctor import Diagnosis
    from sagittal.data.doctor.repair import Repair

PAGE_NAME = "doctor.html"
SHOWN_CHANGES = 20


def doctor(
    dataset: Path,
    *,
    json: Annotated[bool, Parameter(negative="")] = False,
    report: Path | None = None,
    fix: Path | None = None,
    label: Annotated[list[str] | None, Parameter(negative="")] = None,
    workers: Workers = None,
) -> int:
    """Check every scan and label of a data set; exit 1 where training would be refused.

    Args:
        dataset: folder in nnU-Net's layout (dataset.json, imagesTr, labelsTr)
        json: print the findings as JSON; with --fix, those of the copy and what was changed
        report: HTML page to write, with a picture per finding; in a folder it is doctor.html
        fix: new folder for a repaired copy; the data set itself is never changed. What can't be repaired is listed
        label: with --fix, a name for a label value that dataset.json lacks, VALUE=NAME; may be given several times
        workers: files read at a time; by default one per core
    """
    from sagittal.data.doctor import diagnose
    from sagittal.data.doctor.repair import open_repairable, repair

    threads = workers or os.cpu_count() or 1
    names = dict(_named(text) for text in label or ())
    if names and fix is None:
        raise DataError("--label names values in a repaired copy. Expected --fix OUT beside it. Add it.")
    done = None if fix is None else repair(dataset, fix, threads, names)
    if done is not None:
        opened, replaced, diagnosis = open_repairable(done.out)[0], {}, done.left
    else:
        opened, declared = open_repairable(dataset)
        replaced = dict(declared.replaced)
        diagnosis = diagnose(opened, workers=threads, replaced=replaced)
    page = None
    if report is not None:
        from sagittal.data.doctor.page import write_page

        page = write_page(report / PAGE_NAME if report.is_dir() else report, opened, diagnosis, replaced)
    if json:
        print(diagnosis.to_json() if done is None else done.to_json())
    else:
        _print_table(str(dataset if done is None else done.out), diagnosis)
        if done is not None:
            _print_changes(done)
        if page is not None:
            print(f"report: {page}")
    return 0 if diagnosis.ok else 1


def _named(text: str) -> tuple[int, str]:
    value, separator, name = text.partition("=")
    try:
        if separator and name:
            return int(value), name
    except ValueError:
        pass
    raise DataError(f"--label {text}: no value and name. Expected VALUE=NAME, for example --label 7=cyst. Correct it.")


def _print_table(title: str, diagnosis: Diagnosis) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(title=escape(title), show_lines=False)
    for name in ("", "code", "case", "finding", "what to do"):
        table.add_column(name, overflow="fold")  # a path has no blanks to break it at, and its end names the file
    style = {"error": "bold red", "warning": "yellow", "fact": "dim"}
    for finding in diagnosis.findings:
        cells = (finding.level, finding.code, finding.case, finding.message, finding.fix)
        table.add_row(*map(escape, cells), style=style[finding.level])
    console = Console()
    console.print(table)
    console.print("usable" if diagnosis.ok else "not usable: training refuses it until the errors are mended")


def _print_changes(done: Repair) -> None:
    print(f"repaired copy: {done.out}, {len(done.changes)} files changed or left out; all of it is in {done.report}")
    for change in done.changes[:SHOWN_CHANGES]:
        print(f"  {change.file}: {change.what}")
    if len(done.changes) > SHOWN_CHANGES:
        print(f"  and {len(done.changes) - SHOWN_CHANGES} more")
    for value, original in done.label_map.items():
        print(f"  label value {original} is {value} in the copy; predictions hold {original} again")
    kinds = sorted({finding.code for finding in done.left.errors})
    if kinds:
        print(f"  {len(done.left.errors)} errors could not be repaired: {', '.join(kinds)}")
