"""Two real processes against one: losses, gradients, BatchNorm; and what is said when one of them dies.

The checks share one start of two processes, which takes longer than all of them.
"""

from __future__ import annotations

import copy
import time
from pathlib import Path

import pytest
import torch
from torch import nn

from sagittal.data.label_index import LabelIndex, label_index
from sagittal.errors import TrainingError
from sagittal.networks.build import build_network
from sagittal.plan.dataset import DatasetSpec, Label
from sagittal.plan.loss import Loss
from sagittal.plan.segformer3d import SegFormer3DConfig
from sagittal.training import distributed
from sagittal.training.distributed import (
    ALONE,
    World,
    require_equal,
    start,
    sum_gradients,
    world_from_environment,
)
from sagittal.training.losses import segmentation_loss
from sagittal.training.synchronised_norms import synchronise_batch_norm

CPU = torch.device("cpu")
TIMEOUT_S = 300.0
"""How long processes wait for each other: on a slow machine one of them may start, and end, late."""
LOSSES = {
    "dice and cross-entropy": Loss(),
    "batch dice": Loss(batch_dice=True),
    "top-k": Loss(top_k_fraction=0.3),
    "focal tversky": Loss(tversky_weight=1, dice_weight=0),
    "batch tversky": Loss(tversky_weight=1, batch_dice=True),
    "boundary": Loss(boundary_weight=0.1, boundary_reach_mm=3),
}


def _index(kind: str) -> LabelIndex:
    return label_index(
        DatasetSpec(
            name="x",
            channel_names=("MR",),
            labels=(Label(name="a", values=(1, 2) if kind == "regions" else (1,)), Label(name="b", values=(2,))),
            regions_class_order=(1, 2) if kind == "regions" else None,
            ignore_value=None if kind == "classes" else 9,
            file_ending=".nii.gz",
        )
    )


def _run(rank: int, address: str) -> None:
    torch.set_num_threads(1)
    world = World(rank, 2, rank, address)
    with start(world, CPU, timeout_s=TIMEOUT_S):
        _check_messages(world)
        _check_losses(world)
        _check_networks(world)
        _check_single_values(world)
        _check_death(world)


def test_two_processes_do_what_one_does(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(_run, ((tmp_path / "meet").as_uri(),), 2)


def _share(world: World, count: int) -> slice:
    share = world.share(count)
    return slice(share.start, share.stop)


def _check_losses(world: World) -> None:
    for count in (4, 3, 1):
        for kind in ("classes", "ignore", "regions"):
            for name, loss in LOSSES.items():
                _check_loss(world, count, _index(kind), loss, f"{name}, {kind}, {count}")


def _check_loss(world: World, count: int, index: LabelIndex, loss: Loss, name: str) -> None:
    config = loss.replace(deep_supervision_weights=(0.7, 0.3))
    generator = torch.Generator().manual_seed(count)
    sizes = ((4, 5, 6), (2, 3, 3))
    outputs = [
        torch.randn(count, index.spec.num_outputs, *size, generator=generator, dtype=torch.float64, requires_grad=True)
        for size in sizes
    ]
    targets = torch.randint(index.num_indices + (index.ignore_index is not None), (count, 4, 5, 6), generator=generator)
    if index.ignore_index is not None:
        targets[0, :3] = index.ignore_index
    spacing_mm, part = (2.0, 1.0, 1.0), _share(world, count)
    expected = segmentation_loss(outputs, targets, index, config, spacing_mm=spacing_mm)
    wanted = torch.autograd.grad(expected, outputs)
    loss_here = segmentation_loss(
        [output[part] for output in outputs], targets[part], index, config, spacing_mm=spacing_mm, world=world
    )
    torch.testing.assert_close(loss_here, expected, rtol=1e-12, atol=0, msg=lambda text: f"{name}: {text}")
    assert len(set(world.gather_objects(loss_here.item()))) == 1
    for here, there in zip(torch.autograd.grad(loss_here, outputs), wanted, strict=True):
        torch.testing.assert_close(world.sum(here), there, rtol=1e-10, atol=1e-15, msg=lambda text: f"{name}: {text}")
    if not config.batch_dice:
        micro = (slice(part.start, min(part.start + 1, part.stop)), slice(min(part.start + 1, part.stop), part.stop))
        keywords = {"spacing_mm": spacing_mm, "whole": targets[part], "world": world}
        parts = [segmentation_loss([o[m] for o in outputs], targets[m], index, config, **keywords) for m in micro]
        torch.testing.assert_close(sum(parts), expected, rtol=1e-12, atol=0, msg=lambda text: f"{name}: {text}")


def _check_networks(world: World) -> None:
    for kind in ("segformer3d", "plain", "momentum"):
        for count in (3, 2):
            _check_norms(world, kind, count)


def _check_messages(world: World) -> None:
    assert world.gather_objects(f"from {world.rank}") == ["from 0", "from 1"]
    assert world.broadcast_object(world.rank) == 0
    assert [world.any_true(False), world.any_true(world.rank == 1), world.any_true(True)] == [False, True, True]
    same = {"a": torch.ones(2, 3), "b": torch.zeros(())}
    require_equal(same, world)
    with pytest.raises(TrainingError, match="'b' differs between process 0 and 1 of 2"):
        require_equal(same | {"b": torch.tensor(float(world.rank))}, world)
    network = nn.Linear(2, 1)
    if world.main:
        network.bias.grad = torch.ones(1)
    sum_gradients(network, world)
    assert network.weight.grad is None
    assert network.bias.grad == torch.ones(1)


def _network(kind: str) -> tuple[nn.Module, tuple[int, ...]]:
    torch.manual_seed(0)
    if kind == "segformer3d":
        config = SegFormer3DConfig(
            embed_dims=(8, 8, 16, 16), num_heads=(1, 1, 2, 2), depths=(1, 1, 1, 1), decoder_dim=16
        )
        return build_network(config, 1, 2).double(), (32, 40, 16)
    norm = nn.BatchNorm3d(4, momentum=None if kind == "momentum" else 0.1, affine=kind == "plain")
    return nn.Sequential(nn.Conv3d(1, 4, 3), norm, nn.GELU(), nn.Conv3d(4, 2, 1)).double(), (5, 6, 7)


def _check_norms(world: World, kind: str, count: int) -> None:
    network, size = _network(kind)
    distributed._BUCKET_BYTES = 64 if kind == "plain" else 1 << 20
    alone = copy.deepcopy(network)
    synchronise_batch_norm(network, world)
    generator = torch.Generator().manual_seed(count)
    part = _share(world, count)
    for _ in range(2):
        images = torch.randn(count, 1, *size, generator=generator, dtype=torch.float64)
        with torch.no_grad():
            shape = alone.eval()(images).shape
        targets = torch.randint(2, (count, *shape[2:]), generator=generator)
        values = []
        for module, where, who in ((alone, slice(None), ALONE), (network, part, world)):
            module.train().zero_grad()
            loss = segmentation_loss([module(images[where])], targets[where], _one_class(), Loss(), world=who)
            loss.backward()
            values.append(loss.detach())
        torch.testing.assert_close(values[1], values[0], rtol=1e-12, atol=0)
        sum_gradients(network, world)
        for (name, here), there in zip(network.named_parameters(), alone.parameters(), strict=True):
            torch.testing.assert_close(
                here.grad, there.grad, rtol=1e-9, atol=1e-12, msg=lambda text, name=name: f"{kind} {name}: {text}"
            )
        for (name, here), there in zip(network.state_dict().items(), alone.state_dict().values(), strict=True):
            torch.testing.assert_close(
                here, there, rtol=1e-12, atol=1e-14, msg=lambda text, name=name: f"{name}: {text}"
            )
    require_equal(network.state_dict(), world)
    torch.testing.assert_close(network.eval()(images), alone.eval()(images), rtol=1e-9, atol=1e-12)


def _one_class() -> LabelIndex:
    labels = (Label(name="a", values=(1,)),)
    return label_index(DatasetSpec(name="x", channel_names=("MR",), labels=labels, file_ending=".nii.gz"))


def _check_single_values(world: World) -> None:
    """Two processes with a voxel each have a variance; one voxel in all has none."""
    norm, alone = nn.BatchNorm3d(2).double(), nn.BatchNorm3d(2).double()
    synchronise_batch_norm(norm, world)
    x = torch.tensor([[1.0, -2.0], [3.0, 5.0]], dtype=torch.float64).view(2, 2, 1, 1, 1)
    torch.testing.assert_close(norm(x[_share(world, 2)]), alone(x)[_share(world, 2)])
    running = norm.running_mean.clone()
    result = norm(x[_share(world, 1)])
    assert result.shape[0] == len(world.share(1))
    assert torch.equal(norm.running_mean, running)


def _check_death(world: World) -> None:
    """The second process ends here; the first one notices."""
    if not world.main:
        return
    began = time.monotonic()
    with pytest.raises(TrainingError, match="process 0 of 2: another process ended"):
        for _ in range(2):
            world.sum(torch.ones(3))
    assert time.monotonic() - began < TIMEOUT_S / 2, "it was not told of the end, but waited in vain"


def test_processes_that_do_not_meet_end_with_advice(tmp_path: Path) -> None:
    world = World(0, 2, 0, (tmp_path / "meet").as_uri())
    with (
        pytest.raises(TrainingError, match="process 0 of 2 did not meet the others at file://"),
        start(world, CPU, timeout_s=0.5),
    ):
        pass


def test_one_process_needs_no_others() -> None:
    x = torch.ones(2)
    assert ALONE.main and ALONE.sum(x) is x and ALONE.gather_objects("a") == ["a"] and ALONE.any_true(True)
    network = nn.Sequential(nn.BatchNorm3d(2))
    synchronise_batch_norm(network, ALONE)
    assert type(network[0]) is nn.BatchNorm3d
    with start(ALONE, CPU):
        assert not ALONE.any_true(False)
    assert ALONE.device(torch.device("cuda")) == torch.device("cuda")


def test_shares_are_even_and_complete() -> None:
    for count in range(6):
        for size in range(1, 5):
            shares = [World(rank, size).share(count) for rank in range(size)]
            assert [n for share in shares for n in share] == list(range(count))
            assert max(map(len, shares)) - min(map(len, shares)) <= 1


TORCHRUN = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_ADDR": "node", "MASTER_PORT": "29500"}


def test_the_world_is_read_from_what_torchrun_sets() -> None:
    assert world_from_environment({"HOME": "/x"}) == ALONE
    assert world_from_environment(TORCHRUN) == World(3, 4, 1, "tcp://node:29500")
    assert world_from_environment(TORCHRUN | {"MASTER_ADDR": "::1"}).address == "tcp://[::1]:29500"
    assert World(3, 4, 1).device(torch.device("cuda")) == torch.device("cuda:1")


@pytest.mark.parametrize(
    "changes", [{"MASTER_ADDR": ""}, {"RANK": "4"}, {"WORLD_SIZE": "four"}, {"LOCAL_RANK": "-1"}], ids=str
)
def test_a_half_set_environment_is_refused(changes: dict[str, str]) -> None:
    with pytest.raises(TrainingError, match="expected what torchrun sets"):
        world_from_environment(TORCHRUN | changes)
