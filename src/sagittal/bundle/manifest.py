"""manifest.json: which files a bundle has, with the size and SHA-256 of each, so that a changed byte is refused.

A bundle is a folder:

    manifest.json               this file; it lists all others and carries a hash of itself
    plan.json                   the Plan
    metrics.json                how the weights were validated
    MODEL_CARD.md               the same for people
    weights/fold_N.safetensors  one per fold, or weights/all.safetensors
    low/plan.json               where there is a second, faster model that sees less: its plan
    low/weights/...             and its weights, named as above

Nothing else may lie in it: no link, no further file, no path that leads out.
"""

from __future__ import annotations

import hashlib
import json
import re
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from sagittal.errors import BundleError, PlanError
from sagittal.plan.base import Frozen, canonical_json

FORMAT = "sagittal-bundle"
SCHEMA_VERSION = 1
MANIFEST = "manifest.json"
PLAN = "plan.json"
METRICS = "metrics.json"
MODEL_CARD = "MODEL_CARD.md"
WEIGHTS_FOLDER = "weights"
WEIGHTS_ENDING = ".safetensors"
LOW = "low/"
"""What begins the paths of a second model, which sees scans at a coarser spacing."""
_FIXED_FILES = frozenset({PLAN, METRICS, MODEL_CARD})
_WEIGHTS_NAME = re.compile(r"all|fold_(0|[1-9][0-9]{0,3})", flags=re.ASCII)
_READ_BYTES = 4 << 20
_ASK_AGAIN = "Copy or download the bundle again."

Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class FileEntry(Frozen):
    """Size and hash of one file."""

    size_bytes: Annotated[int, Field(ge=0)]
    sha256: Sha256


class Manifest(Frozen):
    """The list of a bundle's files; `manifest_sha256` is taken over all other fields."""

    format: Literal["sagittal-bundle"] = "sagittal-bundle"
    schema_version: Literal[1] = 1
    sagittal_version: str
    """The version that wrote the bundle."""
    created: str
    """Date and time, UTC, ISO 8601."""
    files: dict[str, FileEntry]
    """By path relative to the bundle, with forward slashes."""
    manifest_sha256: Sha256

    @model_validator(mode="after")
    def _check(self) -> Self:
        for name in self.files:
            own = name.removeprefix(LOW)
            if name not in _FIXED_FILES and weights_name(own) is None and name != f"{LOW}{PLAN}":
                raise ValueError(
                    f"file '{name}' has no place in a bundle (known: {', '.join(sorted(_FIXED_FILES))}, "
                    f"{WEIGHTS_FOLDER}/all{WEIGHTS_ENDING}, {WEIGHTS_FOLDER}/fold_N{WEIGHTS_ENDING})"
                )
        absent = _FIXED_FILES - self.files.keys()
        if absent:
            raise ValueError(f"lists no {', '.join(sorted(absent))}")
        if not self.weight_names:
            raise ValueError("lists no weights")
        if bool(self.low_weight_names) != (f"{LOW}{PLAN}" in self.files):
            raise ValueError(f"lists {LOW}{PLAN} without weights in {LOW}{WEIGHTS_FOLDER}, or these without their plan")
        return self

    @property
    def weight_names(self) -> tuple[str, ...]:
        """Names of the weights, `fold_0`, `fold_1`, ... by number, or `all`."""
        return _weight_names(self.files)

    @property
    def low_weight_names(self) -> tuple[str, ...]:
        """The same of the second model; empty where there is none."""
        return _weight_names(path.removeprefix(LOW) for path in self.files if path.startswith(LOW))


def _weight_names(paths: Iterable[str]) -> tuple[str, ...]:
    names = [name for path in paths if (name := weights_name(path)) is not None]
    return tuple(sorted(names, key=lambda name: (len(name), name)))


def make_manifest(files: dict[str, FileEntry], *, sagittal_version: str, created: str) -> Manifest:
    """Return a manifest of `files` that carries its own hash."""
    draft = Manifest(sagittal_version=sagittal_version, created=created, files=files, manifest_sha256="0" * 64)
    return draft.replace(manifest_sha256=_own_hash(draft))


def weights_path(name: str) -> str:
    """Return the path inside a bundle of the weights called `name` (`all` or `fold_N`)."""
    if not _WEIGHTS_NAME.fullmatch(name):
        raise BundleError(f"'{name}' is no name for weights. Expected 'all' or 'fold_N' with N = 0, 1, 2, ...")
    return f"{WEIGHTS_FOLDER}/{name}{WEIGHTS_ENDING}"


def weights_name(path: str) -> str | None:
    """Return the name of the weights at `path` inside a bundle, None where it is no path of weights."""
    if not path.startswith(f"{WEIGHTS_FOLDER}/") or not path.endswith(WEIGHTS_ENDING):
        return None
    name = path.removeprefix(f"{WEIGHTS_FOLDER}/").removesuffix(WEIGHTS_ENDING)
    return name if _WEIGHTS_NAME.fullmatch(name) else None


def looks_like_bundle(path: Path) -> bool:
    """Whether `path` is a folder that claims to be a bundle, whole or not; nothing is verified."""
    try:
        return bool(_parse(_read_own(path), str(path))["format"] == FORMAT)
    except (BundleError, KeyError):
        return False


def read_manifest(folder: Path) -> Manifest:
    """Read and check manifest.json of `folder`, but none of the files that it lists.

    Raises:
        BundleError: no bundle, one of a newer version, or a manifest that is not as it was written.
    """
    return parse_manifest(_read_own(folder), source=str(folder / MANIFEST))


def parse_manifest(raw: bytes, *, source: str) -> Manifest:
    """Check the bytes of a manifest.json; messages name `source`.

    Raises:
        BundleError: no manifest, one of a newer version, or one that is not as it was written.
    """
    tree = _parse(raw, source)
    if tree.get("format") != FORMAT:
        raise BundleError(
            f"{source}: the format is {tree.get('format')!r}, expected '{FORMAT}'. Not a Sagittal bundle."
        )
    version = tree.get("schema_version")
    if isinstance(version, int) and version > SCHEMA_VERSION:
        raise BundleError(
            f"{source}: schema_version {version} is newer than {SCHEMA_VERSION}, the newest that this version reads "
            f"(written by sagittal {tree.get('sagittal_version', '?')}). Update sagittal.",
            code="bundle_too_new",
        )
    try:
        manifest = Manifest.from_json(raw, source=source)
    except PlanError as error:
        raise BundleError(f"{error.message} {_ASK_AGAIN}") from None
    # The text itself is compared too, so that no byte of this file can change unseen.
    if manifest.manifest_sha256 != _own_hash(manifest) or raw != manifest.to_json().encode():
        raise BundleError(
            f"{source}: changed since it was written (its own hash differs). {_ASK_AGAIN}", code="changed"
        )
    return manifest


def verify_files(folder: Path, manifest: Manifest) -> None:
    """Compare every file below `folder` with `manifest`.

    Raises:
        BundleError: a file is missing, too many, a link, or differs in size or hash.
    """
    present = set(walk_files(folder))
    expected = {MANIFEST, *manifest.files}
    for name in sorted(expected - present):
        raise BundleError(f"{folder / name}: missing, but the manifest lists it. {_ASK_AGAIN}", code="missing_file")
    for name in sorted(present - expected):
        raise BundleError(
            f"{folder / name}: the manifest does not list it. Move it out of the bundle.", code="unlisted_file"
        )
    for name, entry in manifest.files.items():
        verify_file(folder / name, entry)


def verify_file(path: Path, entry: FileEntry) -> None:
    """Raise BundleError where the file's size or hash is not that of `entry`."""
    digest = hashlib.sha256()
    size = 0
    try:
        with path.open("rb") as file:
            while block := file.read(_READ_BYTES):
                digest.update(block)
                size += len(block)
    except OSError as error:
        raise BundleError(f"{path}: can't be read ({error.strerror}). {_ASK_AGAIN}") from None
    _compare(path, size, digest.hexdigest(), entry)


def read_verified(path: Path, entry: FileEntry) -> bytes:
    """Return the file's bytes after comparing these very bytes with `entry`."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise BundleError(f"{path}: can't be read ({error.strerror}). {_ASK_AGAIN}") from None
    _compare(path, len(content), hashlib.sha256(content).hexdigest(), entry)
    return content


def entry_of(content: bytes) -> FileEntry:
    """Return size and hash of `content`."""
    return FileEntry(size_bytes=len(content), sha256=hashlib.sha256(content).hexdigest())


def walk_files(folder: Path) -> Iterator[str]:
    """Yield the relative path, with forward slashes, of every file below `folder`.

    Raises:
        BundleError: a link or something that is neither file nor folder.
    """
    pending = [folder]
    while pending:
        try:
            children = sorted(pending.pop().iterdir())
            modes = [child.lstat().st_mode for child in children]
        except OSError as error:
            raise BundleError(f"{folder}: can't be listed ({error.strerror}).") from None
        for child, mode in zip(children, modes, strict=True):
            if stat.S_ISDIR(mode):
                pending.append(child)
            elif stat.S_ISREG(mode):
                yield child.relative_to(folder).as_posix()
            else:
                kind = "a symbolic link" if stat.S_ISLNK(mode) else "no ordinary file"
                raise BundleError(
                    f"{child}: is {kind}; a bundle holds ordinary files only. {_ASK_AGAIN}", code="no_ordinary_file"
                )


def _compare(path: Path, size: int, sha256: str, entry: FileEntry) -> None:
    if size != entry.size_bytes:
        what = f"has {size} bytes, the manifest says {entry.size_bytes}"
    elif sha256 != entry.sha256:
        what = f"changed since it was written (SHA-256 {sha256[:12]}..., the manifest says {entry.sha256[:12]}...)"
    else:
        return
    raise BundleError(f"{path}: {what}. {_ASK_AGAIN}", code="changed")


def _own_hash(manifest: Manifest) -> str:
    return hashlib.sha256(canonical_json(manifest.replace(manifest_sha256="0" * 64)).encode()).hexdigest()


def _read_own(folder: Path) -> bytes:
    source = folder / MANIFEST
    if not folder.is_dir():
        what = "a file, not a folder" if folder.exists() else "does not exist"
        raise BundleError(f"{folder}: {what}. Expected a bundle, the folder that 'sagittal train' writes.")
    if source.is_symlink() or not source.is_file():
        raise BundleError(f"{folder}: holds no {MANIFEST}. Expected a bundle, the folder that 'sagittal train' writes.")
    return _read_small(source)


def _parse(raw: bytes, source: str) -> dict[str, Any]:
    try:
        tree = json.loads(raw)
    except (ValueError, RecursionError):
        raise BundleError(f"{source}: is not JSON. {_ASK_AGAIN}", code="changed") from None
    if not isinstance(tree, dict):
        raise BundleError(f"{source}: expected a JSON object. {_ASK_AGAIN}", code="changed")
    return tree


def _read_small(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise BundleError(f"{path}: can't be read ({error.strerror}).") from None
