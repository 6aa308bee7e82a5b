"""Options of `sagittal train` that can't change a weight: where and how it runs, what is kept, who is told."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import Parameter, validators

from sagittal.cli.options import kernels_file, known_folder, parse_devices, parse_duration_s

if TYPE_CHECKING:
    from sagittal.training.stages import RunOptions

_AtLeastOne = Annotated[int, Parameter(validator=validators.Number(gte=1))]
_AtLeastZero = Annotated[int | None, Parameter(validator=validators.Number(gte=0))]


@Parameter(name="*")
@dataclass(frozen=True)
class HowToRun:
    """Where and how a training runs.

    Attributes:
        device: auto, cpu, cuda, cuda:1 or mps
        devices: with --fold all: where folds are trained side by side, for example cuda:0,cuda:1
        cache: folder for preprocessed cases, which runs may share
        resume: go on from the last checkpoint; of several folds, those that failed or were stopped
        memory_gib: memory that a training step may use, where a plan is made here
        splits: own splits, as nnU-Net's splits_final.json; one in the data set's folder is taken without being named
        checkpoint_every: time between two checkpoints
        keep_checkpoints: how many of them are kept, the last ones
        workers: threads that make training batches; by itself what the device needs
        compile: whether the network is compiled; auto where that pays
        kernels: Sagittal's kernels or plain PyTorch; auto takes them where they run and are faster
        log: what else receives the log, in the run's own folder: tensorboard, mlflow or both, with a comma
    """

    device: str = "auto"
    devices: str | None = None
    cache: Path | None = None
    resume: Annotated[bool, Parameter(negative="")] = False
    memory_gib: float = 8.0
    splits: Path | None = None
    checkpoint_every: str = "60s"
    keep_checkpoints: _AtLeastOne = 2
    workers: _AtLeastZero = None
    compile: Literal["auto", "on", "off"] = "auto"
    kernels: Literal["auto", "on", "off"] = "auto"
    log: str | None = None

    def options(self, **more: Any) -> RunOptions:
        """Return what the library is told; `more` are fields that no option gives, and the device of this machine.

        Raises:
            PlanError: a time that is none, or --device and --devices together.
        """
        from sagittal.errors import PlanError
        from sagittal.training.stages import RunOptions

        if self.devices is not None and self.device != "auto":
            raise PlanError("--device and --devices exclude each other. Give one of them.", code="options")
        for option, text in (("--device", self.device), ("--devices", self.devices)):
            if text is not None:
                parse_devices(text, option)
        return RunOptions(
            device=more.pop("device", self.device),
            devices=_listed(self.devices),
            cache=None if self.cache is None else self.cache.absolute(),
            known=known_folder(),
            known_kernels=kernels_file(),
            resume=self.resume,
            memory_gib=self.memory_gib,
            splits=None if self.splits is None else self.splits.absolute(),
            checkpoint_every_s=parse_duration_s(self.checkpoint_every, "--checkpoint-every"),
            keep_checkpoints=self.keep_checkpoints,
            loader_workers=self.workers,
            compile=self.compile,
            kernels=self.kernels,
            trackers=_listed(self.log),
            **more,
        )


def _listed(text: str | None) -> tuple[str, ...]:
    return tuple(part.strip() for part in (text or "").split(",") if part.strip())
