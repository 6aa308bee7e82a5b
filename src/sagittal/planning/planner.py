"""`make_plan`: the rules of this room in order, their values and reasons put together."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from math import inf
from typing import Any

from sagittal.errors import PlanError
from sagittal.plan import DatasetSpec, Fingerprint, Plan, network_config
from sagittal.plan.base import Triple, canonical_json
from sagittal.plan.loss import Loss
from sagittal.plan.overrides import deep_supervision_weights
from sagittal.plan.plan import Configuration, Inference, Patch, Preprocessing
from sagittal.plan.training import Training
from sagittal.planning import recipe, sampling
from sagittal.planning.fit import Fit, Fitter
from sagittal.planning.grid import Grid, finer_resolution, grid_of, low_resolution
from sagittal.planning.normalization import normalization
from sagittal.planning.spacing import target_spacing, transposition
from sagittal.planning.wishes import Wishes, wishes_for

ANISOTROPY_THRESHOLD = 3.0
_ALWAYS = {
    "schema_version": "the form of plans that this version writes",
    "dataset": "declared by dataset.json",
    "preprocessing.anisotropy_threshold": "nnU-Net's",
    "training.optimizer": "the network's recipe",
    "training.augmentation": "nnU-Net's probabilities and ranges",
    "training.foreground_oversampling": "nnU-Net's, a third of each batch on the foreground",
    "training.gradient_clip_norm": "nnU-Net's",
    "training.precision": "fp32 is for every device; bf16 takes less memory on a GPU, seldom less time",
    "training.folds": "nnU-Net's, five parts",
    "training.split_seed": "nnU-Net's, so that folds can be compared",
    "training.split": "as nnU-Net does, at random",
    "training.patients_listed": "no patients.csv was taken into account",
    "training.patient_pattern": "none was given",
    "training.split_sha256": "ids and seed alone decide on the folds",
    "training.seed": "any number would do; the same one gives the same losses",
    "training.initialization": "random weights, drawn from training.seed",
    "training.micro_batches": "the batch is computed as a whole",
    "training.ema_decay": "off: where the rate falls to nothing, a mean of the weights adds nothing (docs/lab-log.md)",
    "training.case_weights_sha256": "no case_weights.csv was taken into account",
    "training.deterministic": "not asked for; on a CPU the same bits come again anyway",
    "training.postprocessing": "rules that help on the held-out cases are written into the bundle's plan",
    "training.loss": "off: Dice and cross-entropy alone",
    "schedule.warmup_start_factor": "a warm-up rises from nothing",
    "schedule.final_factor": "the rate falls to nothing",
    "schedule.validations": "twenty along the way; nnU-Net scores patches after every epoch instead",
    "schedule.validation_cases": "enough to follow, few enough to take little time; the last validation takes them all",
    "schedule.early_stop_validations": "never: a schedule that falls to nothing gains most at its end",
    "schedule.keep": "the end's, which no validation has chosen",
    "inference.overlap": "nnU-Net's, half a window",
    "inference.mirror_axes": "the axes that training mirrors",
    "postprocessing": "none before held-out cases tell what helps",
}
"""Reasons of what is the same for every data set and network."""

_ORIENTATIONS = {
    "RAS": "scans of any axis order reach the network the same way round",
    "stored": "as asked for: axes stay as the files store them, which is nnU-Net's way",
}
_CONFIGURATIONS: dict[Configuration, str] = {
    "3d": "volumes at the full resolution",
    "3d-low": "--config 3d-low, volumes at a coarser spacing, of which a patch shows more",
    "2d": "--config 2d, slices across the network's first axis, one at a time",
}


def make_plan(
    fingerprint: Fingerprint,
    spec: DatasetSpec,
    network_name: str,
    *,
    memory_gib: float = 8.0,
    configuration: Configuration = "3d",
    preset: str | None = None,
    settings: Mapping[str, Any] | None = None,
) -> Plan:
    """Plan preprocessing and training of a network for a data set.

    Args:
        fingerprint: what was measured of the data set; its orientation becomes the plan's.
        spec: what it declares.
        network_name: for example `mednext-s`; see `sagittal.plan.NETWORKS`.
        memory_gib: memory that the tensors of one training step may take.
        configuration: volumes, volumes at a coarser spacing, or slices.
        preset: a protocol to start from; see `sagittal.planning.PRESETS`.
        settings: values of the plan by dotted name, as `--set` takes them. The rest follows from those of spacing,
            patch, batch and network.

    Raises:
        PlanError: no network has this name or this form, the fingerprint has other channels or another axis order,
            `memory_gib` is not positive, there is no coarser configuration to make, or a setting makes no sense.
        ResourceError: even the smallest patch does not fit into `memory_gib`; the message says how much it needs.
    """
    wishes = wishes_for(network_name, configuration, preset, settings or {})
    named, fixed = wishes.network(network_config(network_name))
    _require_fitting(fingerprint, spec, wishes, memory_gib)
    fitter = Fitter(named, fixed, len(spec.channel_names), spec.num_outputs, wishes, memory_gib)
    grid, why_grid = _resolved(fingerprint, wishes, configuration, fitter, named.output_stride_vox)
    fit = fitter.fit(grid)
    preprocessing, why_preprocessing = _preprocessing(fingerprint, spec, grid)
    training, why_training = _training(spec, fingerprint, grid, fit, wishes)
    schedule, why_schedule = recipe.schedule(fit.network)
    plan = Plan(
        network_name=network_name.lower(),
        configuration=configuration,
        dataset=spec,
        fingerprint_sha256=fingerprint_sha256(fingerprint),
        preprocessing=preprocessing,
        patch=Patch(size=fit.patch_size),
        network=fit.network,
        training=training,
        schedule=schedule,
        inference=Inference(mirror_axes=training.augmentation.mirror_axes),
        label_volumes=fingerprint.label_volumes,
        reasons={
            "network_name": "as asked for, or the default",
            "configuration": _CONFIGURATIONS[configuration],
            "fingerprint_sha256": f"of what was measured of {fingerprint.num_cases} cases",
            "label_volumes": f"measured in {fingerprint.num_cases} cases, for 'sagittal qc' to compare with",
            "network": f"chosen by name, {network_name.lower()}",
            **_ALWAYS,
            **why_preprocessing,
            **why_grid,
            **fit.reasons,
            **why_training,
            **_under("schedule", why_schedule),
        },
    )
    return wishes.applied_to(plan)


def _resolved(
    fingerprint: Fingerprint, wishes: Wishes, configuration: Configuration, fitter: Fitter, stride_vox: int
) -> tuple[Grid, dict[str, str]]:
    """Return the grid that cases are brought to, made coarser for 3d-low and finer where that pays, and why."""

    def patch_of(tried: Grid) -> Triple:
        return fitter.patch(tried).size

    grid, why_grid = _grid(fingerprint, wishes)
    if configuration == "3d-low":
        grid, why = low_resolution(grid, patch_of(grid), fingerprint, patch_of)
        return grid, {**why_grid, "preprocessing.spacing_mm": why}
    if configuration == "3d" and wishes.spacing_mm is None and wishes.patch_size is None:
        finer = finer_resolution(grid, stride_vox, fingerprint, patch_of)
        if finer is not None:
            grid, why = finer
            return grid, {**why_grid, "preprocessing.spacing_mm": f"{why}; {why_grid['preprocessing.spacing_mm']}"}
    return grid, why_grid


def fingerprint_sha256(fingerprint: Fingerprint) -> str:
    """Return the hash that a plan keeps of the fingerprint it was made from.

    `label_volumes` is left out: nothing is planned by it, and a data set keeps the hash that earlier versions gave it.
    """
    return hashlib.sha256(canonical_json(fingerprint.replace(label_volumes=())).encode()).hexdigest()


def _require_fitting(fingerprint: Fingerprint, spec: DatasetSpec, wishes: Wishes, memory_gib: float) -> None:
    if len(fingerprint.intensities) != len(spec.channel_names):
        raise PlanError(
            f"the fingerprint has {len(fingerprint.intensities)} channels, dataset.json declares "
            f"{len(spec.channel_names)} ({', '.join(spec.channel_names)}). Take the fingerprint of this data set."
        )
    if not 0 < memory_gib < inf:
        raise PlanError(f"--memory-gib {memory_gib}: expected more than 0, for example 8.")
    asked = wishes.orientation
    if asked is not None and asked[0] != fingerprint.orientation:
        raise PlanError(
            f"preprocessing.orientation is {asked[0]} ({asked[1]}), the fingerprint was taken along "
            f"{fingerprint.orientation} axes. Take it along these: extract_fingerprint(..., orientation='{asked[0]}')."
        )


def _grid(fingerprint: Fingerprint, wishes: Wishes) -> tuple[Grid, dict[str, str]]:
    """Return the grid of the full resolution, and the reasons of its fields in the plan."""
    spacing, why_spacing = wishes.spacing_mm or target_spacing(fingerprint, ANISOTROPY_THRESHOLD)
    transpose, why_transpose = wishes.transpose or transposition(spacing)
    sees_slices = wishes.configuration == "2d"
    grid = grid_of(fingerprint, spacing, transpose=transpose, keeps_slices=sees_slices)
    why_slices = "a network of volumes sees cases of one spacing"
    if sees_slices:
        why_slices = "nnU-Net's for 2d: no slice is made between two of a scan"
        why_spacing += "; only within slices, which keep their own distance"
    return grid, {
        "preprocessing.spacing_mm": why_spacing,
        "preprocessing.transpose": why_transpose,
        "preprocessing.keeps_slices": why_slices,
    }


def _preprocessing(fingerprint: Fingerprint, spec: DatasetSpec, grid: Grid) -> tuple[Preprocessing, dict[str, str]]:
    schemes, why_schemes = normalization(spec.channel_names, fingerprint)
    share = 100 * fingerprint.median_relative_size_after_crop
    preprocessing = Preprocessing(
        orientation=fingerprint.orientation,
        transpose=grid.transpose,
        spacing_mm=grid.spacing_mm,
        normalization=schemes,
        anisotropy_threshold=ANISOTROPY_THRESHOLD,
        keeps_slices=grid.keeps_slices,
    )
    crop = f"nnU-Net's; voxels outside of the non-zero box hold nothing, {share:.3g} % remain (median)"
    return preprocessing, {
        "preprocessing.crop_to_nonzero": crop,
        "preprocessing.orientation": _ORIENTATIONS[fingerprint.orientation],
        "preprocessing.normalization": why_schemes,
    }


def _training(
    spec: DatasetSpec, fingerprint: Fingerprint, grid: Grid, fit: Fit, wishes: Wishes
) -> tuple[Training, dict[str, str]]:
    precision = wishes.get("training.precision")
    optimizer, why_optimizer = recipe.optimizer(fit.network, precision=None if precision is None else precision.value)
    loss, why_loss = recipe.loss(fit.network, wishes.configuration, grid.coverage(fit.patch_size))
    if wishes.preset is not None and wishes.preset.skips_coarsest_output and fit.network.scales > 1:
        loss = _without_coarsest(loss, fit.network.scales)
        why_loss["deep_supervision_weights"] = f"preset {wishes.preset_name}, none for the coarsest output"
    power, why_loss["rare_class_power"] = sampling.rare_class_power(
        fingerprint, grid.network_spacing_mm, fit.patch_size, wishes.preset_name
    )
    sees_slices = wishes.configuration == "2d"
    augmentation, why_augmentation = recipe.augmentation(
        spec, fit.patch_size, fingerprint.orientation, grid.transpose, sees_slices=sees_slices
    )
    balanced, why_balanced = sampling.class_balanced(spec, wishes.preset_name)
    training = Training(
        batch_size=fit.batch_size,
        optimizer=optimizer,
        loss=loss.replace(rare_class_power=power),
        augmentation=augmentation,
        class_balanced=balanced,
    )
    return training, {
        "training.class_balanced": why_balanced,
        **_under("training.optimizer", why_optimizer),
        **_under("training.loss", why_loss),
        **_under("training.augmentation", why_augmentation),
    }


def _without_coarsest(loss: Loss, outputs: int) -> Loss:
    return loss.replace(deep_supervision_weights=(*deep_supervision_weights(outputs - 1), 0.0))


def _under(group: str, reasons: Mapping[str, str]) -> dict[str, str]:
    return {f"{group}.{name}": reason for name, reason in reasons.items()}
