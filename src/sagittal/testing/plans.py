"""A Plan without a data set behind it: to test with and to measure with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sagittal.plan import DatasetSpec, Label, Plan, network_config
from sagittal.plan.augmentation import Augmentation
from sagittal.plan.base import Triple, TripleMm
from sagittal.plan.loss import Loss
from sagittal.plan.optimizers import AdamW
from sagittal.plan.overrides import deep_supervision_weights, override
from sagittal.plan.plan import Inference, Patch, Preprocessing, ZScore
from sagittal.plan.schedule import Schedule
from sagittal.plan.training import Training


def untrained_spec(num_outputs: int, channels: int = 1) -> DatasetSpec:
    """Return a data set's declaration with background and `num_outputs - 1` classes, values 1, 2, ..."""
    return DatasetSpec(
        name="untrained",
        channel_names=tuple(f"channel_{index}" for index in range(channels)),
        labels=tuple(Label(name=f"class_{value}", values=(value,)) for value in range(1, num_outputs)),
        file_ending=".nii.gz",
    )


def untrained_plan(
    network_name: str,
    spec: DatasetSpec,
    *,
    patch_size: Triple = (128, 128, 128),
    spacing_mm: TripleMm = (1.0, 1.0, 1.0),
    settings: Mapping[str, Any] | None = None,
) -> Plan:
    """Return a plan for `network_name` whose every number is stated here, none measured.

    Args:
        network_name: a name of `sagittal networks`.
        spec: channels and labels.
        patch_size: window in voxels, D, H, W.
        spacing_mm: target spacing, D, H, W.
        settings: fields to change by dotted name, as `--set` does.

    Raises:
        PlanError: an unknown network or field, or a value that does not fit.
    """
    network = network_config(network_name)
    outputs = network.scales
    plan = Plan(
        network_name=network_name.lower(),
        dataset=spec,
        fingerprint_sha256="0" * 64,
        preprocessing=Preprocessing(spacing_mm=spacing_mm, normalization=_zscore(spec.channel_names)),
        patch=Patch(size=patch_size),
        network=network,
        training=Training(
            batch_size=2,
            optimizer=AdamW(learning_rate=1e-3, weight_decay=3e-5),
            loss=Loss(deep_supervision_weights=deep_supervision_weights(outputs)),
            augmentation=Augmentation(),
        ),
        schedule=Schedule(steps=1),
        inference=Inference(),
        reasons={"network": "an untrained network, to measure and test with"},
    )
    return override(plan, settings or {}, origin="--set")


def _zscore(channel_names: Sequence[str]) -> tuple[ZScore, ...]:
    return tuple(ZScore() for _ in channel_names)
