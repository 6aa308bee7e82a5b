"""UpKern: kernels are interpolated, everything else is copied, and what does not fit is named and changes nothing."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from sagittal.errors import PlanError
from sagittal.networks import MedNeXt, SegFormer3D, upkern
from sagittal.networks.upkern import depthwise_kernels, interpolate_kernel


def mednext(kernel_size: int, *, spatial_dims: int = 3, deep_supervision: bool = False, channels: int = 2) -> MedNeXt:
    return MedNeXt(
        1,
        2,
        channels=channels,
        kernel_size=kernel_size,
        block_counts=(1,) * 9,
        deep_supervision=deep_supervision,
        spatial_dims=spatial_dims,
    )


def by_hand(kernel: Tensor, size: int) -> Tensor:
    """Interpolate along one axis after the other: linear, voxel centres aligned, the edge repeated."""
    for axis in range(2, kernel.ndim):
        old = kernel.shape[axis]
        planes = []
        for index in range(size):
            place = min(max((index + 0.5) * old / size - 0.5, 0), old - 1)
            low = min(int(place), old - 2)
            share = place - low
            planes.append((1 - share) * kernel.select(axis, low) + share * kernel.select(axis, low + 1))
        kernel = torch.stack(planes, dim=axis)
    return kernel


def snapshot(network: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in network.state_dict().items()}


@pytest.mark.parametrize("spatial_dims", [2, 3])
@pytest.mark.parametrize(("small", "large"), [(3, 5), (5, 7), (3, 7), (5, 3)])
def test_kernels_are_interpolated_and_the_rest_is_copied(small: int, large: int, spatial_dims: int) -> None:
    source, target = mednext(small, spatial_dims=spatial_dims), mednext(large, spatial_dims=spatial_dims)
    report = upkern(target, source)
    old, new = source.state_dict(), target.state_dict()
    kernels = {name for name in new if name.endswith("conv1.weight")}
    assert set(report.interpolated) == kernels
    assert any(name.startswith("up_") for name in kernels)  # the transposed ones
    assert set(report.copied) == new.keys() - kernels
    assert not report.fresh + report.dropped + report.adapted
    for name, tensor in new.items():
        expected = by_hand(old[name], large) if name in kernels else old[name]
        torch.testing.assert_close(tensor, expected, rtol=1e-5, atol=1e-6)


def test_a_kernel_of_one_value_keeps_it() -> None:
    kernel = torch.full((4, 1, 3, 3, 3), 0.25)
    assert torch.equal(interpolate_kernel(kernel, (7, 7, 7)), torch.full((4, 1, 7, 7, 7), 0.25))


def test_state_dicts_and_checkpoints_serve_as_well_as_networks() -> None:
    source, first, second = mednext(3), mednext(5), mednext(5)
    checkpoint = {"epoch": 3, "state_dict": {f"module.{name}": t.half() for name, t in source.state_dict().items()}}
    upkern(first, {"dummy_tensor": torch.zeros(1), **source.state_dict()})
    report = upkern(second.state_dict(), checkpoint)
    assert len(report.interpolated) == 17
    for name, tensor in second.state_dict().items():
        torch.testing.assert_close(tensor, first.state_dict()[name], rtol=2e-3, atol=1e-3)
    assert second.stem.weight.dtype == torch.float32


def test_kernels_of_a_decoder_of_its_own_size_are_interpolated_alone() -> None:
    source, target = mednext(3), mednext(3)
    for name, module in target.named_modules():
        if name.startswith(("up_", "dec_block_")) and name.endswith("conv1"):
            assert isinstance(module, nn.Conv3d | nn.ConvTranspose3d)
            module.weight = nn.Parameter(torch.zeros(*module.weight.shape[:2], 5, 5, 5))
    report = upkern(target, source)
    assert {name.split("_")[0] for name in report.interpolated} == {"up", "dec"}
    assert len(report.interpolated) == 8


def test_heads_of_deep_supervision_are_optional_either_way() -> None:
    report = upkern(mednext(5, deep_supervision=True), mednext(3))
    assert len(report.fresh) == 8 and all(name.startswith("out_") for name in report.fresh)
    report = upkern(mednext(5), mednext(3, deep_supervision=True))
    assert len(report.dropped) == 8
    assert "out_*.conv_out.weight" in report.summary()


def test_the_report_prints_every_tensor() -> None:
    target = mednext(5)
    report = upkern(target, mednext(3))
    lines = str(report).splitlines()
    assert len(lines) == 1 + len(target.state_dict())
    assert any(line.split() == ["interpolated", "up_0.conv1.weight", "4x1x5x5x5", "4x1x3x3x3"] for line in lines)
    assert report.summary().startswith("139 copied; 17 interpolated (enc_block_*.*.conv1.weight, ")


@pytest.mark.parametrize(
    ("source", "told"),
    [
        (mednext(3, channels=4), "of another shape: stem.weight (4, 1, 1, 1, 1) where the network has (2, 1, 1, 1, 1)"),
        (SegFormer3D(1, 2, embed_dims=(4, 4, 4, 4), num_heads=(1, 1, 1, 1)), "unexpected: segformer_encoder"),
        (mednext(3, spatial_dims=2), "of another shape"),
        ({}, "missing: stem.weight"),
    ],
)
def test_what_does_not_fit_is_named_and_nothing_is_changed(source: nn.Module, told: str) -> None:
    target = mednext(5)
    before = snapshot(target)
    with pytest.raises(PlanError) as caught:
        upkern(target, source)
    assert told in caught.value.message
    assert "Only the size of depthwise kernels may differ" in caught.value.message
    assert all(torch.equal(tensor, before[name]) for name, tensor in target.state_dict().items())


def test_a_dense_kernel_of_another_size_is_not_interpolated() -> None:
    with pytest.raises(PlanError, match="another shape: weight"):
        upkern(nn.Conv3d(1, 4, 5), nn.Conv3d(1, 4, 3))
    assert depthwise_kernels(nn.Conv3d(1, 4, 5)) == frozenset()


def test_a_target_that_holds_no_tensors_is_refused() -> None:
    with pytest.raises(PlanError, match="'a' of the target is of type int"):
        upkern({"a": 3}, mednext(3))  # type: ignore[dict-item]
