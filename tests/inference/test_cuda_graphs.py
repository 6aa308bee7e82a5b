"""Recorded windows: the rules around CUDA graphs with a recorder of our own, and the graphs themselves on a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from sagittal.inference.engines.cuda_graphs import MOST_RECORDINGS, WindowGraphs
from sagittal.inference.engines.torch_engine import TorchEngine
from sagittal.networks.build import build_network
from sagittal.testing.plans import untrained_plan, untrained_spec


class Network:
    """Doubles its windows, and keeps its last input and output, which a recorded graph would go on using."""

    def __init__(self) -> None:
        self.calls = 0
        self.last: tuple[Tensor, Tensor] | None = None

    def __call__(self, windows: Tensor) -> Tensor:
        self.calls += 1
        self.last = windows, 2 * windows
        return self.last[1]


class Recorder:
    """Stands for torch.cuda's recording on a CPU: a replay computes what was recorded into the same memory."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, network: Network) -> None:
        self.network, self.recorded, self.replayed, self.emptied = network, 0, 0, 0
        self.error: Exception | None = None
        self.pools: list[object] = []
        recorder = self

        class Graph:
            def replay(self) -> None:
                recorder.replayed += 1
                given, result = self.memory
                result.copy_(2 * given)

            memory: tuple[Tensor, Tensor]

        @contextmanager
        def graph(recording: Graph, *, pool: object, capture_error_mode: str) -> Iterator[None]:
            if recorder.error is not None:
                raise recorder.error
            recorder.pools.append(pool)
            yield
            assert recorder.network.last is not None
            recording.memory = recorder.network.last
            recording.memory[1].zero_()  # recording computes nothing
            recorder.recorded += 1

        def empty_cache() -> None:
            recorder.emptied += 1

        fakes: dict[str, Any] = {"CUDAGraph": Graph, "graph": graph, "empty_cache": empty_cache}
        fakes |= {"device": lambda _: nullcontext(), "synchronize": lambda _: None, "graph_pool_handle": object}
        for name, fake in fakes.items():
            monkeypatch.setattr(torch.cuda, name, fake)


def windows(count: int = 1, seed: int = 0) -> Tensor:
    return torch.randn(count, 1, 2, 3, 4, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def network() -> Network:
    return Network()


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch, network: Network) -> Recorder:
    return Recorder(monkeypatch, network)


def test_the_second_call_is_recorded_and_later_ones_replayed(network: Network, recorder: Recorder) -> None:
    graphs, weights = WindowGraphs(torch.device("cpu")), [torch.ones(1)]
    results = [graphs.call("logits", network, windows(seed=seed), weights).clone() for seed in range(5)]
    assert all(torch.equal(result, 2 * windows(seed=seed)) for seed, result in enumerate(results))
    assert (network.calls, recorder.recorded, recorder.replayed) == (2, 1, 4)


def test_shapes_and_purposes_have_recordings_of_their_own_in_one_pool(network: Network, recorder: Recorder) -> None:
    graphs = WindowGraphs(torch.device("cpu"))
    for what, count in (("logits", 1), ("logits", 2), ("features", 1)):
        for seed in range(3):
            given = windows(count, seed)
            assert torch.equal(graphs.call(what, network, given, []), 2 * given)
    assert recorder.recorded == 3
    assert len(set(map(id, recorder.pools))) == 1


def test_weights_that_moved_are_read_where_they_are(network: Network, recorder: Recorder) -> None:
    graphs, weights = WindowGraphs(torch.device("cpu")), [torch.ones(1)]
    for _ in range(3):
        graphs.call("logits", network, windows(), weights)
    moved = [torch.ones(1)]
    graphs.call("logits", network, windows(), moved)
    assert (network.calls, recorder.recorded) == (3, 1)


def test_no_more_than_a_few_shapes_are_recorded(network: Network, recorder: Recorder) -> None:
    graphs = WindowGraphs(torch.device("cpu"))
    for count in range(1, MOST_RECORDINGS + 3):
        for seed in range(3):
            given = windows(count, seed)
            assert torch.equal(graphs.call("logits", network, given, []), 2 * given)
    assert recorder.recorded == MOST_RECORDINGS


def test_what_cannot_be_recorded_is_told_once_and_runs_as_ever(network: Network, recorder: Recorder) -> None:
    graphs = WindowGraphs(torch.device("cpu"))
    recorder.error = RuntimeError("operation not permitted\nwhen stream is capturing")
    graphs.call("logits", network, windows(), [])
    with pytest.warns(RuntimeWarning, match=r"\(1, 1, 2, 3, 4\) can't be recorded.*not permitted when stream"):
        assert torch.equal(graphs.call("logits", network, windows(), []), 2 * windows())
    recorder.error = None
    for _ in range(3):
        graphs.call("logits", network, windows(2), [])
    assert (recorder.recorded, recorder.emptied) == (0, 1)


def test_recordings_give_way_where_memory_is_short(network: Network, recorder: Recorder) -> None:
    graphs, short = WindowGraphs(torch.device("cpu")), True

    def hungry(given: Tensor) -> Tensor:
        nonlocal short
        if short:
            short = False
            raise torch.OutOfMemoryError("no room")
        return network(given)

    with pytest.raises(torch.OutOfMemoryError):
        graphs.call("features", hungry, windows(), [])
    for _ in range(2):
        graphs.call("logits", network, windows(), [])
    short = True
    assert torch.equal(graphs.call("features", hungry, windows(3), []), 2 * windows(3))
    assert recorder.emptied == 1
    calls = network.calls
    graphs.call("logits", network, windows(), [])
    assert network.calls == calls + 1


def test_an_engine_on_a_cpu_records_nothing() -> None:
    plan = untrained_plan("segformer3d", untrained_spec(3), patch_size=(16, 16, 32))
    assert TorchEngine(plan, [build_network(plan.network, 1, 3)], "cpu")._graphs is None


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", ["mednext-s", "segformer3d"])
def test_replayed_windows_have_the_logits_of_the_first(name: str) -> None:
    plan = untrained_plan(name, untrained_spec(3), patch_size=(32, 32, 32))
    engine = TorchEngine(plan, [build_network(plan.network, 1, 3).cuda()], "cuda")
    given = [np.random.default_rng(seed).standard_normal((2, 1, 32, 32, 32)).astype(np.float32) for seed in range(3)]
    first = [engine.logits(each) for each in given]
    assert engine._graphs is not None
    assert engine._graphs._recordings
    fresh = TorchEngine(plan, engine._networks, "cuda")
    for each, expected in zip(given, first, strict=True):
        fresh._graphs = WindowGraphs(torch.device("cuda"))
        np.testing.assert_allclose(expected, fresh.logits(each), rtol=1e-4, atol=1e-5)
