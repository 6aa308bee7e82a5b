"""A bundle in one file: made with `pack`, taken apart with `unpack`, and taken by `read_bundle` as it is.

How the file looks and what is checked is in `bundle.archive`.
"""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sagittal.bundle.archive import extract_archive, is_package, write_archive
from sagittal.bundle.read import read_bundle
from sagittal.errors import BundleError
from sagittal.plan.base import cannot_write

__all__ = ["is_package", "pack", "unpack"]

_PART = ".part"


def pack(bundle: str | os.PathLike[str], file: str | os.PathLike[str]) -> Path:
    """Write a bundle to one file and return its path; a package that is already there is replaced at the end.

    Args:
        bundle: the folder, or a package.
        file: the package to write, by custom `NAME.sagittal`; its folder is made.

    Raises:
        BundleError: the bundle is not intact, or the file exists and is no package.
        ResourceError: the disk is full or the file can't be written.
    """
    target = Path(file)
    read = read_bundle(bundle)
    if target.is_dir() or (target.exists() and not is_package(target)):
        raise BundleError(f"{target}: exists and is no package. Choose another name; nothing was overwritten.")
    with _room_beside(target) as room:
        part = room / target.name
        write_archive(read.path, read.manifest, part)
        # A byte that changed between the check and the copy would otherwise be packed under the old hashes.
        (room / "check").mkdir()
        extract_archive(part, room / "check")
        part.chmod(0o644)
        part.replace(target)
    return target


def unpack(file: str | os.PathLike[str], folder: str | os.PathLike[str]) -> Path:
    """Make a bundle's folder of a package and return its path; it appears whole and verified, or not at all.

    Args:
        file: the package.
        folder: a folder that does not exist yet, or an empty one; its parents are made.

    Raises:
        BundleError: the package is damaged or holds anything unusual, or the folder holds something already.
        ResourceError: the disk is full or the folder can't be written.
    """
    target = Path(folder)
    if target.is_symlink() or (target.exists() and not (target.is_dir() and not any(target.iterdir()))):
        raise BundleError(f"{target}: exists and is no empty folder. Choose another one; nothing was overwritten.")
    with _room_beside(target) as room:
        part = room / "bundle"
        part.mkdir()
        extract_archive(Path(file), part, durable=True)
        try:
            read_bundle(part)
        except BundleError as error:
            raise BundleError(error.message.replace(str(part), str(file)), code=error.code) from None
        if target.exists():
            target.rmdir()
        part.rename(target)
    return target


@contextmanager
def _room_beside(target: Path) -> Iterator[Path]:
    """Yield a new folder on the same disk, which is gone afterwards."""
    room: Path | None = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        room = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}.", suffix=_PART))
        yield room
    except OSError as error:
        full = "disk_full" if error.errno == errno.ENOSPC else None
        raise cannot_write(target, error, other="another place", code=full) from None
    finally:
        if room is not None:
            shutil.rmtree(room, ignore_errors=True)
