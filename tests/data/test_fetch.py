from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path

import pytest
from local_server import Served, serving

from sagittal.data.catalogue import CATALOGUE, Download, PublicDataset
from sagittal.data.fetch import RECORD, fetch
from sagittal.errors import DataError

CONTENT = b"an archive"
SHA256 = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "127.0.0.1")


def entry(url: str, md5: str | None = None) -> PublicDataset:
    item = Download(url, "acdc.zip", md5, "the host" if md5 else "")
    return dataclasses.replace(CATALOGUE["acdc"], downloads=(item,))


def test_the_first_download_is_recorded_and_a_second_call_only_checks_it(tmp_path: Path) -> None:
    said: list[str] = []
    with serving(Served(CONTENT)) as server:
        (path,) = fetch(entry(server.url), tmp_path, say=said.append)
        assert fetch(entry(server.url), tmp_path, say=said.append) == (path,)
    assert path.read_bytes() == CONTENT and len(server.requests) == 1
    recorded = json.loads((tmp_path / RECORD).read_text())["acdc.zip"]
    assert recorded == {"url": server.url, "bytes": len(CONTENT), "sha256": SHA256, "checked_by": None}
    assert "first download's SHA-256 is recorded, which vouches for nothing yet" in said[0]
    assert "there already, with the recorded SHA-256" in said[1]


def test_a_published_checksum_is_checked_and_said(tmp_path: Path) -> None:
    said: list[str] = []
    md5 = hashlib.md5(CONTENT).hexdigest()
    with serving(Served(CONTENT)) as server:
        fetch(entry(server.url, md5), tmp_path, say=said.append)
    assert "MD5 as published by the host" in said[0]
    assert json.loads((tmp_path / RECORD).read_text())["acdc.zip"]["checked_by"] == "published MD5"


def test_a_later_download_is_compared_with_the_first(tmp_path: Path) -> None:
    said: list[str] = []
    with serving(Served(CONTENT)) as server:
        (path,) = fetch(entry(server.url), tmp_path)
        path.unlink()
        fetch(entry(server.url), tmp_path, say=said.append)
        assert "SHA-256 as recorded at the first download" in said[0]
        path.unlink()
        server.content = b"another"
        with pytest.raises(DataError, match=f"at the first download it was {SHA256}. It is kept as acdc.zip.changed"):
            fetch(entry(server.url), tmp_path)
    assert not path.exists() and path.with_name("acdc.zip.changed").read_bytes() == b"another"


def test_a_file_that_was_changed_or_came_from_elsewhere_is_not_taken_nor_overwritten(tmp_path: Path) -> None:
    with serving(Served(CONTENT)) as server:
        (tmp_path / "acdc.zip").write_bytes(b"mine")
        with pytest.raises(DataError, match="was not fetched by this command"):
            fetch(entry(server.url), tmp_path)
        assert (tmp_path / "acdc.zip").read_bytes() == b"mine"
        (tmp_path / "acdc.zip").unlink()
        (path,) = fetch(entry(server.url), tmp_path)
        path.write_bytes(b"changed")
        with pytest.raises(DataError, match=r"It was changed or damaged. Remove it"):
            fetch(entry(server.url), tmp_path)


@pytest.mark.parametrize("text", ["{", "[]", '{"acdc.zip": 3}'])
def test_a_record_that_is_none_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / RECORD).write_text(text)
    with pytest.raises(DataError, match="not a record of downloads"):
        fetch(entry("http://127.0.0.1:1/x"), tmp_path)


def test_a_set_behind_a_login_tells_how_to_get_it(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"can't be fetched by a command. Register at synapse.org") as caught:
        fetch(CATALOGUE["btcv"], tmp_path / "new")
    assert caught.value.code == "needs_login"
    assert not (tmp_path / "new").exists()


def test_a_refusal_is_told_with_the_page_of_the_data_set(tmp_path: Path) -> None:
    with serving(Served(CONTENT, fail_with=[404])) as server:
        with pytest.raises(DataError, match=rf"says 404.*Its page: {CATALOGUE['acdc'].address}") as caught:
            fetch(entry(server.url), tmp_path)
        assert caught.value.code == "refused"
