"""Keep benchmarks/gpu.py going: its parts run in processes of their own, and one that dies or hangs costs one part.

A kernel that writes where it may not takes the whole CUDA context with it, and one that never ends takes the process.
So the work is done by a worker that notes in a file what it begins and what it finds; here it is watched, ended where
nothing moves any more, and started again behind the part that was its last.
"""

import json
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

GRACE_S = 20.0
"""Seconds beyond a part's limit, which the worker keeps itself as long as its process answers."""
START_S = 60.0
_LEAST_S = 5.0


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Return the rows that workers have written; a last line that is not whole is left out."""
    rows = []
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            rows.append(json.loads(line))
        except ValueError:
            continue
    return rows


def supervise(command: Sequence[str], path: Path, end: float) -> None:
    """Run a worker until it is done or the time is over, and again behind each part at which it dies.

    Args:
        command: the worker's; `--rows`, `--after` and `--limit` are added.
        path: where it writes its rows.
        end: time.monotonic() by which it must have ended.
    """
    after: list[str] = []
    while (left := end - time.monotonic()) > _LEAST_S:
        words = [*command, "--rows", str(path), *after, "--limit", f"{left:.1f}"]
        known = len(read_rows(path))
        with subprocess.Popen(words) as worker:
            why = _watch(worker, path, known, end)
        new = read_rows(path)[known:]
        if why is None:
            return
        begun = [row["part"] for row in new if row["section"] == "begin"]
        if not begun:
            _write(path, "start of a worker", why)
            return  # it dies before any part, and would so again
        if not any(row["section"] == "failure" and row["part"] == begun[-1] for row in new):
            _write(path, begun[-1], why)
        after = ["--after", begun[-1]]


def supervise_all(command: Sequence[str], path: Path, end: float, shards: int) -> None:
    """Run so many workers at once, each with its share of the parts, and gather their rows in one file."""
    paths = [path.with_name(f"{path.name}.{shard}") for shard in range(shards)]
    with ThreadPoolExecutor(shards) as pool:
        for shard, own in enumerate(paths):
            pool.submit(supervise, [*command, "--shard", f"{shard}/{shards}"], own, end)
    with path.open("a") as file:
        for own in paths:
            file.writelines(json.dumps(row) + "\n" for row in read_rows(own))
            own.unlink(missing_ok=True)


def worker_command(script: str, words: Sequence[str]) -> list[str]:
    """Return the command of a worker with the words of our own command line."""
    return [sys.executable, script, *words, "--worker"]


def _watch(worker: "subprocess.Popen[bytes]", path: Path, known: int, end: float) -> str | None:
    """Wait for a worker; return why it did not do all it should, or None."""
    began = time.monotonic()
    seen, limit_s = known, START_S
    while True:
        try:
            code = worker.wait(0.5)
            return None if code == 0 else f"its process ended with {code}"
        except subprocess.TimeoutExpired:
            rows = read_rows(path)
        if len(rows) > seen:
            seen, began = len(rows), time.monotonic()
            limits = [row["limit_s"] for row in rows if row["section"] == "begin"]
            limit_s = limits[-1] if limits else START_S
        now = time.monotonic()
        if now > min(began + limit_s, end) + GRACE_S:
            worker.kill()
            worker.wait()
            return f"nothing moved for {now - began:.0f} s"


def _write(path: Path, part: str, why: str) -> None:
    with path.open("a") as file:
        file.write(json.dumps({"section": "failure", "part": part, "why": why}) + "\n")
