"""The OpenVINO engine: ensembles, heads, precisions, the cache on disk, memory, and that it tells nobody."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sagittal.bundle import Bundle, read_bundle
from sagittal.errors import BundleError, DataError, ResourceError
from sagittal.inference.engines import openvino_engine
from sagittal.inference.engines.engine import MemberEngine
from sagittal.inference.engines.openvino_engine import OpenVINOEngine, load, supports
from sagittal.networks.build import build_network
from sagittal.plan import Plan
from sagittal.testing.bundle import write_random_bundle
from sagittal.testing.plans import untrained_plan, untrained_spec

openvino = pytest.importorskip("openvino")

WINDOW = (16, 20, 18)
SMALL = {"network.channels": 2, "network.block_counts": [1] * 9, "network.expansion_ratio": 1}
SMALL_TRANSFORMER = {"network.embed_dims": [4] * 4, "network.num_heads": [1] * 4}


def plan_of(network: str = "mednext-s", **settings: Any) -> Plan:
    return untrained_plan(network, untrained_spec(3, 2), patch_size=WINDOW, settings={**SMALL, **settings})


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    return read_bundle(write_random_bundle(tmp_path / "bundle", plan_of(), folds=("fold_0", "fold_1")))


def windows(count: int = 2, channels: int = 2) -> np.ndarray[Any, Any]:
    return np.random.default_rng(0).normal(1, 2, (count, channels, *WINDOW)).astype(np.float32)


def mean_of_networks(bundle: Bundle, images: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    outputs = []
    for name in bundle.weight_names:
        network = build_network(bundle.plan.network, 2, 3).eval()
        network.load_state_dict({key: torch.from_numpy(array.copy()) for key, array in bundle.weights(name).items()})
        with torch.no_grad():
            outputs.append(network(torch.from_numpy(images)).numpy())
    mean: np.ndarray[Any, Any] = np.mean(outputs, axis=0)
    return mean


def difference(one: np.ndarray[Any, Any], other: np.ndarray[Any, Any]) -> float:
    assert one.shape == other.shape
    return float(np.abs(one - other).max() / np.abs(other).max())


def test_folds_are_averaged(bundle: Bundle) -> None:
    engine = load(bundle, threads=1)
    images = windows()
    expected = mean_of_networks(bundle, images)
    assert (engine.name, engine.device, engine.precision, engine.num_outputs) == ("openvino", "cpu", "fp32", 3)
    assert difference(engine.logits(images), expected) < 1e-4
    # A second call reuses the compiled networks' volumes, and must not write into the first one's result.
    first = engine.logits(images)
    engine.logits(images + 1)
    assert difference(first, expected) < 1e-4


def test_the_joint_head_turns_all_folds_features_into_the_mean(bundle: Bundle) -> None:
    engine = load(bundle, threads=1)
    images = windows()
    features = engine.features(images)
    assert engine.head is not None
    assert features.shape == (2, 4, *WINDOW)
    logits = np.einsum("kf,nfdhw->nkdhw", engine.head.weight, features) + engine.head.bias[:, None, None, None]
    assert difference(logits, mean_of_networks(bundle, images)) < 1e-4


def test_bf16_is_close_where_the_processor_has_it(bundle: Bundle) -> None:
    if "BF16" not in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        pytest.skip("this processor has no bfloat16")
    images = windows(1)
    off = difference(load(bundle, precision="bf16", threads=1).logits(images), mean_of_networks(bundle, images))
    assert 1e-5 < off < 0.1


def test_bf16_is_refused_where_the_processor_lacks_it(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    class Old(openvino.Core):  # type: ignore[misc, name-defined]
        def get_property(self, *_: str) -> list[str]:
            return ["FP32", "INT8"]

    monkeypatch.setattr(openvino_engine, "core", Old)
    with pytest.raises(ResourceError, match="no bfloat16"):
        load(bundle, precision="bf16")
    load(bundle)


@pytest.mark.parametrize("network", ["mednext-s", "segformer3d"])
def test_compiled_networks_are_found_on_disk(network: str, tmp_path: Path) -> None:
    # Both have loops in them, whose bodies' names count too.
    plan = untrained_plan(
        network,
        untrained_spec(3, 2),
        patch_size=WINDOW,
        settings=SMALL if network == "mednext-s" else SMALL_TRANSFORMER,
    )
    bundle = read_bundle(write_random_bundle(tmp_path / "bundle", plan))
    folder = tmp_path / "cache"
    images = windows(1)
    first = load(bundle, cache_folder=folder, threads=1).logits(images)
    kept = {path.name: path.stat().st_mtime_ns for path in folder.rglob("*.blob")}
    assert len(kept) == 1
    engine = load(bundle, cache_folder=folder, threads=1)
    assert np.array_equal(engine.logits(images), first)
    assert {path.name: path.stat().st_mtime_ns for path in folder.rglob("*.blob")} == kept
    assert all(request.get_compiled_model().get_property("LOADED_FROM_CACHE") for request in _requests(engine))


def test_a_cache_that_cannot_be_written_costs_no_result(bundle: Bundle, tmp_path: Path) -> None:
    (tmp_path / "home").write_text("a file, in which no folder can be made, whoever asks")
    images = windows(1)
    found = load(bundle, cache_folder=tmp_path / "home" / "networks", threads=1).logits(images)
    assert np.array_equal(found, load(bundle, threads=1).logits(images))


@pytest.mark.parametrize("order", [("fp32", "bf16"), ("bf16", "fp32")])
def test_no_precision_runs_what_was_compiled_for_another(order: tuple[Any, Any], tmp_path: Path) -> None:
    if "BF16" not in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        pytest.skip("this processor has no bfloat16")
    settings = {"network.embed_dims": [32, 64, 160, 256]}
    plan = untrained_plan("segformer3d", untrained_spec(3, 2), patch_size=(32, 40, 36), settings=settings)
    bundle = read_bundle(write_random_bundle(tmp_path / "bundle", plan))
    images = np.random.default_rng(0).normal(1, 2, (1, 2, 32, 40, 36)).astype(np.float32)
    for precision in order:
        # A process of its own finds it on disk; in one process OpenVINO may keep it.
        found = load(bundle, precision=precision, cache_folder=tmp_path / "cache", threads=1).logits(images)
        assert np.array_equal(found, load(bundle, precision=precision, threads=1).logits(images)), precision


def test_without_a_folder_nothing_is_written(bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    monkeypatch.chdir(empty)
    load(bundle, threads=1).logits(windows(1))
    assert list(empty.iterdir()) == []


def _requests(engine: OpenVINOEngine) -> list[Any]:
    return list(engine._compiled.values())


def test_few_compiled_networks_are_kept(bundle: Bundle) -> None:
    engine = OpenVINOEngine(bundle.plan, [bundle.weights("fold_0")], threads=1)
    for size in (16, 17, 18):
        engine.logits(windows(1)[..., :size])
    assert len(engine._compiled) == 2


def test_folds_take_turns_with_one_set_of_volumes(bundle: Bundle) -> None:
    one = OpenVINOEngine(bundle.plan, [bundle.weights("fold_0")]).memory((64, 64, 64))
    two = load(bundle).memory((64, 64, 64))
    weights = 4 * sum(array.nbytes for array in bundle.weights("fold_0").values())
    volumes = one.fixed_bytes - weights - openvino_engine._RUNTIME_BYTES
    assert volumes > 10 * 2**20
    assert two.fixed_bytes - one.fixed_bytes - weights < 0.5 * volumes


def test_memory_is_that_of_coarse_logits_where_a_prediction_asks_for_these(tmp_path: Path) -> None:
    settings, window = {**SMALL_TRANSFORMER, "patch.size": [32, 48, 32]}, (32, 48, 32)
    needs = []
    for outputs in (3, 103):
        plan = untrained_plan("segformer3d", untrained_spec(outputs), settings=settings)
        found = read_bundle(write_random_bundle(tmp_path / f"bundle_{outputs}", plan))
        needs.append(load(found, threads=1).memory(window))
    voxels = 32 * 48 * 32
    assert needs[1].per_window_bytes - needs[0].per_window_bytes == 4 * 100 * voxels // 64
    # A hundred classes at the window's own resolution would be 4 * 100 * voxels.
    assert needs[1].fixed_bytes - needs[0].fixed_bytes < 0.5 * 4 * 100 * voxels


def test_networks_without_a_graph_are_named() -> None:
    assert supports(plan_of()) is None
    other = untrained_plan("plainconvunet", untrained_spec(3))
    assert supports(other) == "no OpenVINO form of plainconvunet"
    with pytest.raises(ResourceError, match="no OpenVINO form of plainconvunet"):
        OpenVINOEngine(other, [{}])


def test_weights_of_another_plan_are_refused_by_the_bundles_name(bundle: Bundle) -> None:
    other = Bundle(bundle.path, bundle.manifest, plan_of(**{"network.kernel_size": 5}), bundle.metrics)
    with pytest.raises(BundleError, match=f"{bundle.path}: the weights' 'enc_block_0.0.conv1.weight' has shape"):
        load(other)


def test_windows_of_other_channels_are_refused(bundle: Bundle) -> None:
    with pytest.raises(DataError, match=r"shape \(1, 3, 16, 20, 18\). Expected \(N, 2, D, H, W\)"):
        load(bundle).logits(windows(1, channels=3))


def test_nothing_is_sent(bundle: Bundle) -> None:
    # In a process of its own: in this one, somebody may have imported OpenVINO before us.
    program = f"""
import sys, socket
def refuse(*arguments, **options):
    raise AssertionError("a socket was opened")
socket.socket.connect = socket.create_connection = socket.getaddrinfo = refuse
from sagittal.bundle import read_bundle
from sagittal.inference.engines import openvino_engine
from sagittal.inference.engines.engine import MemberEngine
import numpy
engine = openvino_engine.load(read_bundle({str(bundle.path)!r}), threads=1)
engine.logits(numpy.zeros((1, 2, 16, 20, 18), numpy.float32))
assert sys.modules["openvino_telemetry"] is None
assert not [name for name in sys.modules if name.startswith("openvino_telemetry.")]
assert "torch" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, timeout=400)
    assert done.returncode == 0, done.stderr


def test_the_stated_memory_is_what_a_call_takes(tmp_path: Path) -> None:
    if not Path("/proc/self/status").exists():
        pytest.skip("the system does not tell a process's highest memory")
    plan = untrained_plan("mednext-s", untrained_spec(3), patch_size=(64, 48, 64))
    path = write_random_bundle(tmp_path / "bundle", plan)
    program = f"""
from pathlib import Path
from sagittal.bundle import read_bundle
from sagittal.inference.engines import openvino_engine
from sagittal.inference.engines.engine import MemberEngine
import numpy
def highest():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))
bundle = read_bundle({str(path)!r})
before = highest()
engine = openvino_engine.load(bundle, threads=1)
stated = engine.memory((64, 48, 64))
engine.features(numpy.zeros((1, 1, 64, 48, 64), numpy.float32))
print(highest() - before, stated.fixed_bytes + stated.per_window_bytes)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, timeout=400)
    assert done.returncode == 0, done.stderr
    taken, stated = (int(number) for number in done.stdout.split())
    assert 0.6 * stated < taken < stated


@pytest.mark.parametrize("name", ["mednext-s", "segformer3d"])
def test_folds_can_be_told_apart(name: str, tmp_path: Path) -> None:
    small = SMALL if name == "mednext-s" else SMALL_TRANSFORMER
    plan = untrained_plan(name, untrained_spec(3, 2), patch_size=(16, 16, 32), settings=small)
    read = read_bundle(write_random_bundle(tmp_path / "b", plan, folds=("fold_0", "fold_1")))
    folds = [read.weights(each) for each in read.weight_names]
    together, *each = (OpenVINOEngine(plan, some, threads=1) for some in (folds, folds[:1], folds[1:]))
    assert isinstance(together, MemberEngine) and together.num_members == 2
    images = np.random.default_rng(0).normal(size=(3, 2, 16, 16, 32)).astype(np.float32)
    found = together.member_logits(images)
    assert difference(found, np.stack([one.logits(images) for one in each], axis=1)) < 1e-4
    assert difference(found.mean(axis=1), together.logits(images)) < 1e-4
    if name == "segformer3d":
        assert together.member_heads is None
        coarse = np.stack([one.coarse_logits(images) for one in each], axis=1)
        assert difference(together.member_logits(images, coarse=True), coarse) < 1e-4
        return
    assert together.member_heads is not None
    parts = np.split(together.features(images), 2, axis=1)
    for part, head, logits in zip(parts, together.member_heads, found.swapaxes(0, 1), strict=True):
        own = np.einsum("kf,nfdhw->nkdhw", head.weight, part) + head.bias[:, None, None, None]
        assert difference(own, logits) < 1e-4
