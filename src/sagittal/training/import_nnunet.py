"""A trained model of nnU-Net v2 becomes a bundle that predicts the same.

plans.json says how scans are prepared and which U-Net it is, dataset.json what channels and labels mean, a checkpoint
of each fold holds the weights and the axes that are mirrored. What differs from nnU-Net's own prediction is rounding,
the last digits of the windows' weights, and logits of anisotropic scans, which are interpolated between slices.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sagittal.bundle import write_bundle
from sagittal.data.dataset import parse_spec
from sagittal.errors import BundleError, PlanError
from sagittal.networks.build import build_network
from sagittal.networks.weights import load_official_weights
from sagittal.plan import DatasetSpec, Plan
from sagittal.plan.baselines import PlainConvUNetConfig, ResEncUNetConfig
from sagittal.plan.mednext import MedNeXtConfig
from sagittal.plan.overrides import override
from sagittal.plan.plan import Configuration, Inference, Patch
from sagittal.plan.training import Training
from sagittal.planning import recipe
from sagittal.planning.wishes import SET_BY_USER
from sagittal.training.import_nnunet_checkpoint import (
    Checkpoint,
    Which,
    checkpoint_files,
    component_rules,
    held_out_dice,
    read_checkpoint,
    require_model_folder,
)
from sagittal.training.import_nnunet_networks import (
    is_mednext,
    mednext_config,
    mednext_name,
    require_all,
    unet_config,
    without_coarse_heads,
    without_twins,
)
from sagittal.training.import_nnunet_plans import (
    Entries,
    configuration_of,
    patch_of,
    preprocessing_of,
    read_json,
)

_TRAINER = "nnUNetTrainer"
_NO_DEEP_SUPERVISION = "nnUNetTrainerNoDeepSupervision"
_LOW = "3d_lowres"
_WHY_RULES = "nnU-Net's choice on its cross-validation, postprocessing.json"
_NOT_MEASURED = "none: imported from nnU-Net, whose folder holds no scores of all its folds"
_MEASURED = "by nnU-Net, on the cases that each imported fold held out (validation/summary.json), before the import"


@dataclass(frozen=True)
class Selection:
    """What of a model is imported.

    Attributes:
        checkpoint: `final` or `best`; None for the final ones, or the best where no fold is finished.
        folds: `0`, `1`, ... or `all`; None for every numbered fold, or `all` where there is none.
        settings: fields of the plan by dotted name, for what weights do not tell.
    """

    checkpoint: Which | None = None
    folds: Sequence[str] | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class ImportedModel:
    """The bundle and its plan."""

    bundle: Path
    plan: Plan


def import_nnunet(
    folder: str | os.PathLike[str],
    out: str | os.PathLike[str],
    selection: Selection | None = None,
    *,
    say: Callable[[str], None] = lambda line: None,
) -> ImportedModel:
    """Make a bundle of a trained model of nnU-Net v2, or of a MedNeXt trained in a fork of it.

    No code in the folder is run: checkpoints are read for tensors, numbers and texts, and anything else is refused.

    Args:
        folder: `nnUNetTrainer__nnUNetPlans__3d_fullres` or the like, with dataset.json, plans.json and folds.
        out: the bundle to write.
        selection: which folds and checkpoints; by default what nnU-Net takes.
        say: receives lines for a person.

    Raises:
        PlanError: something is missing, can't be read safely, does not fit together, or is not computed here as
            nnU-Net does; the message names it.
        DataError: dataset.json makes no sense or names files that can't be read.
        BundleError: `out` holds something already.
        ResourceError: the disk is full, the folder can't be written, or the library of the U-Nets is not installed.
    """
    folder, out, selection = Path(folder), Path(out), selection or Selection()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise BundleError(f"{out}: exists and is not empty; nothing was overwritten. Choose another --out.")
    require_model_folder(folder)
    plans, declared = read_json(folder / "plans.json"), read_json(folder / "dataset.json")
    spec = _spec(declared, plans)
    files = checkpoint_files(folder, selection.checkpoint, selection.folds)
    first = next(iter(files.values()))
    checkpoint = read_checkpoint(first)
    say(f"read: {checkpoint.configuration} by {checkpoint.trainer}, {first.name} of {', '.join(files)}")
    plan = _plan(spec, plans, checkpoint, str(first))
    rules = component_rules(folder, tuple(files), spec, say)
    if rules:
        plan = plan.replace(postprocessing=rules, reasons={**plan.reasons, "postprocessing": _WHY_RULES})
    plan = override(plan, selection.settings, origin=SET_BY_USER)
    weights = {}
    for name, file in files.items():
        fold = checkpoint if file == first else read_checkpoint(file)
        _require_alike(checkpoint, fold, file)
        weights[name] = _fitted(plan, fold, file)
    _tell(plan, checkpoint, say)
    dice = held_out_dice(tuple(files.values()), spec)
    say("validation: " + ("nnU-Net's own scores are kept" if dice else "nothing was measured; evaluate it first"))
    write_bundle(
        out,
        plan=plan,
        weights=weights,
        metrics=_metrics(spec, dice, checkpoint, files),
        data_license=_licence(declared),
    )
    return ImportedModel(out, plan)


def _spec(declared: Entries, plans: Entries) -> DatasetSpec:
    content = dict(declared.values)
    # nnU-Net v2 also takes v1's name for the channels.
    if "channel_names" not in content and isinstance(content.get("modality"), dict):
        content["channel_names"] = content["modality"]
    # A map of label values is Sagittal's own; nnU-Net knows none.
    content.pop("label_map", None)
    return parse_spec(content, declared.where, default_name=plans.get("dataset_name", str))


def _plan(spec: DatasetSpec, plans: Entries, checkpoint: Checkpoint, source: str) -> Plan:
    _require_own_labels(plans)
    configuration = configuration_of(plans, checkpoint.configuration)
    preprocessing, reasons = preprocessing_of(plans, configuration, spec.channel_names)
    network, network_name = _network(configuration, checkpoint, source)
    patch = Patch(size=patch_of(configuration))
    kind: Configuration = "3d-low" if checkpoint.configuration == _LOW else "3d"
    optimizer, _ = recipe.optimizer(network)
    schedule, _ = recipe.schedule(network)
    loss, _ = recipe.loss(network, kind)
    augmentation, _ = recipe.augmentation(spec, patch.size, preprocessing.orientation, preprocessing.transpose)
    trained = f"the recipe here for {network_name}; these weights were trained by {checkpoint.trainer}"
    return Plan(
        network_name=network_name,
        configuration=kind,
        dataset=spec,
        fingerprint_sha256="0" * 64,
        preprocessing=preprocessing,
        patch=patch,
        network=network,
        training=Training(
            batch_size=max(1, configuration.get("batch_size", int)),
            optimizer=optimizer,
            loss=loss.replace(batch_dice=configuration.values.get("batch_dice") is True),
            # nnU-Net mirrors without exchanging labels of two sides.
            augmentation=augmentation.replace(mirror_axes=checkpoint.mirror_axes, swapped_labels=()),
        ),
        schedule=schedule,
        inference=Inference(overlap=0.5, mirror_axes=checkpoint.mirror_axes),
        reasons={
            "network": _why_network(network, checkpoint),
            "dataset": "nnU-Net's dataset.json",
            "configuration": f"nnU-Net's {checkpoint.configuration}",
            "patch.size": "plans.json's patch_size",
            "inference.overlap": "nnU-Net's, half a window",
            "inference.mirror_axes": "the checkpoint's inference_allowed_mirroring_axes",
            "training.batch_size": "plans.json's batch_size",
            "training.loss.batch_dice": "plans.json's batch_dice",
            "training.optimizer": trained,
            "schedule.steps": trained,
            **reasons,
        },
    )


def _require_own_labels(plans: Entries) -> None:
    manager = plans.values.get("label_manager", "LabelManager")
    if manager != "LabelManager":
        raise plans.refuse(f"labels are handled by {manager}", "LabelManager, nnU-Net's own")


def _network(
    configuration: Entries, checkpoint: Checkpoint, source: str
) -> tuple[PlainConvUNetConfig | ResEncUNetConfig | MedNeXtConfig, str]:
    if is_mednext(checkpoint.tensors):
        config = mednext_config(checkpoint.tensors, source)
        return config, mednext_name(config)
    unet = unet_config(configuration, deep_supervision=checkpoint.trainer != _NO_DEEP_SUPERVISION)
    return unet, unet.kind


def _why_network(network: PlainConvUNetConfig | ResEncUNetConfig | MedNeXtConfig, checkpoint: Checkpoint) -> str:
    if isinstance(network, MedNeXtConfig):
        return (
            "read off the weights' names and shapes, which do not tell network.norm and network.block_residual: those "
            "are assumed, the official network's"
        )
    return f"plans.json's architecture; every tensor of {checkpoint.trainer}'s fits it"


def _require_alike(first: Checkpoint, other: Checkpoint, file: Path) -> None:
    """Refuse folds that were not trained alike: nnU-Net would predict them all as the first says."""
    for what in ("configuration", "trainer", "mirror_axes"):
        one, two = getattr(first, what), getattr(other, what)
        if one != two:
            raise PlanError(
                f"{file}: its {what} is {two}, that of the fold before it {one}. Expected folds that were trained "
                "alike. Import them apart, with --fold.",
                code="nnunet_folder",
            )


def _fitted(plan: Plan, checkpoint: Checkpoint, file: Path) -> dict[str, np.ndarray]:
    """Return a fold's weights by the names of our network, each tensor accounted for."""
    spec, config = plan.dataset, plan.network
    with torch.random.fork_rng(devices=[]):
        network = build_network(config, len(spec.channel_names), spec.num_outputs)
    if isinstance(config, MedNeXtConfig):
        load_official_weights(network, checkpoint.tensors)
        tensors: Mapping[str, torch.Tensor] = network.state_dict()
    else:
        assert isinstance(config, PlainConvUNetConfig | ResEncUNetConfig)
        tensors = without_twins(checkpoint.tensors, str(file))
        if not config.deep_supervision:
            tensors = without_coarse_heads(tensors, len(config.strides) - 2)
        advice = (
            f"Does {checkpoint.trainer} build another network than plans.json says? Predict with nnU-Net itself then."
        )
        require_all(tensors, network.state_dict(), str(file), advice)
    return {name: tensor.detach().to(torch.float32).contiguous().numpy() for name, tensor in tensors.items()}


def _tell(plan: Plan, checkpoint: Checkpoint, say: Callable[[str], None]) -> None:
    spacing = ", ".join(f"{value:g}" for value in plan.preprocessing.spacing_mm)
    window = " x ".join(str(size) for size in plan.patch.size)
    mirrored = ", ".join(map(str, plan.inference.mirror_axes)) or "none"
    say(f"network: {plan.network_name}; spacing {spacing} mm; window {window} voxels; mirrored axes: {mirrored}")
    if isinstance(plan.network, MedNeXtConfig):
        say("assumed, for weights don't tell; correct with --set: network.norm=group, network.block_residual=true")
    if not checkpoint.trainer.startswith(_TRAINER):
        say(
            f"trainer: {checkpoint.trainer} is none of nnU-Net's; if it prepares scans in another way, predictions "
            "differ"
        )


def _metrics(
    spec: DatasetSpec, dice: Mapping[str, float | None] | None, checkpoint: Checkpoint, files: Mapping[str, Path]
) -> dict[str, Any]:
    scores = dict(dice) if dice else {label.name: None for label in spec.labels}
    known = [score for score in scores.values() if score is not None]
    return {
        "dice": scores,
        "mean_dice": sum(known) / len(known) if known and len(known) == len(scores) else None,
        "validation": _MEASURED if known else _NOT_MEASURED,
        "imported": {
            "from": "nnU-Net v2",
            "trainer": checkpoint.trainer,
            "configuration": checkpoint.configuration,
            "checkpoint": next(iter(files.values())).name,
            "file_sha256": {name: _sha256(file) for name, file in files.items()},
        },
    }


def _licence(declared: Entries) -> str | None:
    told = declared.values.get("licence", declared.values.get("license"))
    return told if isinstance(told, str) and told else None


def _sha256(file: Path) -> str:
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()
