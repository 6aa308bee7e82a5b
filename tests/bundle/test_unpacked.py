"""Folders that packages are unpacked in: a killed process's are deleted, a living one's are not."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import pytest

from sagittal.bundle import unpacked
from sagittal.bundle.unpacked import Unpacked, forget_abandoned, hold, new_folder

HOLDING = """
import sys
from sagittal.bundle.unpacked import hold, new_folder
folder = new_folder()
(folder / "manifest.json").touch()
holds = hold(folder)
print(folder, flush=True)
sys.stdin.read()
"""


@pytest.fixture
def scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def age(folder: Path) -> None:
    os.utime(folder, (0, 0))


def filled() -> Path:
    folder = new_folder()
    (folder / "manifest.json").touch()
    return folder


def test_a_folder_of_a_living_process_stays_and_goes_once_it_was_killed(scratch: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", HOLDING],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "TMPDIR": str(scratch)},
    ) as server:
        assert server.stdout is not None
        folder = Path(server.stdout.readline().strip())
        age(folder)
        forget_abandoned()
        assert (folder / "manifest.json").exists()
        server.kill()
    forget_abandoned()
    assert not folder.exists() and folder.parent == scratch


@pytest.mark.usefixtures("scratch")
def test_a_held_folder_stays_in_this_process_too_until_it_is_removed() -> None:
    folder = filled()
    held = hold(folder)
    age(folder)
    forget_abandoned()
    assert folder.exists()
    Unpacked(folder, os.getpid() + 1, None).remove()
    assert folder.exists(), "a forked child leaves it to its parent"
    held.remove()
    assert not folder.exists()


@pytest.mark.usefixtures("scratch")
def test_a_young_folder_may_be_about_to_be_held() -> None:
    folder = filled()
    forget_abandoned()
    assert folder.exists()
    age(folder)
    forget_abandoned()
    assert not folder.exists()


@pytest.mark.usefixtures("scratch")
def test_where_a_folder_can_not_be_locked_nothing_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(unpacked, "_locks", SimpleNamespace(flock=refuse, LOCK_SH=1, LOCK_EX=2, LOCK_NB=4))
    folder = filled()
    held = hold(folder)
    age(folder)
    forget_abandoned()
    assert folder.exists(), "nobody knows whether it is held"
    held.remove()
    assert not folder.exists()


@pytest.mark.usefixtures("scratch")
def test_without_locks_an_open_file_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unpacked, "_locks", None)
    folder, rename = filled(), Path.rename
    held = hold(folder)
    assert held.descriptor is not None and os.fstat(held.descriptor).st_ino == (folder / "manifest.json").stat().st_ino
    age(folder)

    def refuse(*_: object) -> None:
        raise PermissionError(13, "a file in it is open")

    monkeypatch.setattr(Path, "rename", refuse)
    forget_abandoned()
    assert folder.exists()
    monkeypatch.setattr(Path, "rename", rename)
    forget_abandoned()
    assert not list(folder.parent.iterdir())
    held.remove()
