"""The folder of a bundle's 8-bit networks: read, verified, and replaced so that a kill at any moment loses nothing.

See `bundle.replacement`. Whoever reads between the two renames is given the old one.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from sagittal.bundle.manifest import FileEntry, read_verified
from sagittal.bundle.replacement import previous_folder, tidy
from sagittal.bundle.replacement import replacing as replacing_folder
from sagittal.errors import ResourceError
from sagittal.plan.base import Frozen, cannot_write

REPORT = "int8.json"
_ABANDONED_AFTER_S = 7 * 86400.0
"""Calibrating takes hours at most; a younger folder may belong to a run that is alive."""


class Int8Report(Frozen):
    """What is known of 8-bit networks."""

    schema_version: Literal[1] = 1
    bundle_sha256: str
    """Of the manifest of the bundle that they were made of."""
    openvino_version: str
    calibration_cases: int
    scored_cases: int
    """None of them took part in the calibration."""
    dice_fp32: float
    """Mean over cases and classes, of a hundred points; predicted without mirroring."""
    dice_int8: float
    files: dict[str, FileEntry]

    @property
    def points_lost(self) -> float:
        """How much lower the mean Dice is."""
        return self.dice_fp32 - self.dice_int8


def standing(folder: Path) -> Path:
    """Return where the networks of `folder` are: there, or where a run that was stopped had put them aside."""
    previous = previous_folder(folder)
    return previous if not folder.exists() and _holds_networks(previous) else folder


def read_report(folder: Path) -> Int8Report:
    """Return what is known of the 8-bit networks in a folder.

    Raises:
        ResourceError: there are none.
        PlanError: the report is not as it was written.
    """
    source = folder / REPORT
    if not source.is_file():
        raise ResourceError(
            f"there are no 8-bit networks of this bundle: {source} is missing. Make them with 'sagittal "
            "quantize BUNDLE DATASET', or use --precision fp32 or bf16.",
            code="int8",
        )
    return Int8Report.from_json(source.read_bytes(), source=str(source))


def verify(folder: Path) -> Int8Report:
    """Return what is known of the networks in a folder, after comparing every file with its hash.

    Raises:
        BundleError: a file is missing or changed.
        PlanError, ResourceError: see `read_report`.
    """
    report = read_report(folder)
    for name, entry in report.files.items():
        read_verified(folder / name, entry)
    return report


@contextmanager
def replacing(folder: Path) -> Iterator[Path]:
    """Give a new folder to fill, report last; it takes the place of `folder` at the end of the block, or nothing does.

    Raises:
        BundleError: what was written can't be read back.
        ResourceError: the folder holds something else than 8-bit networks, or can't be written; it is untouched.
    """
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        tidy(folder, _holds_networks, abandoned_after_s=_ABANDONED_AFTER_S)
        if folder.exists() and not _holds_networks(folder) and not (folder.is_dir() and not any(folder.iterdir())):
            raise ResourceError(
                f"{folder}: exists and holds no 8-bit networks. Choose another folder; nothing was overwritten.",
                code="exists",
            )
        with replacing_folder(folder) as room:
            yield room
            verify(room)
    except OSError as error:
        raise cannot_write(folder, error, what="the folder of 8-bit networks", code="disk") from None


def _holds_networks(folder: Path) -> bool:
    return (folder / REPORT).is_file()
