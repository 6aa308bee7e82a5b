"""The Plan: everything that can change a weight or a voxel, with the reason of every number."""

from __future__ import annotations

import json
from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, model_validator

from sagittal.errors import PlanError, did_you_mean
from sagittal.plan.base import Frozen, Triple, TripleMm
from sagittal.plan.dataset import DatasetSpec
from sagittal.plan.migrations import migrate
from sagittal.plan.networks import NetworkConfig
from sagittal.plan.postprocessing import Rule, unknown_label
from sagittal.plan.quantities import Count, Positive
from sagittal.plan.schedule import Schedule
from sagittal.plan.training import Training
from sagittal.plan.volume_range import VolumeRange

PositiveTripleMm = tuple[Positive, Positive, Positive]
Configuration = Literal["3d", "3d-low", "2d"]
"""What the network sees: the scan, the scan at a coarser spacing, or one slice of it at a time."""


class ZScore(Frozen):
    """Subtract the mean and divide by the standard deviation of each image, each channel apart."""

    kind: Literal["zscore"] = "zscore"
    nonzero_only: bool = False
    """Use only the non-zero mask and leave the outside 0 (nnU-Net: where the crop saves a quarter)."""


class CTNormalization(Frozen):
    """Clip to percentiles 0.5 and 99.5 of the data set's foreground, then its mean and standard deviation (HU)."""

    kind: Literal["ct"] = "ct"
    lower: float
    upper: float
    mean: float
    std: Positive


class RescaleToUnit(Frozen):
    """Map each image's range to 0..1."""

    kind: Literal["rescale_to_0_1"] = "rescale_to_0_1"


class NoNormalization(Frozen):
    """Leave intensities as they are."""

    kind: Literal["none"] = "none"


Normalization = Annotated[ZScore | CTNormalization | RescaleToUnit | NoNormalization, Field(discriminator="kind")]


class Preprocessing(Frozen):
    """From a scan to the array that the network sees: reorient, transpose, crop, normalise, resample, in this order."""

    orientation: Literal["RAS", "stored"] = "RAS"
    """Axis order of the scan: D, H, W towards superior, anterior, right; or as the file stores them (nnU-Net)."""
    transpose: Triple = (0, 1, 2)
    """Which axes of the oriented scan are the network's first, second and third: the coarsest comes first (nnU-Net)."""
    crop_to_nonzero: bool = True
    spacing_mm: PositiveTripleMm
    """Target spacing along D, H, W of the oriented scan, before `transpose`."""
    normalization: tuple[Normalization, ...]
    """One per channel."""
    anisotropy_threshold: Positive = 3.0
    """Above this ratio of spacings the coarse axis is resampled apart from the plane (nnU-Net)."""
    keeps_slices: bool = False
    """Whether each case keeps its own spacing along the network's first axis, so that a network that sees slices sees
    none between two of the scan's (nnU-Net's 2d); there, `spacing_mm` only tells the usual spacing."""

    later_fields: ClassVar[tuple[str, ...]] = ("transpose", "keeps_slices")

    @model_validator(mode="after")
    def _check(self) -> Self:
        if sorted(self.transpose) != [0, 1, 2]:
            raise ValueError(f"transpose must name each of the axes 0, 1, 2 once, got {list(self.transpose)}")
        return self

    @property
    def network_spacing_mm(self) -> TripleMm:
        """Target spacing along the axes of the network's arrays."""
        first, second, third = self.transpose
        return self.spacing_mm[first], self.spacing_mm[second], self.spacing_mm[third]

    def target_mm(self, own_mm: TripleMm) -> TripleMm:
        """Return what a case of spacing `own_mm` is resampled to; both along the axes of the network's arrays."""
        first, second, third = self.network_spacing_mm
        return own_mm[0] if self.keeps_slices else first, second, third


class Patch(Frozen):
    """The window that the network sees, in training and in prediction."""

    size: tuple[Count, Count, Count]
    """Voxels along the network's axes: D, H, W of the oriented scan in the order of `preprocessing.transpose`."""


class Inference(Frozen):
    """How a whole scan is predicted."""

    overlap: Annotated[float, Field(ge=0, lt=1)] = 0.5
    """Share of the window's edge that neighbours have in common."""
    mirror_axes: tuple[Literal[0, 1, 2], ...] = (0, 1, 2)
    """Axes of the network's arrays that are mirrored at test time; all their combinations are averaged."""


class Plan(Frozen):
    """Everything that can change a weight or a voxel. What can't (device, workers, folders) is a run option."""

    schema_version: Literal[1] = 1
    network_name: str
    """The name that the network was chosen by; `network` is what counts."""
    configuration: Configuration = "3d"
    dataset: DatasetSpec
    fingerprint_sha256: str
    """Hash of the fingerprint that the plan was made from."""
    preprocessing: Preprocessing
    patch: Patch
    network: NetworkConfig
    training: Training
    schedule: Schedule
    inference: Inference
    postprocessing: tuple[Rule, ...] = ()
    """What is done to a label map after the network, in this order."""
    label_volumes: tuple[VolumeRange, ...] = ()
    """How large each label of `dataset` is in the training cases; changes no voxel, `sagittal qc` compares with it."""
    reasons: dict[str, str]
    """Why each field has its value, by dotted name; `--set` and `--budget` write their own."""

    later_fields: ClassVar[tuple[str, ...]] = ("configuration", "postprocessing", "label_volumes")

    @classmethod
    def from_json(cls, text: str | bytes, *, source: str = "JSON text") -> Self:
        """Parse `text`, written by this version or an earlier one.

        Raises:
            PlanError: it is no plan, one of a newer version, or not valid; the message names `source` and the field.
        """
        try:
            tree = json.loads(text)
        except ValueError as error:
            raise PlanError(
                f"{source}: not a plan, for it is no JSON ({error}). Expected a file of 'sagittal plan'."
            ) from None
        if not isinstance(tree, dict):
            raise PlanError(
                f"{source}: not a plan, but a JSON {type(tree).__name__}. Expected a file of 'sagittal plan'."
            )
        return super().from_json(json.dumps(migrate(tree, source=source)), source=source)

    @model_validator(mode="after")
    def _check(self) -> Self:
        channels, normalised = len(self.dataset.channel_names), len(self.preprocessing.normalization)
        if channels != normalised:
            raise ValueError(f"{channels} channels but {normalised} normalisations")
        outputs = self.network.scales
        weights = len(self.training.loss.deep_supervision_weights)
        if weights != outputs:
            raise ValueError(
                f"training.loss.deep_supervision_weights has {weights} values; this network has {outputs} "
                f"output{'s' if outputs > 1 else ''}"
            )
        if self.label_volumes and len(self.label_volumes) != len(self.dataset.labels):
            raise ValueError(f"{len(self.dataset.labels)} labels but {len(self.label_volumes)} label_volumes")
        self._check_dims()
        self._check_swapped_labels()
        if self.training.augmentation.channel_dropout and channels == 1:
            raise ValueError(
                f"training.augmentation.channel_dropout is {self.training.augmentation.channel_dropout} and there is "
                "one channel, which is never left out. Set it to 0"
            )
        unknown = unknown_label(self.postprocessing, self.dataset)
        if unknown is not None:
            names = [label.name for label in self.dataset.labels]
            raise ValueError(f"postprocessing: no label is called '{unknown}'.{did_you_mean(unknown, names)}")
        start = self.training.initialization
        if start is not None and start.freeze_encoder_steps >= self.schedule.steps:
            raise ValueError(
                f"training.initialization.freeze_encoder_steps is {start.freeze_encoder_steps} and schedule.steps "
                f"{self.schedule.steps}: the encoder would never be trained. Freeze it for fewer steps"
            )
        return self

    def _check_dims(self) -> None:
        sees_slices = self.configuration == "2d"
        if (self.network.dims == 2) != sees_slices:
            raise ValueError(
                f"configuration is {self.configuration} and the network one of {self.network.dims} axes. Plan with "
                f"--config {'3d' if sees_slices else '2d'}, or leave the network's axes as they were"
            )
        if sees_slices and self.patch.size[0] != 1:
            raise ValueError(f"configuration is 2d, so patch.size must begin with 1, got {list(self.patch.size)}")

    def _check_swapped_labels(self) -> None:
        name, swapped = "training.augmentation.swapped_labels", self.training.augmentation.swapped_labels
        unknown = sorted({value for _, *pair in swapped for value in pair} - self.dataset.foreground_values)
        if unknown:
            raise ValueError(
                f"{name} names label values {unknown}; expected two of {sorted(self.dataset.foreground_values)}. Take "
                "the pair out"
            )
        for axis in sorted({axis for axis, _, _ in swapped}):
            cut = self.dataset.cut_by_swaps((one, other) for of, one, other in swapped if of == axis)
            if cut is not None:
                raise ValueError(
                    f"{name} makes of '{cut.name}' {list(cut.values)} what is no label of the data set. Take axis "
                    f"{axis} out of training.augmentation.mirror_axes and its pairs out of swapped_labels"
                )


def as_triple(values: list[int] | tuple[int, ...]) -> Triple:
    """Return three integers as a typed tuple."""
    d, h, w = values
    return d, h, w
