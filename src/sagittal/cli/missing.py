"""Which extra a command lacks, where Python says only which module."""

from __future__ import annotations

from sagittal import errors
from sagittal.errors import ResourceError

_NEEDS = {"train": "training", "demo": "training", "predict": "this prediction", "import-weights": "importing weights"}


def lacking_package(error: ImportError, verb: str) -> ResourceError | None:
    """Return what to install where `error` is about a package of an extra; None where it is our own mistake.

    Args:
        error: of an import.
        verb: the command that the user gave, `train` for example.
    """
    return errors.lacking_package(error, _NEEDS.get(verb, f"sagittal {verb}"))
