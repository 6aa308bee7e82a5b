"""A plain list of bundles that others can fetch: one JSON file, beside the packages or with their addresses.

    {
      "format": "sagittal-models",
      "schema_version": 1,
      "models": [{"name": "spleen", "version": "1", "file": "spleen-1.sagittal", "sha256": ..., "bytes": ..., ...}]
    }

A hospital puts index and packages into a shared folder or on its web server. The hash of each package stands in the
index, so a package may lie anywhere; who trusts the index gets the bytes that its maker listed.
"""

from __future__ import annotations

import filecmp
import hashlib
import json
import re
import shutil
from pathlib import Path, PurePosixPath
from typing import Annotated, Literal, Self
from urllib.parse import urlsplit

from pydantic import Field, ValidationError, field_validator, model_validator

from sagittal.bundle.manifest import Sha256
from sagittal.bundle.read import Bundle
from sagittal.errors import BundleError, PlanError, ResourceError, did_you_mean
from sagittal.plan.base import Frozen, cannot_write, describe_validation_error

FORMAT = "sagittal-models"
SCHEMA_VERSION = 1
WEB = ("https", "http")
_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._+-]*$"
_RESERVED = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?", flags=re.IGNORECASE)
"""Names that Windows keeps for devices."""

Word = Annotated[str, Field(pattern=_PATTERN, max_length=100)]


class ModelEntry(Frozen):
    """One package."""

    name: Word
    version: Word
    file: Annotated[str, Field(min_length=1)]
    """A path relative to the index, with forward slashes, or an address (https, http)."""
    sha256: Sha256
    bytes: Annotated[int, Field(gt=0)]
    network: str
    """Name of the network, for example mednext-s."""
    channels: tuple[str, ...]
    """What a scan must have, in order."""
    labels: tuple[str, ...]
    licence: str = "unknown"
    """Of the weights, in the words of whoever made the list."""
    dice: Annotated[float, Field(ge=0, le=1)] | None = None
    """Mean over classes as the bundle's metrics tell it; None where it was not validated."""
    validation: str = ""
    """On which cases that was measured."""

    @field_validator("file")
    @classmethod
    def _stays_beside_the_index(cls, file: str) -> str:
        address = urlsplit(file)
        if address.scheme in WEB and address.netloc:
            return file
        path = PurePosixPath(file)
        if path.is_absolute() or ".." in path.parts or "\\" in file or ":" in file:
            raise ValueError("expected a path below the index, with forward slashes, or an https:// or http:// address")
        if any(_RESERVED.fullmatch(part) for part in path.parts):
            raise ValueError("a name that Windows keeps for devices")
        return file

    @property
    def is_address(self) -> bool:
        """Whether `file` is an address on the web, not a path."""
        return urlsplit(self.file).scheme in WEB

    @property
    def file_name(self) -> str:
        """What the fetched package is called; it comes from name and version, not from an address."""
        last = urlsplit(self.file).path if self.is_address else self.file
        return f"{self.name}-{self.version}{PurePosixPath(last).suffix}"

    def __str__(self) -> str:
        """Return `name version`."""
        return f"{self.name} {self.version}"


class ModelIndex(Frozen):
    """The list, in the order in which its entries were added."""

    format: Literal["sagittal-models"] = "sagittal-models"
    schema_version: Literal[1] = 1
    models: tuple[ModelEntry, ...] = ()

    @model_validator(mode="after")
    def _unique(self) -> Self:
        seen = [(entry.name.lower(), entry.version.lower()) for entry in self.models]
        twice = sorted({f"{name} {version}" for name, version in seen if seen.count((name, version)) > 1})
        if twice:
            raise ValueError(f"listed twice: {', '.join(twice)}")
        return self

    def entry(self, wanted: str) -> ModelEntry:
        """Return the entry called `NAME` (the one added last) or `NAME==VERSION`.

        Raises:
            BundleError: there is none.
        """
        name, _, version = wanted.partition("==")
        named = [entry for entry in self.models if entry.name == name]
        if not named:
            known = did_you_mean(name, {entry.name for entry in self.models}) if self.models else " The list is empty."
            raise BundleError(f"'{name}' is not in the list of models.{known}", code="unknown_model")
        fitting = [entry for entry in named if version in ("", entry.version)]
        if not fitting:
            raise BundleError(
                f"'{name}' has no version '{version}'. Versions: {', '.join(entry.version for entry in named)}.",
                code="unknown_model",
            )
        return fitting[-1]


def parse_index(content: bytes, source: str) -> ModelIndex:
    """Return the list that `content` holds.

    Raises:
        BundleError: it is no such list, or a newer one than this version reads; the message names `source`.
    """
    try:
        tree = json.loads(content)
    except (ValueError, RecursionError):
        tree = None
    if not isinstance(tree, dict) or tree.get("format") != FORMAT:
        raise BundleError(
            f'{source}: not a list of models. Expected JSON with "format": "{FORMAT}", as \'sagittal models add\' '
            "writes it. Check the path.",
            code="no_index",
        )
    version = tree.get("schema_version")
    if isinstance(version, int) and version > SCHEMA_VERSION:
        raise BundleError(
            f"{source}: schema_version {version} is newer than {SCHEMA_VERSION}, the newest that this version of "
            "sagittal reads. Update sagittal.",
            code="index_too_new",
        )
    try:
        return ModelIndex.from_json(content, source=source)
    except PlanError as error:
        raise BundleError(f"{error.message} Ask whoever keeps the list.", code="no_index") from None


def entry_of(
    bundle: Bundle,
    package: Path,
    *,
    name: str,
    version: str,
    file: str,
    licence: str | None = None,
) -> ModelEntry:
    """Return the entry of a packed bundle.

    Args:
        bundle: what is in the package.
        package: the file; its bytes are hashed.
        name: what the model is to be called in the list.
        version: of the model.
        file: where the package will be: a path relative to the index, or an address.
        licence: of the weights.

    Raises:
        BundleError: a name, version, path or licence that can't stand in an index.
        ResourceError: the package can't be read.
    """
    try:
        with package.open("rb") as content:
            sha256 = hashlib.file_digest(content, "sha256").hexdigest()
        size = package.stat().st_size
    except OSError as error:
        raise ResourceError(f"{package}: can't be read ({error.strerror}). Check the path.") from None
    dice, plan = bundle.metrics.get("mean_dice"), bundle.plan
    try:
        return ModelEntry(
            name=name,
            version=version,
            file=file,
            sha256=sha256,
            bytes=size,
            network=plan.network_name,
            channels=plan.dataset.channel_names,
            labels=tuple(label.name for label in plan.dataset.labels),
            licence=licence or "unknown",
            dice=float(dice) if isinstance(dice, int | float) else None,
            validation=str(bundle.metrics.get("validation", "")),
        )
    except ValidationError as error:
        raise BundleError(describe_validation_error(error, f"the entry of {package.name}"), code="bad_entry") from None


def with_entry(index: ModelIndex, entry: ModelEntry) -> ModelIndex:
    """Return the list with one more entry.

    Raises:
        BundleError: it lists this name and version already; letters of either case count as the same.
    """
    if any(str(listed).lower() == str(entry).lower() for listed in index.models):
        raise BundleError(
            f"{entry}: is in the list already, and what others may have fetched is never replaced. Give another "
            "--version.",
            code="exists",
        )
    return index.replace(models=(*index.models, entry))


def place_package(package: Path, target: Path) -> None:
    """Copy a package to `target` so that it appears whole or not at all; nothing else is ever overwritten.

    Raises:
        BundleError: something else is there.
        ResourceError: it can't be written.
    """
    if target.exists():
        if filecmp.cmp(target, package, shallow=False):
            return
        raise BundleError(f"{target}: exists, and is not overwritten. Give another --name or --version.", code="exists")
    part = target.with_name(f".{target.name}.part")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(package, part)
        part.replace(target)
    except OSError as error:
        raise cannot_write(target, error, code="disk") from None
    finally:
        part.unlink(missing_ok=True)
