"""Which extra a command lacks, where Python says only which module."""

from __future__ import annotations

from sagittal.errors import ResourceError

_EXTRAS = {
    "torch": ("PyTorch", "torch"),
    "openvino": ("OpenVINO", "openvino"),
    "onnx": ("ONNX", "onnx"),
    "onnxscript": ("ONNX Script", "onnx"),
    "onnxruntime": ("ONNX Runtime", "onnx"),
}
"""By the name of a module: what people call it, and the extra that installs it."""
_NEEDS = {"train": "training", "demo": "training", "predict": "this prediction", "import-weights": "importing weights"}


def lacking_package(error: ImportError, verb: str) -> ResourceError | None:
    """Return what to install where `error` is about a package of an extra; None where it is our own mistake.

    Args:
        error: of an import.
        verb: the command that the user gave, `train` for example.
    """
    module = error.name
    # Only the package itself: a module that it lacks means another version of it, which this would not tell.
    if module not in _EXTRAS:
        return None
    title, extra = _EXTRAS[module]
    hint = " Prediction on a CPU does without it: pip install 'sagittal[openvino]'." if module == "torch" else ""
    return ResourceError(
        f"{_NEEDS.get(verb, f'sagittal {verb}')} needs {title}, which is not installed: "
        f"pip install 'sagittal[{extra}]'.{hint}",
        code="missing_package",
    )
