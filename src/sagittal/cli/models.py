"""`sagittal models`: list, fetch and add bundles by a plain index file."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import App, Parameter

from sagittal.cli.progress import download_bar

if TYPE_CHECKING:
    from sagittal.bundle.index import ModelEntry

models = App(name="models", help="List, fetch and add bundles by a plain index file, in a folder or on a web server.")


@models.command(name="list")
def list_models(index: str, /, *, json: Annotated[bool, Parameter(negative="")] = False) -> int:
    """List the bundles of an index.

    Args:
        index: path or address (https, http, file) of the index
        json: print the index as JSON
    """
    from sagittal.data.fetch_bundle import read_index

    listed = read_index(index).index
    if json:
        print(listed.to_json(), end="")
        return 0
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=SIMPLE_HEAD)
    for column in ("name", "version", "network", "channels", "labels", "Dice", "MB", "licence"):
        table.add_column(column, overflow="fold")
    for entry in listed.models:
        table.add_row(*map(escape, _row(entry)))
    Console().print(table)
    print(f"Fetch one: sagittal models fetch NAME --index {index} --out FOLDER. Research use, not medical devices.")
    return 0


@models.command
def fetch(name: str, /, *, index: str, out: Path) -> int:
    """Fetch a packed bundle; it appears whole, with the SHA-256 that the index lists, or not at all.

    Args:
        name: of the list, or NAME==VERSION; without a version the one that was added last
        index: path or address (https, http, file) of the index
        out: folder for the package
    """
    from sagittal.data.fetch_bundle import fetch_bundle, read_index

    listed = read_index(index)
    with download_bar() as on_progress:
        package = fetch_bundle(name, listed, out, on_progress=on_progress, say=print)
    print(f"sagittal predict {package} SCAN --out FOLDER")
    return 0


@models.command
def add(
    bundle: Path,
    /,
    *,
    index: Path,
    name: str | None = None,
    version: str = "1",
    url: str | None = None,
    licence: str | None = None,
) -> int:
    """Add a bundle to an index; it is packed beside the index, and listed with its SHA-256.

    Args:
        bundle: a folder that `sagittal train` wrote, or a package of one
        index: the index file; it is made where it is missing
        name: what the model is called; by default as the bundle
        version: of the model
        url: where others fetch the package, if not beside the index: you put it there yourself
        licence: of the weights, in a few words
    """
    from sagittal.bundle.publish import add_bundle

    entry, package = add_bundle(bundle, index, name=name, version=version, url=url, licence=licence)
    print(f"{index}: lists {entry}, {entry.bytes} bytes, SHA-256 {entry.sha256}")
    print(f"package: {package}" + (f"; put it to {url}" if url else ""))
    return 0


def _row(entry: ModelEntry) -> tuple[str, ...]:
    return (
        entry.name,
        entry.version,
        entry.network,
        ", ".join(entry.channels),
        _shortened(entry.labels),
        "-" if entry.dice is None else f"{entry.dice:.3f}",
        f"{entry.bytes / 1e6:.1f}",
        entry.licence,
    )


def _shortened(labels: tuple[str, ...]) -> str:
    shown = ", ".join(labels[:6])
    return shown if len(labels) <= 6 else f"{shown} and {len(labels) - 6} more"
