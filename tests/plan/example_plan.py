"""A plan in which as many fields as possible differ from their defaults."""

from __future__ import annotations

from sagittal.plan import DatasetSpec, Label, MedNeXtConfig, Plan
from sagittal.plan.augmentation import Augmentation
from sagittal.plan.loss import Loss
from sagittal.plan.optimizers import AdamW
from sagittal.plan.plan import CTNormalization, Inference, Patch, Preprocessing, ZScore
from sagittal.plan.schedule import Schedule
from sagittal.plan.training import Training

CLASSES = DatasetSpec(
    name="vessels",
    channel_names=("CT", "T1"),
    labels=(Label(name="artery", values=(2,)), Label(name="vein", values=(300,))),
    ignore_value=9,
    file_ending=".nii.gz",
)
REGIONS = DatasetSpec(
    name="tumours",
    channel_names=("T1",),
    labels=(Label(name="whole", values=(1, 2, 4)), Label(name="core", values=(2, 4))),
    regions_class_order=(1, 2),
    file_ending=".nii",
)
PLAN = Plan(
    network_name="mednext-s",
    dataset=CLASSES,
    fingerprint_sha256="ab" * 32,
    preprocessing=Preprocessing(
        spacing_mm=(2.5, 0.1, 1 / 3),
        normalization=(CTNormalization(lower=-100.5, upper=400.0, mean=0.1 + 0.2, std=1e-3), ZScore(nonzero_only=True)),
    ),
    patch=Patch(size=(48, 64, 80)),
    network=MedNeXtConfig(kernel_size=5, expansion_ratio=(2, 3, 4, 4, 4, 4, 4, 3, 2)),
    training=Training(
        batch_size=3,
        optimizer=AdamW(learning_rate=1e-3, weight_decay=3e-5),
        loss=Loss(deep_supervision_weights=(0.5, 0.25, 0.125, 0.0625, 0.0625)),
        augmentation=Augmentation(mirror_axes=(0, 1)),
        gradient_clip_norm=1.5,
        seed=2**40,
    ),
    schedule=Schedule(steps=1000, warmup_fraction=0.02, warmup_start_factor=0.01),
    inference=Inference(overlap=0.25, mirror_axes=()),
    reasons={"patch.size": "fits into 8 GiB", "schedule.steps": "–"},
)
