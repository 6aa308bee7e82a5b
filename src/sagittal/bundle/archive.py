"""A bundle in one file, a package: how its bytes lie, and how they are checked before one of them is used.

A package is a ZIP archive that any tool opens, under rules of its own that leave an attacker little to play with:

- manifest.json comes first, then exactly the files that it lists, in the order of their names; each is stored without
  compression, as an ordinary file that nobody may execute;
- the comment of the archive is `sagittal-package-1 ` and the SHA-256 of every byte before it: none can change unseen.

Nothing is compressed, so nothing can swell: what comes out is never larger than the package. Where a file is written
follows from the manifest, whose names come from a short list of known ones, never from the archive.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import stat
import struct
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from sagittal.bundle.manifest import MANIFEST, Manifest, parse_manifest, verify_files
from sagittal.errors import BundleError

ENDING = ".sagittal"
_VERSION = 1
_COMMENT = re.compile(rb"sagittal-package-([0-9]+) ([0-9a-f]{64})")
_COMMENT_BYTES = len(f"sagittal-package-{_VERSION} ") + 64
_END_RECORD_BYTES = 22
_LOCAL_HEADER_BYTES = 30
_FIRST_BYTES = b"PK\x03\x04"
_MODE = stat.S_IFREG | 0o644
_DATE = (1980, 1, 1, 0, 0, 0)
_UNIX = 3
_MAX_MANIFEST_BYTES = 1 << 20
_READ_BYTES = 4 << 20
_ASK_AGAIN = "Copy or download the package again."


def is_package(path: str | os.PathLike[str]) -> bool:
    """Whether `path` is a file that claims to be a package, by its ending or its first bytes; nothing is verified."""
    path = Path(path)
    if not path.is_file():
        return False
    if path.suffix == ENDING:
        return True
    try:
        with path.open("rb") as file:
            start = file.read(_LOCAL_HEADER_BYTES + len(MANIFEST))
    except OSError:
        return False
    return start.startswith(_FIRST_BYTES) and start.endswith(MANIFEST.encode())


def write_archive(folder: Path, manifest: Manifest, target: Path) -> None:
    """Write the files of a verified bundle to the new file `target`; the same bundle gives the same bytes.

    Raises:
        OSError: a file can't be read, the disk is full, or the target can't be written.
    """
    with zipfile.ZipFile(target, "x", zipfile.ZIP_STORED) as archive:
        for name in _names(manifest):
            source = folder / name
            entry = zipfile.ZipInfo(name, _DATE)
            entry.create_system, entry.external_attr = _UNIX, _MODE << 16
            # Known beforehand, the size decides whether the entry needs the fields for more than 4 GiB.
            entry.file_size = source.stat().st_size
            with source.open("rb") as read, archive.open(entry, "w") as written:
                shutil.copyfileobj(read, written, _READ_BYTES)
    with target.open("r+b") as file:
        # The last two bytes of the end record tell how long the comment is.
        file.seek(-2, os.SEEK_END)
        file.write(_COMMENT_BYTES.to_bytes(2, "little"))
        size = file.tell()
        digest = _sha256(file, size)
        file.seek(size)
        file.write(f"sagittal-package-{_VERSION} {digest}".encode())
        file.flush()
        os.fsync(file.fileno())


def extract_archive(source: Path, folder: Path, *, durable: bool = False) -> None:
    """Write the files of the package `source` into the empty folder `folder` and verify every byte of them.

    `durable` waits until the disk has them, so that a power cut after a later rename loses nothing.

    Raises:
        BundleError: the package is damaged, or something in it is not as `write_archive` writes it.
        OSError: the disk is full or the folder can't be written.
    """
    try:
        file = source.open("rb")
    except OSError as error:
        raise BundleError(f"{source}: can't be read ({error.strerror}). {_ASK_AGAIN}") from None
    with file:
        _check_hash(source, file)
        with _explained(source):
            archive = zipfile.ZipFile(file)
            manifest = _checked_manifest(source, archive)
        for name in _names(manifest):
            with _explained(source):
                content = archive.read(name)
            # The name comes from the manifest's list of known ones: nothing that the archive says leads anywhere.
            _write(folder / name, content, durable)
    try:
        verify_files(folder, manifest)
    except BundleError as error:
        # The user gave the package and knows nothing of the folder.
        raise BundleError(error.message.replace(str(folder), str(source)), code=error.code) from None


def _write(path: Path, content: bytes, durable: bool) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("xb") as file:
        file.write(content)
        if durable:
            file.flush()
            os.fsync(file.fileno())


def _names(manifest: Manifest) -> list[str]:
    return [MANIFEST, *sorted(manifest.files)]


def _check_hash(source: Path, file: IO[bytes]) -> None:
    size = file.seek(0, os.SEEK_END)
    file.seek(max(0, size - _COMMENT_BYTES))
    comment = _COMMENT.fullmatch(file.read())
    if comment is None or size < _COMMENT_BYTES + _END_RECORD_BYTES:
        raise BundleError(
            f"{source}: no package, or one that was cut short (its end does not say 'sagittal-package'). Expected a "
            f"bundle, or a file that 'sagittal package' writes. {_ASK_AGAIN}",
            code="no_package",
        )
    if int(comment[1]) != _VERSION:
        raise BundleError(
            f"{source}: a package of version {int(comment[1])}; this version of sagittal reads {_VERSION}. Update "
            "sagittal.",
            code="bundle_too_new",
        )
    if _sha256(file, size - _COMMENT_BYTES) != comment[2].decode():
        raise BundleError(f"{source}: changed since it was written (its hash differs). {_ASK_AGAIN}", code="changed")


def _checked_manifest(source: Path, archive: zipfile.ZipFile) -> Manifest:
    """Return the manifest after comparing with it what the archive says of its entries; only it is read."""
    entries = archive.infolist()
    if not entries or entries[0].filename != MANIFEST or entries[0].file_size > _MAX_MANIFEST_BYTES:
        raise _odd(source, f"its first entry is not a {MANIFEST} of at most {_MAX_MANIFEST_BYTES} bytes")
    for entry in entries:
        _check_entry(source, entry)
    # Before the first byte is read: entries that share bytes could make one large file out of a small one many times.
    starts = [entry.header_offset for entry in entries]
    if starts[0] != 0:
        raise _odd(source, "something stands before its first entry")
    for entry, following in zip(entries, [*starts[1:], archive.start_dir], strict=True):
        if entry.header_offset + _LOCAL_HEADER_BYTES + len(entry.filename) + entry.file_size > following:
            raise _odd(source, f"{entry.filename!r} reaches into what follows it")
    manifest = parse_manifest(archive.read(entries[0]), source=f"{source}: {MANIFEST}")
    names = [entry.filename for entry in entries]
    if names != _names(manifest):
        odd = sorted(set(names) ^ set(_names(manifest))) or ["the same files in another order, or twice"]
        raise _odd(source, f"its entries are not those that its manifest lists: {odd[0]!r}")
    for entry in entries[1:]:
        expected = manifest.files[entry.filename].size_bytes
        if entry.file_size != expected:
            raise _odd(source, f"{entry.filename!r} has {entry.file_size} bytes, the manifest says {expected}")
    return manifest


def _check_entry(source: Path, entry: zipfile.ZipInfo) -> None:
    if entry.compress_type != zipfile.ZIP_STORED or entry.compress_size != entry.file_size or entry.flag_bits:
        raise _odd(source, f"{entry.filename!r} is compressed or encrypted")
    if entry.create_system != _UNIX or entry.external_attr != _MODE << 16:
        raise _odd(source, f"{entry.filename!r} is a link, a folder, an executable or no ordinary file")


def _odd(source: Path, what: str) -> BundleError:
    return BundleError(
        f"{source}: {what}. Expected a file as 'sagittal package' writes it. Ask its maker for such a file.",
        code="odd_package",
    )


@contextmanager
def _explained(source: Path) -> Iterator[None]:
    """Turn whatever zipfile raises on a damaged archive into a BundleError."""
    try:
        yield
    except (zipfile.BadZipFile, struct.error, EOFError, OSError, ValueError, LookupError) as error:
        raise BundleError(f"{source}: is damaged ({error}). {_ASK_AGAIN}", code="changed") from None
    except (NotImplementedError, RuntimeError, OverflowError) as error:
        raise _odd(source, f"holds what no package holds ({error})") from None


def _sha256(file: IO[bytes], size: int) -> str:
    """Return the hash of the first `size` bytes."""
    digest = hashlib.sha256()
    file.seek(0)
    while size > 0 and (block := file.read(min(size, _READ_BYTES))):
        digest.update(block)
        size -= len(block)
    return digest.hexdigest()
