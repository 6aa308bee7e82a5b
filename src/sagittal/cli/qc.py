"""`sagittal qc`: which of these predictions are probably wrong?"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from sagittal.cli.options import Workers
from sagittal.cli.progress import CountLines
from sagittal.cli.stopping import ended_by_sigterm

if TYPE_CHECKING:
    from sagittal.report.qc import QualityCheck

SHOWN = 20


def qc(
    predictions: Path,
    *,
    bundle: Path | None = None,
    images: Path | None = None,
    out: Path | None = None,
    workers: Workers = None,
    json: Annotated[bool, Parameter(negative="")] = False,
) -> int:
    """Look for predictions that are probably wrong, where there are no references; write qc.html, qc.csv and qc.json.

    Exit code 0 whatever is flagged, 1 where a file can't be read.

    Args:
        predictions: folder of label maps, or one file
        bundle: the model that predicted them, to compare with the volumes of its training cases
        images: folder of the scans, for the pictures
        out: folder for the results, by default qc in the folder of the predictions
        workers: label maps read at the same time; each takes memory
        json: print what was found as JSON, and the rest on stderr
    """
    from sagittal.bundle import read_bundle
    from sagittal.report.qc import QC_HTML, check_predictions

    place = out or (predictions.parent if predictions.is_file() else predictions) / "qc"
    read = None if bundle is None else read_bundle(bundle)
    with ended_by_sigterm():
        result = check_predictions(
            predictions, place, bundle=read, images=images, workers=workers, told=CountLines("measured")
        )
    if json:
        print(result.to_json(), end="")
    else:
        _print(result)
        print(f"report: {place / QC_HTML}")
    return 1 if result.failures else 0


def _print(result: QualityCheck) -> None:
    from sagittal.report.summary import count

    print(f"{count(len(result.cases), 'case')}, {len(result.flagged)} flagged; compared with {result.compared_with}")
    for check in result.flagged[:SHOWN]:
        print(f"look at {check.case} (suspicion {check.suspicion:.1f})")
        for flag in check.flags[:3]:
            print(f"  {flag.reason}")
        if len(check.flags) > 3:
            print(f"  and {len(check.flags) - 3} more")
    if len(result.flagged) > SHOWN:
        print(f"and {len(result.flagged) - SHOWN} more cases")
    for warning in result.warnings:
        print(f"warning: {warning}")
    for failure in result.failures:
        print(f"failed: {failure.case}: {failure.message}")
