"""`sagittal datasets`: which public data sets there are, how to get one, and its conversion to nnU-Net's layout."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import App, Parameter

from sagittal.cli.progress import download_bar

if TYPE_CHECKING:
    from sagittal.data.catalogue import PublicDataset

_WAYS = {"fetch": "fetch", "registration": "registration", "script": "its own script"}
AsJson = Annotated[bool, Parameter(negative="")]

datasets = App(name="datasets", help="List public data sets, fetch one, and convert it to nnU-Net's layout.")


@datasets.default
def list_datasets(*, json: AsJson = False) -> int:
    """List the public data sets of the MedNeXt and SegFormer3D papers and of the Decathlon; needs no network.

    Args:
        json: print everything that is known of each as JSON
    """
    from sagittal.data.catalogue import CATALOGUE

    if json:
        _print_json([_as_json(entry) for entry in CATALOGUE.values()])
        return 0
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    table = Table("name", "cases", "", "labels", "licence", "get it by", box=SIMPLE_HEAD, pad_edge=False)
    for entry in CATALOGUE.values():
        kind, licence = entry.modality.split(" ")[0], entry.licence.split(",")[0]
        table.add_row(entry.name, str(entry.cases), kind, entry.labels, licence, _WAYS[entry.access])
    Console().print(table)
    print("'sagittal datasets show NAME' tells address, citation, how to get it, and what could not be verified.")
    return 0


@datasets.command
def show(name: str, *, json: AsJson = False) -> int:
    """Tell what is known of a data set: licence, address, checksum, how to get it, what could not be verified.

    Args:
        name: of the list, for example acdc
        json: print it as JSON
    """
    from sagittal.data.catalogue import public_dataset

    entry = public_dataset(name)
    if json:
        _print_json(_as_json(entry))
        return 0
    facts = {
        "title": entry.title,
        "modality": entry.modality,
        "labels": entry.labels,
        "labelled cases": str(entry.cases),
        "licence": entry.licence,
        "address": entry.address,
        "cite": entry.citation,
        "get it": entry.how or f"sagittal datasets fetch {entry.name} --to FOLDER",
        "convert it": f"sagittal datasets convert {entry.name} FILES --out FOLDER",
        "protocols": ", ".join(entry.protocols) or "all cases in folds",
    }
    for item in entry.downloads:
        facts["file"] = item.url
        facts["checksum"] = f"MD5 {item.md5}, published by {item.md5_source}" if item.md5 else "none published"
    facts["not verified"] = "; ".join(entry.unverified) or "-"
    width = max(map(len, facts))
    for title, fact in facts.items():
        print(f"{title:<{width}}  {fact}")
    return 0


@datasets.command
def fetch(name: str, *, to: Path) -> int:
    """Download an open data set; stopped or broken off, the same command goes on where it was.

    Args:
        name: of the list
        to: folder for the archives; downloads.json in it records address and SHA-256 of each
    """
    from sagittal.data.catalogue import public_dataset
    from sagittal.data.fetch import fetch as fetch_files

    entry = public_dataset(name)
    with download_bar() as on_progress:
        files = fetch_files(entry, to, say=_say, on_progress=on_progress)
    print(f"{entry.title}: {entry.licence}. Cite {entry.citation}.")
    print(f"sagittal datasets convert {entry.name} {' '.join(map(str, files))} --out {to / entry.name}")
    return 0


@datasets.command
def convert(
    name: str,
    sources: Annotated[list[Path], Parameter(negative="")],
    *,
    out: Path,
    protocol: Literal["nnformer"] | None = None,
) -> int:
    """Convert a data set as its publisher distributes it to nnU-Net's layout; needs no network.

    Args:
        name: of the list
        sources: its archives (tar, tar.gz, zip), which are not unpacked, or folders; several where it comes in parts
        out: the new folder; nothing is ever overwritten
        protocol: nnformer splits the set as nnFormer and SegFormer3D did, into splits_final.json
    """
    from sagittal.data.catalogue import public_dataset
    from sagittal.data.convert import convert as convert_files

    entry = public_dataset(name)
    with _counted() as on_case:
        made = convert_files(entry, sources, out, protocol=protocol, on_case=on_case)
    for note in made.notes:
        print(f"note: {note}")
    print(f"{made.folder}: {made.training} training cases, {made.testing} test cases. Licence: {entry.licence}.")
    print(f"Check them: sagittal doctor {made.folder}")
    return 0


def _as_json(entry: PublicDataset) -> dict[str, Any]:
    from dataclasses import asdict

    return asdict(entry)


def _print_json(value: object) -> None:
    import json

    print(json.dumps(value, indent=2))


@contextmanager
def _counted() -> Iterator[Callable[[str], None]]:
    from rich.console import Console

    console = Console(stderr=True)
    if not console.is_terminal:
        yield lambda case: None
        return
    with console.status("Converting") as status:
        yield lambda case: status.update(f"Converting {case}")


def _say(line: str) -> None:
    print(line, flush=True)
