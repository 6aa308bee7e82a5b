"""Storage that machines share: a folder, and an object store that speaks S3 on this machine."""

from __future__ import annotations

import errno
import threading
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sagittal.cluster.shared import LISTING, Store
from sagittal.cluster.shared_places import sha256_of
from sagittal.errors import DataError, PlanError, ResourceError
from sagittal.plan.urls import is_url, without_secrets

pytest.importorskip("s3fs", reason="no s3fs: pip install 'sagittal[ray]'")

_IGNORED = "ignore::DeprecationWarning"


@pytest.fixture(params=["folder", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    if request.param == "folder":
        return Store(tmp_path / "store")
    return Store(f"{request.getfixturevalue('s3')}/{tmp_path.name}")


def _folder(root: Path, **files: bytes) -> Path:
    for name, content in files.items():
        path = root / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return root


def _contents(root: Path) -> dict[str, bytes]:
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def test_a_file_comes_back_as_it_was_stored_and_can_be_replaced(store: Store, tmp_path: Path) -> None:
    (tmp_path / "scan").write_bytes(b"voxels")
    assert not store.exists("a/scan")
    store.put("a/scan", tmp_path / "scan")
    store.put("a/note", b"old")
    store.put("a/note", b"new")
    assert store.get("a/note") == b"new"
    assert store.fetch("a/scan", tmp_path / "deep" / "copy").read_bytes() == b"voxels"
    assert store.list() == store.list("a") == ["a/note", "a/scan"]
    assert store.exists("a/scan") and not store.exists("a")


def test_what_is_deleted_is_gone_and_may_be_deleted_again(store: Store) -> None:
    store.put("a/x", b"1")
    store.put("ab/x", b"2")
    store.delete_folder("a")
    store.delete("a/x")
    assert store.list() == ["ab/x"]
    assert store.list("nowhere") == []


def test_a_shared_folder_keeps_no_empty_folders(tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    store.publish("run/fold_0", _folder(tmp_path / "source", log=b"1"))
    store.put("run/kept", b"2")
    store.delete_folder("run/fold_0")
    assert [path.name for path in (tmp_path / "store").rglob("*")] == ["run", "kept"]
    store.delete_folder("run")
    store.delete_folder("run")
    assert list((tmp_path / "store").iterdir()) == []


def test_what_was_never_stored_is_told(store: Store, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nothing: no such file"):
        store.get("nothing")
    with pytest.raises(DataError, match=r"nothing: no such file"):
        store.fetch("nothing", tmp_path / "target")
    with pytest.raises(DataError, match=r"run: nothing was published there"):
        store.fetch_folder("run", tmp_path / "target")
    assert store.published("run") is None
    assert not list(tmp_path.glob("*target*")), "a file that was not fetched left something behind"


def test_a_file_that_can_not_be_read_is_named_and_not_the_store(store: Store, tmp_path: Path) -> None:
    store.put("there", b"1")
    source = tmp_path / "scan"
    with pytest.raises(ResourceError, match=r"scan: can't be read \(No such file") as told:
        store.put("copy", source)
    assert told.value.code == "unreadable"
    source.mkdir()
    with pytest.raises(ResourceError, match=r"scan: can't be read \(Is a directory") as told:
        store.put("copy", source)
    assert told.value.code == "unreadable" and store.list() == ["there"]


def test_where_a_fetched_file_can_not_be_written_the_disk_is_blamed_and_not_the_store(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, write = Store(tmp_path / "store"), Path.open
    store.put("scan", b"voxels")

    def full(path: Path, mode: str = "r", *rest: object) -> object:
        if mode == "wb":
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(path, mode, *rest)  # type: ignore[call-overload]

    monkeypatch.setattr(Path, "open", full)
    with pytest.raises(ResourceError, match=r"target: can't be written.*No space left"):
        store.fetch("scan", tmp_path / "target")


def test_a_published_folder_comes_back_without_what_a_writer_left_half_done(store: Store, tmp_path: Path) -> None:
    source = _folder(tmp_path / "run", log=b"1", checkpoints__last=b"22", **{".log.x.part": b"half"})
    listing = store.publish("run", source)
    assert {name: file.size_bytes for name, file in listing.files.items()} == {"log": 1, "checkpoints/last": 2}
    assert store.fetch_folder("run", tmp_path / "copy") == listing == store.published("run")
    assert _contents(tmp_path / "copy") == {"log": b"1", "checkpoints/last": b"22"}


def test_publishing_again_sends_what_changed_and_takes_away_what_is_unused(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = _folder(tmp_path / "run", large=b"same", small=b"1", gone=b"3")
    store.publish("run", source)
    (source / "gone").unlink()
    _folder(source, small=b"2")
    sent: list[str] = []
    put = store._place.put
    monkeypatch.setattr(store._place, "put", lambda name, content: (sent.append(name), put(name, content))[1])
    store.publish("run", source)
    assert len(sent) == 2 and sent[-1] == f"run/{LISTING}", "only the new file, and the list after it"
    assert len(store.list("run/blobs")) == 2
    store.fetch_folder("run", tmp_path / "copy")
    assert _contents(tmp_path / "copy") == {"large": b"same", "small": b"2"}


def test_until_all_of_it_is_there_readers_get_what_was_published_before(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = _folder(tmp_path / "run", a=b"old a", b=b"old b")
    store.publish("run", source)
    _folder(source, a=b"new a", b=b"new b")
    put = store._place.put

    def dies(name: str, content: Path | bytes) -> None:
        if name.endswith(LISTING):
            raise ResourceError("the writer's machine was lost")
        put(name, content)

    monkeypatch.setattr(store._place, "put", dies)
    with pytest.raises(ResourceError, match="was lost"):
        store.publish("run", source)
    store.fetch_folder("run", tmp_path / "copy")
    assert _contents(tmp_path / "copy") == {"a": b"old a", "b": b"old b"}


def test_a_reader_beside_a_writer_gets_one_version_whole(tmp_path: Path) -> None:
    store, source = Store(tmp_path / "store"), _folder(tmp_path / "run", a=b"0", b=b"0")
    store.publish("run", source)
    done = threading.Event()

    def write() -> None:
        try:
            for number in range(1, 25):
                store.publish("run", _folder(tmp_path / f"run{number}", a=b"%d" % number, b=b"%d" % number))
        finally:
            done.set()

    writer = threading.Thread(target=write)
    writer.start()
    seen = set()
    while not (seen and done.is_set()):
        store.fetch_folder("run", tmp_path / "copy")
        found = _contents(tmp_path / "copy")
        assert found["a"] == found["b"]
        seen.add(found["a"])
    writer.join()
    assert seen


def test_a_file_that_is_not_as_it_was_stored_is_refused(store: Store, tmp_path: Path) -> None:
    listing = store.publish("run", _folder(tmp_path / "run", weights=b"good"))
    store.put(f"run/blobs/{listing.files['weights'].sha256}", b"evil")
    with pytest.raises(DataError, match=r"weights is not as it was stored.*Publish it again"):
        store.fetch_folder("run", tmp_path / "copy")
    assert not (tmp_path / "copy" / "weights").exists()


@pytest.mark.parametrize("name", ["", "/etc/passwd", "../up", "a/../../b", "a\\b"])
def test_names_stay_in_the_place(name: str, tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="relative path with forward slashes"):
        Store(tmp_path).put(name, b"")


def test_a_listing_that_climbs_is_refused(tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    content = b'{"files": {"../../x": {"size_bytes": 0, "sha256": "' + b"0" * 64 + b'"}}}'
    store.put(f"run/{LISTING}", content)
    with pytest.raises(PlanError, match="relative path"):
        store.fetch_folder("run", tmp_path / "copy")


@given(files=st.dictionaries(st.sampled_from(["a", "b", "c/d", "c/e.gz"]), st.binary(max_size=20), min_size=1))
@settings(max_examples=15, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_folder_makes_the_round_trip(files: dict[str, bytes], tmp_path_factory: pytest.TempPathFactory) -> None:
    root = tmp_path_factory.mktemp("round")
    store = Store(f"file://{root}/store")
    for name, content in files.items():
        path = root / "run" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    listing = store.publish("x/y", root / "run")
    store.fetch_folder("x/y", root / "copy")
    assert _contents(root / "copy") == files
    assert all(sha256_of(root / "run" / name) == stored.sha256 for name, stored in listing.files.items())


def test_places_that_make_no_sense_are_told(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="has no name"):
        Store(" ")
    with pytest.raises(PlanError, match=r"nowhere://x: not a place that fsspec knows"):
        Store("nowhere://x")
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(ResourceError, match="can't be written"):
        Store(tmp_path / "file")


def test_a_protocol_whose_package_is_missing_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    import fsspec

    def lacks(url: str, **_: object) -> None:
        raise ImportError("Please install gcsfs to access Google Storage")

    monkeypatch.setattr(fsspec.core, "url_to_fs", lacks)
    with pytest.raises(ResourceError, match="needs gcsfs, which is not installed: pip install gcsfs"):
        Store("gs://scans/x")


def test_a_name_and_a_password_in_a_url_are_not_told() -> None:
    assert without_secrets("ftp://me:word@host/x?sig=word") == "ftp://host/x"
    assert without_secrets("s3://bucket/x") == "s3://bucket/x" and without_secrets("/a@b/c?d") == "/a@b/c?d"
    with pytest.raises(PlanError) as told:
        Store("nowhere://me:word@host/x")
    assert "nowhere://host/x" in told.value.message and "word" not in told.value.message


def test_a_bucket_that_is_not_there_is_told_with_its_address(s3: str) -> None:
    with pytest.raises(ResourceError, match=r"s3://no-such-bucket/x/a: can't be written"):
        Store("s3://no-such-bucket/x").put("a", b"1")


def test_a_url_is_told_from_a_path() -> None:
    assert is_url("s3://bucket/x") and not is_url("/data/x") and not is_url("C:\\data")
