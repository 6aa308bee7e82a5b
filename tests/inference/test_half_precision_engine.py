"""The engine torch in bf16 and fp16: what it computes, here on a CPU, and where it is refused."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch
from test_torch_engine import networks_of, plan_of
from torch import nn

from sagittal.bundle import read_bundle
from sagittal.cli import predict_options
from sagittal.errors import PlanError, ResourceError
from sagittal.inference.engines import choice, torch_engine
from sagittal.inference.engines.choice import PRECISIONS, load_engine, require_sensible
from sagittal.inference.engines.cuda_graphs import WindowGraphs
from sagittal.inference.engines.engine import Precision
from sagittal.inference.engines.torch_engine import TorchEngine, require_precision
from sagittal.networks.half_precision import to_half_precision
from sagittal.testing.bundle import write_random_bundle

SIZE = (16, 16, 16)
BOUND: dict[Precision, float] = {"bf16": 0.03, "fp16": 0.004}


def windows(count: int = 1) -> np.ndarray:
    return np.random.default_rng(0).standard_normal((count, 1, *SIZE)).astype(np.float32)


def error(found: np.ndarray, expected: np.ndarray) -> float:
    assert found.dtype == np.float32 and found.shape == expected.shape
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


@pytest.mark.parametrize("name", ["mednext-s", "segformer3d"])
@pytest.mark.parametrize("precision", list(BOUND))
def test_results_are_those_of_fp32_but_for_rounding(name: str, precision: Precision) -> None:
    plan = plan_of(name, 3)
    networks = networks_of(plan, 2)
    before = [part.clone() for network in networks for part in network.state_dict().values()]
    exact, engine = TorchEngine(plan, networks, "cpu"), TorchEngine(plan, networks, "cpu", precision=precision)
    given = windows(2)
    assert engine.precision == precision and exact.precision == "fp32"
    assert 0 < error(engine.logits(given), exact.logits(given)) < BOUND[precision]
    assert error(engine.member_logits(given), exact.member_logits(given)) < BOUND[precision]
    np.testing.assert_array_equal(engine.logits(given), engine.logits(given))
    if name == "segformer3d":
        assert error(engine.coarse_logits(given), exact.coarse_logits(given)) < BOUND[precision]
    after = [part for network in networks for part in network.state_dict().values()]
    assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))


def test_recordings_take_windows_and_give_logits_in_float32() -> None:
    plan = plan_of("mednext-s", 3)
    engine = TorchEngine(plan, networks_of(plan, 1), "cpu", precision="bf16")
    expected = engine.logits(windows())
    graphs = WindowGraphs(torch.device("cpu"))
    engine._graphs = graphs
    np.testing.assert_array_equal(engine.logits(windows()), expected)
    ((_, _, dtype, weights),) = graphs._seen  # type: ignore[misc]
    assert dtype == torch.float32 and len(weights) == len(list(engine._networks[0].parameters()))  # type: ignore[has-type]


def test_the_head_is_applied_in_float32() -> None:
    plan = plan_of("mednext-s", 7)
    networks = networks_of(plan, 1)
    engine, exact = TorchEngine(plan, networks, "cpu", precision="bf16"), TorchEngine(plan, networks, "cpu")
    assert engine.head is not None and exact.head is not None
    np.testing.assert_array_equal(engine.head.weight, exact.head.weight)
    features = engine.features(windows())
    assert np.array_equal(features, torch.from_numpy(features).bfloat16().float().numpy())
    logits = np.einsum("kf,nfdhw->nkdhw", engine.head.weight, features) + engine.head.bias[:, None, None, None]
    np.testing.assert_allclose(logits, engine.logits(windows()), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["mednext-s", "segformer3d"])
def test_memory_is_measured_in_the_precision(name: str) -> None:
    plan = plan_of(name, 7)
    networks = networks_of(plan, 1)
    half, full = (TorchEngine(plan, networks, "cpu", precision=p).memory(SIZE) for p in ("bf16", "fp32"))
    assert 0.4 < half.fixed_bytes / full.fixed_bytes < 0.7
    assert 0.4 < half.per_window_bytes / full.per_window_bytes < 1
    on_gpu = TorchEngine(plan, networks, "meta", precision="bf16").memory(SIZE)
    assert on_gpu == TorchEngine(plan, networks, "meta").memory(SIZE)


def test_leaving_the_range_of_float16_is_told_and_not_written() -> None:
    plan = plan_of("mednext-s", 3)
    networks = networks_of(plan, 1)
    head = networks[0].get_submodule("dec_block_0.0.conv3")
    nn.init.constant_(head.bias, 1e5)  # type: ignore[arg-type]
    assert np.isfinite(TorchEngine(plan, networks, "cpu", precision="bf16").logits(windows())).all()
    with pytest.raises(ResourceError, match=r"left float16's range \(65504\) on cpu.*--precision bf16") as caught:
        TorchEngine(plan, networks, "cpu", precision="fp16").logits(windows())
    assert caught.value.code == "precision"


def test_pytorch_has_no_int8() -> None:
    plan = plan_of("mednext-s", 3)
    with pytest.raises(AssertionError, match="does not compute in int8"):
        TorchEngine(plan, networks_of(plan, 1), "cpu", precision="int8")
    with pytest.raises(ResourceError, match="does not compute in int8"):
        require_precision(torch.device("cuda"), "int8")


@pytest.mark.parametrize("device", ["cpu", "mps"])
def test_other_devices_than_cuda_are_refused(device: str) -> None:
    require_precision(torch.device(device), "fp32")
    with pytest.raises(ResourceError, match=f"fp16 on CUDA devices only, and the device is {device}"):
        require_precision(torch.device(device), "fp16")
    for precision, engine in (("bf16", "torch"), ("fp16", "torch"), ("fp16", "auto")):
        with pytest.raises(
            PlanError, match=f"{precision} on CUDA devices only, and device '{device}' is none"
        ) as caught:
            require_sensible(engine, precision, ["cuda:1", device])
        assert ("OpenVINO has bf16" in str(caught.value)) == (device == "cpu")
    require_sensible("torch", "bf16", ["cuda", "cuda:1"])
    require_sensible("auto", "bf16", [device])
    require_sensible("torch", "fp32", [device])


def test_precisions_that_an_engine_never_has() -> None:
    with pytest.raises(PlanError, match="engine 'torch' computes in fp32, and on CUDA devices in bf16 and fp16"):
        require_sensible("torch", "int8")
    with pytest.raises(PlanError, match="engine 'openvino' computes in fp32, bf16 and int8"):
        require_sensible("openvino", "fp16")


def test_auto_is_refused_where_it_means_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    for finds in (False, True):
        monkeypatch.setattr(choice, "_torch_finds_accelerator", lambda finds=finds: finds)
        if finds:
            require_sensible("torch", "fp16", ["auto"])
        else:
            with pytest.raises(PlanError, match="device 'auto' is none here"):
                require_sensible("torch", "fp16", ["auto"])


@pytest.mark.parametrize("precision", list(BOUND))
def test_a_gpu_gets_the_precision_that_was_asked_for(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, precision: Precision
) -> None:
    """With a device check that takes this CPU for a GPU."""
    plan = plan_of("mednext-s", 3)
    bundle = read_bundle(write_random_bundle(tmp_path / "b", plan))
    monkeypatch.setattr(torch_engine, "resolve_device", lambda _: torch.device("cpu"))
    monkeypatch.setattr(torch_engine, "require_precision", lambda *_: None)
    engine = load_engine(bundle, "cuda", precision=precision)
    assert (engine.name, engine.precision) == ("torch", precision)
    exact = load_engine(bundle, "cpu", "torch")
    assert error(engine.logits(windows()), exact.logits(windows())) < BOUND[precision]


def test_a_gpu_without_bf16_is_refused_and_told_of_fp16(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device", lambda _: nullcontext())
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: including_emulation)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Old GPU")
    require_precision(torch.device("cuda"), "fp16")
    with pytest.raises(ResourceError, match=r"Old GPU \(cuda\) has no units for bf16.*Use --precision fp16"):
        require_precision(torch.device("cuda"), "bf16")


def test_the_command_line_and_the_library_know_the_same_precisions() -> None:
    assert get_args(predict_options.Precision) == get_args(Precision) == PRECISIONS


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", ["mednext-s", "segformer3d"])
@pytest.mark.parametrize("precision", list(BOUND))
def test_graphs_on_a_gpu_have_the_numbers_of_the_cpu(name: str, precision: Precision) -> None:
    plan = plan_of(name, 3)
    networks = networks_of(plan, 1)
    exact = TorchEngine(plan, networks, "cpu").logits(windows())
    engine = TorchEngine(plan, [network.cuda() for network in networks], "cuda", precision=precision)
    found = [engine.logits(windows()) for _ in range(3)]
    assert all(error(each, exact) < 2 * BOUND[precision] for each in found)
    np.testing.assert_array_equal(found[1], found[2])


def test_networks_are_converted_in_place_by_the_function_and_copied_by_the_engine() -> None:
    plan = plan_of("mednext-s", 3)
    (network,) = networks_of(plan, 1)
    TorchEngine(plan, [network], "cpu", precision="bf16")
    assert {part.dtype for part in network.parameters()} == {torch.float32}
    to_half_precision(network, torch.bfloat16)
    assert {part.dtype for part in network.parameters()} == {torch.float32, torch.bfloat16}
