from __future__ import annotations

import errno
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sagittal.errors import ResourceError
from sagittal.inference import scratch
from sagittal.inference.scratch import ScratchBlocks, disk_folder, lacking

SIZES = st.tuples(st.integers(0, 3), st.integers(1, 4), st.integers(1, 5))


@given(writes=st.lists(st.tuples(st.integers(0, 3), SIZES), min_size=1, max_size=12), half=st.booleans())
@settings(max_examples=30, deadline=None, derandomize=True)
def test_the_last_block_of_each_key_comes_back(
    writes: list[tuple[int, tuple[int, int, int]]], half: bool, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.getbasetemp()
    before = set(folder.iterdir())
    blocks, last = ScratchBlocks(folder, np.float16 if half else np.float32), {}
    rng = np.random.default_rng(0)
    for key, sizes in writes:
        # Not contiguous, as parts of windows are.
        block = rng.standard_normal((2, *sizes, 2)).astype(np.float32)[..., 0]
        blocks.write(key, block)
        last[key] = block
    for key, block in last.items():
        got = np.stack([channel.copy() for channel in blocks.read(key)])
        np.testing.assert_array_equal(got, block.astype(got.dtype))
        assert got.dtype == (np.float16 if half else np.float32)
    assert set(folder.iterdir()) == before
    blocks.close()


def test_blocks_that_differ_by_a_row_lie_in_the_same_place(tmp_path: Path) -> None:
    blocks = ScratchBlocks(tmp_path, np.float32)
    for rows in (33, 34, 33, 34):
        blocks.write("key", np.full((2, rows, 5, 6), rows, np.float32))
    assert blocks._end == int(2 * 33 * 5 * 6 * 4 * scratch.ROOM)
    blocks.close()


def test_room_is_asked_of_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=10 << 30)
    monkeypatch.setattr(scratch.shutil, "disk_usage", lambda _: usage)
    assert lacking(tmp_path, 7 << 30) is None
    assert lacking(tmp_path, 9 << 30) == f"{tmp_path}: 11.25 GiB are needed there and 10.00 GiB are free."
    monkeypatch.undo()
    assert "No such file" in str(lacking(tmp_path / "not there", 1))


def test_a_folder_that_takes_no_file_is_known_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(**_: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(scratch.tempfile, "TemporaryFile", refuse)
    assert lacking(tmp_path, 1) == f"{tmp_path}: no file can be made there (Read-only file system)."
    with pytest.raises(ResourceError, match=r"Read-only file system.*Allow writing there, choose another folder"):
        ScratchBlocks(tmp_path, np.float32)


@pytest.mark.parametrize(
    ("kinds", "taken"),
    [({"tmp": "ext4"}, "tmp"), ({"tmp": "tmpfs"}, "var"), ({"tmp": "tmpfs", "var": "tmpfs"}, None), ({}, "tmp")],
)
def test_temporary_folders_in_main_memory_are_no_disk(
    kinds: dict[str, str], taken: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A space in the name of a mount is told as \\040.
    folders = {name: tmp_path / f"a {name}" for name in ("tmp", "var")}
    mounts = ["none / overlay rw 0 0"]
    for name, folder in folders.items():
        folder.mkdir()
        if name in kinds:
            mounts += [f"none {folder} nfs rw 0 0".replace("a ", "a\\040"), f"none {folder} ".replace("a ", "a\\040")]
            mounts[-1] += f"{kinds[name]} rw 0 0"
    monkeypatch.setattr(scratch.tempfile, "tempdir", str(folders["tmp"]))
    monkeypatch.setattr(scratch, "_KEPT_TEMPORARY", str(folders["var"]))
    monkeypatch.setattr(Path, "read_text", lambda *_, **__: "\n".join(mounts))
    assert disk_folder() == (None if taken is None else folders[taken])


def test_elsewhere_than_on_linux_the_temporary_folder_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(*_: object, **__: object) -> str:
        raise FileNotFoundError

    monkeypatch.setattr(Path, "read_text", absent)
    monkeypatch.setattr(scratch.tempfile, "tempdir", str(tmp_path))
    assert disk_folder() == tmp_path


def test_a_folder_that_cant_be_written_is_named(tmp_path: Path) -> None:
    with pytest.raises(ResourceError, match=r"not there: can't be written .*--memory-gib") as caught:
        ScratchBlocks(tmp_path / "not there", np.float32)
    assert caught.value.code == "disk"


def test_a_full_disk_is_told_with_what_is_needed(tmp_path: Path) -> None:
    blocks = ScratchBlocks(tmp_path, np.float32, 3 << 30)

    class Full:
        def __init__(self, file: Any) -> None:
            self._file = file

        def seek(self, where: int) -> int:
            return int(self._file.seek(where))

        def write(self, _: object) -> int:
            raise OSError(errno.ENOSPC, "No space left on device")

    file, blocks._file = blocks._file, Full(blocks._file)  # type: ignore[assignment]
    with pytest.raises(
        ResourceError,
        match=r"No space left on device.*3\.00 GiB in all\. .* GiB are free now\. Free space there, choose",
    ):
        blocks.write(0, np.zeros((1, 2, 3, 4), np.float32))
    file.close()
