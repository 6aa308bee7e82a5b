"""Configurations become the networks that they describe, field by field."""

from __future__ import annotations

import pytest
import torch

from sagittal.networks import MedNeXt, SegFormer3D, build, create_mednext, create_segformer3d
from sagittal.networks.build import build_network
from sagittal.plan.networks import MedNeXtConfig, SegFormer3DConfig, network_config


@pytest.mark.parametrize("size", ["S", "B", "M", "L"])
@pytest.mark.parametrize("kernel_size", [3, 5])
def test_named_mednexts_are_the_published_ones(size: str, kernel_size: int) -> None:
    name = f"mednext-{size.lower()}" + ("" if kernel_size == 3 else f"-k{kernel_size}")
    with torch.device("meta"):
        built = build_network(network_config(name), 1, 3)
        published = create_mednext(size, in_channels=1, num_classes=3, kernel_size=kernel_size, deep_supervision=True)
    assert [(key, tensor.shape) for key, tensor in built.state_dict().items()] == [
        (key, tensor.shape) for key, tensor in published.state_dict().items()
    ]
    assert built.checkpointing == published.checkpointing


def test_every_field_of_a_mednext_arrives() -> None:
    config = MedNeXtConfig(
        channels=4,
        expansion_ratio=(1, 2, 3, 4, 5, 6, 7, 8, 9),
        kernel_size=5,
        block_counts=(1, 2, 1, 1, 1, 1, 1, 1, 2),
        deep_supervision=False,
        norm="layer",
        grn="v2",
        checkpointing=True,
    )
    expected = MedNeXt(
        1,
        2,
        channels=4,
        expansion_ratio=(1, 2, 3, 4, 5, 6, 7, 8, 9),
        kernel_size=5,
        block_counts=(1, 2, 1, 1, 1, 1, 1, 1, 2),
        norm="layer",
        grn="v2",
        checkpointing=True,
    )
    assert str(build_network(config, 1, 2)) == str(expected)
    assert build_network(config, 1, 2).checkpointing
    assert build_network(config, 1, 2, deep_supervision=True).deep_supervision


def test_every_field_of_a_segformer3d_arrives() -> None:
    config = SegFormer3DConfig(
        embed_dims=(4, 8, 12, 16),
        num_heads=(1, 2, 3, 4),
        depths=(1, 2, 1, 1),
        sr_ratios=(2, 1, 2, 1),
        mlp_ratios=(1, 2, 3, 4),
        decoder_dim=8,
        attention_scale="paper",
    )
    network = build_network(config, 1, 2)
    expected = SegFormer3D(
        1,
        2,
        embed_dims=(4, 8, 12, 16),
        num_heads=(1, 2, 3, 4),
        depths=(1, 2, 1, 1),
        sr_ratios=(2, 1, 2, 1),
        mlp_ratios=(1, 2, 3, 4),
        decoder_dim=8,
        attention_scale="paper",
    )
    assert str(network) == str(expected)
    assert (
        network.segformer_encoder.tf_block2[0].attention.scale
        == expected.segformer_encoder.tf_block2[0].attention.scale
    )
    with torch.device("meta"):
        named = build_network(network_config("segformer3d"), 4, 3)
        assert str(named) == str(create_segformer3d(in_channels=4, num_classes=3))


def test_a_field_that_a_plan_leaves_out_arrives_as_well(monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, object] = {}
    monkeypatch.setattr(build, "SegFormer3D", lambda *_sizes, **options: given.update(options) or torch.nn.Identity())
    build_network(SegFormer3DConfig(), 1, 2)
    assert given.keys() == SegFormer3DConfig.model_fields.keys() - {"kind"}
