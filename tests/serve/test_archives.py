"""Zips from strangers: the good one comes out whole, each bad one is refused by name and before it harms."""

from __future__ import annotations

import io
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from sagittal.serve.archives import unpack
from sagittal.serve.refusals import RefusalError
from sagittal.serve.settings import Limits

LIMITS = Limits(unpacked_bytes=1 << 20, files=10)
SLICE = bytes(128) + b"DICM" + bytes(1000)


def _zip(members: dict[str, bytes], method: int = zipfile.ZIP_DEFLATED) -> bytes:
    target = io.BytesIO()
    with zipfile.ZipFile(target, "w", method) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return target.getvalue()


def _unpack(tmp_path: Path, content: bytes, limits: Limits = LIMITS) -> dict[str, bytes]:
    (tmp_path / "sent").write_bytes(content)
    unpack(tmp_path / "sent", tmp_path / "out", limits)
    return {path.name: path.read_bytes() for path in sorted((tmp_path / "out").iterdir())}


def _refused(tmp_path: Path, content: bytes, status: int, match: str, limits: Limits = LIMITS) -> None:
    with pytest.raises(RefusalError, match=match) as caught:
        _unpack(tmp_path, content, limits)
    assert caught.value.status == status
    assert str(tmp_path) not in caught.value.message
    assert sorted(path.name for path in tmp_path.iterdir()) in (["out", "sent"], ["sent"])


def test_slices_get_numbers_for_names_and_other_files_stay_behind(tmp_path: Path) -> None:
    members = {"DOE^JOHN/b": SLICE + b"2", "DOE^JOHN/a": SLICE + b"1", "README.TXT": b"hello", "bad.dcm": b"damaged"}
    found = _unpack(tmp_path, _zip(members))
    assert found == {"000000.dcm": SLICE + b"1", "000001.dcm": SLICE + b"2", "000002.dcm": b"damaged"}


def test_a_single_image_of_another_format_comes_out(tmp_path: Path) -> None:
    assert _unpack(tmp_path, _zip({"scan.nii": b"n" * 400})) == {"image": b"n" * 400}


def test_what_other_archives_took_of_the_limit_is_counted_once(tmp_path: Path) -> None:
    for number, members in enumerate(({"scan.nii": b"n" * 400}, {"a": SLICE, "b": SLICE})):
        (tmp_path / "sent").write_bytes(_zip(members))
        size = sum(map(len, members.values()))
        assert unpack(tmp_path / "sent", tmp_path / f"out{number}", LIMITS, spent_bytes=10_000) == size


@pytest.mark.parametrize("name", ["../../etc/passwd", "/etc/passwd", "C:\\windows\\x", "a/../../x", "\\\\host\\x"])
def test_names_that_lead_out_are_refused(tmp_path: Path, name: str) -> None:
    _refused(tmp_path, _zip({name: SLICE}), 422, "leads out")


def test_links_are_refused(tmp_path: Path) -> None:
    target = io.BytesIO()
    with zipfile.ZipFile(target, "w") as archive:
        entry = zipfile.ZipInfo("link.dcm")
        entry.create_system, entry.external_attr = 3, 0o120777 << 16
        archive.writestr(entry, "/etc/passwd")
    _refused(tmp_path, target.getvalue(), 422, "a link")


def test_archives_within_are_refused(tmp_path: Path) -> None:
    _refused(tmp_path, _zip({"a.dcm": SLICE, "b.zip": _zip({"c": SLICE})}), 422, "within")
    (tmp_path / "second").mkdir()
    _refused(tmp_path / "second", _zip({"b.zip": _zip({"c": SLICE})}), 422, "within")


@pytest.mark.parametrize("kind", [0o020000, 0o060000, 0o010000, 0o140000])
def test_devices_pipes_and_sockets_are_refused(tmp_path: Path, kind: int) -> None:
    target = io.BytesIO()
    with zipfile.ZipFile(target, "w") as archive:
        entry = zipfile.ZipInfo("a.dcm")
        entry.create_system, entry.external_attr = 3, (kind | 0o644) << 16
        archive.writestr(entry, SLICE)
    _refused(tmp_path, target.getvalue(), 422, "a link or a device")


def test_an_archive_that_holds_itself_is_refused_whatever_it_is_called(tmp_path: Path) -> None:
    # A quine's member is an archive like any other: it is told by its bytes, and nothing is unpacked twice.
    inner = _zip({"again.zip": _zip({"again.zip": b"PK\x03\x04" + bytes(100)})})
    for number, name in enumerate(("r.zip", "r", "r.nii", "r.dcm")):
        place = tmp_path / str(number)
        place.mkdir()
        content = _zip({name: inner})
        if name == "r.dcm":  # taken for a damaged slice, which the reader refuses
            assert _unpack(place, content) == {"000000.dcm": inner}
        else:
            _refused(place, content, 422, "within")


@pytest.mark.parametrize(
    "head", [b"7z\xbc\xaf\x27\x1c", b"Rar!\x1a\x07", b"\xfd7zXZ\0", b"BZh9", bytes(257) + b"ustar"]
)
def test_archives_of_other_kinds_within_are_refused(tmp_path: Path, head: bytes) -> None:
    _refused(tmp_path, _zip({"a.dcm": SLICE, "b": head + bytes(300)}), 422, "within")


def test_a_flood_from_few_bytes_is_refused_before_it_is_written(tmp_path: Path) -> None:
    # Ten members of 1 GiB of zeros, as their directory says; no more than the first bytes of one are ever unpacked.
    flood = _zip({f"{number}.dcm": SLICE + bytes(1 << 20) for number in range(9)})
    forged = flood
    place = forged.find(b"PK\x01\x02")
    while place >= 0:
        forged = forged[: place + 24] + struct.pack("<I", 1 << 30) + forged[place + 28 :]
        place = forged.find(b"PK\x01\x02", place + 4)
    _refused(tmp_path, forged, 413, "unpacks to", Limits(unpacked_bytes=2 << 30, files=10))
    (tmp_path / "second").mkdir()
    _refused(tmp_path / "second", flood, 413, "unpacks to")
    assert not any((tmp_path / "second" / "out").iterdir())


def test_limits_of_size_number_and_ratio(tmp_path: Path) -> None:
    cases: list[tuple[bytes, str, Limits]] = [
        (_zip({f"{n}.dcm": SLICE for n in range(11)}), "holds 11 files", LIMITS),
        (_zip({"a.dcm": SLICE + bytes(1 << 20)}), "unpacks to", LIMITS),
        (_zip({"a.dcm": SLICE + bytes(65 << 20)}), "times its size", Limits(unpacked_bytes=1 << 30)),
        (_zip({f"{'n' * 3000}{n}.dcm": SLICE for n in range(10)}), "a directory larger", LIMITS),
    ]
    for number, (content, match, limits) in enumerate(cases):
        (tmp_path / str(number)).mkdir()
        _refused(tmp_path / str(number), content, 413, match, limits)


def test_nothing_readable_is_told(tmp_path: Path) -> None:
    _refused(tmp_path, _zip({"a.txt": b"x", "b.txt": b"y"}), 415, "no DICOM file")


def _in_directory(content: bytes, offset: int, value: bytes) -> bytes:
    """Change a field of the first entry of the directory."""
    place = content.index(b"PK\x01\x02")
    return content[: place + offset] + value + content[place + offset + len(value) :]


FORGED: dict[str, Callable[[bytes], bytes]] = {
    "a smaller size": lambda content: _in_directory(content, 24, struct.pack("<I", 5)),
    "a larger size": lambda content: _in_directory(content, 24, struct.pack("<I", 500_000)),
    "a larger packed size": lambda content: _in_directory(content, 20, struct.pack("<I", 500_000)),
    "another checksum": lambda content: _in_directory(content, 16, b"\1\2\3\4"),
    "a place beyond the end": lambda content: _in_directory(content, 42, struct.pack("<I", 1 << 30)),
    "encryption": lambda content: _in_directory(content, 8, b"\1\0"),
    "an unknown method": lambda content: _in_directory(content, 10, b"\x63\0"),
    "no end": lambda content: content[:-10],
    "an end alone": lambda content: content[-22:],
    "nothing": lambda content: b"PK\x03\x04",
    "a directory before the file": lambda content: content[:-10] + struct.pack("<IIH", 46, 1 << 31, 0),
}


@pytest.mark.parametrize("what", FORGED)
def test_forged_fields_are_refused(tmp_path: Path, what: str) -> None:
    content = _zip({"a.dcm": SLICE, "b.dcm": SLICE})
    _refused(tmp_path, FORGED[what](content), 422, "zip")


def test_members_that_share_their_bytes_are_refused(tmp_path: Path) -> None:
    content = _zip({"a.dcm": SLICE, "b.dcm": SLICE})
    second = content.index(b"PK\x01\x02", content.index(b"PK\x01\x02") + 1)
    shared = content[: second + 42] + bytes(4) + content[second + 46 :]
    _refused(tmp_path, shared, 422, "share their bytes|can't be read")


def test_mutated_archives_are_refused_or_unpacked_but_nothing_else_happens(tmp_path: Path) -> None:
    rng, whole = np.random.default_rng(0), _zip({f"{n}.dcm": SLICE + bytes([n]) for n in range(3)})
    for number in range(150):
        content = bytearray(whole)
        for place in rng.integers(0, len(content), 3):
            content[place] = int(rng.integers(0, 256))
        (tmp_path / str(number)).mkdir()
        try:
            _unpack(tmp_path / str(number), bytes(content))
        except RefusalError as error:
            assert error.status in (413, 415, 422)
