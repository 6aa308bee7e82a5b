from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from sagittal.errors import DataError, ResourceError
from sagittal.volumes.work_memory import Room, available_bytes, run_in


def most_at_once(room: Room, need: int, jobs: int = 6, at_least: int = 1) -> int:
    """Return how many worked at the same time; each waits until `at_least` do."""
    running, most, lock, enough = 0, 0, threading.Lock(), threading.Event()

    def work() -> None:
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
            if most >= at_least:
                enough.set()
        enough.wait(120)
        time.sleep(0.02)
        with lock:
            running -= 1

    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(lambda _: run_in(room, need, work), range(jobs)))
    return most


@pytest.mark.parametrize(("total", "most"), [(None, 6), (600, 6), (250, 2), (100, 1), (10, 1)])
def test_as_many_work_at_once_as_there_is_room_for(total, most):
    assert most_at_once(Room(total), 100) <= most
    if most > 1:
        assert most_at_once(Room(total), 100, at_least=2) > 1


def test_what_runs_out_of_memory_tries_again_alone():
    room, attempts, others = Room(None), [], []

    def greedy() -> str:
        attempts.append(len(others))
        if len(attempts) == 1:
            raise MemoryError
        return "done"

    def modest() -> None:
        others.append(1)
        time.sleep(0.05)
        others.pop()

    with ThreadPoolExecutor(3) as pool:
        waiting = [pool.submit(run_in, room, 1, modest) for _ in range(2)]
        time.sleep(0.01)
        assert pool.submit(run_in, room, 1, greedy).result() == "done"
        for future in waiting:
            future.result()
    assert len(attempts) == 2 and attempts[1] == 0


def test_a_second_failure_tells_the_need_and_what_is_free():
    def greedy() -> None:
        raise ResourceError("no memory", code="memory")

    with pytest.raises(ResourceError, match=r"takes about 5 MiB; [\d,]+ MiB are free") as caught:
        run_in(Room(None), 5 << 20, greedy)
    assert caught.value.code == "memory"


def test_other_errors_pass_at_once():
    attempts = []

    def broken() -> None:
        attempts.append(1)
        raise DataError("broken")

    with pytest.raises(DataError, match="broken"):
        run_in(Room(None), 1, broken)
    assert len(attempts) == 1


def test_free_memory_is_known_here():
    free = available_bytes()
    assert free is not None and 1 << 20 < free < 1 << 50
