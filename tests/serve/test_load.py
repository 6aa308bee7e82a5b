"""The load of benchmarks/serve.py in small: clients at the same time, workers killed, and every job ends once."""

from __future__ import annotations

import importlib.util
import sys
from collections import Counter
from pathlib import Path
from types import ModuleType

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.kill]
CLIENTS, JOBS, WORKERS, KILLS = 8, 40, 2, 3


@pytest.fixture(scope="module")
def benchmark() -> ModuleType:
    path = Path(__file__).parents[2] / "benchmarks" / "serve.py"
    spec = importlib.util.spec_from_file_location("benchmark_of_the_service", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # Its dataclasses look their module up.
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_under_load_and_with_workers_killed_no_job_is_lost_and_none_has_two_results(
    benchmark: ModuleType, tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # On a fast machine all is done before the memory was looked at often enough to tell how it grows.
    monkeypatch.setattr(benchmark, "_SAMPLE_S", 0.1)
    seen = benchmark.load(
        tiny_bundle, tmp_path, clients=CLIENTS, jobs=JOBS, workers=WORKERS, kills=KILLS, shape=(9, 12, 10)
    )
    assert benchmark.wrongs(tmp_path, seen, JOBS) == []
    assert seen.kills == KILLS and len(seen.hashes) == benchmark.SCANS
    states = Counter(seen.states.values())
    # Only a job that lost two workers may have failed.
    assert states["done"] + seen.codes["worker_died"] == JOBS and seen.codes["worker_died"] <= KILLS // 2
    assert "jobs/s" in benchmark.told(seen, JOBS)
    seen.states[next(iter(seen.states))] = "cancelled"
    seen.states["0" * 32] = "done"
    assert len(benchmark.wrongs(tmp_path, seen, JOBS + 1)) >= 1


def test_the_growth_of_memory_is_told_by_the_minute(benchmark: ModuleType) -> None:
    assert benchmark.slope_mib([(0.0, 100.0), (30.0, 110.0), (60.0, 120.0)]) == pytest.approx(20.0)
