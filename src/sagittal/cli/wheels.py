"""Collect wheels with pip: of the versions installed here, for this machine or another kind of machine.

pip decides by the machine it runs on which requirements count (`; sys_platform == "win32"`), even where it fetches for
another one. So what the other machine needs besides is found in the metadata of the wheels, until nothing is missing.
"""

from __future__ import annotations

import platform as this
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from email.parser import HeaderParser
from importlib.metadata import distributions
from pathlib import Path
from zipfile import BadZipFile, ZipFile

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from sagittal.errors import PlanError, ResourceError

_ROUNDS = 10
_TOLD_LINES = 12


@dataclass(frozen=True)
class Machine:
    """What the wheels are for.

    Attributes:
        python: its Python, `3.12`.
        tags: the platforms in the names of wheels that fit; none where it is like this machine.
        markers: what requirements may ask of it, beside the version of Python.
    """

    python: str
    tags: tuple[str, ...] = ()
    markers: tuple[tuple[str, str], ...] = ()

    @property
    def environment(self) -> dict[str, str]:
        """What requirements are decided by, where it is not this machine."""
        version = {"python_version": self.python, "python_full_version": f"{self.python}.0"}
        implementation = {"implementation_name": "cpython", "platform_python_implementation": "CPython"}
        return {**version, **implementation, "implementation_version": f"{self.python}.0", **dict(self.markers)}


_GLIBC = tuple(f"manylinux_2_{minor}_x86_64" for minor in (28, 27, 26, 24, 17, 12, 5))


def _markers(sys_platform: str, system: str, os_name: str, processor: str) -> tuple[tuple[str, str], ...]:
    names = ("sys_platform", "platform_system", "os_name", "platform_machine")
    return tuple(zip(names, (sys_platform, system, os_name, processor), strict=True))


PLATFORMS = {
    "linux": (
        (*_GLIBC, "manylinux2014_x86_64", "manylinux2010_x86_64", "manylinux1_x86_64", "linux_x86_64"),
        _markers("linux", "Linux", "posix", "x86_64"),
    ),
    "windows": (("win_amd64",), _markers("win32", "Windows", "nt", "AMD64")),
    "macos": (
        (*(f"macosx_{major}_0_arm64" for major in (14, 13, 12, 11)), "macosx_11_0_universal2"),
        _markers("darwin", "Darwin", "posix", "arm64"),
    ),
}
"""Of each name: the wheels that fit, and what requirements may ask of it."""


def machine(platform: str | None, python: str | None) -> Machine:
    """Return what the wheels are for; without arguments a machine like this one.

    Raises:
        PlanError: the version of Python is none, or older than the oldest that Sagittal runs on.
    """
    own = f"{sys.version_info.major}.{sys.version_info.minor}"
    version = python or own
    parts = version.split(".")
    if len(parts) != 2 or not all(part.isdecimal() for part in parts) or (int(parts[0]), int(parts[1])) < (3, 11):
        raise PlanError(f"--python {version}: expected 3.11 or newer, as two numbers, for example 3.12.", code="python")
    if platform is None and version == own:
        return Machine(own)
    name = platform or {"Linux": "linux", "Windows": "windows", "Darwin": "macos"}.get(this.system(), "")
    if name not in PLATFORMS:
        raise PlanError(
            f"--python {version} on {this.system()}: expected --platform with it, one of {', '.join(PLATFORMS)}."
        )
    tags, markers = PLATFORMS[name]
    return Machine(version, tags, markers)


def collect(folder: Path, own_wheel: Path, extras: Sequence[str], target: Machine, constraints: Sequence[str]) -> None:
    """Put wheels of all that `own_wheel` with `extras` needs into `folder`, where it lies already.

    Args:
        folder: the wheels.
        own_wheel: Sagittal's.
        extras: of Sagittal.
        target: what the wheels are for.
        constraints: lines `name==version`.

    Raises:
        ResourceError: pip is missing, or can't get something; the message has its words.
    """
    pinned = folder / ".constraints.txt"
    pinned.write_text("".join(f"{line}\n" for line in constraints), encoding="utf-8")
    try:
        wanted = f"{own_wheel}[{','.join(extras)}]" if extras else str(own_wheel)
        if not target.tags:
            _pip(["wheel", "--wheel-dir", str(folder), "--constraint", str(pinned), wanted])
            return
        # The wheel itself is read here, for its requirements may differ where the wheels will be used.
        missing = missing_requirements(folder, extras, target.environment)
        for _ in range(_ROUNDS):
            if not missing:
                return
            chosen = [part for tag in target.tags for part in ("--platform", tag)]
            version = ["--python-version", target.python, "--implementation", "cp", "--only-binary=:all:"]
            _pip(["download", "--dest", str(folder), "--constraint", str(pinned), *chosen, *version, *missing])
            missing = missing_requirements(folder, extras, target.environment)
        raise ResourceError(f"pip does not get {', '.join(missing)}, though it says so. Update pip.", code="pip")
    finally:
        pinned.unlink(missing_ok=True)


def installed_versions() -> list[str]:
    """Return `name==version` of every package that is installed here, but for Sagittal itself.

    What follows a `+` names a build (2.9.1+cpu), which not every index has, and is left out.
    """
    found = {}
    for package in distributions():
        name = package.metadata["Name"]
        if name and canonicalize_name(name) != "sagittal":
            found[canonicalize_name(name)] = package.version.partition("+")[0]
    return [f"{name}=={version}" for name, version in sorted(found.items())]


def missing_requirements(folder: Path, extras: Sequence[str], environment: Mapping[str, str]) -> list[str]:
    """Return what Sagittal with `extras` needs in `environment`, however indirectly, and no wheel of `folder` is."""
    wheels = dict(map(_requirements_of, sorted(folder.glob("*.whl"))))
    pending = [("sagittal", extra) for extra in ("", *extras)]
    seen, missing = set(pending), {}
    while pending:
        name, extra = pending.pop()
        for requirement in wheels[name]:
            marker = requirement.marker
            if marker is not None and not marker.evaluate({**environment, "extra": extra}):
                continue
            needed = canonicalize_name(requirement.name)
            if needed not in wheels:
                chosen = f"[{','.join(sorted(requirement.extras))}]" if requirement.extras else ""
                missing[needed] = f"{requirement.name}{chosen}{requirement.specifier}"
                continue
            new = {(needed, each) for each in ("", *requirement.extras)} - seen
            seen |= new
            pending.extend(sorted(new))
    return sorted(missing.values())


def _requirements_of(wheel: Path) -> tuple[str, list[Requirement]]:
    try:
        with ZipFile(wheel) as archive:
            name = next(name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
            headers = HeaderParser().parsestr(archive.read(name).decode())
    except (OSError, BadZipFile, StopIteration) as error:
        raise ResourceError(f"{wheel}: not a wheel that can be read ({error}). Remove it and try again.") from None
    return canonicalize_name(headers["Name"]), [Requirement(line) for line in headers.get_all("Requires-Dist", [])]


def _pip(arguments: Sequence[str]) -> None:
    """Run this Python's pip; where its packages come from, its own settings say."""
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input", *arguments]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode == 0:
        return
    if "No module named pip" in done.stdout:
        raise ResourceError(
            f"{sys.executable}: has no pip, which fetches the wheels. Install it: {sys.executable} -m ensurepip",
            code="pip",
        )
    told = [line.strip() for line in done.stdout.splitlines() if line.strip()]
    # What conflicts stands some lines above the last one.
    raise ResourceError(
        f"pip can't get all wheels. It says: {' / '.join(told[-_TOLD_LINES:])}. The versions wanted are those "
        "installed here. Check the network and pip's settings (pip config list); for another kind of machine, run this "
        "command on a machine of that kind.",
        code="pip",
    )
