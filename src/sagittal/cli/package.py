"""`sagittal package`: a bundle becomes one file, or such a file a folder again."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter


def package(
    bundle: Path,
    /,
    *,
    out: Path | None = None,
    to_folder: Annotated[Path | None, Parameter(name="--unpack")] = None,
) -> int:
    """Make one file of a bundle, which every command takes in place of the folder; or unpack such a file.

    Args:
        bundle: folder that `sagittal train` wrote; with --unpack, a package
        out: the file to write, for example liver.sagittal
        to_folder: unpack into this new folder instead; every byte is verified first
    """
    from sagittal.bundle import pack, unpack
    from sagittal.errors import BundleError

    if (out is None) == (to_folder is None):
        raise BundleError(
            f"{bundle}: say what to do with it. Expected either --out FILE.sagittal or --unpack FOLDER.", code="usage"
        )
    if out is not None:
        file = pack(bundle, out)
        print(f"package: {file} ({file.stat().st_size / 1e6:.1f} MB)")
    else:
        assert to_folder is not None
        print(f"bundle: {unpack(bundle, to_folder)}")
    return 0
