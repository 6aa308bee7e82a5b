"""pydicom, loaded when it is needed, and kept to itself: its warnings, errors and log lines may quote what names the
patient.
"""

from __future__ import annotations

import importlib
import logging
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path, PurePath
from typing import Any

from sagittal.errors import DataError, SagittalError

MAX_INFLATED_BYTES = 1 << 30
"""A deflated file that unpacks to more is refused before it is read."""
_LOGGERS = ("pydicom", "pydicom.pixels.decoders.base")
_SILENT: ContextVar[bool] = ContextVar("silent", default=False)
_DEFLATED = b"1.2.840.10008.1.2.1.99"
_META_AT, _META_BYTES = 132, 12
_BLOCK_BYTES = 1 << 20


def _passes(record: logging.LogRecord) -> bool:
    return not _SILENT.get()


@contextmanager
def silent() -> Iterator[None]:
    """Hold back what pydicom warns of and logs in this thread: it quotes the values of tags."""
    token = _SILENT.set(True)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        _SILENT.reset(token)


def library(path: Path) -> Any:
    """Return pydicom.

    Raises:
        DataError: it is not installed.
    """
    try:
        pydicom = importlib.import_module("pydicom")
        importlib.import_module("pydicom.pixels")
    except ImportError:
        raise DataError(
            f"{path}: reading DICOM needs pydicom, which is not installed. Run: pip install 'sagittal[dicom]'",
            code="missing_extra",
        ) from None
    for name in _LOGGERS:
        logging.getLogger(name).addFilter(_passes)  # a second time changes nothing
    return pydicom


def damaged(name: str, path: Path, cause: str) -> DataError:
    """Return the error for a file `name` of the scan at `path`."""
    where = str(path) if PurePath(name).name == path.name else f"{path}: {name}"
    return DataError(
        f"{where}: {cause}. Expected a whole DICOM file. Copy or export the series again.", code="unreadable"
    )


@contextmanager
def quiet(name: str, path: Path) -> Iterator[None]:
    """Turn what pydicom raises into a DataError that names the file, and hold back its warnings.

    Args:
        name: the file's, within the scan.
        path: of the scan.

    Raises:
        DataError: the file is damaged.
    """
    try:
        with silent():
            yield
    except (SagittalError, zipfile.BadZipFile):
        raise
    except OSError as error:
        raise DataError(
            f"{path}: {name}: can't be read ({error.strerror or 'seeking failed'}). Check the file and its "
            "permissions.",
            code="unreadable",
        ) from None
    except library(path).errors.InvalidDicomError:
        raise damaged(name, path, "it is no DICOM file") from None
    except Exception as error:
        # On damaged tags pydicom lets through whatever its conversions raise; forged lengths are out of memory.
        raise damaged(name, path, f"its header makes no sense ({type(error).__name__})") from None


def require_sensible_size(name: str, path: Path, file: Any) -> None:
    """Refuse a deflated file that unpacks to too much: pydicom would unpack it whole. The file is left at its start.

    Raises:
        DataError: it does, or its deflated part is damaged.
    """
    head = file.read(1 << 12)
    if _DEFLATED in head:
        length = int.from_bytes(head[_META_AT + 8 : _META_AT + _META_BYTES], "little")
        file.seek(_META_AT + _META_BYTES + length)
        unpacker, count = zlib.decompressobj(-zlib.MAX_WBITS), 0
        try:
            while not unpacker.eof and (block := unpacker.unconsumed_tail or file.read(_BLOCK_BYTES)):
                count += len(unpacker.decompress(block, _BLOCK_BYTES))
                if count > MAX_INFLATED_BYTES:
                    raise DataError(
                        f"{path}: {name}: it unpacks to more than {MAX_INFLATED_BYTES >> 30} GiB. Expected a slice or "
                        "a volume. Unpack it yourself if you trust it.",
                        code="too_large",
                    )
        except zlib.error:
            raise damaged(name, path, "its deflated part is damaged") from None
        if not unpacker.eof:
            raise damaged(name, path, "its deflated part is cut off: it is truncated")
    file.seek(0)


class BoundedFile:
    """A file of which no more is asked for than it has: a forged length must not make room for gigabytes.

    Args:
        file: opened for reading; it is closed with this one.
        size: its bytes.
    """

    def __init__(self, file: Any, size: int) -> None:
        self._file, self._size = file, size
        self.seek: Callable[..., int] = file.seek
        self.tell: Callable[[], int] = file.tell
        self.close: Callable[[], None] = file.close

    def read(self, count: int = -1) -> bytes:
        """Return at most `count` bytes."""
        content: bytes = self._file.read(min(count, self._size) if count >= 0 else -1)
        return content

    def __enter__(self) -> BoundedFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
