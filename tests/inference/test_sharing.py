from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from known_network import scan_of, tiny_plan
from streamed import Folds, Known, KnownCoarse, Slabs, image_of, run

from sagittal.errors import DataError, ResourceError
from sagittal.inference.engines.engine import NetworkMemory, members_of
from sagittal.inference.engines.sharing import SharedEngine, engines_in, threads_each
from sagittal.inference.memory import Choice
from sagittal.inference.predictor import load
from sagittal.plan.base import Triple
from sagittal.testing.bundle import write_random_bundle

IMAGE = image_of((19, 14, 23))
WINDOW: Triple = (8, 6, 10)
Array = np.ndarray[Any, Any]


def shared(*engines: Any) -> Any:
    for number, engine in enumerate(engines):
        engine.device = f"cuda:{number}"
    return SharedEngine(engines)


@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("kind", [Known, KnownCoarse])
@pytest.mark.parametrize("features", [None, 3])
@pytest.mark.parametrize(("mirror_axes", "batch", "ahead"), [((), 2, True), ((0, 2), 5, False), ((), 1, True)])
def test_several_engines_give_every_bit_of_one(
    count: int, kind: type[Known], features: int | None, mirror_axes: tuple[int, ...], batch: int, ahead: bool
) -> None:
    choice = Choice(batch, ahead=ahead)
    one, several = Slabs(), Slabs()
    expected = run(
        kind(5, features), IMAGE, WINDOW, (19, 14, 23), choice=choice, mirror_axes=mirror_axes, consumers=[one]
    )
    engines = [kind(5, features) for _ in range(count)]
    got = run(
        shared(*engines), IMAGE, WINDOW, (19, 14, 23), choice=choice, mirror_axes=mirror_axes, consumers=[several]
    )
    np.testing.assert_array_equal(got, expected)
    np.testing.assert_array_equal(several.whole(), one.whole())
    busy = [sum(engine.batches) for engine in engines]
    assert all(busy[: min(batch, count)]) and not any(busy[batch:])


def test_windows_are_computed_at_the_same_time() -> None:
    both = threading.Barrier(2, timeout=120)

    class Waiting(Known):
        def features(self, windows: Array) -> Array:
            both.wait()
            return super().features(windows)

    assert shared(Waiting(4, 2), Waiting(4, 2)).features(np.zeros((2, 1, 4, 4, 4), np.float32)).shape == (2, 2, 4, 4, 4)


@pytest.mark.parametrize(
    ("error", "kind", "message"),
    [
        (
            DataError("the network was given nonsense.", code="input_channels"),
            DataError,
            "cuda:1: the network was given",
        ),
        (MemoryError(), ResourceError, "cuda:1: the memory does not suffice"),
        (
            RuntimeError("illegal\n address"),
            ResourceError,
            r"cuda:1: its network failed \(RuntimeError: illegal address\)",
        ),
    ],
)
def test_a_failing_engine_is_named(error: Exception, kind: type[Exception], message: str) -> None:
    class Failing(Known):
        def features(self, windows: Array) -> Array:
            raise error

    with pytest.raises(kind, match=message) as caught:
        run(shared(Known(4, 2), Failing(4, 2)), IMAGE, WINDOW, (19, 14, 23), choice=Choice(2))
    assert caught.value.__cause__ is error


def test_what_one_engine_tells_all_tell_together() -> None:
    class Sized(Known):
        def __init__(self, fixed: int, each: int, features: int | None = 2) -> None:
            super().__init__(4, features)
            self.needs = NetworkMemory(fixed, each)

        def memory(self, window: Triple) -> NetworkMemory:
            return self.needs

    engine = shared(Sized(10, 3), Sized(20, 2))
    assert engine.memory(WINDOW) == NetworkMemory(30, 3) and engine.device == "cuda:0,cuda:1"
    assert engines_in(engine) == 2 and engines_in(Known(4)) == 1 and members_of(engine) == 1
    assert engine.head is engine.engines[0].head and engine.name == "torch" and engine.precision == "fp32"
    assert shared(Sized(1, 1), Sized(1, 1, None)).head is None
    assert shared(KnownCoarse(4), KnownCoarse(4)).coarse_stride((8, 8, 8)) == 2
    assert shared(KnownCoarse(4), Known(4)).coarse_stride((8, 8, 8)) == 1


def test_folds_of_all_engines_are_told_apart() -> None:
    windows = np.random.default_rng(0).standard_normal((3, 1, 4, 6, 8)).astype(np.float32)
    for one, coarse in ((Folds(4, 2, features=2), False), (Folds(4, 2, coarse=True), True)):
        engine = shared(*(Folds(4, 2, features=None if coarse else 2, coarse=coarse) for _ in range(2)))
        expected = one.member_logits(windows, coarse=coarse)
        np.testing.assert_array_equal(engine.member_logits(windows, coarse=coarse), expected)
        assert members_of(engine) == 2 and (engine.member_heads is None) == coarse


def test_threads_are_shared_out() -> None:
    assert [threads_each(count, 6) for count in (1, 2, 4, 9)] == [6, 3, 1, 1]


@pytest.mark.parametrize("engine", ["torch", "openvino"])
def test_a_bundle_on_two_devices_gives_the_same_label_map(tmp_path: Path, engine: str) -> None:
    if engine == "openvino":
        pytest.importorskip("openvino")
    bundle = write_random_bundle(tmp_path / "b", tiny_plan())
    scan = scan_of((40, 33, 34))
    alone = load(bundle, device="cpu", engine=engine).predict(scan, mirror=False)
    pair = load(bundle, device="cpu, cpu", engine=engine)
    assert pair.device == "cpu,cpu" and pair.engine.name == engine
    np.testing.assert_array_equal(pair.predict(scan, mirror=False, memory_gib=4.0).array, alone.array)
    with pytest.raises(ResourceError, match="'quantum' is not a device"):
        load(bundle, device="cpu,quantum", engine="torch")
