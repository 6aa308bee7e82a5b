"""`make_plan`: the rules of this room in order, their values and reasons put together."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from math import inf, prod

from sagittal.errors import PlanError
from sagittal.plan import DatasetSpec, Fingerprint, Plan, network_config
from sagittal.plan.base import TripleMm, canonical_json
from sagittal.plan.plan import Inference, Patch, Preprocessing, Training
from sagittal.planning import recipe
from sagittal.planning.normalization import normalization
from sagittal.planning.patch import fit_batch, fit_patch, patch_rule
from sagittal.planning.spacing import in_network_order, median_shape, target_spacing, transposition
from sagittal.planning.topology import FittedStep, network_for_patch

ANISOTROPY_THRESHOLD = 3.0
_ALWAYS = {
    "preprocessing.anisotropy_threshold": "nnU-Net's",
    "training.foreground_oversampling": "nnU-Net's, a third of each batch on the foreground",
    "training.gradient_clip_norm": "nnU-Net's",
    "training.precision": "fp32 is for every device; bf16 takes less memory on a GPU, seldom less time",
    "training.split_seed": "nnU-Net's, so that folds can be compared",
    "inference.overlap": "nnU-Net's, half a window",
    "inference.mirror_axes": "the axes that training mirrors",
}
"""Reasons of what is the same for every data set and network."""


_ORIENTATIONS = {
    "RAS": "scans of any axis order reach the network the same way round",
    "stored": "as asked for: axes stay as the files store them, which is nnU-Net's way",
}


def make_plan(
    fingerprint: Fingerprint,
    spec: DatasetSpec,
    network_name: str,
    *,
    memory_gib: float = 8.0,
    spacing_mm: TripleMm | None = None,
) -> Plan:
    """Plan preprocessing and training of a network for a data set.

    Args:
        fingerprint: what was measured of the data set; its orientation becomes the plan's.
        spec: what it declares.
        network_name: for example `mednext-s`; see `sagittal.plan.NETWORKS`.
        memory_gib: memory that the tensors of one training step may take.
        spacing_mm: target spacing along D, H, W, in place of the one that the rules choose.

    Raises:
        PlanError: no network has this name, the fingerprint has other channels, or `memory_gib` is not positive.
        ResourceError: even the smallest patch does not fit into `memory_gib`; the message says how much it needs.
    """
    named = network_config(network_name)
    if len(fingerprint.intensities) != len(spec.channel_names):
        raise PlanError(
            f"the fingerprint has {len(fingerprint.intensities)} channels, dataset.json declares "
            f"{len(spec.channel_names)} ({', '.join(spec.channel_names)}). Take the fingerprint of this data set."
        )
    if not 0 < memory_gib < inf:
        raise PlanError(f"--memory-gib {memory_gib}: expected more than 0, for example 8.")
    if spacing_mm is None:
        spacing, why_spacing = target_spacing(fingerprint, ANISOTROPY_THRESHOLD)
    else:
        spacing, why_spacing = spacing_mm, "as asked for"
    transpose, why_transpose = transposition(spacing)
    schemes, why_schemes = normalization(spec.channel_names, fingerprint)
    turned = in_network_order(fingerprint, transpose)
    network_spacing = spacing[transpose[0]], spacing[transpose[1]], spacing[transpose[2]]
    shape = median_shape(turned, network_spacing)
    rule = patch_rule(named)
    steps = FittedStep(named, network_spacing, len(spec.channel_names), spec.num_outputs)
    patch_size, why_patch = fit_patch(steps, network_spacing, shape, rule, memory_gib)
    network, why_network = network_for_patch(named, network_spacing, patch_size)
    voxels = float(prod(shape)) * fingerprint.num_cases
    batch_size, why_batch = fit_batch(steps.for_patch(patch_size), patch_size, voxels, rule, memory_gib)
    optimizer, why_optimizer = recipe.optimizer(network)
    schedule, why_schedule = recipe.schedule(network)
    loss, why_loss = recipe.loss(network)
    augmentation, why_augmentation = recipe.augmentation(spec, patch_size, fingerprint.orientation, transpose)
    return Plan(
        network_name=network_name.lower(),
        dataset=spec,
        fingerprint_sha256=fingerprint_sha256(fingerprint),
        preprocessing=Preprocessing(
            orientation=fingerprint.orientation,
            transpose=transpose,
            spacing_mm=spacing,
            normalization=schemes,
            anisotropy_threshold=ANISOTROPY_THRESHOLD,
        ),
        patch=Patch(size=patch_size),
        network=network,
        training=Training(batch_size=batch_size, optimizer=optimizer, loss=loss, augmentation=augmentation),
        schedule=schedule,
        inference=Inference(mirror_axes=augmentation.mirror_axes),
        reasons={
            "network": f"chosen by name, {network_name.lower()}",
            "preprocessing.crop_to_nonzero": _crop_reason(fingerprint),
            "preprocessing.orientation": _ORIENTATIONS[fingerprint.orientation],
            "preprocessing.transpose": why_transpose,
            "preprocessing.spacing_mm": why_spacing,
            "preprocessing.normalization": why_schemes,
            **_under("network", why_network),
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
