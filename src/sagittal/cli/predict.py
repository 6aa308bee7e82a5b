"""`sagittal predict`: scans become label maps."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter


def predict(
    bundle: Path,
    input: Annotated[
        list[Path],
        Parameter(
            help="a scan (file, or folder or zip of a DICOM series), its channels in order, or a folder of scans"
        ),
    ],
    /,
    *,
    out: Path,
    mirror: bool = True,
    memory_gib: float | None = None,
    device: str = "auto",
) -> int:
    """Segment scans; each label map has the grid of its scan and is written whole or not at all.

    Args:
        bundle: folder that `sagittal train` wrote
        out: folder for the label maps
        mirror: average over mirrored copies (--no-mirror is up to eight times faster)
        memory_gib: memory to stay within; refused before it starts where that can't be done
        device: auto, cpu, cuda, cuda:1 or mps
    """
    from sagittal.inference.folder import predict_folder
    from sagittal.inference.predictor import load

    result = predict_folder(
        load(bundle, device=device),
        input[0] if len(input) == 1 else input,
        out,
        mirror=mirror,
        memory_gib=memory_gib,
        on_case=lambda case: print(case, flush=True),
    )
    if result.failures:
        print(f"error: {len(result.failures)} of {len(result.cases)} cases failed:", file=sys.stderr)
        for failure in result.failures:
            print(f"  {failure}", file=sys.stderr)
    return 1 if result.failures else 0
