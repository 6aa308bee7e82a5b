"""What a process tells its parent stays apart from what libraries print."""

from __future__ import annotations

import json
import subprocess
import sys

NOISY = """
import os, threading
from sagittal.inference.messages import sent_by_standard_output
with sent_by_standard_output() as send:
    print("a library speaks", flush=True)
    os.system("echo and so does its child")
    threads = [threading.Thread(target=lambda n=n: [send(thread=n, text="x" * 999) for _ in range(20)]) for n in (1, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
"""


def test_messages_of_several_threads_are_whole_lines_and_nothing_else_is_among_them() -> None:
    done = subprocess.run([sys.executable, "-c", NOISY], capture_output=True, text=True, check=True)
    told = [json.loads(line) for line in done.stdout.splitlines()]
    assert sorted(message["thread"] for message in told) == [1] * 20 + [2] * 20
    assert done.stderr.splitlines() == ["a library speaks", "and so does its child"]
