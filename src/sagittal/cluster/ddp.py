"""Several nodes train each network together: Ray Train starts the processes, like `torchrun`, and again after losses.

Each worker runs the whole of `sagittal train` for its rank; what the ranks do together is in `training.distributed` and
does not know who started them.
"""

from __future__ import annotations

import dataclasses
import os
import platform
import tempfile
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ray
import torch
from ray import train as ray_train
from ray.train.torch import TorchConfig, TorchTrainer

from sagittal.cluster.board import Board, Said
from sagittal.cluster.folds import require_seen
from sagittal.cluster.ray_session import Needs, Session
from sagittal.errors import ResourceError, SagittalError, TrainingError
from sagittal.kernels import keep_freed_memory
from sagittal.training.distributed import world_from_environment
from sagittal.training.run import TrainResult
from sagittal.training.stages import RunOptions

LOSSES = 5
"""So often the processes are started again after one of them was lost."""
_LOOK_EVERY_S = 0.5
_GROUP = "all"

Trains = Callable[..., TrainResult]
"""`training.run.train`, or what trains two models in one bundle."""


def train_together(
    trains: Trains,
    dataset: Path,
    out: Path,
    *,
    wishes: Mapping[str, Any],
    options: RunOptions,
    session: Session,
    needs: Needs,
    processes: int,
) -> TrainResult:
    """Train with several processes on the nodes of a cluster, which share every batch.

    Args:
        trains: what each process runs.
        dataset, out: absolute paths, which all nodes see.
        wishes: the other arguments of `trains`.
        options: as on one machine; lines are said here.
        session: the cluster.
        needs: what each process occupies.
        processes: how many.

    Raises:
        ResourceError: the cluster has too little, or a node does not see the folders.
        SagittalError: what training raises; also after more losses than are made good.
    """
    session.require(needs, "a process")
    if session.slots(needs) < processes:
        raise ResourceError(
            f"{processes} processes with {needs} each need more than {session.place} has: it has room for "
            f"{session.slots(needs)}. Ask for fewer processes, or add nodes.",
            code="cluster_too_small",
        )
    folder = out.with_name(f"{out.name}.run")
    folder.mkdir(parents=True, exist_ok=True)
    require_seen(session.nodes, (folder, dataset))
    board: Any = ray.remote(Outcome).options(num_cpus=0, scheduling_strategy=session.home).remote()
    ray.get(board.begin.remote(_GROUP, 0))
    device = "cuda" if needs.gpus else "cpu"
    sent = dataclasses.replace(options, device=device, carrier=None, at_once=1, live=False, say=_nobody)
    given = {"trains": trains, "dataset": dataset, "out": out, "wishes": dict(wishes), "options": sent}
    try:
        with tempfile.TemporaryDirectory(dir=folder, prefix=".train-") as scratch:
            running = ray.remote(num_cpus=0, max_retries=0)(_drive)
            done = running.options(scheduling_strategy=session.home).remote(given, board, needs, processes, scratch)
            while not ray.wait([done], timeout=_LOOK_EVERY_S)[0]:
                _say_lines(board, options.say)
            _say_lines(board, options.say)
            lost = ray.get(done)
        outcome = ray.get(board.outcome.remote())
    finally:
        ray.kill(board)
    if isinstance(outcome, TrainResult):
        return outcome
    if isinstance(outcome, SagittalError):
        raise outcome
    raise TrainingError(
        f"the processes were lost more than {LOSSES} times ({lost}); the last checkpoint is intact. Look at the nodes, "
        "then go on with --resume.",
        code="process_lost",
    )


class Outcome(Board):
    """A board that also keeps what came out."""

    def __init__(self) -> None:
        super().__init__()
        self._outcome: TrainResult | SagittalError | None = None
        self._starts = 0

    def again(self) -> bool:
        """Count a start of the main process; return whether there was one before."""
        self._starts += 1
        return self._starts > 1

    def end(self, outcome: TrainResult | SagittalError) -> None:
        """Keep what the main process returned or raised, or the first error of another one."""
        if self._outcome is None or not isinstance(outcome, SagittalError):
            self._outcome = outcome

    def outcome(self) -> TrainResult | SagittalError | None:
        """Return it; None where all processes were lost."""
        return self._outcome


def _say_lines(board: Any, say: Callable[[str], None]) -> None:
    said: list[Said] = ray.get(board.take.remote())
    for one in said:
        say(one.line)


def _drive(given: Mapping[str, Any], board: Any, needs: Needs, processes: int, scratch: str) -> str | None:
    """Run Ray Train to its end on the head; return how the processes were lost, None where they were not."""
    resources = {"CPU": needs.cpus, **({"GPU": needs.gpus} if needs.gpus else {})}
    trainer = TorchTrainer(
        _train_rank,
        train_loop_config={**given, "board": board, "threads": needs.cpus},
        torch_config=TorchConfig(backend="cpu:gloo,cuda:nccl" if needs.gpus else "gloo"),
        scaling_config=ray_train.ScalingConfig(
            num_workers=processes,
            use_gpu=bool(needs.gpus),
            resources_per_worker=resources,
            placement_strategy="SPREAD",
        ),
        run_config=ray_train.RunConfig(
            name="train", storage_path=scratch, failure_config=ray_train.FailureConfig(max_failures=LOSSES)
        ),
    )
    try:
        trainer.fit()
    except Exception as error:
        return f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"
    return None


def _train_rank(config: dict[str, Any]) -> None:
    """Be one process of those that train together: what Ray Train runs on each worker."""
    world = world_from_environment(os.environ)
    board, node = config["board"], f"{platform.node()} {ray.get_runtime_context().get_node_id()[:8]}"
    torch.set_num_threads(config["threads"])
    keep_freed_memory()

    def say(line: str) -> None:
        board.say.remote(_GROUP, 0, node, line)

    if world.main:
        say(f"train: {world.size} processes on the cluster, the first on {node}")
    # Processes that are started again go on from the last checkpoint, whatever was asked for at first.
    resume = config["options"].resume or (world.main and ray.get(board.again.remote()))
    options = dataclasses.replace(config["options"], world=world, resume=resume, say=say if world.main else _nobody)
    try:
        result = config["trains"](config["dataset"], config["out"], options=options, **config["wishes"])
    except SagittalError as error:
        if error.code == "process_lost":
            raise  # Ray Train starts all of them again.
        ray.get(board.end.remote(error))
        return
    except Exception:
        say(traceback.format_exc())
        raise
    if world.main:
        ray.get(board.end.remote(result))


def _nobody(line: str) -> None:
    """Drop a line; the first process tells it."""
