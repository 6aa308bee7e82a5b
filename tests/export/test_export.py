"""Whole exports of small bundles: what lies in the folder, and that it gives what the bundle gives."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from tiny_segformer import TINY
from torch import Tensor, nn

from sagittal.bundle import pack, read_bundle
from sagittal.errors import PlanError, ResourceError
from sagittal.export import export as export_module
from sagittal.export.description import ExportedModel
from sagittal.export.export import export_bundle
from sagittal.export.torch_graph import export_program, network_of
from sagittal.plan import Plan
from sagittal.testing.bundle import write_random_bundle
from sagittal.testing.plans import untrained_plan, untrained_spec

MACHINE = (b"/site-packages", b"/sagittal/", b"torch_graph", str(Path(__file__).parents[2]).encode())
MEDNEXT = {"network.channels": 4, "network.block_counts": [1] * 9, "network.expansion_ratio": 2}


@pytest.fixture
def bundle(tmp_path: Path, tiny_plan: Plan) -> Path:
    return write_random_bundle(tmp_path / "bundle", tiny_plan, folds=("fold_0", "fold_1"))


def check_folder(folder: Path) -> ExportedModel:
    """Check hashes, that nothing tells of this machine, and return model.json."""
    model = ExportedModel.read(folder / "model.json")
    assert {path.name for path in folder.iterdir()} == {"model.json", *model.files}
    for name, entry in model.files.items():
        content = (folder / name).read_bytes()
        assert (len(content), hashlib.sha256(content).hexdigest()) == (entry.size_bytes, entry.sha256)
        if name != "read_model.py":
            assert not [word for word in MACHINE if word in content], name
    return model


def test_openvino_files_are_whole_and_take_any_size(bundle: Path, tmp_path: Path) -> None:
    told: list[str] = []
    model = export_bundle(bundle, "openvino", tmp_path / "out", say=told.append)
    assert check_folder(tmp_path / "out") == model
    assert set(model.files) == {
        *("fold_0.xml", "fold_0.bin", "fold_1.xml", "fold_1.bin"),
        *("read_model.py", "MODEL_CARD.md"),
    }
    assert [network.sizes for network in model.networks] == ["open", "open"]
    assert model.bundle_sha256 == read_bundle(bundle).manifest.manifest_sha256
    assert [line.split(":")[0] for line in told] == ["fold_0.xml", "fold_1.xml"]
    assert told[0].endswith("at 16 x 24 x 33 and at 2 images of 41 x 57 x 35")
    assert sys.modules["openvino_telemetry"] is None
    from sagittal.export.openvino_graph import openvino_runner

    image = np.random.default_rng(0).standard_normal((2, 2, 37, 41, 35), np.float32)
    with torch.no_grad():
        expected = network_of(read_bundle(bundle), "fold_1")(torch.from_numpy(image)).numpy()
    np.testing.assert_allclose(openvino_runner(tmp_path / "out" / "fold_1.xml")(image), expected, atol=1e-5)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning")
@pytest.mark.parametrize("name", ["segformer3d", "mednext-s"])
def test_onnx_takes_any_size(name: str, tmp_path: Path) -> None:
    plan = untrained_plan(
        name, untrained_spec(3, 2), patch_size=(16, 24, 32), settings=TINY if name == "segformer3d" else MEDNEXT
    )
    package = pack(write_random_bundle(tmp_path / "bundle", plan), tmp_path / "model.sagittal")
    model = export_bundle(package, "onnx", tmp_path / "out")
    assert check_folder(tmp_path / "out") == model
    assert model.networks[0].sizes == "open" and model.networks[0].largest_difference < 1e-4
    session = onnxruntime.InferenceSession(tmp_path / "out" / "all.onnx", providers=["CPUExecutionProvider"])
    assert session.get_inputs()[0].shape == ["N", 2, "D", "H", "W"]
    assert session.get_outputs()[0].shape == ["N", 3, "D", "H", "W"]
    network = network_of(read_bundle(package), "all")
    for sizes in ((1, 2, 13, 14, 17), (2, 2, 64, 33, 20), (1, 2, 35, 48, 66)):
        image = np.random.default_rng(0).standard_normal(sizes, np.float32)
        with torch.no_grad():
            expected = network(torch.from_numpy(image)).numpy()
        (logits,) = session.run(["logits"], {"image": image})
        np.testing.assert_allclose(logits, expected, atol=1e-4 * np.abs(expected).max())


@pytest.mark.slow
def test_torch_program_is_loaded_with_torch_alone(tmp_path: Path) -> None:
    plan = untrained_plan("segformer3d", untrained_spec(3), patch_size=(33, 40, 36), settings=TINY)
    bundle = write_random_bundle(tmp_path / "bundle", plan)
    assert export_bundle(bundle, "torch", tmp_path / "out").networks[0].sizes == "open"
    check_folder(tmp_path / "out")
    code = (
        "import sys, torch\n"
        "program = torch.export.load(sys.argv[1]).module()\n"
        "assert program(torch.zeros(2, 1, 41, 50, 37)).shape == (2, 3, 41, 50, 37)\n"
        "assert not [name for name in sys.modules if name.startswith('sagittal')]\n"
    )
    import subprocess

    subprocess.run([sys.executable, "-I", "-W", "ignore", "-c", code, str(tmp_path / "out" / "all.pt2")], check=True)


def test_networks_without_a_builder_are_converted(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sagittal.export import openvino_graph

    torch.manual_seed(0)
    layer = nn.Conv3d(2, 3, 3, padding=1).eval().requires_grad_(False)
    monkeypatch.setattr(openvino_graph, "BUILDERS", {})
    monkeypatch.setattr(export_module, "network_of", lambda *_: layer)
    model = export_bundle(bundle, "openvino", tmp_path / "out")
    assert check_folder(tmp_path / "out").networks[0].sizes == "open" and len(model.networks) == 2
    image = torch.randn(2, 2, 5, 9, 7)
    logits = openvino_graph.openvino_runner(tmp_path / "out" / "fold_0.xml")(image.numpy())
    np.testing.assert_allclose(logits, layer(image).numpy(), atol=1e-5)


class Branching(nn.Module):
    """Does what depends on the voxels."""

    def forward(self, image: Tensor) -> Tensor:
        return torch.cat([image, image[:, :1]], dim=1) if image.sum() > 0 else image.new_zeros(1, 3, *image.shape[2:])


def test_a_graph_that_depends_on_the_voxels_is_refused_and_leaves_nothing(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(export_module, "network_of", lambda *_: Branching().eval())
    with pytest.raises(PlanError, match="can't be exported") as caught:
        export_bundle(bundle, "torch", tmp_path / "out")
    assert caught.value.code == "not_exportable"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bundle"]


class Halving(nn.Module):
    """Takes windows of even sizes only."""

    def forward(self, image: Tensor) -> Tensor:
        assert image.shape[-1] % 2 == 1
        return torch.cat([image, image[:, :1]], dim=1)


def test_what_can_not_be_left_open_is_fixed(bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export_module, "network_of", lambda *_: Halving().eval())
    told: list[str] = []
    model = export_bundle(bundle, "torch", tmp_path / "out", say=told.append)
    assert [network.sizes for network in model.networks] == ["fixed", "fixed"]
    assert told[0].startswith("fold_0.pt2: D, H, W 16 x 24 x 33 alone, ")


def test_a_graph_that_is_right_at_the_window_alone_is_fixed(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written, shapes = export_module._written, []

    def wrong_elsewhere(path: Path, *given: Any) -> Callable[[np.ndarray], np.ndarray]:
        run = written(path, *given)

        def answer(image: np.ndarray) -> np.ndarray:
            shapes.append(image.shape)
            return np.asarray(run(image)) * (1.0 if image.shape[2:] == (16, 24, 33) else 1.001)

        return answer

    monkeypatch.setattr(export_module, "_written", wrong_elsewhere)
    model = export_bundle(bundle, "openvino", tmp_path / "out")
    assert {network.sizes for network in model.networks} == {"fixed"}
    assert shapes == [(1, 2, 16, 24, 33), (2, 2, 41, 57, 35), *[(1, 2, 16, 24, 33)] * 2]


def test_the_second_size_differs_along_every_axis() -> None:
    for window in ((41, 57, 35), (43, 64, 35), (128, 128, 128)):
        other = export_module.other_size(window)
        assert all(a != b and a % 2 and a > 33 for a, b in zip(other, window, strict=True)) and len(set(other)) == 3


def test_foreign_operators_are_refused() -> None:
    @torch.library.custom_op("sagittal_test::twice", mutates_args=())
    def twice(x: Tensor) -> Tensor:
        return x * 2

    twice.register_fake(torch.empty_like)

    class Foreign(nn.Module):
        def forward(self, image: Tensor) -> Tensor:
            result: Tensor = twice(image)
            return result

    with pytest.raises(PlanError, match="operators of sagittal_test"):
        export_program(Foreign().eval(), 1, (4, 5, 6), open_sizes=False)


def test_a_graph_that_gives_something_else_is_refused(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(export_module, "TOLERANCE", 0.0)
    with pytest.raises(PlanError, match="differs from the bundle's network"):
        export_bundle(bundle, "openvino", tmp_path / "out")
    assert not (tmp_path / "out").exists() and len(list(tmp_path.iterdir())) == 1


def test_a_network_of_slices_is_refused(tmp_path: Path) -> None:
    changes = {**TINY, "network.spatial_dims": 2, "configuration": "2d", "patch.size": [1, 24, 32]}
    plan = untrained_plan("segformer3d", untrained_spec(3), settings=changes)
    with pytest.raises(PlanError, match="a network of slices"):
        export_bundle(write_random_bundle(tmp_path / "bundle", plan), "onnx", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_wrong_formats_packages_and_folders_are_named(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(PlanError, match="Did you mean 'onnx'"):
        export_bundle(bundle, "onx", tmp_path / "out")
    with pytest.raises(ResourceError, match="is no empty folder"):
        export_bundle(bundle, "onnx", bundle)
    monkeypatch.setattr(export_module, "find_spec", lambda name: None)
    with pytest.raises(ResourceError, match=r"needs the package onnx.*pip install 'sagittal\[onnx\]'") as caught:
        export_bundle(bundle, "onnx", tmp_path / "out")
    assert caught.value.code == "missing_package"


def test_a_full_disk_leaves_nothing(bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(export_module, "_write_network", full)
    with pytest.raises(ResourceError, match="No space left") as caught:
        export_bundle(bundle, "openvino", tmp_path / "out")
    assert caught.value.code == "disk_full" and len(list(tmp_path.iterdir())) == 1
