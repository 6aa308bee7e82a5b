"""Assemble the folder of `sagittal offline`: wheels, bundles, checksums, scripts and a page that says what to do."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from sagittal.bundle import read_bundle
from sagittal.cli.own_wheel import own_distribution, write_own_wheel
from sagittal.cli.wheels import Machine, collect, installed_versions, machine
from sagittal.data.download import sha256_of
from sagittal.errors import BundleError, PlanError, ResourceError, did_you_mean
from sagittal.plan.base import cannot_write

CHECKSUMS = "SHA256SUMS"
_KERNELS_FOR = {"torch", "onnx", "baselines"}
"""Extras that bring PyTorch, which the compiled kernels are for."""


@dataclass(frozen=True)
class OfflineFolder:
    """What was made: the number of wheels, bytes in all, and what to do on the other machine."""

    wheels: int
    size: int
    how: str


def make_offline_folder(
    folder: Path,
    *,
    bundles: Sequence[Path],
    extras: Sequence[str],
    platform: str | None,
    python: str | None,
    say: Callable[[str], None],
) -> OfflineFolder:
    """Make `folder`, which appears whole or not at all.

    Args:
        folder: must not exist, or be empty.
        bundles: folders or packages to bring along; each is verified.
        extras: of Sagittal, to install.
        platform, python: see `wheels.machine`.
        say: receives lines for a person.

    Raises:
        PlanError: an unknown extra, platform or version of Python, or two bundles of one name.
        BundleError: a bundle is damaged.
        ResourceError: the folder is taken or can't be written, or pip can't get a wheel.
    """
    target = machine(platform, python)
    _require_extras(extras)
    names = [path.resolve().name for path in bundles]
    if len({name.lower() for name in names}) < len(names):
        raise PlanError(f"--bundle: two bundles have one name ({', '.join(names)}). Rename one of them.")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ResourceError(f"{folder}: exists and is not empty. Choose another folder.", code="exists")
    try:
        parent = folder.resolve().parent
        parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=parent, prefix=f".{folder.name}.", suffix=".part") as scratch:
            staging = Path(scratch) / "folder"
            made = _fill(staging, list(zip(names, bundles, strict=True)), extras, target, say)
            if folder.exists():
                folder.rmdir()
            staging.rename(folder)
    except OSError as error:
        raise cannot_write(folder, error, code="disk") from None
    return made


def _fill(
    staging: Path,
    bundles: Sequence[tuple[str, Path]],
    extras: Sequence[str],
    target: Machine,
    say: Callable[[str], None],
) -> OfflineFolder:
    for name, source in bundles:
        _bring_along(source, staging / "bundles" / name)
        say(f"bundle: {name}, verified")
    wheels = staging / "wheels"
    wheels.mkdir(parents=True)
    own = write_own_wheel(wheels, compiled=not target.tags and bool(_KERNELS_FOR & set(extras)))
    say(f"wheels: {own.name}; pip fetches the others")
    collect(wheels, own, extras, target, installed_versions())
    version = own_distribution().version
    wanted = f"sagittal[{','.join(extras)}]=={version}" if extras else f"sagittal=={version}"
    for name, text in _texts(wanted, target.python, [name for name, _ in bundles]).items():
        ends = "\r\n" if name.endswith(".bat") else "\n"
        (staging / name).write_text(text, encoding="ascii", newline=ends)
    (staging / "install.sh").chmod(0o755)
    files = sorted(path for path in staging.rglob("*") if path.is_file())
    lines = [f"{sha256_of(path)}  {path.relative_to(staging).as_posix()}\n" for path in files]
    (staging / CHECKSUMS).write_text("".join(lines), encoding="utf-8", newline="\n")
    how = "install.bat" if ("os_name", "nt") in target.markers else "sh install.sh"
    return OfflineFolder(len(list(wheels.glob("*.whl"))), sum(path.stat().st_size for path in files), how)


def _require_extras(extras: Sequence[str]) -> None:
    known = own_distribution().metadata.get_all("Provides-Extra") or []
    for extra in extras:
        if extra not in known:
            raise PlanError(f"--extra {extra}: no such extra.{did_you_mean(extra, known)}", code="unknown_extra")


def _bring_along(source: Path, target: Path) -> None:
    """Copy a bundle, and verify the copy, not the source: what counts is what arrives."""
    target.parent.mkdir(exist_ok=True, parents=True)
    if source.is_dir():
        shutil.copytree(source, target, symlinks=True)
    elif source.is_file():
        shutil.copyfile(source, target)
    else:
        raise BundleError(f"{source}: does not exist. Expected a bundle, a folder or a package.")
    try:
        read_bundle(target)
    except BundleError as error:
        raise BundleError(error.message.replace(str(target), str(source)), code=error.code) from None


def _texts(wanted: str, python: str, bundles: Sequence[str]) -> dict[str, str]:
    """Return the scripts and README.txt by name; they are ASCII, for any terminal."""
    shown = "\n".join(f"    bundles/{ascii(name)[1:-1]}" for name in bundles) or "    (none)"
    first = f"bundles/{ascii(bundles[0])[1:-1]}" if bundles else "BUNDLE"
    values = {"WANTED": wanted, "PYTHON": python, "BUNDLES": shown, "FIRST": first, "CHECKSUMS": CHECKSUMS}
    values["MAJOR_MINOR"] = f"({python.replace('.', ', ')})"
    texts = {"install.sh": _INSTALL_SH, "install.bat": _INSTALL_BAT, "verify.py": _VERIFY, "README.txt": _README}
    for name, text in texts.items():
        for key, value in values.items():
            text = text.replace(f"@{key}@", value)
        texts[name] = text
    return texts


_INSTALL_SH = """\
#!/bin/sh
# Install Sagittal from this folder, without network, into the folder given (by default venv beside this script).
set -eu
here=$(CDPATH= cd -- "$(dirname -- "$0")" && pwd)
target=${1:-"$here/venv"}
python=${PYTHON:-python3}
"$python" -c 'import sys; sys.exit(sys.version_info[:2] != @MAJOR_MINOR@)' || {
    echo "install: Python @PYTHON@ is needed. Set PYTHON=/path/to/python@PYTHON@." >&2
    exit 1
}
"$python" "$here/verify.py"
"$python" -m venv "$target"
export PIP_DISABLE_PIP_VERSION_CHECK=1
"$target/bin/python" -m pip install --quiet --no-index --find-links "$here/wheels" '@WANTED@'
"$target/bin/sagittal" --version
echo "installed: $target/bin/sagittal"
"""
_INSTALL_BAT = """\
@echo off
rem Install Sagittal from this folder, without network, into the folder given (by default venv beside this script).
setlocal
set "target=%~1"
if "%target%"=="" set "target=%~dp0venv"
if "%PYTHON%"=="" set "PYTHON=py -@PYTHON@"
%PYTHON% -c "import sys; sys.exit(sys.version_info[:2] != @MAJOR_MINOR@)" || (
    echo install: Python @PYTHON@ is needed. Install it, or set PYTHON to its python.exe. 1>&2
    exit /b 1
)
%PYTHON% "%~dp0verify.py" || exit /b 1
%PYTHON% -m venv "%target%" || exit /b 1
set "scripts=%target%\\Scripts"
set PIP_DISABLE_PIP_VERSION_CHECK=1
"%scripts%\\python.exe" -m pip install --quiet --no-index --find-links "%~dp0wheels" "@WANTED@" || exit /b 1
"%scripts%\\sagittal.exe" --version || exit /b 1
echo installed: %scripts%\\sagittal.exe
"""
_VERIFY = '''\
"""Compare every file of this folder with @CHECKSUMS@; the standard library suffices."""

import hashlib
import pathlib
import sys

folder = pathlib.Path(__file__).resolve().parent
wrong = []
for line in (folder / "@CHECKSUMS@").read_text(encoding="utf-8").splitlines():
    expected, name = line.split("  ", 1)
    path = folder / name
    if not path.is_file():
        wrong.append(name + ": missing")
    elif hashlib.sha256(path.read_bytes()).hexdigest() != expected:
        wrong.append(name + ": changed")
if wrong:
    sys.exit("verify: " + "; ".join(wrong) + ". Copy the folder again.")
print("verify: every file is as it was made")
'''
_README = """\
Sagittal without a network
==========================

This folder installs @WANTED@ on a machine that has Python @PYTHON@ and no network.

    Linux, macOS:   sh install.sh
    Windows:        install.bat

Both compare every file with @CHECKSUMS@ first (python verify.py does only that), then make a virtual environment in the
folder venv, or in the folder that you name: sh install.sh /opt/sagittal. Nothing is fetched and nothing is sent.

Then:

    venv/bin/sagittal predict @FIRST@ SCAN --out FOLDER          (Windows: venv\\Scripts\\sagittal)

Bundles in this folder:

@BUNDLES@

What a bundle was made for and how well it does stands in its MODEL_CARD.md: for research use, not a medical device.
"""
