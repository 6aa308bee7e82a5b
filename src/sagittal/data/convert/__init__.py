"""From a public data set as its publisher distributes it to nnU-Net's layout, one module per layout.

A layout is a function from a source to a `Conversion`, which says what becomes of every file and touches none. A new
one is a module, an entry in `LAYOUTS` and an entry in the catalogue.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from sagittal.data.catalogue import Protocol, PublicDataset
from sagittal.data.convert.acdc import read_acdc
from sagittal.data.convert.amos import read_amos
from sagittal.data.convert.brats import read_brats
from sagittal.data.convert.btcv import read_btcv
from sagittal.data.convert.conversion import Conversion, require_free, write_conversion
from sagittal.data.convert.kits import read_kits
from sagittal.data.convert.lits import read_lits
from sagittal.data.convert.msd import read_msd
from sagittal.data.convert.source import Source, open_source
from sagittal.errors import DataError

__all__ = ["LAYOUTS", "Converted", "convert"]

LAYOUTS: Mapping[str, Callable[[Source, str, Protocol | None], Conversion]] = {
    "msd": read_msd,
    "acdc": read_acdc,
    "btcv": read_btcv,
    "amos": read_amos,
    "kits": read_kits,
    "brats": read_brats,
    "lits": read_lits,
}
"""By the catalogue's `layout`: from the source, the data set's name and the protocol to what becomes of its files."""


@dataclass(frozen=True)
class Converted:
    """A data set that was converted.

    Attributes:
        folder: in nnU-Net's layout.
        training, testing: numbers of cases.
        notes: what a person should know.
    """

    folder: Path
    training: int
    testing: int
    notes: tuple[str, ...]


def convert(
    entry: PublicDataset,
    sources: Iterable[Path],
    out: Path,
    *,
    protocol: Protocol | None = None,
    on_case: Callable[[str], None] = lambda case: None,
) -> Converted:
    """Convert a public data set, without any network.

    Args:
        entry: of the catalogue.
        sources: the archives or folders that it was distributed in.
        out: the data set's new folder; it must not exist, or be empty.
        protocol: another way of using the set, one of `entry.protocols`.
        on_case: called with the id of a case each time that a file of it is written.

    Raises:
        DataError: the sources are not this data set, incomplete, damaged or unsafe; or `out` exists.
        ResourceError: the disk is full or the folder can't be written; nothing is left of the attempt.
    """
    if protocol is not None and protocol not in entry.protocols:
        offered = ", ".join(entry.protocols) or "none"
        raise DataError(f"--protocol {protocol}: {entry.name} has {offered}. Leave it out.", code="unknown_protocol")
    require_free(out)
    facts = {
        "name": entry.name if protocol is None else f"{entry.name}-{protocol}",
        "description": entry.title,
        "licence": entry.licence,
        "reference": f"{entry.citation}; {entry.address}",
    }
    with open_source(sources) as source:
        conversion = LAYOUTS[entry.layout](source, entry.name, protocol)
        write_conversion(conversion, source, out, facts, on_case)
    notes = list(conversion.notes)
    # A protocol may set labelled training cases apart for testing; without one, labels of test cases are an extra.
    scans = conversion.training if protocol is None else (*conversion.training, *conversion.testing)
    found = sum(scan.labels is not None for scan in scans)
    if found != entry.cases:
        notes.append(f"{found} labelled cases were there; as published the set has {entry.cases}")
    return Converted(out, len(conversion.training), len(conversion.testing), tuple(notes))
