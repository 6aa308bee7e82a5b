"""`sagittal evaluate`: predictions against references, as numbers and as a page."""

from __future__ import annotations

from pathlib import Path


def evaluate(
    predictions: Path, references: Path, *, out: Path, images: Path | None = None, log: Path | None = None
) -> int:
    """Score label maps against references; write metrics.json, metrics.csv and report.html.

    Args:
        predictions: folder of label maps, or one file
        references: folder of label maps with the same names, or one file
        out: folder for the results
        images: folder of the scans, for the pictures of the report
        log: log.jsonl of the training, for its curve in the report
    """
    from rich.console import Console
    from rich.table import Table

    from sagittal.errors import DataError
    from sagittal.report.evaluation import evaluate as evaluate_folders
    from sagittal.report.page import Page
    from sagittal.training.log import read_log

    if log is not None and not log.is_file():
        raise DataError(f"{log}: no such file. Expected a training's log, BUNDLE.run/fold_0/log.jsonl for example.")
    page = Page(curve=read_log(log) if log is not None else ())
    result = evaluate_folders(predictions, references, out, images=images, page=page)
    table = Table("class", "mean Dice", "mean HD95 (mm)", "missed", title=f"{result.summary.cases} cases")
    for name, summary in result.summary.classes.items():
        values = [summary.metrics[key].mean for key in ("dice", "hd95_mm")]
        table.add_row(
            name, *("undefined" if value is None else f"{value:.3f}" for value in values), str(summary.missed)
        )
    Console().print(table)
    for warning in result.warnings:
        print(f"warning: {warning}")
    for failure in result.failures:
        print(f"failed: {failure.case}: {failure.message}")
    dice = result.summary.mean["dice"]
    print(f"report: {out / 'report.html'} dice {'undefined' if dice is None else f'{dice:.4f}'}")
    return 1 if result.failures else 0
