"""The DICOMweb client against a server that misbehaves; a real PACS is asked in `test_watch_orthanc.py`."""

from __future__ import annotations

import errno
import json
import os
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import pytest

from sagittal.errors import ResourceError
from sagittal.serve import dicomweb
from sagittal.serve.dicomweb import DicomWeb
from sagittal.serve.settings import Limits


class Odd(BaseHTTPRequestHandler):
    """Answers what it was told to, and notes what it was asked."""

    answer: ClassVar[tuple[int, dict[str, str], bytes]] = (200, {}, b"")
    asked: ClassVar[list[tuple[str, str, dict[str, str], bytes]]] = []

    def _reply(self) -> None:
        body = self.rfile.read(int(self.headers.get("content-length") or 0))
        self.asked.append((self.command, self.path, dict(self.headers), body))
        status, headers, content = self.answer
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(content))} | headers).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    do_GET = do_POST = _reply  # noqa: N815 - the name that the library looks for

    def log_message(self, format: str, *arguments: Any) -> None:
        pass


@pytest.fixture
def pacs() -> Iterator[DicomWeb]:
    Odd.asked.clear()
    with ThreadingHTTPServer(("127.0.0.1", 0), Odd) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield DicomWeb(f"http://127.0.0.1:{server.server_port}/web/", "user:ü:word", timeout_s=120)
        server.shutdown()
        thread.join()


def _failure(reason: int) -> bytes:
    return json.dumps({"00081198": {"vr": "SQ", "Value": [{"00081197": {"vr": "US", "Value": [reason]}}]}}).encode()


@pytest.mark.parametrize("status", [200, 202, 409])
def test_what_the_pacs_has_already_is_stored(pacs: DicomWeb, tmp_path: Path, status: int) -> None:
    (tmp_path / "a.dcm").write_bytes(b"object")
    Odd.answer = (status, {}, _failure(0x0111))
    pacs.store("1.2", [tmp_path / "a.dcm"])
    method, path, headers, body = Odd.asked[0]
    assert (method, path) == ("POST", "/web/studies/1.2") and headers["Authorization"].startswith("Basic ")
    boundary = headers["Content-Type"].partition("boundary=")[2]
    expected = f"--{boundary}\r\nContent-Type: application/dicom\r\n\r\nobject\r\n--{boundary}--\r\n"
    assert body == expected.encode()


@pytest.mark.parametrize(
    ("status", "content"), [(202, _failure(0xA700)), (409, b""), (409, b"{}"), (500, b""), (200, b"<html>")]
)
def test_what_the_pacs_does_not_keep_is_told(pacs: DicomWeb, tmp_path: Path, status: int, content: bytes) -> None:
    (tmp_path / "a.dcm").write_bytes(b"object")
    Odd.answer = (status, {}, content)
    with pytest.raises(ResourceError, match=r"^the PACS at 127.0.0.1 ") as caught:
        pacs.store("1.2", [tmp_path / "a.dcm"])
    assert "word" not in caught.value.message


@pytest.mark.parametrize("status", [408, 429, 502, 503, 504])
def test_a_pacs_that_a_proxy_finds_away_can_t_be_reached(pacs: DicomWeb, tmp_path: Path, status: int) -> None:
    (tmp_path / "a.dcm").write_bytes(b"object")
    Odd.answer = (status, {}, b"<html>Bad Gateway")
    for ask in (
        lambda: pacs.series(("CT",)),
        lambda: pacs.fetch("1.2", "1.2.3", tmp_path, Limits()),
        lambda: pacs.store("1.2", [tmp_path / "a.dcm"]),
    ):
        with pytest.raises(ResourceError, match=str(status)) as caught:
            ask()
        assert caught.value.code == "pacs_unreachable"


def test_a_full_disk_is_no_fault_of_the_pacs(pacs: DicomWeb, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def take(parts: Any, piece: bytes) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(dicomweb._Parts, "take", take)
    Odd.answer = (200, {"Content-Type": "multipart/related; boundary=b"}, b"--b\r\n\r\nobject\r\n--b--\r\n")
    with pytest.raises(OSError, match=os.strerror(errno.ENOSPC)):
        pacs.fetch("1.2", "1.2.3", tmp_path, Limits())


@pytest.mark.parametrize(
    "answer",
    [
        (302, {"Location": "http://127.0.0.1:1/elsewhere"}, b""),
        (200, {}, b"no JSON"),
        (200, {}, b'{"a": 1}'),
        (200, {}, b"[" * 100_000),
        (200, {"Content-Length": "1000"}, b"[]"),
    ],
)
def test_an_odd_answer_to_a_search_is_an_error(pacs: DicomWeb, answer: tuple[int, dict[str, str], bytes]) -> None:
    Odd.answer = answer
    with pytest.raises(ResourceError):
        pacs.series(("CT",))
    assert len(Odd.asked) == 1


def test_a_search_ends_where_a_server_knows_no_pages_and_skips_what_is_no_series(pacs: DicomWeb) -> None:
    entry = {"0020000E": {"vr": "UI", "Value": ["1.2.3"]}, "00201209": {"vr": "IS", "Value": ["many"]}}
    odd = [{"0020000E": {"Value": [7]}}, {"0020000E": 7}, {}, "text"]
    Odd.answer = (200, {}, json.dumps([entry] * 499 + odd).encode())
    (found,) = pacs.series(("CT",))
    assert (found.series_uid, found.study_uid, found.instances) == ("1.2.3", "", 0) and not found.is_sound
    assert len(Odd.asked) == 2 and "offset=1" in Odd.asked[1][1]
    Odd.answer = (204, {}, b"")
    assert pacs.series(("CT",)) == ()


@pytest.mark.parametrize(
    "answer",
    [
        (200, {"Content-Type": "application/dicom"}, b"object"),
        (200, {"Content-Type": "multipart/related; boundary=b"}, b"--b\r\n\r\nobject"),
        (200, {"Content-Type": "multipart/related; boundary=b"}, b"something else"),
        (200, {"Content-Type": "multipart/related; boundary=b", "Content-Length": "999"}, b"--b\r\n\r\nobject"),
    ],
)
def test_a_series_that_is_cut_off_is_an_error(
    pacs: DicomWeb, tmp_path: Path, answer: tuple[int, dict[str, str], bytes]
) -> None:
    Odd.answer = answer
    with pytest.raises(ResourceError):
        pacs.fetch("1.2", "1.2.3", tmp_path, Limits())
