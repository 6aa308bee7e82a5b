"""How weights are fitted: batches, loss, optimiser, split."""

from __future__ import annotations

import re
from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, model_validator

from sagittal.plan.augmentation import Augmentation
from sagittal.plan.base import Frozen
from sagittal.plan.loss import Loss
from sagittal.plan.optimizers import Optimizer
from sagittal.plan.quantities import Count, Positive, Probability, Sha256


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
    precision: Literal["fp32", "bf16", "fp16", "fp64"] = "fp32"
    """Numbers of the forward pass; weights and their updates stay fp32 (but for fp64, which is for comparisons).
    fp16 is for GPUs; bf16 too, and on a CPU for MedNeXt where the processor has AMX tiles."""
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
    micro_batches: Count = 1
    """Parts that a batch is computed in, one after the other, with their gradients added up, to save memory. BatchNorm
    and batch Dice see one part at a time; all else is the whole batch's, up to rounding."""
    ema_decay: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share that the running mean of the weights keeps at each step; the mean is validated and becomes the result.
    0 for none."""
    class_balanced: bool = False
    """Whether a forced patch draws its class among all classes first, then a case that has it, so that rare classes
    come as often as common ones; otherwise the case first, then a class that it has (nnU-Net)."""
    case_weights_sha256: Sha256 | None = None
    """Hash of the weights of cases, where case_weights.csv in the data set's folder makes some come more often."""
    deterministic: bool = False
    """Whether only operations are used that give the same bits again on the same machine."""
    postprocessing: Literal["choose", "none"] = "choose"
    """Whether rules for the plan's `postprocessing` are chosen on the held-out cases at the end, where it has none."""

    later_fields: ClassVar[tuple[str, ...]] = (
        "initialization",
        "split",
        "patients_listed",
        "patient_pattern",
        "split_sha256",
        "micro_batches",
        "ema_decay",
        "class_balanced",
        "case_weights_sha256",
        "deterministic",
        "postprocessing",
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.batch_size % self.micro_batches:
            raise ValueError(
                f"micro_batches is {self.micro_batches}, expected a divisor of batch_size, {self.batch_size}"
            )
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
