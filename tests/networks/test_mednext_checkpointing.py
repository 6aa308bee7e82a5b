"""MedNeXt's ways of giving memory back in training: the same numbers, less memory, whole graphs."""

from __future__ import annotations

import copy

import pytest
import torch
from network_graphs import train_once
from torch import Tensor, nn

from sagittal.kernels import cpu_bf16_reason
from sagittal.networks import MedNeXt, MedNeXtBlock, MedNeXtDownBlock, MedNeXtUpBlock, create_mednext
from sagittal.networks.cost import step_memory_bytes

ONE_EACH = (1,) * 9
STYLES = ("none", "expansion", "block")
MIXED = ("none", "expansion", "block", "expansion", "none", "block", "none", "expansion", "block")


def small(**options: object) -> MedNeXt:
    torch.manual_seed(0)
    return MedNeXt(1, 2, **{"channels": 4, "block_counts": ONE_EACH, **options})


@pytest.mark.parametrize("checkpointing", ["expansion", "block", True, MIXED])
def test_checkpointing_changes_memory_not_numbers(checkpointing: object) -> None:
    image = torch.randn(1, 1, 16, 16, 32)
    plain = small(grn="v2", deep_supervision=True).train()
    again = small(grn="v2", deep_supervision=True, checkpointing=checkpointing).train()
    for a, b in zip(train_once(plain, image), train_once(again, image), strict=True):
        assert torch.equal(a, b)


def step_bytes(checkpointing: object, **options: object) -> int:
    with torch.device("meta"):
        network = small(channels=16, checkpointing=checkpointing, **options)
    return step_memory_bytes(network, (1, 1, 32, 32, 48), training=True)


@pytest.mark.parametrize(("norm", "grn"), [("group", False), ("layer", "v2")])
def test_each_style_of_checkpointing_needs_less_memory(norm: str, grn: bool | str) -> None:
    blocks = (3, 1, 1, 1, 1, 1, 1, 1, 3)
    none, expansion, block = (step_bytes(style, block_counts=blocks, norm=norm, grn=grn) for style in STYLES)
    assert expansion < 0.7 * none
    assert block < 0.9 * expansion


def test_the_finest_stages_hold_most_of_what_there_is_to_save() -> None:
    finest = ("block", *("none",) * 7, "block")
    coarsest = tuple("none" if style == "block" else "block" for style in finest)
    assert step_bytes("block") <= step_bytes(finest) < step_bytes(coarsest) < step_bytes("none")


def test_a_resampling_block_is_checkpointed_with_the_stage_whose_ratio_it_has() -> None:
    styles = {
        name: module.checkpointing
        for name, module in small(checkpointing=MIXED).named_modules()
        if hasattr(module, "checkpointing") and name
    }
    for level in range(4):
        assert styles[f"enc_block_{level}.0"] == MIXED[level]
        assert styles[f"down_{level}"] == MIXED[level + 1]
        assert styles[f"up_{level}"] == styles[f"dec_block_{level}.0"] == MIXED[8 - level]
    assert styles["bottleneck.0"] == MIXED[4]


def blocks_of_all_kinds(options: dict[str, object]) -> nn.Module:
    return nn.Sequential(
        MedNeXtBlock(4, 4, **options), MedNeXtDownBlock(4, 6, **options), MedNeXtUpBlock(6, 2, **options)
    )


@pytest.mark.parametrize("checkpointing", STYLES)
@pytest.mark.parametrize("grn", [False, True])
def test_every_style_of_checkpointing_compiles_whole(checkpointing: str, grn: bool) -> None:
    torch.compiler.reset()
    # One block of each kind; the contract compiles whole networks.
    torch.manual_seed(0)
    options = {"expansion_ratio": 2, "grn": grn, "checkpointing": checkpointing}
    eager = blocks_of_all_kinds(options).train()
    compiled = torch.compile(copy.deepcopy(eager), fullgraph=True, backend="aot_eager")
    image = torch.randn(1, 4, 6, 4, 10)
    gradients: list[Tensor] = []
    for network in (eager, compiled):
        network(image).square().mean().backward()
        gradients.append(torch.cat([parameter.grad.flatten() for parameter in network.parameters()]))
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-6)
    torch.compiler.reset()


@pytest.mark.skipif(cpu_bf16_reason() is not None, reason=str(cpu_bf16_reason()))
@pytest.mark.parametrize("checkpointing", ["none", "expansion", "block"])
def test_autocast_on_a_cpu_rounds_products_only_and_repeats_bit_for_bit(checkpointing: str) -> None:
    # At 32 x 48 x 32 the bottleneck has 2 x 3 x 2 voxels: fewer, and the norm over them multiplies every rounding.
    torch.manual_seed(0)
    network = create_mednext("S", in_channels=1, num_classes=2, deep_supervision=True, checkpointing=checkpointing)
    image = torch.randn(1, 1, 32, 48, 32)
    results = []
    for enabled in (False, True, True):
        network.train().zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            outputs = network(image)
        assert {output.dtype for output in outputs} == {torch.float32}
        sum(output.square().mean() for output in outputs).backward()
        gradients = torch.cat([p.grad.flatten() for p in network.parameters() if p.grad is not None])
        results.append((outputs[0].detach(), gradients))
        for power in range(6, 20):
            torch.full((2**power,), 1e30)  # what reads unwritten memory would now find this
    exact, first, second = results
    for ours, again, expected, allowed in zip(first, second, exact, (0.01, 0.03), strict=True):
        assert torch.equal(ours, again)
        assert 0 < (ours - expected).norm() <= allowed * expected.norm()
