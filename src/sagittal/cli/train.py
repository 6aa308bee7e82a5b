"""`sagittal train`: a folder of labelled scans becomes a bundle."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import Parameter

from sagittal.cli.options import Settings, parse_duration_s, parse_settings_option, require_known_names
from sagittal.cli.stopping import STOPPED, command_to_tell, sigterm_raises
from sagittal.cli.train_cluster import OnMachines
from sagittal.cli.train_options import HowToRun

if TYPE_CHECKING:
    from sagittal.training.distributed import World
    from sagittal.training.run import TrainResult

Config = Literal["3d", "3d-low", "2d", "3d,3d-low"]


def train(
    dataset: Path,
    *,
    out: Path,
    plan: Path | None = None,
    network: str | None = None,
    config: Config | None = None,
    preset: str | None = None,
    fold: Literal["0", "1", "2", "3", "4", "all", "none"] = "0",
    budget: str | None = None,
    init_from: Path | None = None,
    freeze_encoder: int | None = None,
    deterministic: Annotated[bool, Parameter(negative="")] = False,
    settings: Settings = None,
    how: HowToRun = HowToRun(),  # noqa: B008 - frozen
    machines: OnMachines = OnMachines(),  # noqa: B008 - frozen
) -> int:
    """Train a network and write a bundle; every step that is missing (check, plan, preprocess) is done and named.

    Args:
        dataset: folder in nnU-Net's layout
        out: the bundle to write; OUT.run beside it holds plan, log, checkpoints and reports
        plan: a plan made by `sagittal plan`
        network: name of the network to plan for; by default that of --init-from or --preset, else mednext-s
        config: what to plan: volumes (3d), volumes at a coarser spacing (3d-low), slices (2d), or two models in one
            bundle (3d,3d-low), of which `predict --fast` takes the second
        preset: a protocol to plan from: mednext-paper, segformer3d-paper, segformer3d-repository or nnunet
        fold: which fifth of the cases is held out; `all` trains five networks, `none` trains on all cases
        budget: time for everything together, for example 15m; the schedule is fitted to it
        init_from: bundle whose trained weights to start from; its network may differ in kernels, channels and labels
        freeze_encoder: epochs (of 250 steps) in which the encoder stays as --init-from has it
        deterministic: bit-equal weights on the same machine, also on a GPU, where it is slower
        how: see HowToRun
        machines: see OnMachines
    """
    began = time.monotonic()
    wishes: dict[str, Any] = {
        "network": network,
        "preset": preset,
        "fold": fold,
        "init_from": None if init_from is None else init_from.absolute(),
        "freeze_encoder_epochs": freeze_encoder,
    }
    # From here on, not from where training begins: to import torch alone takes a second or more.
    with _stoppable_before_training() as before:
        require_known_names(network, preset)
        always = {"training.deterministic": True} if deterministic else {}
        wishes["settings"] = {**parse_settings_option(settings), **always}
        wishes["budget_s"] = None if budget is None else parse_duration_s(budget)
        trains = _way_of(None if plan is None else plan.absolute(), network, config)
        from sagittal.training.distributed import world_from_environment

        world = world_from_environment(os.environ)
        _share_processors(int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
        machines.require_alone(device=how.device, devices=how.devices, processes=world.size)
        say = _say if world.main else _say_nothing
        if machines.fold_processes > 1 and not machines.is_slurm:
            before.begun = before.resumable = True
            return _told(machines.together(trains, dataset, out, how, wishes), world)
        before.out = out
        with machines.told(how.device, say, budgeted=budget is not None) as elsewhere:
            passed_s = time.monotonic() - began
            options = how.options(world=world, passed_s=passed_s, live=world.main, say=say, **elsewhere)
            before.begun = True
            if elsewhere:  # other machines know nothing of the folder that this command was started in
                dataset, out = dataset.absolute(), out.absolute()
            result = trains(dataset, out, options=options, **wishes)
    return _told(result, world)


def _way_of(plan: Path | None, network: str | None, config: Config | None) -> Callable[..., TrainResult]:
    """Return what trains one model, or two in one bundle.

    Raises:
        PlanError: options that exclude each other.
    """
    from sagittal.errors import PlanError
    from sagittal.training.run import train as train_bundle
    from sagittal.training.second_model import train_both

    if plan is not None and network is not None:
        raise PlanError(
            "--plan and --network exclude each other: a plan names its network. Give one of them.", code="options"
        )
    if plan is not None and config == "3d,3d-low":
        raise PlanError("--plan and --config 3d,3d-low exclude each other: a plan is of one model.", code="options")
    if config == "3d,3d-low":
        return train_both
    return partial(train_bundle, plan=plan, configuration=config)


def _told(result: TrainResult, world: World) -> int:
    """Say how a training ended and return the exit code."""
    stopped = result.ended in ("interrupted", "terminated")
    if world.main and stopped:
        _say(f"stopped; go on with: {command_to_tell(_program(world.size), resume=True)}")
    elif world.main:
        _say(f"bundle: {result.bundle}")
    if stopped:
        return 130 if result.ended == "interrupted" else STOPPED
    return 0


@dataclass
class _Before:
    """What is known of a run that has not begun to train."""

    begun: bool = False
    """Whether the data set may have been looked at."""
    resumable: bool = False
    """Whether other machines may have left checkpoints."""
    out: Path | None = None
    """The bundle, beside which there may be checkpoints."""

    def way_on(self) -> str:
        """Return what is kept and the command that goes on with it."""
        out = self.out.resolve() if self.out is not None and self.out.name in ("", "..") else self.out
        # A second Ctrl-C ends training at once, and a run with checkpoints wants to be resumed.
        if (
            out is not None
            and out.name
            and any(out.with_name(f"{out.name}.run").glob("fold_*/checkpoint_*.safetensors"))
        ):
            return f"the last checkpoint is kept; go on with: {command_to_tell(resume=True)}"
        done = "cases prepared so far are kept" if self.begun else "nothing was begun"
        return f"{done}; begin again with: {command_to_tell(resume=True if self.resumable else None)}"


@contextmanager
def _stoppable_before_training() -> Iterator[_Before]:
    """Let SIGTERM unwind imports, check, plan and preprocessing, as Ctrl-C does; training handles both itself."""
    before = _Before()
    try:
        with sigterm_raises(lambda: SystemExit(STOPPED)):
            yield before
    except (KeyboardInterrupt, SystemExit):
        if os.environ.get("RANK", "0") == "0":
            print(f"stopped; {before.way_on()}", file=sys.stderr)
        raise


def _program(processes: int) -> str:
    return "sagittal" if processes == 1 else f"torchrun (as before, {processes} processes) -m sagittal"


def _share_processors(processes: int) -> None:
    """Give each process that `torchrun` started on this machine its part of the processors, where the user gave none.

    torchrun itself gives each of them a single thread, however many processors there are.
    """
    if processes > 1 and os.environ.get("OMP_NUM_THREADS", "1") == "1":
        import torch

        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        torch.set_num_threads(max(cores // processes, 1))


def _say_nothing(line: str) -> None:
    pass


def _say(line: str) -> None:
    print(line, flush=True)
