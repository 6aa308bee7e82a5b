from __future__ import annotations

import hashlib
import io
import json
import socket
from pathlib import Path

import numpy as np
import pytest
from local_server import Served, serving

from sagittal.data import download as module
from sagittal.data.download import download, sha256_of
from sagittal.errors import DataError, ResourceError

CONTENT = np.random.default_rng(0).bytes(3_000_001)
MD5 = hashlib.md5(CONTENT).hexdigest()
SHA256 = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "127.0.0.1")


def left(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_a_file_arrives_whole_with_progress_and_nothing_beside_it(tmp_path):
    told = []
    with serving(Served(CONTENT)) as server:
        got = download(server.url, tmp_path / "new" / "file.tar", md5=MD5, on_progress=lambda *at: told.append(at))
    assert got.path.read_bytes() == CONTENT
    assert (got.size, got.sha256, got.resumed) == (len(CONTENT), SHA256, False)
    assert sha256_of(got.path) == SHA256
    assert left(tmp_path / "new") == {"file.tar"}
    assert told[-1] == (len(CONTENT), len(CONTENT)) and told == sorted(told) and len(told) > 2
    sent = {name.lower() for name in server.requests[0]}
    assert sent <= {"host", "user-agent", "accept-encoding", "connection"}


def test_a_broken_connection_is_taken_up_where_it_was(tmp_path):
    with serving(Served(CONTENT, cut_after=[1_000_000, 500_000])) as server:
        got = download(server.url, tmp_path / "file.tar", md5=MD5, pause_s=0.0)
    assert got.path.read_bytes() == CONTENT
    assert [request.get("Range") for request in server.requests] == [None, "bytes=1000000-", "bytes=1500000-"]
    assert server.requests[1]["If-Range"] == '"one"'


def test_what_an_earlier_call_left_is_taken_up(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "ATTEMPTS", 1)
    with serving(Served(CONTENT, cut_after=[1_000_000], fail_with=[])) as server:
        server.cut_after += [0]
        with pytest.raises(
            ResourceError, match=r"ended at byte 1000000 of 3000001; 1000000 bytes are there.*same command"
        ):
            download(server.url, tmp_path / "file.tar", pause_s=0.0)
        assert left(tmp_path) == {"file.tar.part", "file.tar.part.json"}
        got = download(server.url, tmp_path / "file.tar", md5=MD5, pause_s=0.0)
    assert got.resumed and got.path.read_bytes() == CONTENT
    assert left(tmp_path) == {"file.tar"}


def test_a_server_without_ranges_starts_again(tmp_path):
    with serving(Served(CONTENT, accepts_ranges=False, cut_after=[1_000_000])) as server:
        got = download(server.url, tmp_path / "file.tar", md5=MD5, pause_s=0.0)
    assert got.path.read_bytes() == CONTENT
    assert len(server.requests) == 2


def test_a_file_that_changed_in_between_starts_again(tmp_path):
    part = tmp_path / "file.tar.part"
    part.write_bytes(b"of an older file")
    with serving(Served(CONTENT, etag='"two"')) as server:
        part.with_name("file.tar.part.json").write_text(json.dumps({"url": server.url, "validator": '"one"'}))
        got = download(server.url, tmp_path / "file.tar")
    assert server.requests[0]["If-Range"] == '"one"'
    assert got.path.read_bytes() == CONTENT


@pytest.mark.parametrize("notes", ["not JSON", '{"url": "http://127.0.0.1/other"}', "[]", None])
def test_a_part_of_unknown_origin_is_not_gone_on_with(tmp_path, notes):
    (tmp_path / "file.tar.part").write_bytes(CONTENT[:1000])
    if notes is not None:
        (tmp_path / "file.tar.part.json").write_text(notes)
    with serving(Served(CONTENT)) as server:
        download(server.url, tmp_path / "file.tar", md5=MD5)
    assert "Range" not in server.requests[0]


@pytest.mark.parametrize(("held", "requests"), [(CONTENT, 1), (CONTENT + b"more", 2)])
def test_a_part_that_is_complete_is_kept_and_a_longer_one_begun_again(tmp_path, held, requests):
    (tmp_path / "file.tar.part").write_bytes(held)
    with serving(Served(CONTENT, etag=None)) as server:
        (tmp_path / "file.tar.part.json").write_text(json.dumps({"url": server.url, "validator": ""}))
        got = download(server.url, tmp_path / "file.tar", md5=MD5, pause_s=0.0)
    assert got.path.read_bytes() == CONTENT
    assert len(server.requests) == requests


def test_another_part_than_was_asked_for_is_not_taken(tmp_path):
    with serving(Served(CONTENT, cut_after=[1_000_000], shift_ranges=7)) as server:
        got = download(server.url, tmp_path / "file.tar", md5=MD5, pause_s=0.0)
    assert got.path.read_bytes() == CONTENT
    assert [request.get("Range") for request in server.requests] == [None, "bytes=1000000-", None]


def test_a_weak_tag_is_no_proof_that_the_bytes_are_the_same(tmp_path):
    with serving(Served(CONTENT, etag='W/"one"', cut_after=[1_000_000])) as server:
        download(server.url, tmp_path / "file.tar", md5=MD5, pause_s=0.0)
    assert "If-Range" not in server.requests[1]


def test_a_wrong_checksum_leaves_nothing(tmp_path):
    with serving(Served(CONTENT)) as server, pytest.raises(DataError, match=f"is {MD5}, expected 0{{32}}") as caught:
        download(server.url, tmp_path / "file.tar", md5="0" * 32)
    assert caught.value.code == "wrong_checksum"
    assert left(tmp_path) == set()


def test_nothing_is_overwritten(tmp_path):
    (tmp_path / "file.tar").write_bytes(b"mine")
    with serving(Served(CONTENT)) as server, pytest.raises(DataError, match="exists, and is never overwritten"):
        download(server.url, tmp_path / "file.tar")
    assert (tmp_path / "file.tar").read_bytes() == b"mine" and server.requests == []


def test_a_refusal_is_told_at_once_and_a_server_fault_is_tried_again(tmp_path):
    with serving(Served(CONTENT, fail_with=[404])) as server:
        with pytest.raises(DataError, match="the server says 404 Not Found") as caught:
            download(server.url, tmp_path / "file.tar", pause_s=0.0)
        assert caught.value.code == "refused" and len(server.requests) == 1
        server.fail_with += [503, 429]
        assert download(server.url, tmp_path / "file.tar", pause_s=0.0).sha256 == SHA256
        server.fail_with += [500] * 10
        with pytest.raises(ResourceError, match="the server says 500") as failed:
            download(server.url, tmp_path / "again.tar", pause_s=0.0)
    assert failed.value.code == "network"


def test_a_server_that_is_not_there_is_told(tmp_path):
    with socket.socket() as closed:  # it keeps the port from others, and answers nobody
        closed.bind(("127.0.0.1", 0))
        with pytest.raises(ResourceError, match="Check the network"):
            download(f"http://127.0.0.1:{closed.getsockname()[1]}/file.tar", tmp_path / "file.tar", pause_s=0.0)


@pytest.mark.parametrize("url", ["file:///etc/hostname", "ftp://127.0.0.1/x", "data:,x", "hostname"])
def test_only_web_addresses_are_fetched_and_followed(tmp_path, url):
    with pytest.raises(DataError, match="begins with https:// or http://"):
        download(url, tmp_path / "file.tar")
    if ":" in url:
        with serving(Served(CONTENT, redirect_to=url)) as server, pytest.raises(DataError, match="edirect"):
            download(server.url, tmp_path / "file.tar", pause_s=0.0)


def test_a_redirect_is_followed_and_a_length_is_not_needed(tmp_path):
    with serving(Served(CONTENT, tells_length=False)) as server:
        server.redirect_to = server.url.replace("/file.tar", "/end")
        assert download(server.url, tmp_path / "file.tar", md5=MD5).size == len(CONTENT)


def test_a_redirect_from_https_to_http_is_refused():
    handler = module._SafeRedirects()
    request = module.urllib.request.Request("https://example.org/a")
    with pytest.raises(DataError, match=r"redirects to http://example.org/b. Expected .*https://"):
        handler.redirect_request(request, io.BytesIO(), 302, "", {}, "http://example.org/b")


def test_a_disk_that_is_too_small_is_told_before_and_a_folder_that_cannot_be_written(tmp_path, monkeypatch):
    (tmp_path / "taken").write_bytes(b"")
    with serving(Served(CONTENT)) as server:
        with pytest.raises(ResourceError, match="can't be written"):
            download(server.url, tmp_path / "taken" / "file.tar")
        usage = module.shutil.disk_usage(tmp_path)._replace(free=1000)
        monkeypatch.setattr(module.shutil, "disk_usage", lambda path: usage)
        with pytest.raises(ResourceError, match="3000001 bytes are still to come, 1000 are free"):
            download(server.url, tmp_path / "file.tar")
