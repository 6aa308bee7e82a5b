"""The disk that everything is written to: not to be filled, and what a caller is told of it where it fails."""

from __future__ import annotations

import logging
import os
import shutil
from pathlib import Path

from sagittal.serve.refusals import RefusalError
from sagittal.serve.settings import Limits

_log = logging.getLogger("sagittal.serve")


def require_disk(folder: Path, limits: Limits, coming_bytes: int = 0) -> None:
    """Refuse to fill the disk.

    Raises:
        RefusalError: less than the limit would stay free (503).
    """
    free = shutil.disk_usage(folder).free
    if free - coming_bytes < limits.free_bytes:
        raise RefusalError(
            "the service's disk is nearly full. Send this again later; whoever runs the service has to free space.",
            code="disk",
            status=503,
            headers={"Retry-After": "300"},
        )


def without_path(error: OSError) -> RefusalError:
    """Return what a caller is told of a disk that can't be written or read; the log has the number alone too."""
    _log.error("disk: %s", os.strerror(error.errno or 0))
    return RefusalError("the service's disk can't be used. Send this again later.", code="disk", status=503)


def link_or_copy(source: str, target: str) -> None:
    """Give a file a second name; where the disk has no such thing, a copy."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
