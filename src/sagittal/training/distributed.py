"""Several processes that train one network: who is who, sums over all of them, and what happens when one dies.

Each process holds a share of every batch and computes the loss of the WHOLE batch: what the others contribute is a
constant to it (`World.sum`). The gradients of all processes, ADDED up (`sum_gradients`, not averaged), are then exactly
those of one process with the whole batch, for any split of it. `ALONE` is the world of one process, in which nothing is
sent; the same code runs in both.

Processes must call these functions in the same order, all of them, also one whose share of a batch is empty.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from sagittal.errors import TrainingError

_T = TypeVar("_T")

_BUCKET_BYTES = 32 << 20


@dataclass(frozen=True)
class World:
    """The processes that train together, seen from one of them.

    Attributes:
        rank: number of this process, 0 to size - 1.
        size: number of processes.
        local_rank: number of this process on its machine; it uses that GPU.
        address: where the processes meet, `tcp://host:port` or `file:///path`; empty for one process.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    address: str = ""

    def __post_init__(self) -> None:
        assert 0 <= self.rank < self.size

    @property
    def main(self) -> bool:
        """Whether this is the process that writes files and speaks to the user."""
        return self.rank == 0

    def device(self, device: torch.device) -> torch.device:
        """Return this process's own device of the kind of `device`: `cuda` becomes `cuda:local_rank`."""
        alone = self.size == 1 or device.type != "cuda" or device.index is not None
        return device if alone else torch.device("cuda", self.local_rank)

    def share(self, count: int) -> range:
        """Return which of `count` samples this process holds: neighbours, at most one more than another process.

        The shares of all ranks, one after the other, are `range(count)`; with more processes than samples some are
        empty.
        """
        return range(count * self.rank // self.size, count * (self.rank + 1) // self.size)

    def sum(self, tensor: Tensor) -> Tensor:
        """Return the sum over all processes; the others' parts are constants to the gradient.

        Every process gets the same bits.
        """
        if self.size == 1:
            return tensor
        result: Tensor = _SumOverProcesses.apply(tensor, self)  # type: ignore[no-untyped-call]
        return result

    def gather_objects(self, value: _T) -> list[_T]:
        """Return the values of all processes in the order of their ranks, on every process."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        with _named_failures():
            dist.all_gather_object(values, value)
        return values

    def broadcast_object(self, value: _T) -> _T:
        """Return the main process's value on every process; what the others pass is not used."""
        if self.size == 1:
            return value
        values: list[Any] = [value]
        with _named_failures():
            dist.broadcast_object_list(values, src=0)
        result: _T = values[0]
        return result

    def any_true(self, flag: bool) -> bool:
        """Tell whether `flag` is true in any process; for example, whether one was asked to stop."""
        if self.size == 1:
            return flag
        value = torch.tensor([int(flag)])
        with _named_failures():
            dist.all_reduce(value, dist.ReduceOp.MAX)
        return bool(value.item())


ALONE = World()


def all_reduce(tensor: Tensor, world: World) -> Tensor:
    """Return the sum over all processes as a new tensor without a gradient; `World.sum` has one."""
    total = tensor.detach().clone(memory_format=torch.contiguous_format)
    if world.size > 1:
        with _named_failures():
            dist.all_reduce(total)
    return total


class _SumOverProcesses(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, world: World) -> Tensor:
        return all_reduce(tensor, world)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


@contextmanager
def _named_failures() -> Iterator[None]:
    """Say what a failed exchange between processes means.

    Raises:
        TrainingError: a process is gone or did not answer in time.
    """
    try:
        yield
    except RuntimeError as error:  # torch's DistBackendError and DistNetworkError are such
        if not dist.is_initialized():
            raise
        raise TrainingError(
            f"process {dist.get_rank()} of {dist.get_world_size()}: another process ended or did not answer in time "
            f"({_reason(error)}). Look at the messages of the process that ended first; --resume goes on from "
            "the last checkpoint.",
            code="process_lost",
        ) from error


def _reason(error: Exception) -> str:
    """Return torch's reason without the place in its source and the advice for its developers."""
    first = next(iter(str(error).strip().splitlines()), type(error).__name__)
    return re.sub(r"^\[\S+\.\w+:\d+\] ", "", first).split(". This is typically")[0][:300]


def world_from_environment(environment: Mapping[str, str]) -> World:
    """Read what `torchrun` tells each of its processes; `ALONE` where it did not start this one.

    Args:
        environment: RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT and LOCAL_RANK (0 without it) are read.

    Raises:
        TrainingError: some of the variables are there and others not, or one is no number.
    """
    if "RANK" not in environment and "WORLD_SIZE" not in environment:
        return ALONE
    needed = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    missing = [name for name in needed if not environment.get(name)]
    numbers: dict[str, int] = {}
    for name in ("RANK", "WORLD_SIZE", "MASTER_PORT", "LOCAL_RANK"):
        text = environment.get(name, "0")
        if text.isdecimal():
            numbers[name] = int(text)
        elif name not in missing:
            missing.append(name)
    if missing or numbers["RANK"] >= numbers["WORLD_SIZE"]:
        found = {name: environment.get(name) for name in (*needed, "LOCAL_RANK")}
        raise TrainingError(
            f"the environment of this process has {found}, expected what torchrun sets: numbers, with RANK below "
            "WORLD_SIZE, and the address of the first machine. Start it with "
            "'torchrun --nproc-per-node=N -m sagittal train ...', or unset RANK and WORLD_SIZE for one process.",
            code="launch",
        )
    host = environment["MASTER_ADDR"]
    address = f"tcp://[{host}]" if ":" in host else f"tcp://{host}"
    return World(
        rank=numbers["RANK"],
        size=numbers["WORLD_SIZE"],
        local_rank=numbers["LOCAL_RANK"],
        address=f"{address}:{numbers['MASTER_PORT']}",
    )


@contextmanager
def start(
    world: World, device: torch.device, *, timeout_s: float = 1800.0, backend: str | None = None
) -> Iterator[None]:
    """Join the other processes for the length of a `with` block; do nothing for one, or where they are joined already.

    Args:
        world: this process's place among them.
        device: what it trains on: gloo for a CPU, nccl (and gloo for what is not on the GPU) for CUDA.
        timeout_s: how long a process waits for another one, at the start and in each exchange; more than the longest
            work that one of them does alone (validation, a checkpoint).
        backend: torch's name of another one.

    Raises:
        TrainingError: the processes do not meet in time.
    """
    if world.size == 1:
        yield
        return
    if device.type == "cuda":
        torch.cuda.set_device(world.device(device))
    if dist.is_initialized():  # by what started the processes, which also ends it
        yield
        return
    try:
        dist.init_process_group(
            backend or ("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"),
            init_method=world.address,
            rank=world.rank,
            world_size=world.size,
            timeout=timedelta(seconds=timeout_s),
        )
    except (RuntimeError, ValueError) as error:
        raise TrainingError(
            f"process {world.rank} of {world.size} did not meet the others at {world.address} within {timeout_s:g} s "
            f"({_reason(error)}). Look whether all of them were started, with the same address, and whether a firewall "
            "lets them through.",
            code="processes_did_not_meet",
        ) from error
    try:
        yield
    finally:
        dist.destroy_process_group()


def sum_gradients(network: torch.nn.Module, world: World) -> None:
    """Replace the gradients of `network` by their sums over all processes, in place.

    A gradient that this process does not have counts as 0; one that no process has stays None.
    """
    if world.size == 1:
        return
    parameters = [parameter for parameter in network.parameters() if parameter.requires_grad]
    pending = []
    for bucket in _buckets(parameters):
        present = bucket[0].new_tensor([float(parameter.grad is not None) for parameter in bucket])
        parts = [torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten() for p in bucket]
        flat = torch.cat([*parts, present])
        with _named_failures():
            pending.append((bucket, flat, dist.all_reduce(flat, async_op=True)))
    for bucket, flat, work in pending:
        with _named_failures():
            work.wait()
        *parts, present = torch.split(flat, [*(parameter.numel() for parameter in bucket), len(bucket)])
        for place, (parameter, part) in enumerate(zip(bucket, parts, strict=True)):
            if parameter.grad is not None:
                parameter.grad.copy_(part.view_as(parameter))
            elif present[place] > 0:
                parameter.grad = part.view_as(parameter).clone()


def _buckets(parameters: list[torch.nn.Parameter]) -> Iterator[list[torch.nn.Parameter]]:
    """Group neighbours of one type and device, up to a size that keeps both latency and the buffer small."""
    bucket: list[torch.nn.Parameter] = []
    size = 0
    for parameter in parameters:
        other = bool(bucket) and (bucket[0].dtype, bucket[0].device) != (parameter.dtype, parameter.device)
        if bucket and (other or size > _BUCKET_BYTES):
            yield bucket
            bucket, size = [], 0
        bucket.append(parameter)
        size += parameter.numel() * parameter.element_size()
    if bucket:
        yield bucket


def require_equal(tensors: Mapping[str, Tensor], world: World) -> None:
    """Check that all processes hold the same bits, for example in a network's `state_dict()`.

    Raises:
        TrainingError: some differ; the message names the first and the processes.
    """
    if world.size == 1:
        return
    digests = {name: _digest(tensor) for name, tensor in tensors.items()}
    everyone = world.gather_objects(digests)
    names = dict.fromkeys(name for digest in everyone for name in digest)
    for name in names:
        others = [rank for rank, digest in enumerate(everyone) if digest.get(name) != everyone[0].get(name)]
        if others:
            raise TrainingError(
                f"'{name}' differs between process 0 and {', '.join(map(str, others))} of {world.size}, expected the "
                "same bits in all of them. Give every machine the same plan, the same starting weights and the same "
                "versions of Sagittal and PyTorch.",
                code="processes_differ",
            )


def _digest(tensor: Tensor) -> str:
    values = tensor.detach().cpu().contiguous()
    start = f"{values.dtype} {tuple(values.shape)}".encode()
    return hashlib.sha256(start + values.view(-1).view(torch.uint8).numpy().tobytes()).hexdigest()
