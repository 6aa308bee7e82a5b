"""Scans that arrived, or that are named by paths: recognised by their bytes and given the form that workers read.

uploads/ID/parts/0      what was sent, as it came (`forms`)
uploads/ID/input/0      what a worker reads: image.nii.gz, or the slices of a series; the folder becomes jobs/JOBID
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from sagittal.errors import SagittalError
from sagittal.serve.archives import IMAGE, unpack
from sagittal.serve.disk import without_path
from sagittal.serve.forms import MAX_IMAGES, PARTS, Received
from sagittal.serve.jobs import InputRef
from sagittal.serve.kinds import kind_of
from sagittal.serve.refusals import RefusalError, names_within, without_paths
from sagittal.serve.settings import Limits
from sagittal.volumes.dicom_catalogue import choose_series, list_series
from sagittal.volumes.io import is_dicom, read_header, scan_files

INPUT = "input"


def arrange(received: Received, channels: int, limits: Limits) -> InputRef:
    """Give what was received the form that workers read, and refuse what they could not.

    Args:
        received: a form.
        channels: that the model takes; 0: any number, for an upload whose model is not known.
        limits: of the service.

    Raises:
        RefusalError: another number of images, of an unknown kind (415), too large (413), or unreadable.
        DataError: a header that can't be read, in the library's words.
        ResourceError: the disk is full.
    """
    try:
        return _arranged(received, channels, limits)
    except OSError as error:
        raise without_path(error) from None


def _arranged(received: Received, channels: int, limits: Limits) -> InputRef:
    if not received.images:
        raise RefusalError("no image. Expected the scan in parts called 'image'.", code="no_image", status=422)
    written, files, series = 0, [], []
    for number, part in enumerate(received.images):
        place = received.folder / INPUT / str(number)
        kind = kind_of(part)
        if kind == "zip":
            written += unpack(part, place, limits, spent_bytes=written)
            part.unlink()
            if (place / IMAGE).exists():
                part, kind = place / IMAGE, kind_of(place / IMAGE)
        if kind in ("zip", "dicom"):
            if kind == "dicom":
                place.mkdir(parents=True)
                part.rename(place / "000000.dcm")
            file = place
            if channels:
                _require_series(place)
        else:
            place.mkdir(parents=True, exist_ok=True)
            file = part.rename(place / f"image{kind}")
            written += _voxel_bytes(file)
        if written > limits.unpacked_bytes:
            raise RefusalError(
                f"the scan unpacks to more than the service takes ({limits.unpacked_bytes} bytes).",
                code="too_large",
                status=413,
            )
        series.append(file.is_dir())
        files.append(file.relative_to(received.folder).as_posix())
    shutil.rmtree(received.folder / PARTS)
    return in_channels(InputRef(kind="upload", files=tuple(files), dicom=all(series)), channels, any(series))


def _require_series(folder: Path) -> None:
    found = list_series(folder)
    if not any(info.usable for info in found):
        choose_series(found)  # says what is there instead


def in_channels(given: InputRef, channels: int, has_series: bool) -> InputRef:
    """Return an input with a file per channel; one DICOM study may hold all of them, each as a series.

    Raises:
        RefusalError: another number of images, or DICOM and other formats mixed.
    """
    if has_series and not given.dicom:
        raise RefusalError(
            "DICOM and other images together. Expected one kind for all channels.", code="mixed_formats", status=422
        )
    if channels and given.dicom and len(given.files) == 1:
        given = given.replace(files=given.files * channels)
    if channels and len(given.files) != channels:
        raise RefusalError(
            f"{len(given.files)} images, but the model takes {channels}. Send one per channel, in the model's order.",
            code="channel_count",
            status=422,
        )
    return given


def at_paths(paths: Sequence[str], allowed: Sequence[Path], channels: int, limits: Limits) -> InputRef:
    """Return the input that a request names by paths of this machine, all of it below an allowed folder.

    Raises:
        RefusalError: outside of these folders (403), not there (404), or too many files.
        DataError: no scan, in the library's words.
    """
    if len(paths) > MAX_IMAGES:
        raise RefusalError(
            f"more than {MAX_IMAGES} paths. Expected one per channel.", code="too_many_files", status=413
        )
    roots = [folder.resolve() for folder in allowed]
    files, series = [], []
    for number, text in enumerate(paths):
        path = _allowed(text, roots)
        with _nameless(path):
            parts = scan_files(path)
        if len(parts) > limits.files:
            raise RefusalError(f"path {number + 1}: more than {limits.files} files.", code="too_many_files", status=413)
        # A link within an allowed folder must not lead out of it, nor a header to voxels elsewhere.
        if any(not _is_below(part.resolve(), roots) for part in parts):
            raise _not_allowed()
        is_series = is_dicom(path)
        with _nameless(path):
            if is_series:
                _require_series(path)
            else:
                read_header(path)
        files.append(path)
        series.append(is_series)
    given = InputRef(kind="path", files=tuple(str(path) for path in files), dicom=all(series))
    return in_channels(given, channels, any(series))


@contextmanager
def _nameless(path: Path) -> Iterator[None]:
    """Take the names of somebody's files out of an error: they may be patients'."""
    try:
        yield
    except SagittalError as error:
        told = without_paths(error.message, {str(path), path.name, path.parent.name} | names_within(path))
        raise type(error)(told, code=error.code) from None


def _allowed(text: str, roots: Sequence[Path]) -> Path:
    if "\0" in text or not Path(text).is_absolute():
        raise _not_allowed()
    try:
        path = Path(text).resolve()
    except (OSError, RuntimeError, ValueError):
        raise _not_allowed() from None
    if not _is_below(path, roots):
        raise _not_allowed()
    try:
        if path.exists():
            return path
    except OSError:
        pass
    raise RefusalError("no such path below the allowed folders. Check it.", code="not_found", status=404)


def _is_below(path: Path, roots: Sequence[Path]) -> bool:
    return any(path.is_relative_to(root) for root in roots)


def _not_allowed() -> RefusalError:
    # What is not there and what is not allowed look alike outside of the allowed folders.
    return RefusalError(
        "a path outside of the folders that this service may read. Expected an absolute path below one of those that "
        "'sagittal serve' was given with --allow-folder.",
        code="path_not_allowed",
        status=403,
    )


def _voxel_bytes(file: Path) -> int:
    header = read_header(file)
    depth, height, width = header.geometry.shape
    # Workers compute with float32.
    return depth * height * width * max(4, header.dtype.itemsize)
