"""The service under load: many clients, small jobs, workers killed at random; what is lost, how long it takes, memory.

    python benchmarks/serve.py --clients 50 --jobs 500 --workers 2 --kills 20

Starts `sagittal serve` with an untrained bundle in a process of its own, sends jobs through `sagittal.client` from as
many threads as there are clients, and kills worker processes meanwhile. Each client sends a scan, waits for it, and
reads its label map. Afterwards the service's database, its audit log and its folders are held against what the clients
saw: every job ended once, with one result or one stated error, and equal scans have equal results. Linux only.
"""

import argparse
import hashlib
import json
import os
import random
import signal
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from sagittal.client import Client
from sagittal.errors import SagittalError
from sagittal.testing.bundle import write_untrained_bundle
from sagittal.testing.datasets import AFFINE, TINY_SETTINGS
from sagittal.volumes import Volume

TINY = {name: value for name, value in TINY_SETTINGS.items() if name.startswith(("network.", "patch."))}
MIB = 1 << 20
SCANS = 4
_SAMPLE_S = 0.5
_START_S = 120.0


@dataclass
class Seen:
    """What the clients and the observer saw.

    Attributes:
        latencies_s: from the beginning of a request to the end of its job, as its client saw it.
        accepted_s: from the beginning of a request to its answer.
        states: job -> how it ended, as its client saw it.
        codes: codes of the errors that jobs ended with.
        hashes: scan -> hashes of the label maps that came of it.
        refused: errors that clients were told, other than that of a job.
        service_mib, workers_mib: (seconds, RSS) of the service, and of each worker process by its number.
        kills: how many workers were killed.
        seconds: from the first request to the end of the last job.
    """

    latencies_s: list[float] = field(default_factory=list)
    accepted_s: list[float] = field(default_factory=list)
    states: dict[str, str] = field(default_factory=dict)
    codes: Counter[str] = field(default_factory=Counter)
    hashes: dict[int, set[str]] = field(default_factory=lambda: defaultdict(set))
    refused: list[str] = field(default_factory=list)
    service_mib: list[tuple[float, float]] = field(default_factory=list)
    workers_mib: dict[int, list[tuple[float, float]]] = field(default_factory=lambda: defaultdict(list))
    kills: int = 0
    seconds: float = 0.0


def write_scans(folder: Path, shape: tuple[int, int, int]) -> list[Path]:
    """Write a few scans of noise."""
    scans = []
    for seed in range(SCANS):
        array = np.random.default_rng(seed).normal(100, 20, shape).astype(np.float32)
        scans.append(Volume(array[None], AFFINE).write(folder / f"scan_{seed}.nii.gz"))
    return scans


@contextmanager
def serving(bundle: Path, folder: Path, workers: int) -> Iterator[tuple[int, str]]:
    """Run `sagittal serve`; give its process and its address."""
    log = folder / "log.txt"
    command = [sys.executable, "-m", "sagittal", "serve", str(bundle), "--folder", str(folder / "serve"), "--port", "0",
               "--device", ",".join(["cpu"] * workers), "--max-queued", "100000"]  # fmt: skip
    with log.open("wb") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file)
    try:
        until = time.monotonic() + _START_S
        while " on http://" not in (told := log.read_text()):
            if process.poll() is not None or time.monotonic() > until:
                raise RuntimeError(f"the service did not start: {told}")
            time.sleep(0.05)
        yield process.pid, "http://" + told.partition(" on http://")[2].partition("/\n")[0]
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(60)


def children(pid: int) -> list[int]:
    """Return the child processes of a process."""
    found = []
    for path in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            found += [int(number) for number in path.read_text().split()]
        except OSError:
            continue
    return found


def rss_mib(pid: int) -> float | None:
    """Return the memory that a process has in RAM; None where it is gone."""
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / MIB
    except (OSError, IndexError):
        return None


def watch(pid: int, seen: Seen, stop: threading.Event, began: float) -> None:
    """Note the memory of the service and of its workers until told to stop."""
    while not stop.wait(_SAMPLE_S):
        now = time.monotonic() - began
        service = rss_mib(pid)
        if service is not None:
            seen.service_mib.append((now, service))
        for child in children(pid):
            size = rss_mib(child)
            if size:
                seen.workers_mib[child].append((now, size))


def kill(pid: int, seen: Seen, stop: threading.Event, kills: int, jobs: int, rng: random.Random) -> None:
    """Kill a random worker each time that another share of the jobs has ended, at a random moment."""
    while seen.kills < kills and not stop.wait(rng.uniform(0.02, 0.2)):
        if len(seen.states) < jobs * seen.kills / kills:
            continue
        found = children(pid)
        if found:
            os.kill(rng.choice(found), signal.SIGKILL)
            seen.kills += 1


def work(url: str, scans: Sequence[Path], left: Iterator[int], lock: threading.Lock, seen: Seen) -> None:
    """Be one client: send a scan, wait, read the result, and begin again while jobs are left."""
    client = Client(url)
    while True:
        with lock:
            number = next(left, None)
        if number is None:
            return
        began = time.monotonic()
        try:
            job = client.submit(scans[number % len(scans)])
            accepted = time.monotonic()
            try:
                state, code = client.wait(job)["state"], ""
            except SagittalError as error:
                state, code = client.job(job)["state"], error.code
            ended = time.monotonic()
            digest = hashlib.sha256(client.read(job, "labels.nii.gz")).hexdigest() if state == "done" else None
        except SagittalError as error:
            seen.refused.append(error.code)
            continue
        with lock:
            seen.states[job] = state
            seen.accepted_s.append(accepted - began)
            seen.latencies_s.append(ended - began)
            seen.codes.update([code] if code else [])
            if digest is not None:
                seen.hashes[number % len(scans)].add(digest)


def load(
    bundle: Path, folder: Path, *, clients: int, jobs: int, workers: int, kills: int, shape: tuple[int, int, int]
) -> Seen:
    """Put the service under load and return what was seen."""
    seen, stop, lock = Seen(), threading.Event(), threading.Lock()
    scans, left = write_scans(folder, shape), iter(range(jobs))
    with serving(bundle, folder, workers) as (pid, url):
        Client(url).wait(Client(url).submit(scans[0]))  # models are loaded
        began = time.monotonic()
        others = [
            threading.Thread(target=watch, args=(pid, seen, stop, began)),
            threading.Thread(target=kill, args=(pid, seen, stop, kills, jobs, random.Random(0))),
        ]
        senders = [threading.Thread(target=work, args=(url, scans, left, lock, seen)) for _ in range(clients)]
        for thread in [*others, *senders]:
            thread.start()
        for thread in senders:
            thread.join()
        seen.seconds = time.monotonic() - began
        stop.set()
        for thread in others:
            thread.join()
    return seen


def wrongs(folder: Path, seen: Seen, jobs: int) -> list[str]:
    """Return what the service's own records say against it: jobs lost, ended twice or without a word."""
    served, found = folder / "serve", []
    with sqlite3.connect(served / "jobs.sqlite") as rows:
        states = dict(rows.execute("SELECT id, state FROM jobs").fetchall())
        unsaid = rows.execute("SELECT count(*) FROM jobs WHERE state = 'failed' AND error IS NULL").fetchone()[0]
    rows.close()
    ends = Counter(
        entry["job"]
        for entry in map(json.loads, (served / "audit.jsonl").read_text().splitlines())
        if entry["action"] in ("done", "failed")
    )
    # A job whose second worker died ends in the line that says so.
    if seen.refused:
        found.append(f"clients were refused: {Counter(seen.refused)}")
    if len(seen.states) != jobs or not seen.states.keys() <= states.keys():
        found.append(f"{jobs} jobs, of which clients saw {len(seen.states)} end and the database knows {len(states)}")
    if any(states.get(job) != state for job, state in seen.states.items()):
        found.append("a job changed after its end")
    if set(states.values()) - {"done", "failed"}:
        found.append(f"jobs that did not end: {Counter(states.values())}")
    if unsaid or any(count > 1 for count in ends.values()):
        found.append(f"{unsaid} failed without a word, {sum(count > 1 for count in ends.values())} ended twice")
    if any(ends[job] != 1 for job, state in states.items() if state == "done"):
        found.append("a job is done without a line in the audit log")
    left = [path for path in (served / "jobs").glob("*/*") if path.name != "results"]
    results = {path.parent.name for path in (served / "jobs").glob("*/results")}
    if left or results != {job for job, state in states.items() if state == "done"}:
        found.append(f"{len(left)} files left over, {len(results)} results")
    if any(len(hashes) != 1 for hashes in seen.hashes.values()):
        found.append("one scan has several results")
    return found


def slope_mib(samples: Sequence[tuple[float, float]]) -> float:
    """Return the growth of memory per minute, by least squares."""
    times, sizes = np.array(samples).T
    return float(60 * np.polyfit(times, sizes, 1)[0])


def told(seen: Seen, jobs: int) -> str:
    """Return the numbers as a table."""
    latencies, accepted = np.array(seen.latencies_s), np.array(seen.accepted_s)
    half = seen.service_mib[len(seen.service_mib) // 2 :]
    ages = {pid: samples for pid, samples in seen.workers_mib.items() if samples[-1][0] - samples[0][0] > 10}
    steady = [samples[len(samples) // 2 :] for samples in ages.values()]
    slopes = [slope_mib(samples) for samples in steady]
    most = max(size for each in seen.workers_mib.values() for _, size in each)
    grown = f", {np.median(slopes):+.2f} MiB a minute in the second half of their lives" if slopes else ""
    rows = [
        ("ended", ", ".join(f"{count} {state}" for state, count in Counter(seen.states.values()).items())),
        ("errors", ", ".join(f"{count} {code}" for code, count in seen.codes.items()) or "none"),
        ("workers killed", str(seen.kills)),
        ("throughput", f"{jobs / seen.seconds:.2f} jobs/s, {seen.seconds:.0f} s in all"),
        *(
            (name, ", ".join(f"{share} % {np.percentile(values, share):.2f} s" for share in (50, 90, 99)))
            for name, values in (("request to answer", accepted), ("request to result", latencies))
        ),
        (
            "service's memory",
            f"{half[0][1]:.0f} to {half[-1][1]:.0f} MiB in the second half, {slope_mib(half):+.2f} MiB a minute",
        ),
        ("workers' memory", f"at most {most:.0f} MiB each{grown}"),
    ]
    return "\n".join(f"| {name} | {value} |" for name, value in rows)


def main() -> int:
    """Run the command line; return the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--clients", type=int, default=50)
    parser.add_argument("--jobs", type=int, default=500)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--shape", default="9,12,10", help="voxels of a scan along D, H, W")
    given = parser.parse_args()
    depth, height, width = (int(size) for size in given.shape.split(","))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        bundle = write_untrained_bundle(folder / "tiny", "mednext-s", 3, settings=TINY)
        seen = load(
            bundle, folder, clients=given.clients, jobs=given.jobs, workers=given.workers, kills=given.kills,
            shape=(depth, height, width),
        )  # fmt: skip
        print(told(seen, given.jobs))
        found = wrongs(folder, seen, given.jobs)
    print("\n".join(found) or "no job lost, none with two results")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
