"""Options of `sagittal predict --on`: many machines instead of this one."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter, validators

from sagittal.cli.progress import CountLines
from sagittal.errors import PlanError

if TYPE_CHECKING:
    from sagittal.cluster.places import Place
    from sagittal.cluster.ray_session import Session
    from sagittal.data.dataset import Case
    from sagittal.inference.folder import Tell
    from sagittal.inference.pipeline import Job
    from sagittal.inference.processes import Loading
    from sagittal.inference.run_report import CasePrediction

_Count = Annotated[int | None, Parameter(validator=validators.Number(gte=1))]


@Parameter(name="*")
@dataclass(frozen=True)
class OnCluster:
    """Where many machines predict.

    Attributes:
        on: a Ray cluster: ray (the one that runs here, else one on this machine), ray:HOST:PORT or ray://HOST:PORT; or
            slurm:partition=NAME,time=2h,gpus=1,shards=8 (docs/cluster-slurm.md)
        workers: on Ray, at most so many; by itself as many as there is room for, nodes that join later included
        worker_cpus: on Ray, processors of each worker; by itself those of the smallest node, at most 8
        store: on Ray, folder or URL (s3://BUCKET/FOLDER) that scans and results go through, where nodes don't see this
            machine's folders
    """

    on: str | None = None
    workers: _Count = None
    worker_cpus: _Count = None
    store: str | None = None

    def require_unasked(self, bundle: str) -> None:
        """Refuse these options for a service.

        Raises:
            PlanError: one was given.
        """
        if self != OnCluster():
            raise PlanError(
                f"{bundle}: a service computes where it runs. Leave out --on, --workers, --worker-cpus and --store.",
                code="usage",
            )

    def place(self, devices: Sequence[str]) -> Place | None:
        """Return the cluster that is named, None for this machine.

        Raises:
            PlanError: none can be meant.
        """
        if self.on is None:
            if self != OnCluster():
                raise PlanError(
                    "--workers, --worker-cpus and --store are about a cluster. Give --on ray, or leave them out.",
                    code="usage",
                )
            return None
        from sagittal.cluster.places import parse_place

        place = parse_place(self.on)
        if place.kind == "slurm" and self != OnCluster(self.on):
            raise PlanError(
                f"--on {self.on}: --workers, --worker-cpus and --store are about Ray. For jobs, write shards=, cpus= "
                "and gpus= in --on.",
                code="usage",
            )
        if len(devices) > 1:
            raise PlanError(
                f"--device {','.join(devices)}: on a cluster each worker has a device of its own. Expected auto, cpu "
                "or cuda.",
                code="usage",
            )
        return place

    @contextmanager
    def joined(
        self, place: Place | None, devices: Sequence[str], out: Path, say: Callable[[str], None]
    ) -> Iterator[tuple[Sequence[str], Session | Place | None]]:
        """Join the cluster while the block runs.

        Yields the devices that compute, and where: None is this machine. What an earlier command on SLURM left in `out`
        is taken over.
        """
        if place is None:
            yield devices, None
        elif place.kind == "slurm":
            from sagittal.cluster.slurm_predict import device_in_jobs, recover

            device = device_in_jobs(place, devices[0])
            recover(place, out)
            yield (device,), place
        else:
            from sagittal.cluster.predict import device_on
            from sagittal.cluster.ray_session import connected

            with connected(place, say=say) as session:
                yield (device_on(session, devices[0]),), session

    def predict(
        self, where: Session | Place, device: str, loading: Loading, job: Job, cases: Sequence[Case], tell: Tell
    ) -> None:
        """Predict cases there."""
        from sagittal.cluster.places import Place

        lines, done = CountLines("predicted"), 0

        def told(case: CasePrediction) -> None:
            nonlocal done
            done += 1
            lines(done, len(cases))
            tell(case)

        if isinstance(where, Place):
            from sagittal.cluster.slurm_predict import predict_on_slurm

            predict_on_slurm(where, loading, job, cases, told, _say_aside, device=device)
        else:
            from sagittal.cluster.predict import Crew, predict_on_ray

            crew = Crew(device, self.worker_cpus, self.workers, self.store)
            predict_on_ray(where, crew, loading, job, cases, told, _say_aside)


def _say_aside(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
