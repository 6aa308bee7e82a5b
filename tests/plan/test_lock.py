"""One process at a time."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path

from sagittal.plan.lock import alone

HOLDER = """
import sys
from pathlib import Path
from sagittal.plan.lock import alone
with alone(Path(sys.argv[1])):
    print("holds", flush=True)
    sys.stdin.read()
"""


def test_a_block_waits_for_that_of_another_process_even_if_it_is_killed(tmp_path: Path) -> None:
    file, order = tmp_path / "made" / "lock", []
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(file)], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert holder.stdout is not None and holder.stdin is not None and holder.stdout.readline() == b"holds\n"

    def wait() -> None:
        with alone(file):
            order.append("block")

    waiting = threading.Thread(target=wait)
    waiting.start()
    waiting.join(0.3)
    order.append("kill")
    holder.kill()
    waiting.join(120)
    assert order == ["kill", "block"]
    holder.communicate()


def test_what_can_not_be_locked_keeps_nobody_out(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with alone(tmp_path / "file" / "lock"), alone(tmp_path / "file" / "lock"):
        assert sorted(path.name for path in tmp_path.iterdir()) == ["file"]
