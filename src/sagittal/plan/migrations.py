"""Plans of earlier versions brought up to date, one pure function per step of `schema_version`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from sagittal.errors import PlanError

SCHEMA_VERSION = 1

MIGRATIONS: Mapping[int, Callable[[dict[str, Any]], dict[str, Any]]] = {}
"""From a version to the function that makes its tree one of the next version; empty, for there is only one yet."""


def migrate(
    tree: dict[str, Any],
    *,
    source: str,
    newest: int = SCHEMA_VERSION,
    migrations: Mapping[int, Callable[[dict[str, Any]], dict[str, Any]]] = MIGRATIONS,
) -> dict[str, Any]:
    """Return the JSON tree of a plan in the newest schema.

    Args:
        tree: a plan as it was written; it is left as it is.
        source: what the message calls it, for example its file.
        newest: schema_version to arrive at.
        migrations: see `MIGRATIONS`.

    Raises:
        PlanError: it was written by a newer Sagittal, or its version is none.
    """
    version = tree.get("schema_version")
    if type(version) is not int or version < 1:
        raise PlanError(f"{source}: schema_version is {version!r}, expected 1 to {newest}. Is this a plan?")
    if version > newest:
        raise PlanError(
            f"{source}: schema_version {version} is newer than {newest}, the newest that this version reads. "
            "Install a newer Sagittal.",
            code="newer_version",
        )
    for step in range(version, newest):
        tree = {**migrations[step](tree), "schema_version": step + 1}
    return tree
