"""Graphs of our two networks beyond the contract: sizes left open in torch.export and ONNX, strict export, and real
compiled code."""

from __future__ import annotations

import copy
from pathlib import Path

import onnxruntime
import pytest
import torch
from network_graphs import IN_CHANNELS, NUM_CLASSES, assert_near, graph_namespaces, train_once
from torch import nn
from torch.export import Dim

from sagittal.kernels import cpu_available
from sagittal.networks import MedNeXt, MedNeXtBlock, MedNeXtDownBlock, MedNeXtUpBlock, SegFormer3D

SMALL = {"embed_dims": (8, 16, 24, 32), "num_heads": (1, 2, 3, 4), "depths": (1, 1, 1, 1), "decoder_dim": 16}
SMALLEST = {"mednext": 17, "segformer3d": 33}
"""Voxels from which on sizes can be left open: below, the coarsest grid has one, which the framework treats apart."""


def build(name: str) -> nn.Module:
    torch.manual_seed(0)
    if name == "segformer3d":
        return SegFormer3D(IN_CHANNELS, NUM_CLASSES, **SMALL).eval()
    return MedNeXt(IN_CHANNELS, NUM_CLASSES, channels=16, block_counts=(1,) * 9).eval()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning")
@pytest.mark.parametrize("name", SMALLEST)
def test_one_graph_takes_every_size(name: str, tmp_path: Path) -> None:
    network, path = build(name), tmp_path / "network.onnx"
    example = torch.randn(1, IN_CHANNELS, 34, 69, 50)
    program = torch.export.export(network, (example,), dynamic_shapes=(dict.fromkeys((2, 3, 4), Dim.DYNAMIC),))
    assert graph_namespaces(program) == {"aten", "python"}
    torch.onnx.export(program, (), path, dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (feed,) = session.get_inputs()
    smallest = SMALLEST[name]
    for sizes in ((smallest, smallest + 1, smallest), (64, 41, 80), (35, 48, 66)):
        image = torch.randn(1, IN_CHANNELS, *sizes)
        with torch.no_grad():
            expected = network(image)
            ours = program.module()(image)
        onnx = torch.from_numpy(session.run(None, {feed.name: image.numpy()})[0])
        for logits in (ours, onnx):
            assert logits.shape == expected.shape
            assert (logits - expected).abs().max() < 1e-4 * expected.abs().max()


@pytest.mark.parametrize("name", SMALLEST)
def test_strict_export_gives_the_same(name: str) -> None:
    network, image = build(name), torch.randn(2, IN_CHANNELS, 16, 20, 33)
    torch.compiler.reset()
    program = torch.export.export(network, (image,), strict=True)
    torch.compiler.reset()
    assert graph_namespaces(program) == {"aten"}
    with torch.no_grad():
        logits, expected = program.module()(image), network(image)
    assert (logits - expected).abs().max() < 1e-5 * expected.abs().max()


@pytest.mark.slow
@pytest.mark.skipif(not cpu_available(), reason="no C compiler here")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_compiled_code_trains_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    torch.compiler.reset()
    torch.manual_seed(0)
    # A block of each kind, each checkpointed in another way; the contract traces whole networks.
    blocks = nn.Sequential(
        MedNeXtBlock(16, 16, checkpointing="expansion"),
        MedNeXtDownBlock(16, 32, checkpointing="block"),
        MedNeXtUpBlock(32, 16),
    )
    x = torch.randn(2, 16, 7, 10, 13)
    expected = train_once(copy.deepcopy(blocks), x)
    assert_near(train_once(torch.compile(blocks, fullgraph=True), x), expected)
    torch.compiler.reset()
