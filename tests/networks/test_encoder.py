"""Freezing an encoder: no gradient, no new statistics, and the rest goes on learning."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from sagittal.errors import PlanError
from sagittal.networks import MedNeXt, SegFormer3D
from sagittal.networks.encoder import encoder_prefixes, set_encoder_frozen

NETWORKS = [
    MedNeXt(1, 2, channels=2, block_counts=(1,) * 9, deep_supervision=True),
    SegFormer3D(1, 2, embed_dims=(4, 4, 4, 4), num_heads=(1, 1, 2, 2), depths=(1, 1, 1, 1), decoder_dim=8),
]


@pytest.mark.parametrize("network", NETWORKS)
def test_a_frozen_encoder_stays_as_it_is_until_it_is_let_go(network: nn.Module) -> None:
    network.train()
    prefixes = encoder_prefixes(network)
    optimizer = torch.optim.AdamW(network.parameters(), lr=0.1, weight_decay=0.1)

    def step() -> dict[str, torch.Tensor]:
        before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
        optimizer.zero_grad(set_to_none=True)
        outputs = network(torch.rand(2, 1, 16, 16, 16))
        outputs = outputs if isinstance(outputs, list) else [outputs]
        sum(output.square().mean() for output in outputs).backward()
        optimizer.step()
        return {name: tensor for name, tensor in network.state_dict().items() if not torch.equal(tensor, before[name])}

    step()
    set_encoder_frozen(network, True)
    changed = step()
    assert changed and not any(name.startswith(prefixes) for name in changed)
    assert network.training
    set_encoder_frozen(network, False)
    changed = step()
    assert sum(name.startswith(prefixes) for name in changed) > 10
    assert all(module.training for module in network.modules())


def test_the_encoder_is_all_before_the_decoder() -> None:
    mednext, segformer = NETWORKS
    outside = {
        name.split(".")[0] for name, _ in mednext.named_parameters() if not name.startswith(encoder_prefixes(mednext))
    }
    assert outside == {f"{part}_{level}" for part in ("up", "dec_block") for level in range(4)} | {
        f"out_{level}" for level in range(5)
    }
    outside = {
        name.split(".")[0]
        for name, _ in segformer.named_parameters()
        if not name.startswith(encoder_prefixes(segformer))
    }
    assert outside == {"segformer_decoder"}


def test_a_network_may_say_it_itself_and_one_that_does_not_is_refused() -> None:
    class Own(nn.Module):
        encoder_prefixes = ("body.",)

        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = nn.Linear(2, 2), nn.Linear(2, 2)

    network = Own()
    set_encoder_frozen(network, True)
    assert [name for name, parameter in network.named_parameters() if not parameter.requires_grad] == [
        "body.weight",
        "body.bias",
    ]
    with pytest.raises(PlanError, match="Linear does not say which of its parts is the encoder"):
        encoder_prefixes(nn.Linear(2, 2))
