"""Parameters and multiply-adds against the published and measured tables, memory against real steps and by hand."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from sagittal.networks import MedNeXt, SegFormer3D, create_mednext, create_segformer3d
from sagittal.networks.cost import (
    _LiveBytes,
    activation_memory_bytes,
    multiply_adds,
    parameters,
    step_memory_bytes,
    work,
)

# Size, kernel: parameters without and with deep supervision (1 in, 3 out, with the scalar dummy_tensor that ours
# drops), multiply-adds in 10^9 at 1x128^3; counted on the official network.
MEDNEXT = {
    ("S", 3): (5_550_948, 5_553_840, 127.3),
    ("S", 5): (5_980_580, 5_983_472, 165.6),
    ("B", 3): (10_526_340, 10_529_232, 166.7),
    ("B", 5): (10_955_972, 10_958_864, 205.0),
    ("M", 3): (17_548_996, 17_551_888, 243.6),
    ("M", 5): (18_260_868, 18_263_760, 303.7),
    ("L", 3): (61_779_300, 61_782_192, 494.6),
    ("L", 5): (62_992_932, 62_995_824, 558.9),
}
L_STAGES = (3, 4, 8, 8, 8, 8, 8, 4, 3)


@pytest.mark.parametrize(("size", "kernel_size"), MEDNEXT)
def test_mednext_costs_what_the_official_network_does(size: str, kernel_size: int) -> None:
    plain, supervised, giga = MEDNEXT[size, kernel_size]
    with torch.device("meta"):
        options = {"in_channels": 1, "num_classes": 3, "kernel_size": kernel_size}
        network = create_mednext(size, **options)
        assert parameters(create_mednext(size, **options, deep_supervision=True)) == supervised - 1
    assert parameters(network) == plain - 1
    assert multiply_adds(network, (1, 1, 128, 128, 128)) == pytest.approx(giga * 1e9, rel=0.001)


@pytest.mark.parametrize(("channels", "published"), [(32, 61_969_507), (64, 246_536_387)])
def test_mednext_v2_has_its_published_parameters(channels: int, published: int) -> None:
    with torch.device("meta"):
        network = MedNeXt(1, 3, channels=channels, expansion_ratio=L_STAGES, block_counts=L_STAGES, grn="v2")
    assert parameters(network) == published


@pytest.mark.parametrize(("size", "published", "ours"), [(128, 15.55, 9.41), (96, 5.86, 3.27)])
def test_segformer3d_costs_the_published_sum_less_the_cheaper_fuse(size: int, published: float, ours: float) -> None:
    with torch.device("meta"):
        network = create_segformer3d(in_channels=4, num_classes=3)
    assert parameters(network) == 4_525_251
    counted = work(network, (1, 4, size, size, size))
    assert counted.products == pytest.approx(ours * 1e9, rel=0.002)
    assert counted.products_as_published == pytest.approx(published * 1e9, rel=0.001)


def test_the_published_form_of_segformer3d_fuses_every_map_at_the_finest_grid() -> None:
    network = SegFormer3D(
        1,
        2,
        embed_dims=(4, 4, 8, 8),
        num_heads=(1, 1, 1, 1),
        depths=(1, 1, 1, 1),
        sr_ratios=(2, 1, 1, 1),
        decoder_dim=6,
    )
    shape = (2, 1, 33, 47, 21)
    voxels = [2 * 9 * 12 * 6, 2 * 5 * 6 * 3, 2 * 3 * 3 * 2, 2 * 2 * 2 * 1]
    saved = 6 * 6 * sum(voxels[0] - grid for grid in voxels)
    products, as_published, _ = work(network, shape)
    assert as_published - products == saved
    products, as_published, interpolation = work(MedNeXt(1, 2, channels=2, block_counts=(1,) * 9), shape)
    assert as_published == products == multiply_adds(MedNeXt(1, 2, channels=2, block_counts=(1,) * 9), shape) > 0
    assert interpolation == 0


def test_interpolation_counts_eight_per_voxel_and_channel_beside_the_products() -> None:
    network = SegFormer3D(
        1,
        3,
        embed_dims=(4, 4, 8, 8),
        num_heads=(1, 1, 1, 1),
        depths=(1, 1, 1, 1),
        sr_ratios=(2, 1, 1, 1),
        decoder_dim=6,
    )
    coarse, fine = 8 * 6 * 4, 32 * 24 * 16
    assert work(network, (1, 1, 32, 24, 16)).interpolation == 8 * (3 * 6 * coarse + 3 * fine)


@pytest.mark.parametrize(("mode", "per_voxel"), [("bilinear", 4), ("nearest", 0)])
def test_interpolation_of_slices(mode: str, per_voxel: int) -> None:
    network = nn.Sequential(nn.Conv2d(1, 5, 1), nn.Upsample(scale_factor=2, mode=mode))
    products = 3 * 5 * 8 * 6
    assert work(network, (3, 1, 8, 6)) == (products, products, per_voxel * 3 * 5 * 16 * 12)


def test_attention_products_count() -> None:
    small = {"embed_dims": (4, 4, 4, 4), "num_heads": (1, 1, 1, 1), "decoder_dim": 4, "depths": (1, 1, 1, 1)}
    reduced = SegFormer3D(1, 2, **small, sr_ratios=(4, 1, 1, 1))
    whole = SegFormer3D(1, 2, **small, sr_ratios=(1, 1, 1, 1))
    tokens, keys, width = 8**3, 2**3, 4
    # Queries meet more keys in both products, and the reduction's convolution goes.
    more = 2 * tokens * (tokens - keys) * width + (tokens - keys) * width * 2 * width - keys * 64 * width * width
    shape = (1, 1, 32, 32, 32)
    assert multiply_adds(whole, shape) - multiply_adds(reduced, shape) == more


def test_multiply_adds_grow_with_the_batch_and_leave_the_network_alone() -> None:
    network = create_segformer3d(in_channels=1, num_classes=2).train()
    before = copy.deepcopy(network.state_dict())
    once = multiply_adds(network, (1, 1, 32, 32, 48))
    assert multiply_adds(network, (2, 1, 32, 32, 48)) == 2 * once
    step_memory_bytes(network, (1, 1, 32, 32, 48), training=True)
    assert network.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())
    assert all(parameter.grad is None for parameter in network.parameters())


def test_memory_by_hand() -> None:
    network = nn.Sequential(nn.Linear(4, 8, bias=False), nn.Identity(), nn.Linear(8, 2, bias=False))
    weights, image, hidden, logits = 4 * (32 + 16), 4 * 40, 4 * 80, 4 * 20
    # nn.Sequential lets go of the hidden tensor once the second layer has returned.
    assert step_memory_bytes(network, (10, 4), training=False) == weights + image + hidden + logits
    trained = step_memory_bytes(network, (10, 4), training=True)
    assert trained > 2 * weights + image + hidden + logits
    assert activation_memory_bytes(network, (10, 4), training=False) == image + hidden + logits


def test_weights_and_their_gradients_are_no_activations() -> None:
    network = nn.Sequential(nn.Linear(50, 50), nn.Linear(50, 50), nn.Linear(50, 50))
    weights, row = 4 * 3 * 50 * 51, 4 * 50
    activations = activation_memory_bytes(network, (1, 50), training=True)
    # A gradient is one only once it has been added to its parameter's `.grad`.
    assert 5 * row < activations < 2 * 4 * 50 * 51
    assert step_memory_bytes(network, (1, 50), training=True) > 2 * weights + row
    for parameter in network[0].parameters():
        parameter.requires_grad_(False)
    assert 0 < activation_memory_bytes(network, (1, 50), training=True) <= activations


NETWORKS = {
    "mednext": lambda: MedNeXt(1, 3, channels=4, block_counts=(1,) * 9, grn="v2", deep_supervision=True),
    "checkpointed": lambda: MedNeXt(1, 3, channels=4, block_counts=(2,) * 9, checkpointing=True),
    "segformer3d": lambda: SegFormer3D(
        1, 3, embed_dims=(8, 8, 16, 16), num_heads=(1, 1, 2, 2), depths=(1, 1, 1, 1), decoder_dim=16
    ),
}


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("training", [False, True])
def test_memory_equals_that_of_a_real_step(name: str, training: bool) -> None:
    network = NETWORKS[name]()
    predicted = step_memory_bytes(network, (2, 1, 16, 32, 32), training=training)
    network.train(training)
    image = torch.randn(2, 1, 16, 32, 32)
    live = _LiveBytes()
    with live, torch.set_grad_enabled(training):
        for tensor in (*network.parameters(), *network.buffers(), image):
            live.track(tensor)
        outputs = network(image)
        if training:
            outputs = outputs if isinstance(outputs, list) else [outputs]
            losses = [logits.square().mean() for logits in outputs]
            torch.stack(losses).sum().backward()
    assert predicted == live.peak


def test_checkpointing_needs_less_memory_and_weights_cost_twice_in_training() -> None:
    def network(checkpointing: bool) -> MedNeXt:
        with torch.device("meta"):
            return MedNeXt(1, 3, channels=16, block_counts=(2, 1, 1, 1, 1, 1, 1, 1, 2), checkpointing=checkpointing)

    shape = (1, 1, 64, 64, 96)
    plain, checkpointed = (step_memory_bytes(network(flag), shape, training=True) for flag in (False, True))
    assert checkpointed < 0.6 * plain
    assert step_memory_bytes(network(False), shape, training=False) < 0.3 * plain
    tiny = step_memory_bytes(network(False), (1, 1, 16, 16, 16), training=True)
    assert tiny >= 2 * 4 * parameters(network(False))


def test_half_precision_halves_the_memory() -> None:
    with torch.device("meta"):
        network = MedNeXt(1, 3, channels=16)
    shape = (1, 1, 32, 32, 48)
    single = step_memory_bytes(network, shape, training=False)
    assert step_memory_bytes(network.bfloat16(), shape, training=False) == pytest.approx(single / 2, rel=0.01)
