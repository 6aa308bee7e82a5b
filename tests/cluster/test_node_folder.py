"""A node's own folder: folds of one node fetch once, what lost runs left goes, what others own is left alone."""

from __future__ import annotations

import os
import tempfile
import threading
import time
from pathlib import Path

import pytest

from sagittal.cluster import node_folder as module
from sagittal.cluster.node_folder import LEFT_S, node_folder, removing
from sagittal.errors import ResourceError

pytestmark = pytest.mark.skipif(os.name != "posix", reason="locks of files are POSIX's")


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))


def test_two_folds_of_a_node_fetch_an_input_once_and_wait_for_each_other() -> None:
    fetched: list[str] = []
    began = threading.Event()

    def fetch() -> None:
        began.set()
        time.sleep(0.05)
        fetched.append("it")

    with node_folder("train-1", "n") as one, node_folder("train-1", "n") as other:
        first = threading.Thread(target=one.once, args=("case-0", "hash", fetch))
        first.start()
        assert began.wait(300)
        assert not other.once("case-0", "hash", fetch) and fetched == ["it"], "it did not wait for the first"
        first.join()
        assert other.once("case-0", "another hash", fetch) and other.once("case-1", "hash", fetch)
    assert len(fetched) == 3


def test_an_input_whose_fetching_failed_is_fetched_again() -> None:
    def fail() -> None:
        raise ResourceError("no network")

    with node_folder("train-1", "n") as here:
        with pytest.raises(ResourceError):
            here.once("case-0", "hash", fail)
        assert here.once("case-0", "hash", lambda: None)


def test_what_a_lost_run_left_is_removed_unless_a_fold_is_in_it(tmp_path: Path) -> None:
    for run in ("train-left", "train-used", "train-new"):
        with node_folder(run, "n") as left:
            (left.path / "scan").write_bytes(b"1")
    old = time.time() - LEFT_S - 1
    with node_folder("train-used", "n"):
        for run in ("train-left", "train-used"):
            os.utime(tmp_path / f"sagittal-{run}-n" / "in-use", (old, old))
        (tmp_path / "sagittal-train-strange").mkdir()
        with node_folder("train-mine", "n"):
            pass
    found = {path.name for path in tmp_path.iterdir()}
    assert found == {
        "sagittal-train-used-n",
        "sagittal-train-new-n",
        "sagittal-train-mine-n",
        "sagittal-train-strange",
    }


def test_what_a_lost_prediction_left_on_a_node_is_removed_by_the_next_run(tmp_path: Path) -> None:
    for run in ("predict-left", "train-left", "predict-new"):
        with node_folder(run, "worker"):
            pass
    old = time.time() - LEFT_S - 1
    for run in ("predict-left", "train-left"):
        os.utime(tmp_path / f"sagittal-{run}-worker" / "in-use", (old, old))
    with node_folder("predict-mine", "worker"):
        pass
    found = {path.name for path in tmp_path.iterdir()}
    assert found == {"sagittal-predict-new-worker", "sagittal-predict-mine-worker"}


def test_removing_waits_for_processes_that_are_being_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    waits, goes_on = threading.Event(), threading.Event()

    def sleep(seconds: float) -> None:
        waits.set()
        goes_on.wait(300)

    monkeypatch.setattr(module, "END_S", 300.0)
    monkeypatch.setattr(time, "sleep", sleep)
    with node_folder("predict-1", "worker") as here:
        remover = threading.Thread(target=removing("predict-1"))
        remover.start()
        assert waits.wait(300) and here.path.is_dir()
    goes_on.set()
    remover.join(300)
    assert not here.path.exists()
    monkeypatch.setattr(module, "END_S", 0.0)
    with node_folder("predict-1", "worker") as here:
        removing("predict-1")()
        assert not here.path.exists(), "not for ever"


def test_only_the_owner_can_look_into_it_and_a_folder_of_others_is_refused(tmp_path: Path) -> None:
    with node_folder("train-1", "n") as here:
        assert here.path.stat().st_mode & 0o777 == 0o700
    here.path.chmod(0o755)
    with pytest.raises(ResourceError, match=r"not a folder of this user alone.*TMPDIR"), node_folder("train-1", "n"):
        pass
    (tmp_path / "sagittal-train-2-n").symlink_to(tmp_path)
    with pytest.raises(ResourceError, match="not a folder of this user alone"), node_folder("train-2", "n"):
        pass


def test_an_error_inside_is_not_swallowed_and_a_folder_removed_meanwhile_is_made_anew(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with pytest.raises(FileNotFoundError), node_folder("train-1", "n"):
        raise FileNotFoundError("of a fold")
    there, looks = module._is_there, list[Path]()

    def removed_once(descriptor: int, path: Path) -> bool:
        looks.append(path)
        if len(looks) == 1:
            path.unlink()
        return there(descriptor, path)

    monkeypatch.setattr(module, "_is_there", removed_once)
    with node_folder("train-1", "n") as here:
        assert here.path.is_dir()
    assert len(looks) == 2


def test_removing_takes_the_folders_of_one_run_on_all_its_nodes(tmp_path: Path) -> None:
    for run, node in (("train-1", "a"), ("train-1", "b"), ("train-2", "a")):
        with node_folder(run, node):
            pass
    removing("train-1")()
    assert [path.name for path in tmp_path.iterdir()] == ["sagittal-train-2-a"]
