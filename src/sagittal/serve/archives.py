"""A zip from a stranger: everything that its directory says is checked before a byte is unpacked, and again while.

Nothing in the archive names a file on the disk: members become 000000.dcm, 000001.dcm and so on.
"""

from __future__ import annotations

import errno
import stat
import struct
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import IO

from sagittal.serve.kinds import HEAD_BYTES, is_archive, is_dicom
from sagittal.serve.refusals import RefusalError
from sagittal.serve.settings import Limits

IMAGE = "image"
"""The only file of an archive that holds no DICOM."""
MAX_RATIO = 200
"""Unpacked to packed, beyond `_RATIO_COUNTS_FROM`; scans reach 10, and DEFLATE 1032."""
_RATIO_COUNTS_FROM = 64 << 20
_MAX_DIRECTORY_BYTES_PER_FILE = 1024
_END, _END_64, _LOCATOR_64 = b"PK\x05\x06", b"PK\x06\x06", b"PK\x06\x07"
_END_BYTES, _END_64_BYTES, _LOCATOR_BYTES = 22, 56, 20
_LONGEST_COMMENT = 1 << 16
_LOCAL_HEADER_BYTES = 30
_READ_BYTES = 1 << 20
_SLICE_SUFFIXES = (".dcm", ".ima")


def unpack(archive: Path, folder: Path, limits: Limits, *, spent_bytes: int = 0) -> int:
    """Unpack the DICOM files of a zip, or its one image, into a new folder; return the bytes that were written.

    Other files (readme, viewer, DICOMDIR of a CD) are left out.

    Args:
        archive: from a stranger.
        folder: where the files go; it is made.
        limits: what may come out of it.
        spent_bytes: of the limit, by other archives of the same request.

    Raises:
        RefusalError: damaged, encrypted, too large (413), made to harm, or without anything that is read (415).
    """
    folder.mkdir(parents=True)
    written = spent_bytes
    images: list[Path] = []
    others: list[zipfile.ZipInfo] = []
    nested = False
    with _explained(), archive.open("rb") as file:
        _require_small_directory(file, limits)
        with zipfile.ZipFile(file) as opened:
            entries = _checked(opened, archive.stat().st_size, limits, spent_bytes)
            for entry in entries:
                with opened.open(entry) as source:
                    head = source.read(HEAD_BYTES)
                    if not _is_slice(entry.filename, head):
                        others.append(entry)
                        nested = nested or is_archive(head)
                        continue
                    target = folder / f"{len(images):06d}.dcm"
                    written += _copy(head, source, target, limits.unpacked_bytes - written, entry.file_size)
                    images.append(target)
            if images and nested:
                raise _unsafe("holds an archive within the archive")
            if not images:
                return _one_image(opened, others, folder, limits.unpacked_bytes - written)
    return written - spent_bytes


def _one_image(opened: zipfile.ZipFile, entries: Sequence[zipfile.ZipInfo], folder: Path, left: int) -> int:
    """Unpack the only file of an archive without DICOM: an image of another format, whose kind is looked at later."""
    if len(entries) != 1:
        raise RefusalError(
            "the zip holds no DICOM file. Expected the slices of a series, or one image.",
            code="unknown_format",
            status=415,
        )
    with opened.open(entries[0]) as source:
        head = source.read(HEAD_BYTES)
        # A NIfTI file may be packed itself.
        if is_archive(head) and not head.startswith(b"\x1f\x8b"):
            raise _unsafe("holds an archive within the archive")
        return _copy(head, source, folder / IMAGE, left, entries[0].file_size)


def _is_slice(name: str, head: bytes) -> bool:
    # A slice that is damaged must not go unnoticed: its name may be all that tells what it was.
    last = PurePosixPath(name).name.lower()
    return is_dicom(head) or (last.endswith(_SLICE_SUFFIXES) and not last.startswith("."))


def _copy(head: bytes, source: IO[bytes], target: Path, left: int, stated: int) -> int:
    """Write what comes out of a member, as long as it is not more than was stated and may come; return its bytes."""
    written = 0
    with target.open("xb") as file:
        piece = head or source.read(_READ_BYTES)
        while piece:
            written += len(piece)
            if written > left:
                raise _too_large("unpacks to more than the service takes")
            if written > stated:
                raise _unsafe("holds a file larger than it states")
            file.write(piece)
            piece = source.read(_READ_BYTES)
    if written != stated:
        raise _unsafe("holds a file of another size than it states")
    return written


def _checked(opened: zipfile.ZipFile, size: int, limits: Limits, spent_bytes: int) -> list[zipfile.ZipInfo]:
    """Return the files of an archive after a look at everything that its directory says of them."""
    every = opened.infolist()
    if len(every) > 2 * limits.files:
        raise _too_large(f"holds more than {limits.files} files")
    for entry in every:
        _check_entry(entry)
    entries = [entry for entry in every if not entry.is_dir()]
    if len(entries) > limits.files:
        raise _too_large(f"holds {len(entries)} files, more than {limits.files}")
    unpacked = sum(entry.file_size for entry in entries)
    if unpacked > limits.unpacked_bytes - spent_bytes:
        raise _too_large(f"unpacks to {unpacked} bytes, more than the service takes ({limits.unpacked_bytes})")
    if unpacked > _RATIO_COUNTS_FROM and unpacked > MAX_RATIO * size:
        raise _too_large(f"unpacks to {unpacked // max(size, 1)} times its size; scans don't")
    # Members that share bytes would make much of little without a high ratio in any of them.
    placed = sorted(every, key=lambda entry: entry.header_offset)
    ends = [*(entry.header_offset for entry in placed[1:]), opened.start_dir]
    for entry, end in zip(placed, ends, strict=True):
        if entry.header_offset + _LOCAL_HEADER_BYTES + entry.compress_size > end:
            raise _unsafe("holds files that share their bytes")
    return sorted(entries, key=lambda entry: entry.filename)


def _check_entry(entry: zipfile.ZipInfo) -> None:
    name = entry.filename
    as_windows = PureWindowsPath(name)
    if (
        PurePosixPath(name).is_absolute()
        or as_windows.drive
        or as_windows.root
        or ".." in as_windows.parts
        or "\0" in name
    ):
        raise _unsafe("holds a name that leads out of it")
    kind = stat.S_IFMT(entry.external_attr >> 16)
    if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
        raise _unsafe("holds a link or a device")
    if entry.flag_bits & 1:
        raise _damaged("it is encrypted")
    if entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise _damaged("it is packed by a method other than deflate")


def _require_small_directory(file: IO[bytes], limits: Limits) -> None:
    """Refuse a directory that would fill the memory before `zipfile` reads it whole.

    The end record is looked for as `zipfile` does it, so that both find the same one.
    """
    size = file.seek(0, 2)
    if size < _END_BYTES:
        raise _damaged("it is cut off")
    file.seek(-_END_BYTES, 2)
    tail = file.read()
    start = size - _END_BYTES
    if not (tail.startswith(_END) and tail.endswith(b"\0\0")):
        begin = max(size - _LONGEST_COMMENT - _END_BYTES, 0)
        file.seek(begin)
        content = file.read()
        place = content.rfind(_END)
        if place < 0 or len(content) - place < _END_BYTES:
            raise _damaged("it is cut off")
        tail, start = content[place : place + _END_BYTES], begin + place
    directory = struct.unpack("<4s4H2LH", tail)[5]
    if start >= _LOCATOR_BYTES + _END_64_BYTES:
        file.seek(start - _LOCATOR_BYTES)
        if file.read(4) == _LOCATOR_64:
            file.seek(start - _LOCATOR_BYTES - _END_64_BYTES)
            record = file.read(_END_64_BYTES)
            if record.startswith(_END_64):
                directory = struct.unpack("<4sQ2H2L4Q", record)[8]
    if directory > _MAX_DIRECTORY_BYTES_PER_FILE * limits.files:
        raise _too_large("has a directory larger than its files may need")
    file.seek(0)


@contextmanager
def _explained() -> Iterator[None]:
    """Turn whatever zipfile raises on a damaged archive into a refusal."""
    try:
        yield
    except (zipfile.BadZipFile, zlib.error, struct.error, EOFError) as error:
        raise _damaged(type(error).__name__) from None
    except OSError as error:
        if error.errno != errno.EINVAL:  # what a seek to nowhere says; all else is the disk's
            raise
        raise _damaged("places that make no sense") from None
    except (ValueError, LookupError, NotImplementedError, RuntimeError, OverflowError, UnicodeError) as error:
        raise _damaged(f"fields that make no sense: {type(error).__name__}") from None


def _damaged(cause: str) -> RefusalError:
    return RefusalError(
        f"the zip can't be read ({cause}). Expected a whole zip file. Pack it again.", code="unreadable", status=422
    )


def _unsafe(what: str) -> RefusalError:
    return RefusalError(
        f"the zip {what}. Expected the plain files of a series. Pack them anew.", code="unsafe_archive", status=422
    )


def _too_large(what: str) -> RefusalError:
    return RefusalError(f"the zip {what}. Send one series at a time.", code="archive_too_large", status=413)
