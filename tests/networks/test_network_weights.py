"""Loading official weights: what is dropped, what may be absent, and that nothing is copied when anything is wrong."""

from __future__ import annotations

import warnings
from types import ModuleType

import pytest
import torch
from torch import Tensor

from sagittal.errors import PlanError
from sagittal.networks import LoadReport, MedNeXt, SegFormer3D, create_mednext, load_official_weights
from sagittal.networks.weights import official_tensors


def mednext(*, deep_supervision: bool = True, channels: int = 2, blocks: int = 1) -> MedNeXt:
    return MedNeXt(1, 2, channels=channels, block_counts=(blocks,) * 9, deep_supervision=deep_supervision)


def official(network: torch.nn.Module) -> dict[str, Tensor]:
    return {"dummy_tensor": torch.tensor([1.0]), **{name: t.clone() for name, t in network.state_dict().items()}}


def snapshot(network: torch.nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in network.state_dict().items()}


def same(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module.", "model."])
def test_weights_arrive_without_prefix_and_dummy(prefix: str) -> None:
    source, target = mednext(), mednext()
    report = load_official_weights(target, {prefix + name: tensor for name, tensor in official(source).items()})
    assert report.dropped == ("dummy_tensor",)
    assert report.fresh == ()
    assert same(source.state_dict(), target.state_dict())


@pytest.mark.parametrize("key", ["state_dict", "model_state_dict", "network_weights", "model"])
def test_a_whole_checkpoint_is_taken(key: str) -> None:
    source, target = mednext(), mednext()
    tensors = {f"module.{name}": tensor for name, tensor in official(source).items()}
    load_official_weights(target, {"epoch": 3, key: tensors, "optimizer": {"state": {}}})
    assert same(source.state_dict(), target.state_dict())


def test_a_prefix_that_the_network_has_itself_is_kept() -> None:
    source, target = (torch.nn.ModuleDict({"net": mednext()}) for _ in range(2))
    load_official_weights(target, {f"module.{name}": tensor for name, tensor in source.state_dict().items()})
    assert same(source.state_dict(), target.state_dict())


def test_deep_supervision_heads_are_optional_either_way() -> None:
    heads = {f"out_{scale}.conv_out.{kind}" for scale in range(1, 5) for kind in ("weight", "bias")}
    plain = mednext(deep_supervision=False)
    report = load_official_weights(plain, official(mednext()))
    assert set(report.dropped) == heads | {"dummy_tensor"}
    supervised = mednext()
    before = snapshot(supervised)
    report = load_official_weights(supervised, official(plain))
    assert set(report.fresh) == heads
    after = supervised.state_dict()
    assert all(torch.equal(after[name], before[name] if name in heads else plain.state_dict()[name]) for name in after)


def test_half_precision_files_are_converted() -> None:
    source, target = mednext(), mednext()
    load_official_weights(target, {name: tensor.half() for name, tensor in official(source).items()})
    assert target.stem.weight.dtype == torch.float32
    assert torch.equal(target.stem.weight, source.stem.weight.half().float())


def test_segformer_buffers_are_loaded_too() -> None:
    small = {"embed_dims": (4, 4, 4, 4), "num_heads": (1, 1, 2, 2), "decoder_dim": 8}
    source, target = SegFormer3D(1, 2, **small), SegFormer3D(1, 2, **small)
    source(torch.randn(2, 1, 32, 32, 16))
    assert not same(source.state_dict(), target.state_dict())
    load_official_weights(target, source.state_dict())
    assert same(source.state_dict(), target.state_dict())


def test_every_misfit_is_named_and_nothing_is_copied() -> None:
    target = mednext()
    before = snapshot(target)
    weights = official(mednext())
    del weights["stem.bias"]
    weights["enc_block_9.weight"] = torch.zeros(1)
    weights["bottleneck.0.conv1.weight"] = torch.zeros(32, 1, 5, 5, 5)
    with pytest.raises(PlanError) as caught:
        load_official_weights(target, weights)
    for part in ("1 missing: stem.bias", "1 unexpected: enc_block_9.weight", "(32, 1, 5, 5, 5)", "(32, 1, 3, 3, 3)"):
        assert part in caught.value.message
    assert same(before, snapshot(target))


@pytest.mark.parametrize(
    ("source", "advice"),
    [
        (mednext(channels=3), "widths, kernel size, channels and classes"),
        (mednext(blocks=2), "fewer blocks"),
        (SegFormer3D(1, 2, embed_dims=(4, 4, 4, 4), num_heads=(1, 1, 1, 1)), "another architecture"),
    ],
)
def test_advice_fits_the_misfit(source: torch.nn.Module, advice: str) -> None:
    with pytest.raises(PlanError, match=advice):
        load_official_weights(mednext(), source.state_dict())


def test_incomplete_and_foreign_files_are_refused() -> None:
    with pytest.raises(PlanError, match="incomplete"):
        load_official_weights(mednext(blocks=2), official(mednext()))
    with pytest.raises(PlanError, match="missing"):
        load_official_weights(mednext(), {})
    with pytest.raises(PlanError, match="'epoch' of the state dict is of type int"):
        load_official_weights(mednext(), {"epoch": 3, "state_dict": {}})


@pytest.fixture(scope="module")
def monai_nets() -> ModuleType:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip("monai.networks.nets.mednext", reason="MONAI is the oracle of this test")


@pytest.mark.parametrize("deep_supervision", [False, True])
def test_monai_weights_of_s_give_monai_outputs(monai_nets: ModuleType, deep_supervision: bool) -> None:
    torch.manual_seed(0)
    options = {"in_channels": 2, "kernel_size": 3, "deep_supervision": deep_supervision}
    theirs = monai_nets.create_mednext("S", out_channels=3, **options)
    ours = create_mednext("S", num_classes=3, **options)
    report = load_official_weights(ours, theirs.state_dict())
    assert report == LoadReport(dropped=(), fresh=(), naming="monai")
    image = torch.randn(1, 2, 16, 32, 16)
    with torch.no_grad():
        expected = theirs(image)
        scales = ours(image)
    if not deep_supervision:
        expected, scales = [expected], [scales]
    assert len(expected) == len(scales)
    for wanted, logits in zip(expected, scales, strict=True):
        assert (logits - wanted).abs().max() <= 1e-4 * wanted.abs().max()


@pytest.mark.parametrize("kernel_size", [3, 5])
@pytest.mark.parametrize("spatial_dims", [2, 3])
def test_monai_weights_of_any_kernel_in_2d_and_3d(monai_nets: ModuleType, kernel_size: int, spatial_dims: int) -> None:
    torch.manual_seed(1)
    theirs = monai_nets.MedNeXt(
        spatial_dims, 4, 1, 2, kernel_size=kernel_size, use_residual_connection=True, blocks_down=(1, 2, 1, 3)
    ).eval()
    blocks = (1, 2, 1, 3, 2, 2, 2, 2, 2)
    ours = MedNeXt(1, 2, channels=4, kernel_size=kernel_size, block_counts=blocks, spatial_dims=spatial_dims).eval()
    load_official_weights(ours, {"state_dict": theirs.state_dict()})
    image = torch.randn(2, 1, *(16, 32, 16)[:spatial_dims])
    with torch.no_grad():
        wanted, logits = theirs(image), ours(image)
    assert (logits - wanted).abs().max() <= 1e-4 * wanted.abs().max()


def test_monai_grn_bears_its_own_name() -> None:
    names = {
        "enc_stages.2.1.global_resp_beta": "enc_block_2.1.grn_beta",
        "down_blocks.3.res_conv.bias": "down_3.res_conv.bias",
        "up_blocks.0.conv1.weight": "up_3.conv1.weight",
        "dec_stages.3.0.norm.bias": "dec_block_0.0.norm.bias",
        "out_blocks.0.conv_out.bias": "out_4.conv_out.bias",
        "bottleneck.1.global_resp_gamma": "bottleneck.1.grn_gamma",
    }
    renamed, naming = official_tensors({f"module.{name}": torch.zeros(1) for name in names})
    assert naming == "monai" and list(renamed) == list(names.values())


@pytest.mark.parametrize("size", ["B", "L"])
def test_monai_weights_of_larger_sizes_are_refused_with_the_reason(monai_nets: ModuleType, size: str) -> None:
    with torch.device("meta"):
        theirs = monai_nets.create_mednext(size, in_channels=1, out_channels=2)
        ours = create_mednext(size, in_channels=1, num_classes=2)  # type: ignore[arg-type]
    with pytest.raises(PlanError, match="ratio of the stage before") as caught:
        load_official_weights(ours, theirs.state_dict())
    assert "down_0.conv2.weight" in caught.value.message
    assert "missing" not in caught.value.message
