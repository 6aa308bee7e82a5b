from __future__ import annotations

import hashlib
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest

from sagittal.bundle.index import ModelEntry, ModelIndex
from sagittal.data.fetch_bundle import LocatedIndex, fetch_bundle, read_index
from sagittal.errors import BundleError, DataError, ResourceError

CONTENT = b"a package" * 1000


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""


@pytest.fixture
def shop(tmp_path: Path) -> Path:
    """A folder with a list of two models, one of which has changed since it was listed."""
    folder = tmp_path / "shop"
    (folder / "ct").mkdir(parents=True)
    (folder / "ct" / "good.sagittal").write_bytes(CONTENT)
    (folder / "changed.sagittal").write_bytes(CONTENT + b"!")
    models = tuple(
        ModelEntry(
            name=name,
            version="1",
            file=file,
            sha256=hashlib.sha256(CONTENT).hexdigest(),
            bytes=len(CONTENT),
            network="mednext-s",
            channels=("CT",),
            labels=("spleen",),
        )
        for name, file in (("good", "ct/good.sagittal"), ("changed", "changed.sagittal"), ("gone", "gone.sagittal"))
    )
    ModelIndex(models=models).write(folder / "models.json")
    return folder


@pytest.fixture
def address(shop: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(shop)))
    thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/models.json"
    server.shutdown()
    server.server_close()
    thread.join()


def left(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()} if folder.is_dir() else set()


def test_a_model_is_fetched_over_http_with_progress(address: str, tmp_path: Path) -> None:
    told: list[tuple[int, int | None]] = []
    listed = read_index(address)
    package = fetch_bundle("good", listed, tmp_path / "out", on_progress=lambda *at: told.append(at))
    assert package == tmp_path / "out" / "good-1.sagittal"
    assert package.read_bytes() == CONTENT
    assert told[-1] == (len(CONTENT), len(CONTENT))
    assert left(tmp_path / "out") == {"good-1.sagittal"}


@pytest.mark.parametrize("form", ["path", "address of a file"])
def test_a_model_is_fetched_from_a_shared_folder(shop: Path, tmp_path: Path, form: str) -> None:
    index = shop / "models.json"
    listed = read_index(index if form == "path" else index.as_uri())
    assert fetch_bundle("good==1", listed, tmp_path / "out").read_bytes() == CONTENT


def test_what_is_there_with_the_right_hash_is_not_fetched_again(shop: Path, tmp_path: Path) -> None:
    lines: list[str] = []
    listed = read_index(shop / "models.json")
    fetch_bundle("good", listed, tmp_path, say=lines.append)
    (shop / "ct" / "good.sagittal").unlink()
    assert fetch_bundle("good", listed, tmp_path, say=lines.append).read_bytes() == CONTENT
    assert "as the index says" in lines[0] and "there already" in lines[1]
    (tmp_path / "good-1.sagittal").write_bytes(b"mine")
    with pytest.raises(BundleError, match=r"good-1.sagittal: has 4 bytes.*Remove it"):
        fetch_bundle("good", listed, tmp_path)
    assert (tmp_path / "good-1.sagittal").read_bytes() == b"mine"


def test_other_bytes_than_those_listed_never_appear(address: str, shop: Path, tmp_path: Path) -> None:
    for source in (address, shop / "models.json"):
        with pytest.raises(
            BundleError, match=r"changed-1.sagittal: has 9001 bytes.*the index says 9000 bytes.*removed"
        ):
            fetch_bundle("changed", read_index(source), tmp_path / "out")
        assert left(tmp_path / "out") == set()


def test_what_the_list_names_and_nobody_has_is_told(address: str, shop: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="the server says 404"):
        fetch_bundle("gone", read_index(address), tmp_path / "out")
    with pytest.raises(BundleError, match=r"gone.sagittal: missing, but the index lists it"):
        fetch_bundle("gone", read_index(shop / "models.json"), tmp_path / "out")
    assert left(tmp_path / "out") == set()


def test_a_list_that_is_not_there_is_told(address: str, tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"absent.json: can't be read.*sagittal models add"):
        read_index(tmp_path / "absent.json")
    with pytest.raises(DataError, match="the server says 404"):
        read_index(address.replace("models", "absent"))
    with pytest.raises(BundleError, match="not a list of models"):
        read_index(address.replace("models.json", "ct/good.sagittal"))


def test_a_folder_that_cannot_be_made_is_told(shop: Path, tmp_path: Path) -> None:
    (tmp_path / "taken").write_bytes(b"")
    with pytest.raises(ResourceError, match="taken"):
        fetch_bundle("good", read_index(shop / "models.json"), tmp_path / "taken" / "folder")


def test_packages_lie_beside_the_list_or_at_their_own_address(shop: Path) -> None:
    good = read_index(shop / "models.json").index.entry("good")
    away = good.replace(file="https://example.org/good.sagittal")
    remote = LocatedIndex(ModelIndex(models=(good,)), "https://example.org/lists/models.json?x=1")
    assert remote.location(good) == "https://example.org/lists/ct/good.sagittal"
    assert remote.location(away) == away.file
    assert LocatedIndex(remote.index, shop / "models.json").location(good) == shop / "ct" / "good.sagittal"
