"""Make a wheel of the Sagittal that is running, whether it was installed from an index, a wheel or a checkout.

Building from a checkout needs a compiler and a network, and an installed package has no source: so the wheel is packed
anew from the installed files and the installed metadata. The compiled kernels go along only to a machine like this one
(prediction through OpenVINO does not use them, and PyTorch does without them, slower).
"""

from __future__ import annotations

import base64
import hashlib
import sys
import sysconfig
import tomllib
import zipfile
from collections.abc import Iterator
from importlib.machinery import EXTENSION_SUFFIXES
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path

from packaging.requirements import Requirement

import sagittal
from sagittal.errors import ResourceError

_SOURCES = (".c", ".h")
_COMPILED = (".so", ".pyd", ".dylib")
_METADATA = ("METADATA", "entry_points.txt", "top_level.txt")
_DATE = (1980, 1, 1, 0, 0, 0)


def write_own_wheel(folder: Path, *, compiled: bool) -> Path:
    """Write a wheel of this package into `folder` and return it.

    Args:
        folder: where it goes.
        compiled: whether the compiled kernels go along; the wheel then fits this kind of machine only.

    Raises:
        ResourceError: the package runs from files that were never installed, or its metadata is of another state of the
            checkout.
    """
    installed = own_distribution()
    kernels = [path for path in _package_files() if _is_compiled_for_here(path)]
    compiled = compiled and bool(kernels)
    tag = _own_tag() if compiled else "py3-none-any"
    stem = f"sagittal-{installed.version}"
    target = folder / f"{stem}-{tag}.whl"
    content = {
        f"{stem}.dist-info/WHEEL": (
            f"Wheel-Version: 1.0\nGenerator: sagittal {sagittal.__version__}\n"
            f"Root-Is-Purelib: {str(not compiled).lower()}\nTag: {tag}\n"
        ).encode()
    }
    root = Path(sagittal.__file__).parent
    for path in _package_files():
        if path in kernels and not compiled:
            continue
        content[f"sagittal/{path.relative_to(root).as_posix()}"] = path.read_bytes()
    for name in _METADATA:
        text = installed.read_text(name)
        if text is not None:
            content[f"{stem}.dist-info/{name}"] = text.encode()
    for file in installed.files or ():
        if "licenses" in file.parts:
            content[f"{stem}.dist-info/licenses/{file.name}"] = Path(str(file.locate())).read_bytes()
    _write_zip(target, content, f"{stem}.dist-info/RECORD")
    return target


def own_distribution() -> Distribution:
    """Return the metadata that this package was installed with.

    Raises:
        ResourceError: there is none, or it is older than the checkout's pyproject.toml.
    """
    try:
        installed = distribution("sagittal")
    except PackageNotFoundError:
        raise ResourceError(
            "sagittal is not installed here, only its files are found. Expected an installed package: pip install it, "
            "from its folder for example with pip install -e .",
            code="not_installed",
        ) from None
    project = Path(sagittal.__file__).parents[2] / "pyproject.toml"
    if project.is_file() and _declared(project) not in (None, _requirements(installed)):
        raise ResourceError(
            f"{project}: names other dependencies than those that sagittal was installed with. Install it again: "
            f"pip install -e {project.parent}",
            code="stale_metadata",
        )
    return installed


def _declared(project: Path) -> set[str] | None:
    """Return the dependencies in a checkout's pyproject.toml, None where it is another project's."""
    declared = tomllib.loads(project.read_text(encoding="utf-8")).get("project", {})
    if declared.get("name") != "sagittal":
        return None
    extras = declared.get("optional-dependencies", {})
    return {_key(line, "") for line in declared.get("dependencies", [])} | {
        _key(line, extra) for extra, lines in extras.items() for line in lines
    }


def _requirements(installed: Distribution) -> set[str]:
    found = set()
    for line in installed.requires or []:
        requirement = Requirement(line)
        text = "" if requirement.marker is None else str(requirement.marker)
        extra = text.rpartition('extra == "')[2].rstrip('"') if "extra ==" in text else ""
        found.add(_key(line.partition(";")[0], extra))
    return found


def _key(requirement: str, extra: str) -> str:
    parsed = Requirement(requirement)
    return f"{parsed.name.lower()}{sorted(parsed.extras)}{parsed.specifier}@{extra}"


def _package_files() -> Iterator[Path]:
    root = Path(sagittal.__file__).parent
    for path in sorted(root.rglob("*")):
        skipped = "__pycache__" in path.parts or path.name.startswith(".") or path.suffix in _SOURCES
        foreign = path.suffix in _COMPILED and not _is_compiled_for_here(path)
        if path.is_file() and not skipped and not foreign:
            yield path


def _is_compiled_for_here(path: Path) -> bool:
    # The whole ending: other Pythons' files end with .so too, which is an ending of its own.
    return path.name[path.name.find(".") :] in EXTENSION_SUFFIXES


def _own_tag() -> str:
    version = f"cp{sys.version_info.major}{sys.version_info.minor}"
    platform = sysconfig.get_platform().replace("-", "_").replace(".", "_")
    return f"{version}-{version}-{platform}"


def _write_zip(target: Path, content: dict[str, bytes], record_name: str) -> None:
    """Write the files of a wheel and its list of them, so that the same files give the same bytes."""
    lines = []
    with zipfile.ZipFile(target, "x", zipfile.ZIP_DEFLATED) as archive:
        for name, data in content.items():
            digest = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
            lines.append(f"{name},sha256={digest},{len(data)}\n")
            _add(archive, name, data)
        _add(archive, record_name, "".join([*lines, f"{record_name},,\n"]).encode())


def _add(archive: zipfile.ZipFile, name: str, data: bytes) -> None:
    entry = zipfile.ZipInfo(name, _DATE)
    entry.external_attr = 0o644 << 16
    entry.compress_type = zipfile.ZIP_DEFLATED
    archive.writestr(entry, data)
