"""What the processes of a run tell each other besides sums: what one did for all, whether to stop, and why one failed.

A process that fails leaves its message in a store that the main process keeps; the others, whose exchange with it
breaks, find it there and end with it, instead of with a broken connection or not at all.
"""

from __future__ import annotations

import itertools
import json
import platform
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import TypeVar
from urllib.parse import urlsplit

import torch
from torch.distributed import Store, TCPStore  # type: ignore[attr-defined]

from sagittal.errors import PlanError, ResourceError, SagittalError, TrainingError
from sagittal.inference.device import resolve_device
from sagittal.plan.plan import Plan
from sagittal.training.distributed import ALONE, World, all_reduce, start
from sagittal.training.signals import StopFlag, StopReason

T = TypeVar("T")

_FAILED = "failed"
_HEARD = "heard {}"
_LOOK_EVERY_S = 0.1
_LAST_WORDS_S = 3.0
"""How long a process whose exchange broke waits for what the other one has to say, and that one for its listeners."""
_REASONS: tuple[StopReason, ...] = ("interrupted", "terminated")


class Peers:
    """The processes of a run while they are connected.

    Attributes:
        world: who they are.
    """

    def __init__(self, world: World, store: Store | None) -> None:
        self.world = world
        self._store = store
        self._works = itertools.count()

    def on_main(self, work: Callable[[], T]) -> T:
        """Do something in the main process, however long it takes, and return its result in every process."""
        if self.world.size == 1:
            return work()
        key = f"done {next(self._works)}"
        result = None
        if self.world.main:
            result = work()
            if self._store is not None:
                self._store.set(key, "")
        else:
            self._wait(key)
        received: T = self.world.broadcast_object(result)  # type: ignore[assignment]
        return received

    def _wait(self, key: str) -> None:
        # Not in an exchange, which has a time limit and can't be interrupted.
        try:
            while self._store is not None and not self._store.check([key]):
                failure = self.failure()
                if failure is not None:
                    raise failure
                time.sleep(_LOOK_EVERY_S)
        except RuntimeError as error:
            raise TrainingError(
                f"process {self.world.rank} of {self.world.size}: the first process is gone, while the others waited "
                "for what it prepared. Look at its messages; then start the same command again.",
                code="process_lost",
            ) from error

    def tell_failure(self, error: BaseException) -> None:
        """Leave word of the error that ends this process; the first one stays."""
        if self._store is None:
            return
        word = {
            "rank": self.world.rank,
            "message": error.message if isinstance(error, SagittalError) else f"{type(error).__name__}: {error}",
            "code": error.code if isinstance(error, SagittalError) else "bug",
            "exit": error.code if isinstance(error, SystemExit) else None,
        }
        try:
            if not self._store.check([_FAILED]):
                self._store.set(_FAILED, json.dumps(word))
        except RuntimeError:
            pass  # The store is gone with the process that kept it, and this one has its own error to show.

    def wait_for_listeners(self) -> None:
        """Keep the store a little while, so that the other processes find in it why this one or another one ended."""
        heard = [_HEARD.format(rank) for rank in range(1, self.world.size)]
        until = time.monotonic() + _LAST_WORDS_S
        try:
            while self._store is not None and time.monotonic() < until and not self._store.check(heard):
                time.sleep(_LOOK_EVERY_S)
        except (SystemExit, RuntimeError):
            pass  # This process ends in any case, and not for this.

    def last_words(self) -> TrainingError | SystemExit | None:
        """Return why another process ended, once it has said so; None where it does not."""
        until = time.monotonic() + _LAST_WORDS_S
        try:
            while self._store is not None and time.monotonic() < until:
                failure = self.failure()
                if failure is not None:
                    return failure
                time.sleep(_LOOK_EVERY_S)
        except SystemExit:
            pass  # `torchrun` ends the others as soon as one has ended; what ended it is the news, not that.
        return None

    def failure(self) -> TrainingError | SystemExit | None:
        """Return why another process ended, to end this one with; None where none has said anything."""
        if self._store is None:
            return None
        try:
            if not self._store.check([_FAILED]):
                return None
            word = json.loads(self._store.get(_FAILED))
            self._store.set(_HEARD.format(self.world.rank), "")
        except RuntimeError:
            return None
        if word["exit"] is not None:
            return SystemExit(word["exit"])
        return TrainingError(
            f"process {self.world.rank} of {self.world.size} ends, because process {word['rank']} did: "
            f"{word['message']}",
            code=word["code"],
        )


NO_PEERS = Peers(ALONE, None)


@contextmanager
def together(world: World, device: torch.device) -> Iterator[Peers]:
    """Connect the processes for the length of a `with` block; an error in one of them ends all, with its message.

    Raises:
        TrainingError: they do not meet, or another one failed; else what the block raises.
    """
    if world.size == 1:
        yield NO_PEERS
        return
    peers = NO_PEERS
    try:
        with start(world, device):
            peers = Peers(world, _store_of(world))
            try:
                yield peers
            except TrainingError as error:
                failure = peers.last_words() if error.code == "process_lost" else None
                if failure is not None:
                    raise failure from error
                peers.tell_failure(error)
                raise
            except BaseException as error:
                peers.tell_failure(error)
                raise
    except BaseException:
        if world.main:
            peers.wait_for_listeners()
        raise


def agree(stop: StopFlag, news: bool, world: World) -> bool:
    """Raise the stop flag in every process if it is raised in one, and return whether any process has `news`.

    One small exchange on the CPU, which does not wait for an accelerator.
    """
    if world.size == 1:
        return news
    raised = all_reduce(torch.tensor([*(stop.reason == reason for reason in _REASONS), news], dtype=torch.int32), world)
    for reason, count in zip(_REASONS, raised.tolist(), strict=False):
        if count:
            stop.reason = reason
    return bool(raised[-1] > 0)


def process_device(name: str, world: World) -> torch.device:
    """Return the device of this process: `cuda` becomes its own GPU.

    Raises:
        ResourceError: the machine lacks it, or several processes can't train on it.
    """
    device = resolve_device(name)
    if world.size > 1 and device.type == "mps":
        raise ResourceError(
            f"device '{device}' is for one process, and {world.size} were started. Start one, or choose --device cpu.",
            code="unknown_device",
        )
    return resolve_device(world.device(device))


def enough_samples(plan: Plan, world: World) -> bool:
    """Tell whether every process has a sample in each part of a batch."""
    return world.size == 1 or world.size * plan.training.micro_batches <= plan.training.batch_size


def require_enough_samples(plan: Plan, world: World) -> None:
    """Make sure that every process has a sample in each part of a batch.

    Raises:
        PlanError: there are too many processes.
    """
    if enough_samples(plan, world):
        return
    training = plan.training
    parts = f" in {training.micro_batches} parts" if training.micro_batches > 1 else ""
    raise PlanError(
        f"training.batch_size is {training.batch_size}{parts}, for {world.size} processes: expected a sample for each "
        f"of them{' in each part' if parts else ''}. Start {training.batch_size // training.micro_batches} processes "
        f"or fewer, or make the plan with --set training.batch_size={world.size * training.micro_batches}.",
        code="batch_too_small",
    )


def require_shared(folder: Path, cache: Path, world: World) -> None:
    """Make sure that this process sees the folders that the main one wrote.

    Raises:
        ResourceError: it does not: several machines need a file system that they share.
    """
    for path in () if world.main else (folder, cache):
        if not path.is_dir():
            raise ResourceError(
                f"process {world.rank} on {platform.node()} does not see {path}, where the first process wrote. Give "
                "--out and --cache (and the data set) on a file system that all machines share, by the same paths.",
                code="not_shared",
            )


def _store_of(world: World) -> Store | None:
    """Open a store in the main process and connect the others to it; None where the processes met through a file."""
    host = urlsplit(world.address).hostname
    if host is None:
        return None
    limit = timedelta(seconds=60)
    store = TCPStore(host, 0, is_master=True, wait_for_workers=False, timeout=limit) if world.main else None
    port = world.broadcast_object(0 if store is None else store.port)
    return store or TCPStore(host, port, is_master=False, wait_for_workers=False, timeout=limit)
