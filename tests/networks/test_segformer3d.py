"""SegFormer3D: the contract, its parts against their definition, sizes, initialisation, bad configurations."""

from __future__ import annotations

import copy
import math
from typing import Any
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from network_contract import IN_CHANNELS, NUM_CLASSES, NetworkContract
from torch import nn

from sagittal.errors import PlanError
from sagittal.kernels import native
from sagittal.networks import SegFormer3D, create_segformer3d
from sagittal.networks.build import build_network
from sagittal.plan.networks import SegFormer3DConfig

SMALL = {"embed_dims": (8, 16, 24, 32), "num_heads": (1, 2, 3, 4), "depths": (1, 1, 2, 1), "decoder_dim": 16}


class TestSegFormer3D(NetworkContract):
    def build(self) -> nn.Module:
        return SegFormer3D(IN_CHANNELS, NUM_CLASSES, **SMALL)


class TestSegFormer2DPaperScaleGroupNorm(NetworkContract):
    spatial_dims = 2

    def build(self) -> nn.Module:
        return SegFormer3D(
            IN_CHANNELS,
            NUM_CLASSES,
            **{**SMALL, "sr_ratios": (2, 1, 2, 1)},
            attention_scale="paper",
            mlp_ratios=(1, 2, 3, 4),
            norm="group",
            spatial_dims=2,
        )


@pytest.fixture(scope="module")
def small() -> SegFormer3D:
    torch.manual_seed(0)
    return SegFormer3D(1, 2, **SMALL).eval()


@settings(max_examples=12, deadline=None, derandomize=True)
@given(sizes=st.tuples(*(st.integers(1, 40),) * 3))
def test_any_size_comes_back(small: SegFormer3D, sizes: tuple[int, int, int]) -> None:
    with torch.inference_mode():
        assert small(torch.zeros(1, 1, *sizes)).shape == (1, 2, *sizes)


@pytest.mark.parametrize("sizes", [(14, 160, 160), (64, 128, 128), (90, 90, 90), (33, 47, 21)])
def test_named_sizes_come_back(small: SegFormer3D, sizes: tuple[int, int, int]) -> None:
    with torch.inference_mode():
        logits = small(torch.randn(1, 1, *sizes))
    assert logits.shape == (1, 2, *sizes)
    assert torch.isfinite(logits).all()


@pytest.mark.parametrize("sizes", [(14, 160, 160), (64, 128, 256), (90, 90, 90)])
def test_published_network_takes_them(sizes: tuple[int, int, int]) -> None:
    with torch.device("meta"):
        network = create_segformer3d(in_channels=4, num_classes=3)
        assert network(torch.empty(1, 4, *sizes)).shape == (1, 3, *sizes)


@st.composite
def configurations(draw: st.DrawFn) -> dict[str, Any]:
    heads = draw(st.tuples(*(st.integers(1, 3),) * 4))
    return {
        "num_heads": heads,
        "embed_dims": tuple(count * draw(st.integers(1, 9)) for count in heads),
        "depths": draw(st.tuples(*(st.integers(1, 2),) * 4)),
        "sr_ratios": draw(st.tuples(*(st.integers(1, 4),) * 4)),
        "mlp_ratios": draw(st.tuples(*(st.integers(1, 4),) * 4)),
        "decoder_dim": draw(st.integers(2, 40)),
        "attention_scale": draw(st.sampled_from(["head_dim", "paper"])),
        "norm": draw(st.sampled_from(["batch", "group"])),
        "spatial_dims": draw(st.sampled_from([2, 3])),
    }


@settings(max_examples=10, deadline=None, derandomize=True)
@given(options=configurations(), training=st.booleans())
def test_any_configuration_equals_its_plain_operators(options: dict[str, Any], training: bool) -> None:
    torch.manual_seed(0)
    network = SegFormer3D(2, 3, **options).train(training)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    image = torch.randn(2, 2, *(18, 37, 33)[-options["spatial_dims"] :])
    twin = copy.deepcopy(network)
    with torch.set_grad_enabled(training):
        logits = network(image)
        with patch.object(native, "eager", return_value=False):
            plain = twin(image)
    assert (logits - plain).abs().max() < 1e-4 * plain.abs().max()
    if training:
        logits.square().mean().backward()
        with patch.object(native, "eager", return_value=False):
            plain.square().mean().backward()
        ours, theirs = (
            torch.cat([parameter.grad.flatten() for parameter in part.parameters()]) for part in (network, twin)
        )
        assert (ours - theirs).norm() < 1e-3 * theirs.norm()


def test_its_configuration_is_built() -> None:
    options = {**SMALL, "norm": "group", "attention_scale": "paper"}
    network = build_network(SegFormer3DConfig(**options), 1, 2)
    assert str(network) == str(SegFormer3D(1, 2, **options))
    first = network.segformer_encoder.tf_block2[0]
    assert isinstance(first.mlp.dwconv.bn, nn.GroupNorm)
    assert first.attention.scale == 1 / math.sqrt(2)


def test_group_norm_has_the_names_of_the_released_weights() -> None:
    batch, group = (SegFormer3D(1, 2, **SMALL, norm=norm).state_dict() for norm in ("batch", "group"))
    statistics = ("running_mean", "running_var", "num_batches_tracked")
    assert list(group) == [name for name in batch if not name.endswith(statistics)]


def test_two_dimensions_drop_an_axis_of_every_kernel() -> None:
    volume, slices = (SegFormer3D(1, 2, **SMALL, spatial_dims=dims).state_dict() for dims in (3, 2))
    assert list(volume) == list(slices)
    for name, tensor in volume.items():
        expected = tensor.shape[:-1] if tensor.ndim == 5 else tensor.shape
        assert slices[name].shape == expected, name


def test_released_names_and_parameters_stay() -> None:
    with torch.device("meta"):
        network = create_segformer3d(in_channels=4, num_classes=3, norm="group")
        assert sum(parameter.numel() for parameter in network.parameters()) == 4_525_251
        slices = create_segformer3d(in_channels=3, num_classes=2, spatial_dims=2, decoder_dim=128)
        assert slices(torch.empty(2, 3, 33, 70)).shape == (2, 2, 33, 70)


@pytest.mark.parametrize("sr_ratios", [(4, 2, 1, 1), (8, 1, 1, 1), (1, 1, 4, 2), (3, 3, 1, 1)])
def test_smallest_unpadded_size_leaves_keys_for_every_stage(sr_ratios: tuple[int, int, int, int]) -> None:
    network = SegFormer3D(1, 2, **SMALL, sr_ratios=sr_ratios).eval()
    for size in (network.min_size - 1, network.min_size):
        with torch.inference_mode():
            assert network(torch.zeros(1, 1, size, 20, 33)).shape == (1, 2, size, 20, 33)


def test_only_short_axes_are_padded(small: SegFormer3D) -> None:
    assert small.min_size == 13
    image = torch.randn(1, 1, 12, 13, 18)
    padded = nn.functional.pad(image, (0, 0, 0, 0, 0, 4), mode="replicate")
    zeros = nn.functional.pad(image, (0, 2, 0, 3, 0, 0))
    with torch.inference_mode():
        assert torch.equal(small(image), small(padded)[:, :, :12])
        # 13 and 18 voxels go through unpadded: the strided patch embedding sees them as if zeros followed.
        torch.testing.assert_close(small(image), small(zeros)[:, :, :, :13, :18], rtol=1e-4, atol=1e-5)


def test_initialisation_is_the_papers() -> None:
    torch.manual_seed(0)
    network = create_segformer3d(in_channels=4, num_classes=3)
    for name, parameter in network.named_parameters():
        if name.endswith("bias"):
            assert not parameter.any(), name
        elif parameter.ndim == 1:
            assert (parameter == 1).all(), name
    ffn = network.segformer_encoder.tf_block4[0].mlp
    # A normal of std 0.02 cut at +-2 (not at two deviations) keeps its deviation.
    assert ffn.fc1.weight.std().item() == pytest.approx(0.02, rel=0.02)
    assert ffn.dwconv.dwconv.weight.std().item() == pytest.approx(math.sqrt(2 / 27), rel=0.02)
    embedding = network.segformer_encoder.embed_2.patch_embeddings
    assert embedding.weight.std().item() == pytest.approx(math.sqrt(2 / (27 * 64)), rel=0.02)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"embed_dims": (8, 16, 24)}, "embed_dims"),
        ({"depths": (1, 0, 1, 1)}, "depths"),
        ({"sr_ratios": (0, 1, 1, 1)}, "sr_ratios"),
        ({"num_heads": (1, 3, 3, 4)}, "width 16 can't be split into 3 heads"),
        ({"decoder_dim": 0}, "decoder_dim=0"),
        ({"attention_scale": "sqrt"}, "attention_scale='sqrt'"),
        ({"norm": "layer"}, "norm='layer'.*expected 'batch'"),
        ({"spatial_dims": 4}, "spatial_dims=4"),
    ],
)
def test_bad_configurations_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        SegFormer3D(1, 2, **{**SMALL, **options})
    with pytest.raises(PlanError, match="num_classes=0"):
        create_segformer3d(in_channels=1, num_classes=0)


def test_autocast_on_a_cpu_leaves_it_in_float32() -> None:
    # PyTorch's strided convolutions in bfloat16 give weights gradients from unwritten memory on the coarsest grids.
    torch.manual_seed(0)
    network = create_segformer3d(in_channels=1, num_classes=2).train()
    image = torch.randn(2, 1, 16, 20, 16)
    results = []
    for enabled in (False, True):
        network.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            logits = network(image)
        logits.square().mean().backward()
        results.append([logits, *(parameter.grad for parameter in network.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
