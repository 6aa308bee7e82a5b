"""Put a bundle into a list of models (`bundle.index`): pack it beside the list, then write the list anew."""

from __future__ import annotations

import tempfile
from pathlib import Path

from sagittal.bundle.archive import ENDING
from sagittal.bundle.index import ModelEntry, ModelIndex, entry_of, parse_index, place_package, with_entry
from sagittal.bundle.package import pack
from sagittal.bundle.read import read_bundle
from sagittal.errors import BundleError
from sagittal.plan.base import cannot_write


def add_bundle(
    bundle: Path,
    index: Path,
    *,
    name: str | None = None,
    version: str = "1",
    url: str | None = None,
    licence: str | None = None,
) -> tuple[ModelEntry, Path]:
    """List a bundle in `index` and return its entry and its package, which lies beside the index.

    Args:
        bundle: a folder or a package; it is verified.
        index: the list, which is made where it is missing.
        name: what the model is called; by default as the folder or the package.
        version: of the model.
        url: the address at which others will find the package; by default the list names it by its place.
        licence: of the weights.

    Raises:
        BundleError: the bundle is damaged, the list is none, or it has this name and version already.
        ResourceError: the folder of the list can't be written.
    """
    name = name or (bundle.stem if bundle.suffix == ENDING else bundle.resolve().name)
    file_name = f"{name}-{version}{ENDING}"
    listed = _read(index)
    folder = index.resolve().parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
        staging = tempfile.TemporaryDirectory(dir=folder, prefix=".adding.", suffix=".part")
    except OSError as error:
        raise cannot_write(folder, error) from None
    with staging as scratch:
        package = pack(bundle, Path(scratch) / f"package{ENDING}")
        entry = entry_of(
            read_bundle(package), package, name=name, version=version, file=url or file_name, licence=licence
        )
        longer = with_entry(listed, entry)
        place_package(package, folder / file_name)
    longer.write(index)
    return entry, folder / file_name


def _read(index: Path) -> ModelIndex:
    if not index.exists():
        return ModelIndex()
    try:
        content = index.read_bytes()
    except OSError as error:
        raise BundleError(f"{index}: can't be read ({error.strerror}). Expected a list of models.") from None
    return parse_index(content, str(index))
