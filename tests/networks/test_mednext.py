"""MedNeXt as a whole: the contract for its variants, sizes, deep supervision, bad configurations."""

from __future__ import annotations

import pytest
import torch
from network_contract import IN_CHANNELS, NUM_CLASSES, NetworkContract
from torch import nn

from sagittal.errors import DataError, PlanError
from sagittal.networks import MedNeXt, MedNeXtBlock, create_mednext
from sagittal.networks.build import build_network
from sagittal.networks.cost import parameters
from sagittal.plan.networks import MedNeXtConfig, network_config

ONE_EACH = (1,) * 9
STYLES = ("none", "expansion", "block")
MIXED = ("none", "expansion", "block", "expansion", "none", "block", "none", "expansion", "block")
# ten slices, 10 x 1.5 x 1.5 mm: the coarse axis is halved once, and convolved over from the third level on
COARSE = {"strides": ((1, 2, 2), (1, 2, 2), (2, 2, 2), (1, 2, 2)), "flat_levels": (2, 0, 0)}


class TestMedNeXt(NetworkContract):
    def build(self) -> nn.Module:
        blocks = (1, 2, 1, 1, 1, 1, 1, 1, 2)
        return MedNeXt(IN_CHANNELS, NUM_CLASSES, channels=16, block_counts=blocks, deep_supervision=True)


class TestMedNeXtLayerNormGrnV2(NetworkContract):
    test_compiles_whole_and_trains_the_same = None

    def build(self) -> nn.Module:
        return MedNeXt(
            IN_CHANNELS,
            NUM_CLASSES,
            channels=4,
            expansion_ratio=(1, 2, 3, 2, 1, 2, 3, 2, 1),
            block_counts=ONE_EACH,
            norm="layer",
            grn="v2",
        )


class WithoutGraphs(NetworkContract):
    """The contract without what takes seconds and was shown for the same operators above or below."""

    test_compiles_whole_and_trains_the_same = None
    test_exports_to_plain_operators_that_run_as_onnx = None


class TestMedNeXtK5GrnV1(WithoutGraphs):
    def build(self) -> nn.Module:
        return MedNeXt(
            IN_CHANNELS, NUM_CLASSES, channels=4, kernel_size=5, block_counts=ONE_EACH, grn=True, checkpointing=True
        )


class TestMedNeXtK3K5WithoutResiduals(WithoutGraphs):
    def build(self) -> nn.Module:
        return MedNeXt(
            IN_CHANNELS,
            NUM_CLASSES,
            channels=16,
            decoder_kernel_size=5,
            block_counts=ONE_EACH,
            block_residual=False,
            resampling_residual=False,
            checkpointing="expansion",
        )


class TestMedNeXtOfACoarseAxis(NetworkContract):
    def build(self, *, mirrored: bool = False) -> nn.Module:
        step = -1 if mirrored else 1
        return MedNeXt(
            IN_CHANNELS,
            NUM_CLASSES,
            channels=16,
            block_counts=ONE_EACH,
            strides=[strides[::step] for strides in COARSE["strides"]],
            flat_levels=COARSE["flat_levels"][::step],
            checkpointing=MIXED,
        )

    def swap(self, network: nn.Module) -> nn.Module:
        mirrored = self.build(mirrored=True).to(next(network.parameters()).dtype).eval()
        mirrored.load_state_dict(
            {
                name: tensor.transpose(2, -1) if tensor.ndim == 5 else tensor
                for name, tensor in network.state_dict().items()
            }
        )
        return mirrored


class TestMedNeXt2D(NetworkContract):
    spatial_dims = 2

    def build(self) -> nn.Module:
        return MedNeXt(
            IN_CHANNELS, NUM_CLASSES, channels=16, block_counts=ONE_EACH, deep_supervision=True, spatial_dims=2
        )


class TestMedNeXt2DLayerNormGrnV1K5(WithoutGraphs):
    spatial_dims = 2

    def build(self) -> nn.Module:
        return MedNeXt(
            IN_CHANNELS,
            NUM_CLASSES,
            channels=4,
            kernel_size=5,
            decoder_kernel_size=3,
            block_counts=ONE_EACH,
            norm="layer",
            grn=True,
            spatial_dims=2,
            checkpointing=MIXED,
        )


def small(**options: object) -> MedNeXt:
    torch.manual_seed(0)
    return MedNeXt(1, 2, **{"channels": 4, "block_counts": ONE_EACH, **options})


@pytest.mark.parametrize("norm", ["group", "layer"])
@pytest.mark.parametrize("grn", [False, True, "v2"])
@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize("checkpointing", STYLES)
def test_slices_work_in_2d(norm: str, grn: bool | str, residual: bool, checkpointing: str) -> None:
    network = small(
        spatial_dims=2,
        norm=norm,
        grn=grn,
        deep_supervision=True,
        decoder_kernel_size=5,
        block_residual=residual,
        resampling_residual=residual,
        checkpointing=checkpointing,
    )
    scales = network(torch.randn(2, 1, 19, 33))
    assert [tuple(logits.shape[2:]) for logits in scales] == [(19, 33), (10, 17), (5, 9), (3, 5), (2, 3)]
    sum(logits.square().mean() for logits in scales).backward()
    assert all(torch.isfinite(parameter.grad).all() for parameter in network.parameters())
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


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("channels", [4, 16])
def test_an_axis_left_alone_makes_a_2d_network_of_each_slice(axis: int, channels: int) -> None:
    strides = [tuple(1 if other == axis else 2 for other in range(3))] * 4
    flat_levels = tuple(5 if other == axis else 0 for other in range(3))
    options = {"channels": channels, "norm": "layer", "deep_supervision": True, "decoder_kernel_size": 5}
    volumes = small(strides=strides, flat_levels=flat_levels, **options).eval()
    slices = small(spatial_dims=2, **options).eval()
    volumes.load_state_dict(
        {
            name: tensor.unsqueeze(axis + 2) if tensor.ndim > 1 else tensor
            for name, tensor in slices.state_dict().items()
        }
    )
    images = torch.randn(7, 1, 20, 33)
    with torch.inference_mode():
        together = volumes.multiscale(images.movedim(0, axis + 1)[None])
        apart = slices.multiscale(images)
    for ours, theirs in zip(together, apart, strict=True):
        torch.testing.assert_close(ours[0].movedim(axis + 1, 0), theirs, rtol=1e-4, atol=1e-5)


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


@pytest.mark.parametrize("sizes", [(10, 40, 33), (1, 1, 1), (3, 16, 50)])
def test_scales_follow_the_strides(sizes: tuple[int, int, int]) -> None:
    network = small(deep_supervision=True, **COARSE).train()
    factors = [(1, 1, 1), (1, 2, 2), (1, 4, 4), (2, 8, 8), (2, 16, 16)]
    assert network.scale_factors == tuple(factors)
    scales = network(torch.randn(1, 1, *sizes))
    assert [tuple(logits.shape[2:]) for logits in scales] == [
        tuple(-(-size // factor) for size, factor in zip(sizes, scale, strict=True)) for scale in factors
    ]
    default = small().scale_factors
    assert default == tuple((2**level,) * 3 for level in range(5))


def test_levels_without_halving_keep_the_size() -> None:
    network = small(strides=((2, 2, 2), (2, 2, 2), (1, 1, 1), (1, 1, 1)), deep_supervision=True).train()
    scales = network(torch.randn(1, 1, 9, 8, 13))
    sum(logits.square().mean() for logits in scales).backward()
    assert [logits.shape[2:] for logits in scales] == [(9, 8, 13), (5, 4, 7), (3, 2, 4), (3, 2, 4), (3, 2, 4)]
    assert all(torch.isfinite(parameter.grad).all() for parameter in network.parameters())


def kernels(network: nn.Module) -> dict[str, tuple[int, ...]]:
    return {
        name.removesuffix(".conv1.weight"): tuple(tensor.shape[2:])
        for name, tensor in network.state_dict().items()
        if name.endswith("conv1.weight")
    }


def test_the_decoder_kernel_begins_at_the_bottleneck() -> None:
    sizes = {name: kernel[0] for name, kernel in kernels(small(kernel_size=3, decoder_kernel_size=5)).items()}
    assert {name for name, size in sizes.items() if size == 3} == {
        *(f"enc_block_{level}.0" for level in range(4)),
        *(f"down_{level}" for level in range(4)),
    }
    assert {name for name, size in sizes.items() if size == 5} == {
        "bottleneck.0",
        *(f"up_{level}" for level in range(4)),
        *(f"dec_block_{level}.0" for level in range(4)),
    }


def test_kernels_are_flat_on_the_finest_levels_only() -> None:
    shapes = kernels(small(kernel_size=3, decoder_kernel_size=5, **COARSE))
    flat = {name for name, shape in shapes.items() if shape[0] == 1}
    assert flat == {
        *(f"{stage}_block_{level}.0" for stage in ("enc", "dec") for level in (0, 1)),
        *(f"{way}_{level}" for way in ("down", "up") for level in (0, 1)),
    }
    assert all(shape[1] == shape[2] in (3, 5) for shape in shapes.values())
    assert {shapes[name] for name in flat} == {(1, 3, 3), (1, 5, 5)}


def test_options_leave_the_names_of_the_weights_alone() -> None:
    plain = small().state_dict()
    assert list(small(decoder_kernel_size=7, checkpointing=MIXED, **COARSE).state_dict()) == list(plain)
    assert list(small(block_residual=False).state_dict()) == list(plain)
    without = small(resampling_residual=False).state_dict()
    assert list(without) == [name for name in plain if "res_conv" not in name]


def test_residuals_are_switched_apart() -> None:
    network = small(block_residual=False)
    assert {module.residual for module in network.modules() if isinstance(module, MedNeXtBlock)} == {False}
    assert network.down_0.residual
    assert network.up_0.residual
    assert small(resampling_residual=False).bottleneck[0].residual


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
        ({"decoder_kernel_size": 2}, "kernel_size=2"),
        ({"block_counts": (1, 1)}, "block_counts"),
        ({"block_counts": (1,) * 8 + (0,)}, "block_counts"),
        ({"expansion_ratio": (2,) * 8}, "expansion_ratio"),
        ({"expansion_ratio": 0}, "expansion_ratio"),
        ({"norm": "batch"}, "norm='batch'"),
        ({"grn": "v1"}, "grn='v1'"),
        ({"spatial_dims": 4}, "spatial_dims=4"),
        ({"checkpointing": "all"}, "checkpointing='all'.*none, expansion, block"),
        ({"checkpointing": 3}, "checkpointing=.*none, expansion, block"),
        ({"checkpointing": ("block",) * 8}, "checkpointing=.*9, one per stage"),
        ({"strides": ((2, 2, 2),) * 3}, "strides=.*4 times 3 numbers"),
        ({"strides": ((2, 2),) * 4}, "strides=.*4 times 3 numbers"),
        ({"strides": ((2, 2, 2),) * 4, "spatial_dims": 2}, "strides=.*4 times 2 numbers"),
        ({"strides": ((2, 2, 3),) * 4}, "strides=.*of 1 or 2"),
        ({"flat_levels": (1, 0)}, "flat_levels=.*3 numbers"),
        ({"flat_levels": (6, 0, 0)}, "flat_levels=.*0 to 5"),
        ({"flat_levels": (1, 0, 0)}, "axis 0 is halved where kernels measure 1"),
        ({"strides": COARSE["strides"], "flat_levels": (3, 0, 0)}, "axis 0 is halved where kernels measure 1"),
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
    assert {size: set(network.checkpointing) for size, network in networks.items()} == {
        "S": {"none"},
        "B": {"none"},
        "M": {"block"},
        "L": {"block"},
    }


def test_create_mednext_takes_every_option() -> None:
    with torch.device("meta"):
        assert set(create_mednext("L", in_channels=1, num_classes=2, checkpointing=False).checkpointing) == {"none"}
        network = create_mednext(
            "B",
            in_channels=1,
            num_classes=2,
            channels=8,
            kernel_size=3,
            decoder_kernel_size=5,
            deep_supervision=True,
            norm="layer",
            grn="v2",
            block_residual=False,
            resampling_residual=False,
            strides=((1, 2), (2, 2), (2, 2), (2, 1)),
            flat_levels=(1, 0),
            spatial_dims=2,
            checkpointing=MIXED,
        )
        expected = MedNeXt(
            1,
            2,
            channels=8,
            expansion_ratio=(2, 3, 4, 4, 4, 4, 4, 3, 2),
            decoder_kernel_size=5,
            deep_supervision=True,
            norm="layer",
            grn="v2",
            block_residual=False,
            resampling_residual=False,
            strides=((1, 2), (2, 2), (2, 2), (2, 1)),
            flat_levels=(1, 0),
            spatial_dims=2,
            checkpointing=MIXED,
        )
        assert str(network) == str(expected)
        assert network.checkpointing == MIXED
        with pytest.raises(TypeError, match="kernels"):
            create_mednext("S", in_channels=1, num_classes=2, kernels=5)


@pytest.mark.parametrize(("name", "count"), [("mednext-v2-base", 61_969_507), ("mednext-v2-wide", 246_536_387)])
def test_v2_has_the_published_number_of_parameters(name: str, count: int) -> None:
    config = network_config(name)
    assert isinstance(config, MedNeXtConfig)
    with torch.device("meta"):
        named = build_network(config, 1, 3, deep_supervision=False)
        created = create_mednext("L", in_channels=1, num_classes=3, channels=config.channels, grn="v2")
    assert parameters(named) == count
    assert str(named) == str(created)


def test_every_field_of_the_configuration_arrives() -> None:
    config = MedNeXtConfig(
        channels=4,
        decoder_kernel_size=5,
        block_counts=ONE_EACH,
        deep_supervision=False,
        block_residual=False,
        resampling_residual=False,
        strides=((1, 2), (2, 2), (2, 2), (2, 1)),
        flat_levels=(1, 0),
        spatial_dims=2,
        checkpointing=MIXED,
    )
    with torch.device("meta"):
        built = build_network(config, 1, 2)
        expected = small(
            decoder_kernel_size=5,
            block_residual=False,
            resampling_residual=False,
            strides=((1, 2), (2, 2), (2, 2), (2, 1)),
            flat_levels=(1, 0),
            spatial_dims=2,
        )
    assert str(built) == str(expected)
    assert built.checkpointing == MIXED
    assert not built.bottleneck[0].residual
    assert built.scale_factors[-1] == config.multiples
