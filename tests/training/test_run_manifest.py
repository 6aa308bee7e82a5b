"""run.json: attempts are added, never replaced; a checkout's commit is found without git."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from sagittal.errors import DataError
from sagittal.training.manifest import attempt, device_name, git_commit, now, remember_data

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def _attempts(folder: Path) -> list[dict[str, object]]:
    found: list[dict[str, object]] = json.loads((folder / "run.json").read_text())["attempts"]
    return found


def test_a_resumed_run_adds_an_attempt(tmp_path: Path) -> None:
    remember_data(tmp_path, tmp_path, "abc", started=False)
    with pytest.raises(ZeroDivisionError), attempt(tmp_path, {"torch": "1"}, ["0"], started=now(), write=True):
        raise ZeroDivisionError
    remember_data(tmp_path, tmp_path, "abc", started=True)
    with attempt(tmp_path, {"torch": "2"}, ["0", "1"], started=now(), write=True) as outcome:
        # Killed now, the run would leave an attempt without an end.
        assert [one["ended"] is None for one in _attempts(tmp_path)] == [False, True]
        outcome.append("finished")
    first, second = _attempts(tmp_path)
    assert (first["outcome"], first["torch"]) == ("ZeroDivisionError", "1")
    assert (second["outcome"], second["torch"], second["folds"]) == ("finished", "2", ["0", "1"])
    assert str(second["started"]) <= str(second["ended"])
    assert second["command"]


def test_a_fold_that_ends_later_keeps_the_attempt_of_another(tmp_path: Path) -> None:
    with attempt(tmp_path, {"devices": ("cuda:0",)}, ["0"], started=now(), write=True) as first:
        with attempt(tmp_path, {"devices": ("cuda:1",)}, ["1"], started=now(), write=True) as second:
            second.append("shortened")
        first.append("finished")
    told = {str(one["folds"]): one["outcome"] for one in _attempts(tmp_path)}
    assert told == {"['0']": "finished", "['1']": "shortened"}
    assert len(_attempts(tmp_path)) == 2


def test_a_password_of_a_store_is_not_written_down(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["sagittal", "train", "--store", "ftp://me:word@host/x"])
    with attempt(tmp_path, {}, ["0"], started=now(), write=True):
        assert "word" not in (tmp_path / "run.json").read_text()
    assert _attempts(tmp_path)[0]["command"] == ["sagittal", "train", "--store", "ftp://host/x"]


def test_another_process_of_the_run_writes_nothing(tmp_path: Path) -> None:
    with attempt(tmp_path, {}, ["0"], started=now(), write=False) as outcome:
        outcome.append("finished")
    assert not (tmp_path / "run.json").exists()


def test_changed_data_is_refused_once_a_run_has_begun_and_forgotten_before(tmp_path: Path) -> None:
    remember_data(tmp_path, tmp_path, "abc", started=False)
    with attempt(tmp_path, {}, ["0"], started=now(), write=True):
        pass
    with pytest.raises(DataError, match="changed since"):
        remember_data(tmp_path, tmp_path, "def", started=True)
    remember_data(tmp_path, tmp_path, "def", started=False)
    assert _attempts(tmp_path) == []


def test_a_file_of_an_earlier_version_is_read(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text('{"content_sha256": "abc", "python": "3.11"}')
    remember_data(tmp_path, tmp_path, "abc", started=True)
    assert _attempts(tmp_path) == []


@pytest.mark.parametrize("packed", [False, True])
def test_the_commit_of_a_checkout_is_found_without_git(tmp_path: Path, packed: bool) -> None:
    assert git_commit(tmp_path) is None
    folder = tmp_path / ".git"
    (folder / "refs" / "heads").mkdir(parents=True)
    (folder / "HEAD").write_text("ref: refs/heads/main\n")
    if packed:
        (folder / "packed-refs").write_text(f"# pack-refs\n{COMMIT} refs/heads/main\n^{COMMIT}\n")
    else:
        (folder / "refs" / "heads" / "main").write_text(f"{COMMIT}\n")
    assert git_commit(tmp_path) == COMMIT
    (folder / "HEAD").write_text(f"{COMMIT[::-1]}\n")
    assert git_commit(tmp_path) == COMMIT[::-1]


def test_the_commit_of_a_worktree_is_found(tmp_path: Path) -> None:
    common, tree = tmp_path / "main" / ".git", tmp_path / "tree"
    own = common / "worktrees" / "tree"
    own.mkdir(parents=True)
    tree.mkdir()
    (tree / ".git").write_text(f"gitdir: {own}\n")
    (own / "HEAD").write_text("ref: refs/heads/side\n")
    (own / "commondir").write_text("../..\n")
    (common / "refs" / "heads").mkdir(parents=True)
    (common / "refs" / "heads" / "side").write_text(COMMIT)
    assert git_commit(tree) == COMMIT


def test_a_processor_has_a_name() -> None:
    assert device_name(torch.device("cpu"))
