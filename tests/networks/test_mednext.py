"""MedNeXt as a whole: the contract for its variants, sizes, deep supervision, checkpointing, bad configurations."""

from __future__ import annotations

import pytest
import torch
from network_contract import IN_CHANNELS, NUM_CLASSES, NetworkContract
from torch import nn

from sagittal.errors import DataError, PlanError
from sagittal.networks import MedNeXt, create_mednext

NINE = (1, 2, 1, 1, 1, 1, 1, 1, 2)


class TestMedNeXt(NetworkContract):
    def build(self) -> nn.Module:
        return MedNeXt(IN_CHANNELS, NUM_CLASSES, channels=16, block_counts=NINE, deep_supervision=True)


class TestMedNeXtK5GrnV1(NetworkContract):
    def build(self) -> nn.Module:
        return MedNeXt(
            IN_CHANNELS, NUM_CLASSES, channels=4, kernel_size=5, block_counts=(1,) * 9, grn=True, checkpointing=True
        )


class TestMedNeXtLayerNormGrnV2(NetworkContract):
    def build(self) -> nn.Module:
        return MedNeXt(
            IN_CHANNELS,
            NUM_CLASSES,
            channels=4,
            expansion_ratio=(1, 2, 3, 2, 1, 2, 3, 2, 1),
            block_counts=(1,) * 9,
            norm="layer",
            grn="v2",
        )


def small(**options: object) -> MedNeXt:
    torch.manual_seed(0)
    return MedNeXt(1, 2, **{"channels": 4, "block_counts": (1,) * 9, **options})


@pytest.mark.parametrize("norm", ["group", "layer"])
@pytest.mark.parametrize("grn", [False, True, "v2"])
def test_slices_work_in_2d(norm: str, grn: bool | str) -> None:
    network = small(spatial_dims=2, norm=norm, grn=grn, deep_supervision=True)
    scales = network(torch.randn(2, 1, 19, 33))
    assert [tuple(logits.shape[2:]) for logits in scales] == [(19, 33), (10, 17), (5, 9), (3, 5), (2, 3)]
    sum(logits.square().mean() for logits in scales).backward()
    with pytest.raises(DataError, match="5 axes"):
        network(torch.randn(1, 1, 16, 16, 16))


def test_2d_is_3d_on_a_constant_stack() -> None:
    flat = small(spatial_dims=2, kernel_size=1, norm="layer").eval()
    deep = small(kernel_size=1, norm="layer").eval()
    deep.load_state_dict(
        {name: tensor[..., None] if tensor.ndim > 1 else tensor for name, tensor in flat.state_dict().items()}
    )
    image = torch.randn(1, 1, 16, 32)
    with torch.inference_mode():
        stacked = deep(image[..., None].expand(-1, -1, -1, -1, 16))
        # Up blocks leave their front plane without the residual, so only the planes behind it repeat the slice.
        torch.testing.assert_close(stacked[..., -1], flat(image), rtol=1e-4, atol=1e-5)


def test_padding_repeats_the_end_and_crops_it() -> None:
    network = small(deep_supervision=True).eval()
    image = torch.randn(1, 1, 18, 16, 31)
    padded = nn.functional.pad(image, (0, 1, 0, 0, 0, 14), mode="replicate")
    with torch.inference_mode():
        for scale, (ours, reference) in enumerate(
            zip(network.multiscale(image), network.multiscale(padded), strict=True)
        ):
            sizes = [-(-size // 2**scale) for size in image.shape[2:]]
            assert torch.equal(ours, reference[:, :, : sizes[0], : sizes[1], : sizes[2]])


def test_checkpointing_changes_memory_not_numbers() -> None:
    image = torch.randn(1, 1, 16, 16, 32)
    gradients = []
    for checkpointing in (False, True):
        network = small(checkpointing=checkpointing, grn="v2").train()
        network(image).square().mean().backward()
        gradients.append([parameter.grad for parameter in network.parameters()])
    assert all(torch.equal(plain, again) for plain, again in zip(*gradients, strict=True))


def test_v1_has_no_grn_in_the_first_down_block() -> None:
    def with_grn(grn: bool | str) -> set[str]:
        return {name.removesuffix(".grn_beta") for name, _ in small(grn=grn).named_parameters() if "grn_beta" in name}

    assert with_grn("v2") - with_grn(True) == {"down_0"}
    assert {"down_1", "up_0", "bottleneck.0"} <= with_grn(True)
    assert with_grn(False) == set()


def test_down_block_expands_by_the_next_stage() -> None:
    network = small(expansion_ratio=(1, 2, 3, 4, 5, 6, 7, 8, 9))
    wide = {
        name: tensor.shape[0] / tensor.shape[1]
        for name, tensor in network.state_dict().items()
        if "conv2.weight" in name
    }
    assert [wide[f"down_{level}.conv2.weight"] for level in range(4)] == [2, 3, 4, 5]
    assert [wide[f"up_{level}.conv2.weight"] for level in (3, 2, 1, 0)] == [6, 7, 8, 9]


def test_positional_and_keyword_construction_agree() -> None:
    by_name = MedNeXt(in_channels=2, num_classes=3, channels=4)
    assert by_name.state_dict().keys() == MedNeXt(2, 3, channels=4).state_dict().keys()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"channels": 0}, "channels=0"),
        ({"kernel_size": 4}, "kernel_size=4"),
        ({"block_counts": (1, 1)}, "block_counts"),
        ({"block_counts": (1,) * 8 + (0,)}, "block_counts"),
        ({"expansion_ratio": (2,) * 8}, "expansion_ratio"),
        ({"expansion_ratio": 0}, "expansion_ratio"),
        ({"norm": "batch"}, "norm='batch'"),
        ({"grn": "v1"}, "grn='v1'"),
        ({"spatial_dims": 4}, "spatial_dims=4"),
    ],
)
def test_bad_configurations_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        small(**options)


def test_create_mednext_knows_four_sizes() -> None:
    with pytest.raises(PlanError, match=r"'XL' is not a size of MedNeXt\. Did you mean 'L'"):
        create_mednext("XL", in_channels=1, num_classes=2)
    with torch.device("meta"):
        networks = {size: create_mednext(size, in_channels=1, num_classes=2) for size in ("S", "B", "M", "L")}
    assert {size: network.checkpointing for size, network in networks.items()} == {
        "S": False,
        "B": False,
        "M": True,
        "L": True,
    }
    with torch.device("meta"):
        assert not create_mednext("L", in_channels=1, num_classes=2, checkpointing=False).checkpointing
