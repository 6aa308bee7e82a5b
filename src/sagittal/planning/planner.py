"""`make_plan`: the rules of this room in order, their values and reasons put together."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from math import inf, prod

from sagittal.errors import PlanError
from sagittal.plan import DatasetSpec, Fingerprint, Plan, network_config
from sagittal.plan.base import canonical_json
from sagittal.plan.plan import Inference, Patch, Preprocessing, Training
from sagittal.planning import recipe
from sagittal.planning.memory import training_step
from sagittal.planning.normalization import normalization
from sagittal.planning.patch import fit_batch, fit_patch, patch_rule
from sagittal.planning.spacing import median_shape, target_spacing

ANISOTROPY_THRESHOLD = 3.0
_ALWAYS = {
    "preprocessing.orientation": "scans of any axis order reach the network the same way round",
    "preprocessing.anisotropy_threshold": "nnU-Net's",
    "training.foreground_oversampling": "nnU-Net's, a third of each batch on the foreground",
    "training.gradient_clip_norm": "nnU-Net's",
    "training.precision": "fp32 is for every device; bf16 takes less memory on a GPU, seldom less time",
    "training.split_seed": "nnU-Net's, so that folds can be compared",
    "inference.overlap": "nnU-Net's, half a window",
    "inference.mirror_axes": "the axes that training mirrors",
}
"""Reasons of what is the same for every data set and network."""


def make_plan(fingerprint: Fingerprint, spec: DatasetSpec, network_name: str, *, memory_gib: float = 8.0) -> Plan:
    """Plan preprocessing and training of a network for a data set.

    Args:
        fingerprint: what was measured of the data set.
        spec: what it declares.
        network_name: for example `mednext-s`; see `sagittal.plan.NETWORKS`.
        memory_gib: memory that the tensors of one training step may take.

    Raises:
        PlanError: no network has this name, the fingerprint has other channels, or `memory_gib` is not positive.
        ResourceError: even the smallest patch does not fit into `memory_gib`; the message says how much it needs.
    """
    network = network_config(network_name)
    if len(fingerprint.intensities) != len(spec.channel_names):
        raise PlanError(
            f"the fingerprint has {len(fingerprint.intensities)} channels, dataset.json declares "
            f"{len(spec.channel_names)} ({', '.join(spec.channel_names)}). Take the fingerprint of this data set."
        )
    if not 0 < memory_gib < inf:
        raise PlanError(f"--memory-gib {memory_gib}: expected more than 0, for example 8.")
    spacing, why_spacing = target_spacing(fingerprint, ANISOTROPY_THRESHOLD)
    schemes, why_schemes = normalization(spec.channel_names, fingerprint)
    shape = median_shape(fingerprint, spacing)
    rule = patch_rule(network)
    step = training_step(network, len(spec.channel_names), spec.num_outputs)
    patch_size, why_patch = fit_patch(step, spacing, shape, rule, memory_gib)
    voxels = float(prod(shape)) * fingerprint.num_cases
    batch_size, why_batch = fit_batch(step, patch_size, voxels, rule, memory_gib)
    optimizer, why_optimizer = recipe.optimizer(network)
    schedule, why_schedule = recipe.schedule(network)
    loss, why_loss = recipe.loss(network)
    augmentation, why_augmentation = recipe.augmentation(spec, patch_size)
    return Plan(
        network_name=network_name.lower(),
        dataset=spec,
        fingerprint_sha256=fingerprint_sha256(fingerprint),
        preprocessing=Preprocessing(
            spacing_mm=spacing, normalization=schemes, anisotropy_threshold=ANISOTROPY_THRESHOLD
        ),
        patch=Patch(size=patch_size),
        network=network,
        training=Training(batch_size=batch_size, optimizer=optimizer, loss=loss, augmentation=augmentation),
        schedule=schedule,
        inference=Inference(mirror_axes=augmentation.mirror_axes),
        reasons={
            "network": f"chosen by name, {network_name.lower()}",
            "preprocessing.crop_to_nonzero": _crop_reason(fingerprint),
            "preprocessing.spacing_mm": why_spacing,
            "preprocessing.normalization": why_schemes,
            "patch.size": why_patch,
            "training.batch_size": why_batch,
            **_under("training.optimizer", why_optimizer),
            **_under("training.loss", why_loss),
            **_under("training.augmentation", why_augmentation),
            **_under("schedule", why_schedule),
            **_ALWAYS,
        },
    )


def fingerprint_sha256(fingerprint: Fingerprint) -> str:
    """Return the hash that a plan keeps of the fingerprint it was made from."""
    return hashlib.sha256(canonical_json(fingerprint).encode()).hexdigest()


def _under(group: str, reasons: Mapping[str, str]) -> dict[str, str]:
    return {f"{group}.{name}": reason for name, reason in reasons.items()}


def _crop_reason(fingerprint: Fingerprint) -> str:
    share = 100 * fingerprint.median_relative_size_after_crop
    return f"nnU-Net's; voxels outside of the non-zero box hold nothing, {share:.3g} % remain (median)"
