"""The Plan: everything that can change a weight or a voxel, with the reason of every number."""

from __future__ import annotations

import json
import re
from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, model_validator

from sagittal.errors import PlanError
from sagittal.plan.base import Frozen, Triple, TripleMm
from sagittal.plan.dataset import DatasetSpec
from sagittal.plan.migrations import migrate
from sagittal.plan.networks import NetworkConfig

Positive = Annotated[float, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]
Probability = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=1)]
PositiveTripleMm = tuple[Positive, Positive, Positive]
Configuration = Literal["3d", "3d-low", "2d"]
"""What the network sees: the scan, the scan at a coarser spacing, or one slice of it at a time."""
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


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


class AdamW(Frozen):
    """AdamW (arXiv 1711.05101)."""

    kind: Literal["adamw"] = "adamw"
    learning_rate: Positive
    weight_decay: NonNegative
    eps: Positive = 1e-8
    betas: tuple[Probability, Probability] = (0.9, 0.999)


class SGD(Frozen):
    """Stochastic gradient descent with Nesterov momentum."""

    kind: Literal["sgd"] = "sgd"
    learning_rate: Positive
    weight_decay: NonNegative
    momentum: Probability = 0.99


Optimizer = Annotated[AdamW | SGD, Field(discriminator="kind")]


class Schedule(Frozen):
    """How long training lasts, and its learning rate: linear warm-up, then (1 - t)^power down to `final_factor`."""

    steps: Count
    """Optimiser steps in all."""
    warmup_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of the steps in which the rate rises linearly to its peak."""
    warmup_start_factor: Probability = 0.0
    power: NonNegative = 0.9
    final_factor: Probability = 0.0
    """The rate never falls below this share of its peak."""
    validations: Annotated[int, Field(ge=0)] = 20
    """Whole-case validations, evenly spread; the one at the end is made in any case, so 0 and 1 mean that one alone."""
    validation_cases: Count = 20
    """Cases predicted whole at each validation but the last, which takes them all where the time allows."""

    @property
    def warmup_steps(self) -> int:
        """Steps of the warm-up."""
        return int(self.warmup_fraction * self.steps)


class Loss(Frozen):
    """Dice + cross-entropy (softmax), or Dice + binary cross-entropy for regions."""

    dice_weight: NonNegative = 1.0
    cross_entropy_weight: NonNegative = 1.0
    batch_dice: bool = False
    """Sum intersections and volumes over the batch before the ratio."""
    dice_smooth: NonNegative = 1e-5
    deep_supervision_weights: tuple[NonNegative, ...] = (1.0,)
    """Weights of the outputs from fine to coarse; one value for a network without deep supervision."""


class Augmentation(Frozen):
    """Probabilities and ranges of the random changes to a training patch (nnU-Net's defaults)."""

    rotation_probability: Probability = 0.2
    rotation_degrees: Annotated[float, Field(ge=0, le=180)] = 30.0
    scaling_probability: Probability = 0.2
    scaling_range: tuple[Positive, Positive] = (0.7, 1.4)
    mirror_axes: tuple[Literal[0, 1, 2], ...] = (0, 1, 2)
    """Axes of the network's arrays that are mirrored, each with probability 0.5."""
    noise_probability: Probability = 0.1
    noise_variance: tuple[NonNegative, NonNegative] = (0.0, 0.1)
    blur_probability: Probability = 0.2
    blur_sigma_vox: tuple[Positive, Positive] = (0.5, 1.0)
    brightness_probability: Probability = 0.15
    brightness_range: tuple[Positive, Positive] = (0.75, 1.25)
    contrast_probability: Probability = 0.15
    contrast_range: tuple[Positive, Positive] = (0.75, 1.25)
    low_resolution_probability: Probability = 0.25
    low_resolution_range: tuple[Positive, Positive] = (0.5, 1.0)
    gamma_probability: Probability = 0.3
    gamma_inverted_probability: Probability = 0.1
    gamma_range: tuple[Positive, Positive] = (0.7, 1.5)


class Initialization(Frozen):
    """The trained weights that training starts from, instead of random ones (`sagittal train --init-from`)."""

    network_name: str
    """The network that they belong to."""
    channel_names: tuple[str, ...]
    """The channels that it was trained on, in order."""
    outputs: tuple[str, ...]
    """What its outputs stand for, in order; other ones start afresh."""
    weights_sha256: Annotated[dict[str, Sha256], Field(min_length=1)]
    """Hash of each weights file of the bundle: fold k starts from `fold_k`, else from `all`, else from the first."""
    held_out_unseen: bool
    """Whether they were trained on these very cases by this split, so that `fold_k` never saw what fold k holds out."""
    freeze_encoder_steps: Annotated[int, Field(ge=0)] = 0
    """Steps at the beginning in which the encoder stays as it is, so that fresh heads don't spoil it."""


class Training(Frozen):
    """How weights are fitted."""

    batch_size: Count
    optimizer: Optimizer
    loss: Loss
    augmentation: Augmentation
    foreground_oversampling: Probability = 0.33
    """Share of each batch whose patch is placed on a random foreground voxel of a random class."""
    gradient_clip_norm: Positive = 12.0
    precision: Literal["fp32", "bf16"] = "fp32"
    folds: Annotated[int, Field(ge=1, le=5)] = 5
    """Parts that the cases are split into, each of which is held out once; one only with own splits."""
    split_seed: int = 12345
    split: Literal["random", "stratified", "own"] = "random"
    """How cases are split: at random, so that each fold has its share of each set of labels, or as a file says."""
    patients_listed: bool = False
    """Whether patients.csv in the data set's folder tells which cases are of one patient, who is never split."""
    patient_pattern: str | None = None
    """Or the pattern that every case id matches as a whole (Python's `re`); its first group is the patient."""
    split_sha256: Sha256 | None = None
    """Hash of the folds where more than ids and seed decides on them: they must be the same again at training."""
    seed: int = 0
    initialization: Initialization | None = None
    """None for random weights."""

    later_fields: ClassVar[tuple[str, ...]] = (
        "initialization",
        "split",
        "patients_listed",
        "patient_pattern",
        "split_sha256",
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.folds == 1 and self.split != "own":
            raise ValueError("folds is 1, expected 2 to 5: only own splits may be a single one")
        if self.patient_pattern is not None:
            if self.patients_listed:
                raise ValueError("patients_listed and patient_pattern exclude each other: set one of them")
            try:
                groups = re.compile(self.patient_pattern).groups
            except re.error as error:
                raise ValueError(
                    f"patient_pattern '{self.patient_pattern}' is no regular expression: {error}"
                ) from None
            if groups < 1:
                raise ValueError(f"patient_pattern '{self.patient_pattern}' needs a group, for example (.*)_\\d+")
        return self

    @property
    def split_by_files(self) -> bool:
        """Whether more than case ids and seed decides on the folds: a file, or what the labels hold."""
        return self.split != "random" or self.patients_listed


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
    reasons: dict[str, str]
    """Why each field has its value, by dotted name; `--set` and `--budget` write their own."""

    later_fields: ClassVar[tuple[str, ...]] = ("configuration",)

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
        self._check_dims()
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


def as_triple(values: list[int] | tuple[int, ...]) -> Triple:
    """Return three integers as a typed tuple."""
    d, h, w = values
    return d, h, w
