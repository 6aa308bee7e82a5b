"""Replace a folder so that a kill at any moment loses nothing.

The new folder is made whole beside the old one. Then the old one is renamed to `.NAME.previous`, the new one takes its
name, and the old one is deleted. Between the two renames the old one is the whole one, and `tidy` brings it back.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from glob import escape
from pathlib import Path

from sagittal.plan.base import keep_name

_PART = ".part"


def previous_folder(folder: Path) -> Path:
    """Return where the former folder waits while a new one takes its place."""
    return folder.with_name(f".{folder.name}.previous")


def tidy(folder: Path, is_whole: Callable[[Path], bool], *, abandoned_after_s: float) -> None:
    """Put right what a killed run left: bring the former folder back, delete what was replaced or abandoned.

    Args:
        folder: the one that is about to be replaced; it need not exist.
        is_whole: whether a folder is of the kind that is replaced.
        abandoned_after_s: age in seconds from which an unfinished folder belongs to no run that is alive.

    Raises:
        OSError: the disk refuses.
    """
    previous = previous_folder(folder)
    if is_whole(folder):
        # Perhaps half deleted, by a run that was killed at that.
        shutil.rmtree(previous, ignore_errors=True)
    elif is_whole(previous) and not folder.exists():
        previous.rename(folder)
    for part in folder.parent.glob(f".{escape(folder.name)}.*{_PART}"):
        if time.time() - part.stat().st_mtime > abandoned_after_s:
            shutil.rmtree(part, ignore_errors=True)


@contextmanager
def replacing(folder: Path) -> Iterator[Path]:
    """Give a new folder to fill; it takes the place of `folder` at the end of the block, or nothing does.

    Raises:
        OSError: the disk refuses; `folder` is as it was.
    """
    new = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}.", suffix=_PART))
    try:
        yield new
        new.chmod(0o755)
        _keep(new)
        _put_in_place(new, folder)
    finally:
        shutil.rmtree(new, ignore_errors=True)


def _keep(folder: Path) -> None:
    """Have the disk keep the files before they take the place of others: a power cut may not leave empty ones."""
    for parent, _, files in os.walk(folder):
        for name in files:
            with (Path(parent) / name).open("rb+") as file:
                os.fsync(file.fileno())
        keep_name(Path(parent))


def _put_in_place(new: Path, folder: Path) -> None:
    previous = previous_folder(folder)
    if folder.exists() and not any(folder.iterdir()):
        folder.rmdir()
    replaces = folder.exists()
    if replaces:
        folder.rename(previous)
    try:
        new.rename(folder)
    except OSError:
        if replaces:
            previous.rename(folder)
        raise
    keep_name(folder.parent)
    if replaces:
        shutil.rmtree(previous, ignore_errors=True)
