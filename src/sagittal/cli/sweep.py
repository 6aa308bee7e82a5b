"""`sagittal sweep`: several networks on the same folds at equal time, and the bundle of the best."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter, validators

from sagittal.cli.options import Settings, parse_duration_s, parse_settings_option
from sagittal.cli.stopping import STOPPED, command_to_tell, sigterm_raises
from sagittal.cli.train_cluster import OnMachines
from sagittal.cli.train_options import HowToRun
from sagittal.errors import PlanError

if TYPE_CHECKING:
    from sagittal.training.sweep import Standing, Sweep

_Folds = Annotated[int, Parameter(validator=validators.Number(gte=2, lte=5))]


def sweep(
    dataset: Path,
    *,
    out: Path,
    networks: str,
    budget: str,
    folds: _Folds = 5,
    settings: Settings = None,
    how: HowToRun = HowToRun(),  # noqa: B008 - frozen
    machines: OnMachines = OnMachines(),  # noqa: B008 - frozen
) -> int:
    """Compare networks by cross-validation at equal time, stop those that are behind, and keep the winner's bundle.

    OUT/winner is the bundle, OUT/compared/comparison.html the comparison; the same command with --resume goes on.

    Args:
        dataset: folder in nnU-Net's layout
        out: folder for bundles, runs and the comparison
        networks: names with commas between, for example mednext-s,mednext-b,segformer3d
        budget: time for each network over all its folds, for example 1h
        folds: how many folds each is trained on
        how: see HowToRun
        machines: see OnMachines
    """
    from sagittal.training.sweep import Interrupted, Sweep, begin, conclude, keep

    machines.require_alone(device=how.device, devices=how.devices, processes=1)
    _require_one_fold_each(how, machines)
    asked = Sweep(
        dataset=dataset.absolute(),
        out=out.absolute(),
        networks=tuple(name.strip() for name in networks.split(",") if name.strip()),
        budget_s=parse_duration_s(budget),
        folds=folds,
        settings=parse_settings_option(settings),
        options=how.options(say=_say),
    )
    standing = begin(asked, resume=how.resume)
    try:
        # What waits for other machines is ended by it; training here handles it itself.
        with sigterm_raises(lambda: Interrupted("terminated")):
            standing = _train(asked, standing, lambda now: keep(asked, now), how, machines)
    except (Interrupted, KeyboardInterrupt) as stop:
        _say(f"stopped; go on with: {command_to_tell(resume=True)}")
        return STOPPED if isinstance(stop, Interrupted) and stop.ended == "terminated" else 130
    winner = conclude(asked, standing)
    _say(f"bundle: {winner}")
    return 1 if standing.failed else 0


def _train(
    asked: Sweep, standing: Standing, told: Callable[[Standing], None], how: HowToRun, machines: OnMachines
) -> Standing:
    """Train here or on other machines."""
    from sagittal.training.sweep import sweep_here, sweep_in_arrays

    if machines.on is None:
        return sweep_here(asked, standing, told)
    if machines.is_slurm:
        with machines.told(how.device, _say, budgeted=True) as elsewhere:
            there = replace(asked, options=replace(asked.options, **elsewhere))
            return sweep_in_arrays(there, standing, told)
    with machines.session(how.device, _say) as (session, needs):
        from sagittal.cluster.sweep import sweep_on_ray

        return sweep_on_ray(asked, standing, told, session=session, needs=needs)


def _require_one_fold_each(how: HowToRun, machines: OnMachines) -> None:
    """Refuse what trains otherwise than each fold by itself.

    Raises:
        PlanError: such an option was given.
    """
    if machines.on is not None and machines.on.startswith("ray://"):
        raise PlanError(
            f"--on {machines.on}: a sweep listens to its networks from a node of the cluster. Give the command on one, "
            "with --on ray, or with --on ray:HOST:PORT.",
            code="options",
        )
    if machines.fold_processes > 1:
        raise PlanError(
            f"--fold-processes {machines.fold_processes}: a sweep trains each fold with one process. Leave it out.",
            code="options",
        )
    if how.devices is not None:
        raise PlanError(
            f"--devices {how.devices}: without --on, a sweep trains one fold at a time. Name one --device, or give "
            "--on ray:local, which trains a network on each GPU of this machine.",
            code="options",
        )


def _say(line: str) -> None:
    print(line, flush=True)
