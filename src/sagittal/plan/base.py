"""The base of every value that flows through Sagittal: frozen, strict, printable, saveable, comparable."""

from __future__ import annotations

import errno
import json
import os
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any, ClassVar, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    SerializationInfo,
    SerializerFunctionWrapHandler,
    ValidationError,
    model_serializer,
)

from sagittal.errors import PlanError, ResourceError

Triple = tuple[int, int, int]
TripleMm = tuple[float, float, float]


EVERY_FIELD = "every field"
"""Pass it as `model_dump(context=...)` to get the fields that are left out otherwise."""


class Frozen(BaseModel):
    """A frozen pydantic model that refuses unknown fields, silent conversions, infinities and NaN."""

    model_config = ConfigDict(
        frozen=True,
        strict=True,
        extra="forbid",
        allow_inf_nan=False,
        validate_default=True,
        use_attribute_docstrings=True,
    )

    later_fields: ClassVar[tuple[str, ...]] = ()
    """Fields that earlier versions lacked. They are not written where they have their default, so that a value that
    uses none of them keeps its text and its hash, and the version that made it can read it."""

    @model_serializer(mode="wrap")
    def _leave_out_later_defaults(
        self, serialize: SerializerFunctionWrapHandler, info: SerializationInfo
    ) -> dict[str, Any]:
        tree: dict[str, Any] = serialize(self)
        if info.context == EVERY_FIELD:
            return tree
        fields = type(self).model_fields
        unused = {name for name in self.later_fields if getattr(self, name) == fields[name].default}
        return {name: value for name, value in tree.items() if name not in unused}

    def replace(self, **changes: Any) -> Self:
        """Return a copy with `changes`, validated as a whole (pydantic's `model_copy` skips validation)."""
        fields = {name: getattr(self, name) for name in type(self).model_fields}
        return type(self).model_validate({**fields, **changes})

    def to_json(self) -> str:
        """Return indented JSON; `from_json` gives back an equal value."""
        return self.model_dump_json(indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str | bytes, *, source: str = "JSON text") -> Self:
        """Parse `text`; raise PlanError that names `source` and the offending field."""
        try:
            return cls.model_validate_json(text)
        except ValidationError as error:
            raise PlanError(describe_validation_error(error, source)) from None

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> Self:
        """Read a JSON file; raise PlanError where it is missing, unreadable or invalid."""
        path = Path(path)
        try:
            text = path.read_bytes()
        except OSError as error:
            raise PlanError(f"{path}: can't be read ({error.strerror}). Expected a JSON file.") from None
        return cls.from_json(text, source=str(path))

    def write(self, path: str | os.PathLike[str]) -> Path:
        """Write JSON atomically and return the path."""
        return write_atomically(path, self.to_json().encode())


def describe_validation_error(error: ValidationError, source: str) -> str:
    """Return one line per offending field: where, what was given, what was expected."""
    lines = []
    for item in error.errors(include_url=False):
        where = ".".join(str(part) for part in item["loc"]) or "the whole"
        given = repr(item.get("input"))
        given = given if len(given) <= 80 else given[:77] + "..."
        lines.append(f"{where}: {item['msg']} (given {given})")
    return f"{source}: not valid. " + "; ".join(lines)


def write_atomically(path: str | os.PathLike[str], content: bytes) -> Path:
    """Write `content` to `path` so that a reader sees the old file or the whole new one, never a part.

    Raises:
        ResourceError: the disk is full or the folder can't be written; the old file is untouched.
    """
    path = Path(path)
    temporary: str | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        Path(temporary).chmod(0o644)
        Path(temporary).replace(path)
        keep_name(path.parent)
    except OSError as error:
        raise cannot_write(path, error) from None
    finally:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)
    return path


def require_writable(folder: Path) -> None:
    """Make a folder for results, and refuse one that can't take any before the work that they take.

    Raises:
        ResourceError: it can't be made, or no file can be put into it.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise cannot_write(folder, error) from None


def keep_name(folder: Path) -> None:
    """Have the disk keep a name that was just given in a folder; what can't do that (Windows) is left as it is."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def cannot_write(
    path: str | os.PathLike[str],
    error: OSError,
    *,
    what: str = "",
    note: str = "",
    other: str = "another folder",
    code: str | None = None,
) -> ResourceError:
    """Return what to raise where `path` can't be written: the cause, and what helps against this one.

    Args:
        path: file or folder.
        error: what the system said.
        what: in front of "can't be written", for example "the bundle".
        note: a sentence before the advice.
        other: what may be chosen instead.
        code: of the error; by itself that of `ResourceError`.
    """
    match error.errno:
        case errno.ENOSPC | errno.EDQUOT:
            advice = f"Free space or choose {other}."
        case errno.EACCES | errno.EPERM | errno.EROFS:
            advice = f"Allow writing there or choose {other}."
        case _:
            advice = f"Check the disk and the path, or choose {other}."
    told = [f"{Path(path)}:", what, f"can't be written ({error.strerror or error}).", note, advice]
    return ResourceError(" ".join(part for part in told if part), code=code)


def canonical_json(value: Frozen) -> str:
    """Return compact JSON with sorted keys: the text that hashes are taken of."""
    return json.dumps(value.model_dump(mode="json"), sort_keys=True, separators=(",", ":"))
