"""Options of `sagittal predict`: how a scan is predicted, and what is written beside the label map."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from cyclopts import Parameter, validators

if TYPE_CHECKING:
    from sagittal.inference.fast import Fast
    from sagittal.inference.run_report import Choices

Precision = Literal["fp32", "bf16", "fp16", "int8"]
"""As `inference.engines.engine` has it, which the command line loads only where something is computed."""

_Flag = Annotated[bool, Parameter(negative="")]
_Share = Annotated[float | None, Parameter(validator=validators.Number(gt=0, lte=1))]


@Parameter(name="*")
@dataclass(frozen=True)
class HowToPredict:
    """How a scan is predicted.

    Attributes:
        mirror: average over mirrored copies (--no-mirror is up to eight times faster)
        step: distance of neighbouring windows as a share of the window, 0.5 for example; by itself the plan's
        fast: the bundle's second model where it has one (train --config 3d,3d-low), else no mirroring and step 0.75
        postprocessing: apply the rules of the plan to label maps (--no-postprocessing leaves them out)
        missing: names of channels that the scans lack, with commas: t1ce; for models trained with channel dropout
        kernels: with the engine torch, Sagittal's kernels or plain PyTorch; auto takes them where they are faster
        series: of a DICOM study, the UID or number of the series to take, one per channel in the channels' order with
            commas; `sagittal info STUDY` lists them
        others: a further bundle, of the same channels and labels, to average the probabilities with; may be repeated
    """

    mirror: bool = True
    step: _Share = None
    fast: _Flag = False
    postprocessing: bool = True
    missing: str | None = None
    kernels: Literal["auto", "on", "off"] = "auto"
    series: str | None = None
    others: Annotated[tuple[Path, ...], Parameter(name="--with", negative="")] = ()

    def inputs(self, given: Sequence[Path]) -> list[Path]:
        """Return the scans to predict: as given, or the named series of the one study that is given.

        Raises:
            PlanError: series are named of several inputs.
        """
        from sagittal.errors import PlanError
        from sagittal.volumes.dicom_files import with_series

        if self.series is None:
            return list(given)
        if len(given) != 1:
            raise PlanError(
                f"--series {self.series}: {len(given)} inputs. Expected the one study that holds the series. Give one, "
                "or name the series as STUDY#UID.",
                code="usage",
            )
        return [with_series(given[0], uid) for uid in _listed(self.series)]


@Parameter(name="*")
@dataclass(frozen=True)
class Writing:
    """What is written.

    Attributes:
        subset: names of the only classes to write, with commas: liver,spleen
        preview: a picture per case, three planes through the largest structure; scans can be recognised in it
        probabilities: CASE.npz with the probabilities of all classes as float16, (K, D, H, W) as the scan is stored
        entropy: entropy/CASE with how unsure each voxel is, 0 to 1
        quality: how far mirrored copies or folds agree, and which cases to look at because of it; needs mirroring
            or several folds
        dicom: DICOM objects beside the label maps of DICOM series, with commas: seg, labelmap, rtstruct, overview, sr
    """

    subset: str | None = None
    preview: _Flag = False
    probabilities: _Flag = False
    entropy: _Flag = False
    quality: _Flag = False
    dicom: str | None = None

    def choices(
        self,
        how: HowToPredict,
        precision: Precision,
        say: Callable[[str], None],
        fast: Sequence[Fast] = (),
    ) -> Choices:
        """Return what the library is told."""
        from sagittal.inference.dicom_outputs import parse_kinds
        from sagittal.inference.run_report import Choices

        mirror, step = how.mirror and not how.fast, how.step
        for each in fast:
            step = each.step if step is None else step
        for sentence in dict.fromkeys(each.sentence for each in fast):
            say(sentence)
        return Choices(
            precision=precision,
            mirror=mirror,
            step=step,
            fast=how.fast,
            subset=_listed(self.subset),
            missing=_listed(how.missing),
            postprocessing=how.postprocessing,
            preview=self.preview,
            probabilities=self.probabilities,
            entropy=self.entropy,
            quality=self.quality,
            dicom=parse_kinds(self.dicom),
        )


def _listed(text: str | None) -> tuple[str, ...]:
    return tuple(part.strip() for part in (text or "").split(",") if part.strip())
