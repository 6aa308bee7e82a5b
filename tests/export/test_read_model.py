"""The reader that is written beside an exported model against our own prediction, with networks of one convolution."""

from __future__ import annotations

import runpy
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import helper, numpy_helper
from scipy import ndimage
from tiny_segformer import TINY
from torch import nn

from sagittal.bundle.manifest import entry_of
from sagittal.data.label_index import label_index
from sagittal.export.description import ExportedModel, Network, describe
from sagittal.export.export import POST_PROCESS, READER, _template, reader_text
from sagittal.inference.engines.torch_engine import TorchEngine
from sagittal.inference.postprocessing import apply
from sagittal.inference.predictor import Predictor
from sagittal.plan import DatasetSpec, Label, Plan
from sagittal.plan.postprocessing import FillHoles, LargestComponent, MinimumVolume
from sagittal.testing.plans import untrained_plan, untrained_spec

Segment = Callable[[Sequence[Path]], Any]

REGIONS = DatasetSpec(
    name="regions",
    channel_names=("t1", "t2"),
    labels=(
        Label(name="whole", values=(1, 2, 3)),
        Label(name="core", values=(2, 3)),
        Label(name="enhancing", values=(3,)),
    ),
    regions_class_order=(1, 2, 3),
    file_ending=".nii.gz",
)
MAPPED = untrained_spec(3).replace(label_map=((1, -7), (2, 70000)))
OBLIQUE, _ = np.linalg.qr(np.random.default_rng(3).standard_normal((3, 3)))
FLIPPED = np.array([[0.0, -1.0, 0.0], [0.0, 0.0, 1.0], [-1.0, 0.0, 0.0]])

ZSCORE = {"kind": "zscore", "nonzero_only": False}
INSIDE = {"kind": "zscore", "nonzero_only": True}
CT = {"kind": "ct", "lower": -900.0, "upper": 700.0, "mean": 20.0, "std": 310.0}
UNIT = {"kind": "rescale_to_0_1"}
NONE = {"kind": "none"}


def _post_process() -> Callable[..., np.ndarray]:
    found: dict[str, Any] = {}
    exec(compile(_template(POST_PROCESS), POST_PROCESS, "exec"), found)
    function: Callable[..., np.ndarray] = found["post_process"]
    return function


POST_PROCESSED = _post_process()


def conv(plan: Plan, seed: int) -> nn.Conv3d:
    torch.manual_seed(seed)
    layer = nn.Conv3d(len(plan.dataset.channel_names), plan.dataset.num_outputs, 3, padding=1)
    return layer.eval().requires_grad_(False)


def write_conv(path: Path, layer: nn.Conv3d) -> None:
    shapes = [["N", channels, "D", "H", "W"] for channels in (layer.in_channels, layer.out_channels)]
    values = [
        helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape)
        for name, shape in zip(("image", "logits"), shapes, strict=True)
    ]
    weights = [
        numpy_helper.from_array(tensor.numpy(), name) for name, tensor in (("w", layer.weight), ("b", layer.bias))
    ]
    node = helper.make_node("Conv", ["image", "w", "b"], ["logits"], pads=[1] * 6)
    graph = helper.make_graph([node], "conv", values[:1], values[1:], weights)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10), path)


def description(plan: Plan, networks: Sequence[Network] = ()) -> ExportedModel:
    some = tuple(networks) or (Network(name="all", file="all.onnx", sizes="open", largest_difference=0),)
    files = {network.file: entry_of(b"") for network in some}
    return describe(plan, runtime="onnx", networks=some, files=files, bundle_sha256="0" * 64, sagittal_version="0")


def exported(folder: Path, plan: Plan, layers: Sequence[nn.Conv3d], monkeypatch: pytest.MonkeyPatch) -> Segment:
    """Write what `export_bundle` writes, with one convolution per fold, and return the reader's function."""
    networks = []
    for number, layer in enumerate(layers):
        write_conv(folder / f"fold_{number}.onnx", layer)
        networks.append(Network(name=f"fold_{number}", file=f"fold_{number}.onnx", sizes="open", largest_difference=0))
    description(plan, networks).write(folder / "model.json")
    (folder / READER).write_text(reader_text("onnx", post_processing=bool(plan.postprocessing)))
    (folder / POST_PROCESS).write_text(_template(POST_PROCESS))
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.delitem(sys.modules, "post_process", raising=False)
    segment: Segment = runpy.run_path(str(folder / READER))["segment"]
    return segment


def write_scan(
    folder: Path, shape: tuple[int, int, int], axes: np.ndarray, spacing: tuple[float, ...], channels: int
) -> list[Path]:
    """Write a scan with a rim of zeros, as (i, j, k), of which the last channel is stored with a slope."""
    rng = np.random.default_rng(0)
    affine = np.eye(4)
    affine[:3, :3], affine[:3, 3] = axes * spacing, rng.uniform(-90, 90, 3)
    paths = []
    for channel in range(channels):
        voxels = np.round(ndimage.gaussian_filter(rng.standard_normal(shape), 1.2) * 2000).astype(np.int16)
        voxels[:2], voxels[:, -3:], voxels[4:6, 4:6, 3:5] = 0, 0, 0
        image = nibabel.Nifti1Image(voxels, affine)
        image.header.set_xyzt_units("mm")
        if channel == channels - 1:
            image.header.set_slope_inter(0.75, 0.0)
        paths.append(folder / f"scan_{channel}.nii.gz")
        nibabel.save(image, paths[-1])
    return paths


def changed(spec: DatasetSpec, rules: list[dict[str, Any]], patch: tuple[int, int, int], **settings: Any) -> Plan:
    given = {**TINY, "preprocessing.normalization": rules, **{k.replace("__", "."): v for k, v in settings.items()}}
    return untrained_plan("segformer3d", spec, patch_size=patch, spacing_mm=(2.0, 1.0, 1.25), settings=given)


SWAPS = {"training__augmentation__swapped_labels": [[2, 1, 2]]}
SWAPPED = {**SWAPS, "preprocessing__crop_to_nonzero": False, "inference__overlap": 0.25}
STORED = {"preprocessing__orientation": "stored", "preprocessing__transpose": [2, 0, 1]}
CASES: dict[str, tuple[Plan, int, tuple[int, int, int], np.ndarray, tuple[float, ...]]] = {
    "two folds": (changed(untrained_spec(4), [ZSCORE], (12, 14, 16)), 2, (25, 19, 14), FLIPPED, (1.5, 2.0, 1.0)),
    "regions, long oblique voxels": (changed(REGIONS, [INSIDE, CT], (8, 14, 16)), 1, (22, 25, 7), OBLIQUE, (1, 1, 6.5)),
    "planes along another axis": (
        changed(untrained_spec(3, 2), [UNIT, NONE], (10, 10, 10)),
        *(1, (9, 24, 21), np.eye(3), (4.5, 1.0, 1.1)),
    ),
    "stored order, transposed, values of old": (
        changed(MAPPED, [CT], (9, 20, 12), **STORED),
        *(1, (12, 17, 21), FLIPPED, (1.0, 1.0, 1.0)),
    ),
    "a scan smaller than the window": (
        changed(untrained_spec(3), [INSIDE], (24, 24, 40)),
        *(1, (20, 9, 11), OBLIQUE, (1.0, 1.0, 1.2)),
    ),
    "left and right, not cropped": (
        changed(untrained_spec(3), [ZSCORE], (12, 12, 12), **SWAPPED),
        *(1, (23, 17, 14), FLIPPED, (1.0, 1.4, 2.2)),
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_the_reader_predicts_what_sagittal_predicts(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan, folds, shape, axes, spacing = CASES[case]
    layers = [conv(plan, seed) for seed in range(folds)]
    segment = exported(tmp_path, plan, layers, monkeypatch)
    paths = write_scan(tmp_path, shape, axes, spacing, len(plan.dataset.channel_names))
    ours, theirs = compared(plan, layers, segment, paths, tmp_path)
    assert (ours == theirs).mean() > 0.9999
    assert len(np.unique(ours)) == plan.dataset.num_outputs + plan.dataset.has_regions


def compared(
    plan: Plan, layers: Sequence[nn.Conv3d], segment: Segment, paths: list[Path], folder: Path
) -> tuple[np.ndarray, np.ndarray]:
    """Return Sagittal's label map and the reader's, read back from files, after comparing their grids."""
    Predictor(plan, TorchEngine(plan, layers, "cpu")).predict(paths).write(folder / "ours.nii.gz")
    nibabel.save(segment([str(path) for path in paths]), folder / "theirs.nii.gz")
    ours, theirs = (nibabel.load(folder / f"{name}.nii.gz") for name in ("ours", "theirs"))
    assert ours.get_data_dtype() == theirs.get_data_dtype()
    np.testing.assert_array_equal(ours.affine, theirs.affine)
    return np.asarray(ours.dataobj), np.asarray(theirs.dataobj)


@pytest.mark.parametrize("spec", [untrained_spec(4), REGIONS], ids=["classes", "regions"])
def test_rules_on_the_label_map_are_followed(
    spec: DatasetSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second, third = (label.name for label in spec.labels)
    rules = (
        FillHoles(label=first),
        MinimumVolume(label=second, volume_ml=0.02),
        LargestComponent(labels=(second, third)),
        FillHoles(label=third),
        LargestComponent(),
    )
    plain = changed(spec, [ZSCORE] * len(spec.channel_names), (12, 14, 16))
    plan = plain.replace(postprocessing=rules)
    layers = [conv(plan, 0)]
    paths = write_scan(tmp_path, (25, 21, 14), OBLIQUE, (1.5, 2.0, 1.0), len(spec.channel_names))
    ours, theirs = compared(plan, layers, exported(tmp_path, plan, layers, monkeypatch), paths, tmp_path)
    assert (ours == theirs).mean() > 0.9999
    without, _ = compared(plain, layers, exported(tmp_path, plain, layers, monkeypatch), paths, tmp_path)
    assert (without != ours).any()


@settings(max_examples=12, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 2**32 - 1),
    shape=st.tuples(*[st.integers(3, 9)] * 3),
    density=st.sampled_from((0.1, 0.4, 0.8)),
    spec=st.sampled_from((untrained_spec(4), REGIONS, MAPPED)),
)
def test_each_rule_gives_what_sagittals_gives(
    seed: int, shape: tuple[int, int, int], density: float, spec: DatasetSpec
) -> None:
    rng = np.random.default_rng(seed)
    values = label_index(spec).values_of_classes()
    labels = np.where(rng.random(shape) < density, rng.choice(values, shape), 0).astype(values.dtype)
    names = [label.name for label in spec.labels]
    rules = (FillHoles(label=names[0]), MinimumVolume(label=names[1], volume_ml=0.004), LargestComponent())
    rules = (*rules, LargestComponent(labels=tuple(names[-2:])), FillHoles(label=names[-1]))
    for count in range(1, len(rules) + 1):
        plan = changed(spec, [ZSCORE] * len(spec.channel_names), (8, 8, 8)).replace(postprocessing=rules[:count])
        described = [rule.model_dump(mode="json") for rule in description(plan).post_processing]
        theirs = POST_PROCESSED(labels, described, 0.001)
        np.testing.assert_array_equal(theirs, apply(labels, plan.postprocessing, (1.0, 1.0, 1.0), spec))


def test_an_empty_scan_is_segmented_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = changed(untrained_spec(3), [INSIDE], (8, 8, 8))
    layers = [conv(plan, 0)]
    nibabel.save(nibabel.Nifti1Image(np.zeros((9, 10, 11), np.int16), np.eye(4)), tmp_path / "scan.nii.gz")
    segment = exported(tmp_path, plan, layers, monkeypatch)
    ours, theirs = compared(plan, layers, segment, [tmp_path / "scan.nii.gz"], tmp_path)
    np.testing.assert_array_equal(ours, theirs)


def test_scans_in_other_units_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = changed(untrained_spec(3), [ZSCORE], (8, 8, 8))
    image = nibabel.Nifti1Image(np.zeros((9, 10, 11), np.int16), np.eye(4))
    image.header.set_xyzt_units("micron")
    nibabel.save(image, tmp_path / "scan.nii.gz")
    with pytest.raises(AssertionError, match="not mm"):
        exported(tmp_path, plan, [conv(plan, 0)], monkeypatch)([tmp_path / "scan.nii.gz"])


def test_scans_that_do_not_go_together_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = changed(untrained_spec(3, 2), [ZSCORE, ZSCORE], (8, 8, 8))
    segment, paths = exported(tmp_path, plan, [conv(plan, 0)], monkeypatch), {}
    moved = np.diag([1.0, 1.0, 1.5, 1.0])
    given: dict[str, tuple[tuple[int, ...], np.ndarray]] = {"one": ((9, 10, 11), np.eye(4))}
    given |= {"longer": ((9, 10, 12), np.eye(4)), "coarser": ((9, 10, 11), moved), "film": ((9, 10, 11, 2), np.eye(4))}
    for name, (shape, affine) in given.items():
        paths[name] = tmp_path / f"{name}.nii.gz"
        nibabel.save(nibabel.Nifti1Image(np.ones(shape, np.int16), affine), paths[name])
    for names in (["one"], ["one", "longer"], ["film", "film"], ["one"] * 3):
        with pytest.raises(AssertionError, match=r"3D scans of one size: \['channel_0', 'channel_1'\]"):
            segment([paths[name] for name in names])
    with pytest.raises(AssertionError, match="grids differ"):
        segment([paths["one"], paths["coarser"]])


@pytest.mark.parametrize("runtime", ["onnx", "openvino", "torch"])
@pytest.mark.parametrize("rules", [False, True])
def test_the_reader_has_sixty_lines_without_sagittal(runtime: Any, rules: bool) -> None:
    text = reader_text(runtime, post_processing=rules)
    compile(text, READER, "exec")
    _, _, program = text.split('"""', 2)
    # OpenVINO needs a line against its telemetry, the rules on the label map need two.
    assert len(text.splitlines()) <= 60 + (runtime == "openvino") + 2 * rules
    assert max(map(len, text.splitlines())) <= 120 and ";" not in program
    assert "sagittal" not in program and ("torch" in program) == (runtime == "torch")
