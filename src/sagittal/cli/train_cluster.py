"""Options of `sagittal train --on`: the machines that train the folds."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter, validators

from sagittal.cli.train_options import HowToRun
from sagittal.errors import PlanError, ResourceError

if TYPE_CHECKING:
    from sagittal.cluster.places import Place
    from sagittal.cluster.ray_session import Needs, Session
    from sagittal.training.run import TrainResult


_Cpus = Annotated[int | None, Parameter(validator=validators.Number(gte=1))]
_Processes = Annotated[int, Parameter(validator=validators.Number(gte=1))]
_Gpus = Annotated[int | None, Parameter(validator=validators.Number(gte=0, lte=1))]


@Parameter(name="*")
@dataclass(frozen=True)
class OnMachines:
    """Where folds are trained, if not here.

    Attributes:
        on: machines that train the folds: ray (the cluster that runs here, else one on this machine), ray:HOST:PORT,
            ray://HOST:PORT, or slurm:partition=NAME,time=8h,gpus=1,cpus=8 (docs/cluster-slurm.md)
        fold_cpus: processors, and threads, of each fold; by itself those of the smallest node, or its share per GPU
        fold_gpus: 1 or 0 GPUs for each fold; by itself 1 where the cluster has GPUs
        fold_processes: on Ray, processes that train each fold together, with so many CPUs and GPUs each; then one fold
            after the other
        store: on Ray, folder or URL (s3://BUCKET/FOLDER) through which data and checkpoints go, where nodes don't see
            this machine's folders
    """

    on: str | None = None
    fold_cpus: _Cpus = None
    fold_gpus: _Gpus = None
    fold_processes: _Processes = 1
    store: str | None = None

    @property
    def is_slurm(self) -> bool:
        """Whether `on` names SLURM."""
        return self.on is not None and self.on.partition(":")[0] == "slurm"

    def require_alone(self, *, device: str, devices: str | None, processes: int) -> None:
        """Refuse what can't go together, before anything is begun.

        Raises:
            PlanError: such an option was given.
        """
        if self.on is None:
            if self != OnMachines():
                raise PlanError(
                    "--fold-cpus, --fold-gpus, --fold-processes and --store belong to --on. Name the machines there.",
                    code="options",
                )
            return
        if self.store is not None and self.fold_processes > 1:
            raise PlanError(
                "--store and --fold-processes exclude each other: processes that train one fold together share its "
                "folder. Give --out, --cache and the data set on a file system that all nodes see, without --store.",
                code="options",
            )
        if devices is not None or processes > 1 or device not in ("auto", "cpu", "cuda"):
            given = f"--devices {devices}" if devices else "torchrun" if processes > 1 else f"--device {device}"
            raise PlanError(
                f"{given}: with --on, other machines train, each fold on one GPU or none there. Leave it out, or "
                "choose --device auto, cpu or cuda.",
                code="options",
            )
        if device == "cpu" and self.fold_gpus:
            raise PlanError("--device cpu and --fold-gpus 1 exclude each other. Give one of them.", code="options")
        if device == "cuda" and self.fold_gpus == 0:
            raise PlanError("--device cuda and --fold-gpus 0 exclude each other. Give one of them.", code="options")

    @contextmanager
    def told(self, device: str, say: Callable[[str], None], *, budgeted: bool) -> Iterator[dict[str, Any]]:
        """Yield the fields of `RunOptions` that let other machines train while the block runs; none for this machine.

        Args:
            device: kind of device that folds are trained on.
            say: receives lines for a person.
            budgeted: whether a step is to be measured, which is done here.

        Raises:
            PlanError: `on` names no place.
            ResourceError: the cluster can't be reached, is of other versions or too small, or a package is missing.
        """
        if self.on is None:
            yield {}
            return
        from sagittal.cluster.places import parse_place

        place = parse_place(self.on)
        if place.kind == "slurm":
            yield self._on_slurm(place, device)
            return
        from sagittal.cluster.fold_table import FoldTable
        from sagittal.cluster.folds import RayFolds, Road, SamePaths

        road: Road = SamePaths()
        if self.store is not None:
            from sagittal.cluster.carried_folds import CarriedFolds

            road = CarriedFolds(self.store)
        with self.session(device, say, by_store=True) as (session, needs):
            if budgeted:
                _require_like_nodes(needs.gpus)
            at_once = session.slots(needs)
            # This machine checks, plans and prepares on what it has itself.
            here = "auto" if device == "cuda" else device
            carrier = RayFolds(session, needs, table=FoldTable(say), road=road)
            yield {"carrier": carrier, "at_once": at_once, "device": here}

    def _on_slurm(self, place: Place, device: str) -> dict[str, Any]:
        if self != OnMachines(on=self.on):
            raise PlanError(
                f"--on {place}: --fold-cpus, --fold-gpus, --fold-processes and --store are Ray's. Say to SLURM: "
                "slurm:cpus=8,gpus=1; its nodes share a file system.",
                code="options",
            )
        from sagittal.cluster.slurm_folds import SlurmFolds

        carrier = SlurmFolds(place, device=device)
        # This machine checks, plans and prepares on what it has itself.
        here = "auto" if device == "cuda" else device
        return {"carrier": carrier, "at_once": carrier.at_once, "device": here}

    @contextmanager
    def session(
        self, device: str, say: Callable[[str], None], *, by_store: bool = False
    ) -> Iterator[tuple[Session, Needs]]:
        """Yield the cluster that `on` names, and what a fold occupies there.

        Args:
            device: kind of device that folds are trained on.
            say: receives lines for a person.
            by_store: whether what is done there can go by `store`.

        Raises:
            PlanError: `on` names no cluster.
            ResourceError: it can't be reached, is of other versions or too small, or Ray is missing.
        """
        from sagittal.cluster.places import parse_place

        assert self.on is not None
        place = parse_place(self.on)
        if place.kind == "slurm":
            raise PlanError(f"--on {place}: this is done on ray. Choose --on ray.", code="options")
        if self.store is not None and not by_store:
            raise PlanError(
                "--store is for the folds of 'train', and for 'predict'. Leave it out, and give --out and the data set "
                "on a file system that all nodes see.",
                code="options",
            )
        from sagittal.cluster.folds import needs_of_a_fold
        from sagittal.cluster.ray_session import connected

        with connected(place, say=say) as session:
            gpus = {"cpu": 0, "cuda": 1}.get(device, self.fold_gpus)
            needs = needs_of_a_fold(session.nodes, cpus=self.fold_cpus, gpus=gpus)
            session.require(needs, "a fold")
            yield session, needs

    def together(
        self, trains: Callable[..., TrainResult], dataset: Path, out: Path, how: HowToRun, wishes: Mapping[str, Any]
    ) -> TrainResult:
        """Train each fold with several processes of a Ray cluster.

        Args:
            trains: what each process runs.
            dataset, out: what it is told.
            how: where and how it runs.
            wishes: its other arguments.

        Raises:
            PlanError, ResourceError: as `session`; else what training raises.
        """

        def say(line: str) -> None:
            print(line, flush=True)

        with self.session(how.device, say) as (session, needs):
            from sagittal.cluster.ddp import train_together

            return train_together(
                trains,
                dataset.absolute(),
                out.absolute(),
                wishes=wishes,
                options=how.options(say=say),
                session=session,
                needs=needs,
                processes=self.fold_processes,
            )


def _require_like_nodes(gpus: int) -> None:
    """Make sure that a step that is measured here tells how long one takes on the nodes.

    Raises:
        ResourceError: they have GPUs, and this machine has none.
    """
    import torch

    if gpus and not torch.cuda.is_available():
        raise ResourceError(
            "--budget measures a step on this machine, which has no GPU, while folds would be trained on GPUs. Start "
            "the command on a machine like the nodes, or give --set schedule.steps=N instead of --budget.",
            code="budget_elsewhere",
        )
