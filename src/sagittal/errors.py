"""Every error that Sagittal raises on purpose.

    SagittalError               base; catch this one
    ├── DataError               a scan, a label or a data set is not usable as it is
    ├── PlanError               a plan, an override or a network name makes no sense
    ├── BundleError             a bundle is damaged, incomplete or too new
    ├── ResourceError           disk, memory or device is missing or too small
    └── TrainingError           training can't go on (a loss that is not finite, a checkpoint that does not fit)

A message reads: what is wrong with the value -> what was expected -> where it came from -> what to do.
A bug in Sagittal itself is never one of these: it stays an AssertionError or whatever Python raised.
"""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


class SagittalError(Exception):
    """Base of all errors that a user can act on.

    Attributes:
        message: what is wrong, what was expected, where it came from, what to do.
        code: a short stable identifier for machines, for example `grid_mismatch`.
    """

    code = "error"

    def __init__(self, message: str, *, code: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        if code is not None:
            self.code = code

    def as_dict(self) -> dict[str, dict[str, str]]:
        """Return the one JSON error shape, `{"error": {"type", "code", "message"}}`."""
        return {"error": {"type": type(self).__name__, "code": self.code, "message": self.message}}

    def __reduce__(self) -> tuple[object, ...]:
        # Keyword-only arguments do not survive the default pickling between worker processes.
        return (_rebuild, (type(self), self.message, self.code))


def _rebuild(kind: type[SagittalError], message: str, code: str) -> SagittalError:
    return kind(message, code=code)


class DataError(SagittalError):
    """A scan, a label or a data set is not usable as it is."""

    code = "data"


class PlanError(SagittalError):
    """A plan, an override or a network name makes no sense."""

    code = "plan"


class BundleError(SagittalError):
    """A bundle is damaged, incomplete or too new."""

    code = "bundle"


class ResourceError(SagittalError):
    """Disk, memory or device is missing or too small."""

    code = "resource"


class TrainingError(SagittalError):
    """Training can't go on."""

    code = "training"


_EXTRAS = {
    "torch": ("PyTorch", "torch"),
    "openvino": ("OpenVINO", "openvino"),
    "onnx": ("ONNX", "onnx"),
    "onnxscript": ("ONNX Script", "onnx"),
    "onnxruntime": ("ONNX Runtime", "onnx"),
    "fastapi": ("FastAPI", "serve"),
    "starlette": ("FastAPI", "serve"),
    "uvicorn": ("uvicorn", "serve"),
    "python_multipart": ("python-multipart", "serve"),
    "prometheus_client": ("prometheus-client", "serve"),
    "ray": ("Ray", "ray"),
    "submitit": ("submitit", "slurm"),
}
"""By the name of a module: what people call it, and the extra that installs it."""


def lacking_package(error: ImportError, who: str) -> ResourceError | None:
    """Return what to install where `error` is about a package of an extra; None where it is our own mistake.

    Args:
        error: of an import.
        who: what needs the package, for the message.
    """
    # Only the package itself: a module that it lacks means another version of it, which this would not tell.
    if error.name not in _EXTRAS:
        return None
    title, extra = _EXTRAS[error.name]
    hint = " Prediction on a CPU does without it: pip install 'sagittal[openvino]'." if error.name == "torch" else ""
    return ResourceError(
        f"{who} needs {title}, which is not installed: pip install 'sagittal[{extra}]'.{hint}", code="missing_package"
    )


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return ` Did you mean 'x'?` where a known name is close to `name` in any case, else the list of known names."""
    names = sorted(known)
    spelt = {each.casefold(): each for each in names}
    close = get_close_matches(name.casefold(), spelt, n=1, cutoff=0.6)
    return f" Did you mean '{spelt[close[0]]}'?" if close else f" Known: {', '.join(names)}."
