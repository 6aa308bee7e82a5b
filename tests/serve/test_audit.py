"""The audit log: lines are added, never changed, and its files stay few."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import pytest

from sagittal.serve.audit import Audit

LINE_BYTES = 140


def numbers(*files: Path) -> list[int]:
    """Return the numbers that were written as bytes, file by file."""
    return [json.loads(line)["bytes"] for file in files for line in file.read_text().splitlines()]


def test_files_are_rotated_by_size_and_the_oldest_goes(tmp_path: Path) -> None:
    path = tmp_path / "serve" / "audit.jsonl"
    for number in range(60):
        # Opened anew each time, as by a service that is started again.
        audit = Audit(path, most_bytes=5 * LINE_BYTES, kept=3)
        audit.write("submit", key="ward", job="0" * 32, bytes=number)
        audit.close()
    files = [path.with_name(f"audit.jsonl.{number}") for number in (3, 2, 1)] + [path]
    assert sorted(path.parent.iterdir()) == sorted(files)
    kept = numbers(*files)
    assert kept == list(range(kept[0], 60)) and len(kept) > 15
    assert all(file.stat().st_size <= 5 * LINE_BYTES and file.stat().st_mode & 0o777 == 0o600 for file in files)


def test_threads_lose_no_line_between_files(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    audit = Audit(path, most_bytes=10 * LINE_BYTES, kept=100)

    def write(first: int) -> None:
        for number in range(first, first + 100):
            audit.write("submit", job="0" * 32, bytes=number)

    threads = [threading.Thread(target=write, args=(first,)) for first in range(0, 400, 100)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    audit.close()
    assert len(list(tmp_path.iterdir())) > 20
    assert sorted(numbers(*tmp_path.iterdir())) == list(range(400))


def test_a_file_that_can_not_be_rotated_goes_on(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "audit.jsonl"
    (tmp_path / "audit.jsonl.1" / "in the way").mkdir(parents=True)
    audit = Audit(path, most_bytes=LINE_BYTES, kept=1)
    for number in range(5):
        audit.write("submit", job="0" * 32, bytes=number)
    assert numbers(path) == [0, 1, 2, 3, 4]
    assert len(caplog.records) == 1 and str(tmp_path) not in caplog.text
    (tmp_path / "audit.jsonl.1" / "in the way").rmdir()
    (tmp_path / "audit.jsonl.1").rmdir()
    audit.write("submit", job="0" * 32, bytes=5)
    audit.close()
    assert numbers(tmp_path / "audit.jsonl.1", path) == [0, 1, 2, 3, 4, 5]


def test_a_line_longer_than_a_file_is_written_and_a_cut_file_is_filled_from_its_beginning(tmp_path: Path) -> None:
    audit = Audit(tmp_path / "audit.jsonl", most_bytes=1, kept=2)
    audit.write("submit", bytes=1)
    assert numbers(tmp_path / "audit.jsonl") == [1] and len(list(tmp_path.iterdir())) == 1
    with (tmp_path / "audit.jsonl").open("r+b") as file:
        file.truncate()
    audit.write("submit", bytes=2)
    audit.close()
    assert numbers(tmp_path / "audit.jsonl") == [2]
