"""A folder of 8-bit networks that is replaced while the process is killed: the old or the new one is there, whole."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from sagittal.bundle.manifest import entry_of
from sagittal.errors import BundleError, ResourceError
from sagittal.inference.engines.int8_folder import REPORT, Int8Report, read_report, replacing, standing, verify

KILLED = 9
CHANGES = {"os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.chmod", "shutil.rmtree"}


def fill(folder: Path, dice: float) -> None:
    """Write networks of a size of their own, and the report as the last file."""
    files = {"all.xml": b"<net/>", "all.bin": bytes([round(dice)]) * 99}
    for name, content in files.items():
        (folder / name).write_bytes(content)
    entries = {name: entry_of(content) for name, content in files.items()}
    facts = {"bundle_sha256": "0" * 64, "openvino_version": "1", "calibration_cases": 1, "scored_cases": 1}
    Int8Report(**facts, dice_fp32=dice, dice_int8=dice, files=entries).write(folder / REPORT)


def replace(folder: Path, dice: float) -> None:
    with replacing(folder) as room:
        fill(room, dice)


def replace_and_die(folder: Path, change: int) -> None:
    """Replace the folder, but end at once before a certain change of the disk: nothing is cleaned up."""
    left = change

    def count(event: str, _: object) -> None:
        nonlocal left
        if event in CHANGES:
            left -= 1
            if left < 0:
                os._exit(KILLED)

    sys.addaudithook(count)
    replace(folder, 60)
    os._exit(0)


def die_at_each_change(folder: Path) -> None:
    """Write which networks stand after a death before the first change, before the second, and so on to none."""
    for change in range(30):
        replace(folder, 50)
        child = os.fork()
        if not child:
            replace_and_die(folder, change)
        ended = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        sys.stdout.write(f"{ended} {verify(standing(folder)).dice_int8}\n")
        if ended == 0:
            return


@pytest.mark.kill
@pytest.mark.skipif(not hasattr(os, "fork"), reason="dies in a child of its own")
def test_killed_before_any_change_of_the_disk_the_old_or_the_new_networks_are_there(tmp_path: Path) -> None:
    folder = tmp_path / "b.int8"
    # In a process without threads, which can be forked.
    code = f"from pathlib import Path; import test_int8_folder as t; t.die_at_each_change(Path({str(folder)!r}))"
    said = subprocess.run(
        [sys.executable, "-c", code], cwd=Path(__file__).parent, check=True, capture_output=True, text=True
    ).stdout
    codes, found = zip(*(map(float, line.split()) for line in said.splitlines()), strict=True)
    assert codes == (KILLED,) * (len(codes) - 1) + (0,) and len(codes) > 6
    assert found == tuple(sorted(found)) and set(found) == {50.0, 60.0}
    for left in tmp_path.glob(".*.part"):
        os.utime(left, (0, 0))
    replace(folder, 70)
    assert [path.name for path in tmp_path.iterdir()] == ["b.int8"] and verify(folder).dice_int8 == 70


def test_a_block_that_fails_changes_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "b.int8"
    replace(folder, 50)
    with pytest.raises(ZeroDivisionError), replacing(folder) as room:
        fill(room, 60)
        raise ZeroDivisionError
    assert verify(folder).dice_int8 == 50 and len(list(tmp_path.iterdir())) == 1


def test_what_does_not_read_back_replaces_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "b.int8"
    replace(folder, 50)
    with pytest.raises(BundleError, match=r"all\.bin"), replacing(folder) as room:
        fill(room, 60)
        (room / "all.bin").write_bytes(b"cut off")
    assert verify(folder).dice_int8 == 50 and len(list(tmp_path.iterdir())) == 1


def test_a_rename_that_fails_brings_the_old_networks_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, rename = tmp_path / "b.int8", Path.rename
    replace(folder, 50)

    def failing(path: Path, target: Path) -> Path:
        if path.name.endswith(".part"):
            raise OSError(5, "Input/output error")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(ResourceError, match="8-bit networks can't be written"):
        replace(folder, 60)
    assert read_report(folder).dice_int8 == 50 and len(list(tmp_path.iterdir())) == 1


def test_what_a_killed_run_put_aside_comes_back_with_the_next(tmp_path: Path) -> None:
    folder = tmp_path / "b.int8"
    replace(folder, 50)
    folder.rename(tmp_path / ".b.int8.previous")
    assert verify(standing(folder)).dice_int8 == 50
    with pytest.raises(ZeroDivisionError), replacing(folder):
        raise ZeroDivisionError
    assert [path.name for path in tmp_path.iterdir()] == ["b.int8"] and standing(folder) == folder
