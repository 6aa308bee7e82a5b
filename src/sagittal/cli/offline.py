"""`sagittal offline`: a folder that installs Sagittal, and brings models along, on a machine without network."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter


def offline(
    folder: Path,
    /,
    *,
    bundle: Annotated[list[Path] | None, Parameter(negative="", help="bundle to bring along; may be repeated")] = None,
    extra: Annotated[
        list[str] | None, Parameter(negative="", help="an extra to install, openvino by default; may be repeated")
    ] = None,
    platform: Literal["linux", "windows", "macos"] | None = None,
    python: str | None = None,
) -> int:
    """Collect the wheels of Sagittal and of all it needs, bundles, checksums and an install script.

    The versions are those that are installed here. pip fetches them, from where its own settings say.

    Args:
        folder: the folder to make; it must not exist or be empty
        platform: what the other machine is, if not like this one: linux and windows with x86-64, macos with ARM
        python: Python there, for example 3.12; by default as here
    """
    from sagittal.cli.offline_folder import make_offline_folder

    made = make_offline_folder(
        folder,
        bundles=bundle or [],
        extras=extra or ["openvino"],
        platform=platform,
        python=python,
        say=lambda line: print(line, flush=True),
    )
    print(f"{folder}: {made.wheels} wheels, {made.size / 1e6:.0f} MB. Copy it whole; there: {made.how}")
    return 0
