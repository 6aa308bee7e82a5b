from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from streamed import Known

import sagittal.inference.engines as room
from sagittal.bundle import Bundle, read_bundle
from sagittal.errors import PlanError, ResourceError
from sagittal.inference.engines import choice
from sagittal.inference.engines.choice import engine_named, load_engine, torch_hint
from sagittal.kernels import cpu_available
from sagittal.testing.bundle import write_random_bundle
from sagittal.testing.plans import untrained_plan, untrained_spec

ENGINE = Known(3)


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    small = {"network.channels": 4, "network.block_counts": [1] * 9}
    plan = untrained_plan("mednext-s", untrained_spec(3), patch_size=(16, 16, 16), settings=small)
    return read_bundle(write_random_bundle(tmp_path / "b", plan))


class FakeOpenVINO:
    """Stands in for the engine's module: this file tests the choice alone."""

    def __init__(self, why_not: str | None = None) -> None:
        self.why_not = why_not
        self.asked: list[dict[str, Any]] = []

    def supports(self, _plan: Any) -> str | None:
        return self.why_not

    def load(self, _bundle: Bundle, **options: Any) -> Known:
        self.asked.append(options)
        return ENGINE


def install(monkeypatch: pytest.MonkeyPatch, module: FakeOpenVINO | None, missing: tuple[str, ...] = ()) -> None:
    monkeypatch.setattr(choice, "_is_installed", lambda package: package not in missing)
    monkeypatch.setitem(sys.modules, "sagittal.inference.engines.openvino_engine", module)  # type: ignore[arg-type]
    if module is None:
        monkeypatch.delattr(room, "openvino_engine", raising=False)
    else:
        monkeypatch.setattr(room, "openvino_engine", module, raising=False)


@pytest.mark.parametrize("device", ["cpu", "auto"])
def test_a_cpu_takes_openvino_where_it_can(
    monkeypatch: pytest.MonkeyPatch, bundle: Bundle, device: str, tmp_path: Path
) -> None:
    fake = FakeOpenVINO()
    install(monkeypatch, fake)
    monkeypatch.setattr(choice, "_torch_finds_accelerator", lambda: False)
    given = load_engine(bundle, device, precision="bf16", cache_folder=tmp_path)
    assert given is ENGINE and fake.asked == [{"precision": "bf16", "cache_folder": tmp_path, "threads": None}]
    assert load_engine(bundle, device, threads=3) is ENGINE and fake.asked[1]["threads"] == 3


def test_torch_takes_the_threads_that_it_is_given(monkeypatch: pytest.MonkeyPatch, bundle: Bundle) -> None:
    taken: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", taken.append)
    load_engine(bundle, "cpu", "torch")
    load_engine(bundle, "cpu", "torch", threads=2)
    assert taken == [2]


@pytest.mark.parametrize("engine", ["auto", "torch", "openvino"])
@pytest.mark.parametrize("why_not", [None, "no OpenVINO form of it"])
def test_the_engine_is_named_before_it_is_loaded(
    monkeypatch: pytest.MonkeyPatch, bundle: Bundle, engine: str, why_not: str | None
) -> None:
    install(monkeypatch, FakeOpenVINO(why_not))
    name = engine_named(bundle, "cpu", engine)
    if engine == "openvino" and why_not is not None:
        with pytest.raises(ResourceError):
            load_engine(bundle, "cpu", engine)
        assert name == "openvino"
    else:
        assert (load_engine(bundle, "cpu", engine) is ENGINE) == (name == "openvino")
    assert engine_named(bundle, "cuda", "auto") == "torch"


def test_torch_where_openvino_is_absent_or_can_not(monkeypatch: pytest.MonkeyPatch, bundle: Bundle) -> None:
    install(monkeypatch, FakeOpenVINO("no OpenVINO form of mednext"))
    assert load_engine(bundle, "cpu").name == "torch"
    install(monkeypatch, FakeOpenVINO(), missing=("openvino",))
    assert load_engine(bundle, "cpu").name == "torch"
    install(monkeypatch, None)
    assert load_engine(bundle, "cpu").name == "torch"


def test_what_is_asked_for_is_taken_or_refused(monkeypatch: pytest.MonkeyPatch, bundle: Bundle) -> None:
    install(monkeypatch, FakeOpenVINO())
    assert load_engine(bundle, "cpu", "torch").name == "torch"
    with pytest.raises(PlanError, match="PyTorch computes in bf16 on CUDA devices only, and device 'cpu' is none here"):
        load_engine(bundle, "cpu", "torch", "bf16")
    with pytest.raises(ResourceError, match="precision int8 is computed by OpenVINO on a CPU only"):
        load_engine(bundle, "cuda", precision="int8")
    with pytest.raises(ResourceError, match="engine 'openvino' can't be used: it is for CPUs"):
        load_engine(bundle, "cuda", "openvino")
    install(monkeypatch, FakeOpenVINO("no OpenVINO form of unetr"))
    with pytest.raises(ResourceError, match=r"can't be used: no OpenVINO form of unetr\.") as caught:
        load_engine(bundle, "cpu", "openvino")
    assert caught.value.code == "engine"
    with pytest.raises(ResourceError, match=r"by OpenVINO on a CPU, and.*can't be used: no OpenVINO form"):
        load_engine(bundle, "cpu", precision="bf16")


def test_nothing_installed_says_what_to_install(monkeypatch: pytest.MonkeyPatch, bundle: Bundle) -> None:
    install(monkeypatch, FakeOpenVINO(), missing=("openvino", "torch"))
    with pytest.raises(ResourceError, match=r"PyTorch is not installed.*pip install 'sagittal\[openvino\]'"):
        load_engine(bundle, "auto")


def test_unknown_names_are_refused_with_a_hint(bundle: Bundle) -> None:
    with pytest.raises(PlanError, match=r"engine 'openvin' is unknown\. Did you mean 'openvino'"):
        load_engine(bundle, "cpu", "openvin")
    with pytest.raises(PlanError, match=r"precision 'fp23' is unknown\. Did you mean 'fp32'"):
        load_engine(bundle, "cpu", "auto", "fp23")


@pytest.mark.parametrize(
    ("version", "cuda", "found"), [("2.9+cpu", True, False), ("2.9", True, True), ("2.9", False, False)]
)
def test_a_build_without_cuda_is_not_asked(
    monkeypatch: pytest.MonkeyPatch, version: str, cuda: bool, found: bool
) -> None:
    monkeypatch.setattr(choice.metadata, "version", lambda _: version)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    assert choice._torch_finds_accelerator() is found
    monkeypatch.setitem(sys.modules, "torch", None)
    assert choice._torch_finds_accelerator() is False


def test_pytorch_is_hinted_at_where_its_kernels_are_built_and_nothing_was_asked_for(
    monkeypatch: pytest.MonkeyPatch, bundle: Bundle, tmp_path: Path
) -> None:
    monkeypatch.setattr(choice, "_kernels_are_built", lambda: True)
    install(monkeypatch, FakeOpenVINO())
    assert "--engine torch may be faster" in str(torch_hint([bundle], "auto", "fp32", "openvino fp32"))
    assert torch_hint([bundle], "openvino", "fp32", "openvino fp32") is None
    assert torch_hint([bundle], "auto", "bf16", "openvino bf16") is None
    assert torch_hint([bundle], "auto", "fp32", "torch fp32") is None
    plan = untrained_plan("segformer3d", untrained_spec(3), patch_size=(16, 16, 16))
    assert torch_hint([bundle, Bundle(tmp_path, bundle.manifest, plan, {})], "auto", "fp32", "openvino fp32") is None
    monkeypatch.setattr(choice, "_kernels_are_built", lambda: False)
    assert torch_hint([bundle], "auto", "fp32", "openvino fp32") is None
    install(monkeypatch, FakeOpenVINO(), missing=("torch",))
    monkeypatch.setattr(choice, "_kernels_are_built", lambda: True)
    assert torch_hint([bundle], "auto", "fp32", "openvino fp32") is None


def test_the_library_of_the_kernels_is_found_by_its_file(monkeypatch: pytest.MonkeyPatch) -> None:
    assert choice._kernels_are_built() == cpu_available()
    monkeypatch.setattr(choice, "EXTENSION_SUFFIXES", [".absent"])
    assert not choice._kernels_are_built()
