from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from sagittal.inference.engines import torch_engine
from sagittal.inference.engines.engine import CoarseEngine, MemberEngine
from sagittal.inference.engines.torch_engine import TorchEngine
from sagittal.networks.build import build_network
from sagittal.networks.cost import step_memory_bytes
from sagittal.plan import Plan
from sagittal.testing.plans import untrained_plan, untrained_spec


def plan_of(name: str, outputs: int) -> Plan:
    small = {"network.channels": 4, "network.block_counts": [1] * 9} if name == "mednext-s" else {}
    return untrained_plan(name, untrained_spec(outputs), patch_size=(16, 16, 32), settings=small)


def networks_of(plan: Plan, count: int) -> list[nn.Module]:
    torch.manual_seed(0)
    outputs = plan.dataset.num_outputs
    networks = [build_network(plan.network, 1, outputs).eval() for _ in range(count)]
    for network in networks:
        for parameter in network.parameters():
            # Biases begin at zero, and a head without them would pass with wrong ones.
            nn.init.normal_(parameter, std=0.2)
    return networks


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("size", [(16, 16, 32), (9, 17, 20)])
def test_the_head_of_the_features_gives_the_logits(count: int, size: tuple[int, int, int]) -> None:
    plan = plan_of("mednext-s", 7)
    engine = TorchEngine(plan, networks_of(plan, count), "cpu")
    windows = np.random.default_rng(0).standard_normal((2, 1, *size)).astype(np.float32)
    features = engine.features(windows)
    assert engine.head is not None and features.shape == (2, 4 * count, *size) and features.flags.c_contiguous
    logits = np.einsum("kf,nfdhw->nkdhw", engine.head.weight, features) + engine.head.bias[:, None, None, None]
    expected = engine.logits(windows)
    assert expected.shape == (2, 7, *size) and float(np.ptp(expected)) > 0.1
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-4)


def test_folds_are_averaged() -> None:
    plan = plan_of("segformer3d", 3)
    networks = networks_of(plan, 3)
    windows = np.random.default_rng(0).standard_normal((1, 1, 16, 16, 32)).astype(np.float32)
    each = [TorchEngine(plan, [network], "cpu").logits(windows) for network in networks]
    together = TorchEngine(plan, networks, "cpu")
    assert together.head is None
    np.testing.assert_allclose(together.logits(windows), np.mean(each, axis=0), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["mednext-s", "segformer3d"])
def test_folds_can_be_told_apart(name: str) -> None:
    plan = plan_of(name, 5)
    networks = networks_of(plan, 2)
    windows = np.random.default_rng(0).standard_normal((3, 1, 16, 16, 32)).astype(np.float32)
    together = TorchEngine(plan, networks, "cpu")
    each = [TorchEngine(plan, [network], "cpu") for network in networks]
    assert isinstance(together, MemberEngine) and together.num_members == 2
    found = together.member_logits(windows)
    np.testing.assert_allclose(found, np.stack([one.logits(windows) for one in each], axis=1), rtol=1e-4, atol=1e-5)
    if name == "segformer3d":
        assert together.member_heads is None
        coarse = np.stack([one.coarse_logits(windows) for one in each], axis=1)
        np.testing.assert_allclose(together.member_logits(windows, coarse=True), coarse, rtol=1e-4, atol=1e-5)
        return
    assert together.member_heads is not None
    for part, head, logits in zip(
        np.split(together.features(windows), 2, axis=1), together.member_heads, found.swapaxes(0, 1), strict=True
    ):
        own = np.einsum("kf,nfdhw->nkdhw", head.weight, part) + head.bias[:, None, None, None]
        np.testing.assert_allclose(own, logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("count", [1, 2])
def test_segformer3d_interpolates_its_coarse_logits(count: int) -> None:
    plan = plan_of("segformer3d", 3)
    engine = TorchEngine(plan, networks_of(plan, count), "cpu")
    assert isinstance(engine, CoarseEngine) and engine.coarse_stride((16, 16, 32)) == 4
    assert engine.coarse_stride((16, 17, 32)) == 1 and engine.coarse_stride((12, 16, 32)) == 1
    windows = np.random.default_rng(0).standard_normal((2, 1, 16, 16, 32)).astype(np.float32)
    coarse = torch.from_numpy(engine.coarse_logits(windows))
    assert coarse.shape == (2, 3, 4, 4, 8)
    fine = nn.functional.interpolate(coarse, scale_factor=4, mode="trilinear", align_corners=False)
    np.testing.assert_allclose(fine.numpy(), engine.logits(windows), rtol=1e-3, atol=1e-4)
    many = plan_of("segformer3d", 200)
    wide = TorchEngine(many, networks_of(many, 1), "cpu").memory((16, 16, 32))
    assert wide.per_window_bytes < 200 * 16 * 16 * 32 * 4


def test_other_networks_have_no_coarse_logits() -> None:
    plan = plan_of("mednext-s", 3)
    assert TorchEngine(plan, networks_of(plan, 1), "cpu").coarse_stride((16, 16, 32)) == 1


def test_the_networks_stay_as_they_were() -> None:
    plan = plan_of("mednext-s", 7)
    (network,) = networks_of(plan, 1)
    network.train()
    engine = TorchEngine(plan, [network], "cpu")
    windows = np.zeros((1, 1, 16, 16, 32), np.float32)
    engine.features(windows)
    assert network.training and all(module.training for module in network.modules())
    with torch.no_grad():
        assert network.eval()(torch.from_numpy(windows)).shape == (1, 7, 16, 16, 32)


def test_memory_follows_what_will_be_asked_for() -> None:
    def per_window(outputs: int) -> int:
        plan = plan_of("mednext-s", outputs)
        return TorchEngine(plan, networks_of(plan, 1), "cpu").memory((16, 16, 32)).per_window_bytes

    # Above four outputs the features are asked for, and their number does not change.
    assert per_window(60) == per_window(7)
    plan = plan_of("mednext-s", 3)
    (network,) = networks_of(plan, 1)
    least = step_memory_bytes(network, (1, 1, 16, 16, 32), training=False)
    memory = TorchEngine(plan, [network], "cpu").memory((16, 16, 32))
    assert memory.fixed_bytes + memory.per_window_bytes >= least


def test_on_a_gpu_only_the_result_takes_the_hosts_memory() -> None:
    plan = plan_of("mednext-s", 7)
    memory = TorchEngine(plan, networks_of(plan, 1), "meta").memory((16, 16, 32))
    assert memory.fixed_bytes == 0 and memory.per_window_bytes == 4 * 16 * 16 * 32 * 4


def test_an_engine_without_networks_is_our_own_bug() -> None:
    with pytest.raises(AssertionError):
        TorchEngine(plan_of("mednext-s", 3), [], "cpu")


def test_memory_is_measured_once_for_each_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    plan, measured = plan_of("mednext-s", 3), list[tuple[int, ...]]()

    def noting(network: nn.Module, shape: tuple[int, ...], *, training: bool) -> int:
        measured.append(shape)
        return step_memory_bytes(network, shape, training=training)

    monkeypatch.setattr(torch_engine, "step_memory_bytes", noting)
    engine = TorchEngine(plan, networks_of(plan, 1), "cpu")
    first, _, again = (engine.memory(window) for window in ((16, 16, 32), (16, 16, 16), (16, 16, 32)))
    assert first == again and len(measured) == 4
