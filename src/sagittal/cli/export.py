"""`sagittal export`: a bundle for other people's software."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter


def export(
    bundle: Path,
    /,
    *,
    out: Path,
    runtime: Annotated[str, Parameter(name="--format")] = "onnx",
) -> int:
    """Write a bundle's networks as graphs that other software runs, with all that comes before and after them.

    Args:
        bundle: folder that `sagittal train` wrote, or a package
        out: a new folder: one graph per fold, model.json, and read_model.py, which predicts with them
        runtime: onnx (ONNX Runtime), openvino (OpenVINO) or torch (torch.export)
    """
    from sagittal.export.export import export_bundle

    export_bundle(bundle, runtime, out, say=print)
    print(f"exported: {out} (start with model.json and read_model.py)")
    return 0
