"""Loading official weights: what is dropped, what may be absent, and that nothing is copied when anything is wrong."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sagittal.errors import PlanError
from sagittal.networks import MedNeXt, SegFormer3D, load_official_weights


def mednext(*, deep_supervision: bool = True, channels: int = 2, blocks: int = 1) -> MedNeXt:
    return MedNeXt(1, 2, channels=channels, block_counts=(blocks,) * 9, deep_supervision=deep_supervision)


def official(network: torch.nn.Module) -> dict[str, Tensor]:
    return {"dummy_tensor": torch.tensor([1.0]), **{name: t.clone() for name, t in network.state_dict().items()}}


def snapshot(network: torch.nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in network.state_dict().items()}


def same(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
def test_weights_arrive_without_prefix_and_dummy(prefix: str) -> None:
    source, target = mednext(), mednext()
    report = load_official_weights(target, {prefix + name: tensor for name, tensor in official(source).items()})
    assert report.dropped == ("dummy_tensor",)
    assert report.fresh == ()
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
