"""Weights into a network for other channels and outputs: what is matched, what stays fresh, what is refused."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from sagittal.errors import PlanError
from sagittal.networks import Ends, MedNeXt, SegFormer3D, network_ends, transfer
from sagittal.networks.ends import Axis

SMALL = {"embed_dims": (4, 4, 4, 4), "num_heads": (1, 1, 2, 2), "depths": (1, 1, 1, 1), "decoder_dim": 8}
Build = Callable[[int, int], nn.Module]


def mednext(kernel_size: int = 3, *, deep_supervision: bool = True) -> Build:
    def build(channels: int, outputs: int) -> nn.Module:
        options = {"kernel_size": kernel_size, "deep_supervision": deep_supervision}
        return MedNeXt(channels, outputs, channels=2, block_counts=(1,) * 9, **options)

    return build


def segformer(channels: int, outputs: int) -> nn.Module:
    return SegFormer3D(channels, outputs, **SMALL)


def ends(build: Build, channels: str, outputs: str) -> Ends:
    return network_ends(build, tuple(channels.split()), tuple(outputs.split()))


def made(build: Build, its: Ends) -> nn.Module:
    return build(len(its.channels), len(its.outputs))


@pytest.mark.parametrize(
    ("build", "stem", "heads"),
    [
        (mednext(), "stem.weight", 10),
        (mednext(deep_supervision=False), "stem.weight", 2),
        (segformer, "segformer_encoder.embed_1.patch_embeddings.weight", 2),
    ],
)
def test_ends_are_found_without_a_list_of_names(build: Build, stem: str, heads: int) -> None:
    its = ends(build, "a b", "x y")
    assert dict(its.stems) == {stem: Axis(1)}
    assert len(its.heads) == heads and all(axis.is_plain for axis in its.heads.values())


def test_finding_ends_draws_no_random_numbers_and_survives_a_build_that_needs_real_tensors() -> None:
    def build(channels: int, outputs: int) -> nn.Module:
        # Reads a number off a tensor, which tensors without data can't give.
        return nn.Sequential(nn.Linear(channels * 8, int(torch.tensor(4).item())), nn.Linear(4, outputs + 1))

    torch.manual_seed(3)
    wanted = torch.rand(1)
    torch.manual_seed(3)
    its = network_ends(build, ("a",), ("x", "y"))
    assert torch.equal(torch.rand(1), wanted)
    assert dict(its.stems) == {"0.weight": Axis(1, 8, 0)}
    assert its.heads["1.weight"] == Axis(0, 1, 1)
    assert not its.stems["0.weight"].is_plain and not its.heads["1.weight"].is_plain


def test_the_same_ends_copy_everything() -> None:
    its = ends(segformer, "T1 FLAIR", "background tumour")
    source, target = made(segformer, its), made(segformer, its)
    report = transfer(target, source, target_ends=its, source_ends=its)
    assert set(report.copied) == set(target.state_dict())
    assert all(torch.equal(tensor, source.state_dict()[name]) for name, tensor in target.state_dict().items())


@pytest.mark.parametrize("build", [mednext(), segformer])
def test_channels_are_matched_by_name_and_others_get_the_mean(build: Build) -> None:
    old, new = ends(build, "T1 T2", "background tumour"), ends(build, "flair t2 T1 t2", "background tumour")
    source, target = made(build, old), made(build, new)
    report = transfer(target, source, target_ends=new, source_ends=old)
    (stem,) = report.adapted
    before, after = source.state_dict()[stem], target.state_dict()[stem]
    mean = before.mean(1)
    for channel, expected in enumerate((mean, before[:, 1], before[:, 0], mean)):
        torch.testing.assert_close(after[:, channel], expected)
    assert "flair <- mean of T1, T2; t2 <- T2; T1 <- T1; t2 <- mean" in report.table()
    assert len(report.copied) == len(target.state_dict()) - 1


def test_reordered_channels_of_equal_number_are_reordered() -> None:
    old, new = ends(mednext(), "T1 T2", "background tumour"), ends(mednext(), "T2 T1", "background tumour")
    source, target = made(mednext(), old), made(mednext(), new)
    transfer(target, source, target_ends=new, source_ends=old)
    assert torch.equal(target.state_dict()["stem.weight"], source.state_dict()["stem.weight"].flip(1))


@pytest.mark.parametrize("outputs", ["background liver", "background tumour edema"])
def test_heads_for_other_outputs_stay_fresh(outputs: str) -> None:
    old, new = ends(mednext(), "CT", "background tumour"), ends(mednext(5), "CT", outputs)
    source, target = made(mednext(), old), made(mednext(5), new)
    before = {name: tensor.clone() for name, tensor in target.state_dict().items()}
    report = transfer(target, source, target_ends=new, source_ends=old)
    assert set(report.fresh) == set(new.heads) and len(report.fresh) == 10
    assert len(report.interpolated) == 17
    assert all(torch.equal(target.state_dict()[name], before[name]) for name in report.fresh)


def test_heads_of_deep_supervision_are_optional_either_way() -> None:
    plain = mednext(deep_supervision=False)
    old, new = ends(plain, "CT", "background tumour"), ends(mednext(), "CT", "background tumour")
    assert len(transfer(made(mednext(), new), made(plain, old), target_ends=new, source_ends=old).fresh) == 8
    assert len(transfer(made(plain, old), made(mednext(), new), target_ends=old, source_ends=new).dropped) == 8


def test_anything_else_is_refused_by_name_and_nothing_is_changed() -> None:
    its = ends(mednext(), "CT", "background tumour")
    source, target = made(mednext(), its).state_dict(), made(mednext(), its)
    before = {name: tensor.clone() for name, tensor in target.state_dict().items()}
    del source["down_0.conv2.bias"]
    source["extra"] = torch.zeros(1)
    source["up_0.norm.weight"] = torch.zeros(3)
    with pytest.raises(PlanError) as caught:
        transfer(target, source, target_ends=its, source_ends=its)
    for told in (
        "1 missing: down_0.conv2.bias",
        "1 unexpected: extra",
        "up_0.norm.weight (3,) where the network has (4,)",
    ):
        assert told in caught.value.message
    assert all(torch.equal(tensor, before[name]) for name, tensor in target.state_dict().items())
    with pytest.raises(PlanError, match=r"missing: stem\.weight"):
        transfer(target, {}, target_ends=its, source_ends=its)


def test_interleaved_channels_are_refused_unless_they_are_the_same() -> None:
    def build(channels: int, outputs: int) -> nn.Module:
        return nn.Linear(channels * 8, outputs)

    old, new = ends(build, "a", "x"), ends(build, "a b", "x")
    with pytest.raises(PlanError, match="another shape: weight"):
        transfer(made(build, new), made(build, old), target_ends=new, source_ends=old)
    same = transfer(made(build, old), made(build, old), target_ends=old, source_ends=ends(build, "A", "x"))
    assert set(same.copied) == {"weight", "bias"}
