"""The stored numbers of one slice or frame: plain ones, and those that pydicom or GDCM unpack.

No more memory is asked for than the file can fill: sizes are compared with those of the file or, where voxels are
compressed, with those that the compressed image itself states.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from sagittal.errors import DataError
from sagittal.volumes.dicom_files import Member
from sagittal.volumes.dicom_library import BoundedFile, damaged, library, quiet, require_sensible_size

BITS_ALLOCATED = (8, 16, 32)
JPEG_EXTENDED = "1.2.840.10008.1.2.4.51"
RLE = "1.2.840.10008.1.2.5"
JPEG_2000 = ("1.2.840.10008.1.2.4.90", "1.2.840.10008.1.2.4.91")
LOSSY = ("1.2.840.10008.1.2.4.50", JPEG_EXTENDED, "1.2.840.10008.1.2.4.81", JPEG_2000[1])
"""Transfer syntaxes that lose something, unless the header says that this image lost nothing."""
MAX_RLE_RATIO = 64
"""Two bytes of it make 128 at the most."""
_PIXELS = (
    "SamplesPerPixel",
    "PhotometricInterpretation",
    "NumberOfFrames",
    "Rows",
    "Columns",
    "BitsAllocated",
    "BitsStored",
    "PixelRepresentation",
    "ExtendedOffsetTable",
    "ExtendedOffsetTableLengths",
)
_PIXEL_DATA = (0x7FE0, 0x0010)
_UNDEFINED = 0xFFFFFFFF
_ITEM, _END_OF_ITEMS = b"\xfe\xff\x00\xe0", b"\xfe\xff\xdd\xe0"
_NOT_SOF = (0xC4, 0xC8, 0xCC)
_JPEG_LS_SOF = 0xF7


@dataclass(frozen=True)
class Encoding:
    """How a slice's numbers are stored.

    Attributes:
        dtype: type of the numbers in the file's byte order.
        bits: how many of the type's bits count.
        high_bit: which of them is the highest.
        inverted: whether the numbers run from white to black.
        slope: what a number is multiplied with.
        intercept: what is then added.
    """

    dtype: np.dtype[Any]
    bits: int
    high_bit: int
    inverted: bool
    slope: float
    intercept: float


def require_readable_voxels(tags: Any, path: Path) -> None:
    """Refuse by name a transfer syntax that nothing installed unpacks.

    Raises:
        DataError: with what to install, or what else to do.
    """
    syntax = tags.file_meta.get("TransferSyntaxUID")
    if syntax is None or not syntax.is_transfer_syntax:
        raise DataError(
            f"{path}: an unknown transfer syntax. Expected one of the standard's. Export the series again, "
            "uncompressed.",
            code="compressed",
        )
    if not syntax.is_encapsulated:
        return
    try:
        decoder = library(path).pixels.get_decoder(syntax)
    except NotImplementedError:
        raise DataError(
            f"{path}: compressed voxels ({syntax.name}), which are not read. Expected JPEG, JPEG-LS, JPEG 2000, RLE or "
            "none. Unpack them (gdcmconv --raw), or export the series again.",
            code="compressed",
        ) from None
    if not decoder.is_available:
        needed = "pip install 'sagittal[dicom]'"
        if not any("gdcm" in each for each in decoder.missing_dependencies):
            needed = "pip install pylibjpeg pylibjpeg-openjpeg" if "JPEG" in syntax.name else needed
        raise DataError(
            f"{path}: compressed voxels ({syntax.name}), for which no decoder is installed. Run: {needed}",
            code="compressed",
        )


def loses_something(tags: Any) -> bool:
    """Whether the voxels were compressed with loss, now or ever before."""
    told = str(tags.get("LossyImageCompression", "")).strip()
    return told == "01" or (told != "00" and tags.file_meta.get("TransferSyntaxUID") in LOSSY)


def read_frames(
    member: Member, path: Path, shape: tuple[int, int], frames: Sequence[int], encoding: Encoding
) -> Iterator[NDArray[Any]]:
    """Yield the stored numbers of frames of one file as (H, W), in the machine's byte order.

    Args:
        member: the file.
        path: of the scan.
        shape: voxels along H and W.
        frames: which, from 0, in ascending order.
        encoding: how the numbers are stored.

    Raises:
        DataError: they are truncated or damaged, or of another size than the header says.
    """
    pydicom = library(path)
    with quiet(member.name, path):
        opened = BoundedFile(member.open(), member.size)
    with opened as file:
        with quiet(member.name, path):
            require_sensible_size(member.name, path, file)
            tags = pydicom.dcmread(file, stop_before_pixels=True, specific_tags=[*_PIXELS])
            if (int(tags.Rows), int(tags.Columns)) != shape:
                raise damaged(member.name, path, "it changed while it was read")
            if tags.file_meta.TransferSyntaxUID.is_encapsulated:
                found = _compressed_frames(file, tags, member, path, frames)
            else:
                found = _plain_frames(file, tags, member, path, frames, encoding)
        # Not quiet while the caller works, who may have warnings of his own.
        for _ in frames:
            with quiet(member.name, path):
                values = _as_numbers(next(found), encoding)
            yield values


def _plain_frames(
    file: Any, tags: Any, member: Member, path: Path, frames: Sequence[int], encoding: Encoding
) -> Iterator[NDArray[Any]]:
    shape = int(tags.Rows), int(tags.Columns)
    each = shape[0] * shape[1] * encoding.dtype.itemsize
    source, start, length = _value(file, tags, path)
    expected = each * int(tags.get("NumberOfFrames") or 1)
    if length < expected:
        raise damaged(
            member.name, path, f"{expected} bytes of voxels expected, {length} found: it is truncated or forged"
        )
    for frame in frames:
        source.seek(start + frame * each)
        content = source.read(each)
        if len(content) < each:
            text = f"{each} bytes of voxels expected, {len(content)} found: it is truncated"
            raise damaged(member.name, path, text)
        yield np.frombuffer(content, encoding.dtype).reshape(shape)


def _value(file: Any, tags: Any, path: Path) -> tuple[Any, int, int]:
    """Return where the value of PixelData stands: the file, the place in it and the length."""
    syntax = tags.file_meta.TransferSyntaxUID
    if syntax.is_deflated:
        file.seek(0)
        content = library(path).dcmread(file, specific_tags=["PixelData"]).get("PixelData") or b""
        return BytesIO(content), 0, len(content)
    order: Literal["little", "big"] = "little" if syntax.is_little_endian else "big"
    head = file.read(8)
    tag = (int.from_bytes(head[:2], order), int.from_bytes(head[2:4], order))
    if tag != _PIXEL_DATA or len(head) < 8:
        return file, 0, 0
    # The long form of an explicit header: two letters of the type, two bytes that mean nothing, four of the length.
    length = int.from_bytes(head[4:] if syntax.is_implicit_VR else file.read(4), order)
    return file, file.tell(), length


def _compressed_frames(file: Any, tags: Any, member: Member, path: Path, frames: Sequence[int]) -> Iterator[Any]:
    pydicom = library(path)
    _, _, length = _value(file, tags, path)
    if length != _UNDEFINED:
        raise damaged(member.name, path, "no compressed voxels in it: it is truncated")
    _require_whole(file, member, path)
    count = int(tags.get("NumberOfFrames") or 1)
    offsets = None
    if "ExtendedOffsetTable" in tags and "ExtendedOffsetTableLengths" in tags:
        offsets = (tags.ExtendedOffsetTable, tags.ExtendedOffsetTableLengths)
    wanted = iter(frames)
    next_wanted = next(wanted, None)
    found = pydicom.encaps.generate_frames(file, number_of_frames=count, extended_offsets=offsets)
    for index, content in enumerate(found):
        if next_wanted is None:
            return
        if index == next_wanted:
            yield _unpacked(content, tags, member, path)
            next_wanted = next(wanted, None)
    if next_wanted is not None:
        raise damaged(member.name, path, f"frame {next_wanted + 1} of {count} is missing: it is truncated")


def _require_whole(file: Any, member: Member, path: Path) -> None:
    """Refuse compressed voxels that end in the middle: some decoders fill up the rest without a word."""
    start = place = file.tell()
    while (head := file.read(8))[:4] == _ITEM and len(head) == 8:
        place += 8 + int.from_bytes(head[4:], "little")
        if place > member.size:
            raise damaged(member.name, path, "its compressed voxels end too early: it is truncated")
        file.seek(place)
    if head and head[:4] != _END_OF_ITEMS:
        raise damaged(member.name, path, "its compressed voxels end too early: it is truncated")
    file.seek(start)


def _unpacked(content: bytes, tags: Any, member: Member, path: Path) -> NDArray[Any]:
    """Return the numbers of one compressed image as (H, W)."""
    pydicom = library(path)
    shape, syntax = (int(tags.Rows), int(tags.Columns)), tags.file_meta.TransferSyntaxUID
    _require_size(content, shape, tags, member, path)
    bits = int(tags.get("BitsStored") or tags.BitsAllocated)
    if syntax == JPEG_EXTENDED and bits > 8:
        return _twelve_bits(content, shape, bits, member, path)
    options = pydicom.pixels.as_pixel_options(
        tags, number_of_frames=1, correct_unused_bits=False, pixel_keyword="PixelData"
    )
    options.pop("extended_offsets", None)
    decoder = pydicom.pixels.get_decoder(syntax)
    # On damaged JPEG-LS the other decoder takes seconds to say so; GDCM lacks samples of 6 and 7 bits.
    has_gdcm = "JPEG-LS" in syntax.name and "gdcm" in decoder.available_plugins and bits not in (6, 7)
    try:
        values, _ = decoder.as_array(
            pydicom.encaps.encapsulate([content], has_bot=False),
            index=0,
            raw=True,
            decoding_plugin="gdcm" if has_gdcm else "",
            **options,
        )
    except (RuntimeError, ValueError):
        # What the decoders say is for their makers, and may be long.
        raise damaged(member.name, path, f"its compressed voxels ({syntax.name}) are damaged") from None
    return np.asarray(values)


def _twelve_bits(content: bytes, shape: tuple[int, int], bits: int, member: Member, path: Path) -> NDArray[Any]:
    """Unpack JPEG of 12 bits, which pydicom leaves to nobody."""
    try:
        gdcm: Any = importlib.import_module("gdcm")
    except ImportError:
        raise DataError(
            f"{path}: compressed voxels (JPEG of {bits} bits) need GDCM, which is not installed. Run: "
            "pip install 'sagittal[dicom]'",
            code="compressed",
        ) from None
    fragment, fragments = gdcm.Fragment(), gdcm.SequenceOfFragments.New()
    fragment.SetByteStringValue(content)
    fragments.AddFragment(fragment)
    element = gdcm.DataElement(gdcm.Tag(*_PIXEL_DATA))
    element.SetValue(fragments.__ref__())
    image = gdcm.Image()
    image.SetNumberOfDimensions(2)
    image.SetDimensions((shape[1], shape[0], 1))
    image.SetDataElement(element)
    grey = gdcm.PhotometricInterpretation(gdcm.PhotometricInterpretation.MONOCHROME2)
    image.SetPhotometricInterpretation(grey)
    image.SetTransferSyntax(gdcm.TransferSyntax(gdcm.TransferSyntax.JPEGExtendedProcess2_4))
    image.SetPixelFormat(gdcm.PixelFormat(1, 16, bits, bits - 1, 0))
    # GDCM hands bytes over as text.
    values = np.frombuffer(image.GetBuffer().encode("utf-8", "surrogateescape"), np.uint16)
    if values.size != shape[0] * shape[1]:
        raise damaged(member.name, path, "its compressed voxels (JPEG of 12 bits) are damaged")
    return values.reshape(shape)


def _require_size(content: bytes, shape: tuple[int, int], tags: Any, member: Member, path: Path) -> None:
    """Refuse a compressed image that states another size than the header: a decoder would make room for either."""
    height, width = shape
    syntax = tags.file_meta.TransferSyntaxUID
    if syntax == RLE:
        if height * width * int(tags.BitsAllocated) // 8 > MAX_RLE_RATIO * len(content):
            raise damaged(member.name, path, f"{len(content)} bytes for {height} x {width} voxels: truncated or forged")
        return
    stated = (
        _size_of_jpeg_2000(content) if syntax in JPEG_2000 or "JPEG 2000" in syntax.name else _size_of_jpeg(content)
    )
    if stated is None:
        raise damaged(member.name, path, f"its compressed voxels ({syntax.name}) are damaged")
    if stated != (height, width, 1):
        text = f"{stated[0]} x {stated[1]} voxels of {stated[2]} values compressed, {height} x {width} in the header"
        raise damaged(member.name, path, text)


def _size_of_jpeg(content: bytes) -> tuple[int, int, int] | None:
    """Return height, width and components that a JPEG or JPEG-LS image states, from its frame header."""
    place = content.find(b"\xff\xd8")
    place = place + 2 if place >= 0 else len(content)
    while place + 10 <= len(content):
        if content[place] != 0xFF:
            return None
        marker = content[place + 1]
        if marker == 0xFF:
            place += 1
        elif (0xC0 <= marker <= 0xCF and marker not in _NOT_SOF) or marker == _JPEG_LS_SOF:
            height, width = content[place + 5 : place + 7], content[place + 7 : place + 9]
            return int.from_bytes(height, "big"), int.from_bytes(width, "big"), content[place + 9]
        else:
            place += 2 + max(2, int.from_bytes(content[place + 2 : place + 4], "big"))
    return None


def _size_of_jpeg_2000(content: bytes) -> tuple[int, int, int] | None:
    """Return height, width and components that a JPEG 2000 image states, from its SIZ marker."""
    place = content.find(b"\xff\x4f\xff\x51")
    fields = content[place + 8 : place + 42]
    if place < 0 or len(fields) < 34:
        return None
    # Xsiz, Ysiz, XOsiz, YOsiz, four numbers of tiles, components.
    right, low, left, top = (int.from_bytes(fields[start : start + 4], "big") for start in (0, 4, 8, 12))
    return low - top, right - left, int.from_bytes(fields[32:34], "big")


def _as_numbers(values: NDArray[Any], encoding: Encoding) -> NDArray[Any]:
    """Return the numbers in the machine's byte order, without the bits that do not count, low ones black."""
    native = encoding.dtype.newbyteorder("=")
    values = values.astype(native)
    width = 8 * native.itemsize
    if encoding.bits != width:
        # Other data may hide in the bits that do not count; shifting there and back also spreads the sign.
        values = (values << (width - 1 - encoding.high_bit)) >> (width - encoding.bits)
    if encoding.inverted:
        highest = -1 if native.kind == "i" else (1 << encoding.bits) - 1
        values = (highest - values).astype(native)
    return values
