"""Protocols by name: what a paper or a tool fixes, laid down before the rest of a plan is derived."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from sagittal.errors import PlanError, did_you_mean
from sagittal.plan.plan import Configuration


@dataclass(frozen=True)
class Preset:
    """Overrides of a plan that stand for a published protocol. What it leaves out, the rules choose.

    Attributes:
        about: whose protocol it is, for a list.
        network_name: the network that is planned for where none is named.
        kinds: kinds of network that it is for; none: all.
        configurations: what it can be planned as.
        settings: dotted name to JSON value, as for `--set`.
        notes: what there is to say of a value, beside that it is the preset's.
        skips_coarsest_output: whether deep supervision gives the coarsest output no weight.
    """

    about: str
    network_name: str
    settings: Mapping[str, Any]
    kinds: tuple[str, ...] = ()
    configurations: tuple[Configuration, ...] = ("3d",)
    notes: Mapping[str, str] = field(default_factory=dict)
    skips_coarsest_output: bool = False


PRESETS: Mapping[str, Preset] = {
    "mednext-paper": Preset(
        about="MedNeXt's paper (arXiv 2303.09975) and its official code: 1 mm isotropic, patches of 128^3",
        network_name="mednext-s",
        kinds=("mednext",),
        settings={
            "preprocessing.spacing_mm": [1.0, 1.0, 1.0],
            "patch.size": [128, 128, 128],
            "network.deep_supervision": True,
            "training.batch_size": 2,
            "training.optimizer": {"kind": "adamw", "learning_rate": 1e-3, "weight_decay": 3e-5, "eps": 1e-4},
            "training.loss.dice_weight": 1.0,
            "training.loss.cross_entropy_weight": 1.0,
            "training.foreground_oversampling": 0.33,
            "training.gradient_clip_norm": 12.0,
            "schedule.steps": 250_000,
            "schedule.warmup_fraction": 0.0,
            "schedule.power": 0.9,
            "inference.overlap": 0.5,
        },
        notes={
            "preprocessing.spacing_mm": "in training and in prediction; results come on the scans' own grids",
            "training.optimizer": "eps 1e-4 kept fp16 from NaN there",
            "network.deep_supervision": "five outputs, weighted 0.5161, 0.2581, 0.1290, 0.0645, 0.0323",
            "schedule.steps": "1000 epochs of 250 steps",
        },
    ),
    "segformer3d-paper": Preset(
        about="SegFormer3D's paper (arXiv 2404.10156): warm-up to 4e-4, batch 4, patches of 128^3 as on BraTS",
        network_name="segformer3d",
        kinds=("segformer3d",),
        settings={
            "patch.size": [128, 128, 128],
            "network.attention_scale": "paper",
            "training.batch_size": 4,
            "training.optimizer": {"kind": "adamw", "learning_rate": 4e-4, "weight_decay": 0.01},
            "training.loss.dice_weight": 1.0,
            "training.loss.cross_entropy_weight": 1.0,
            "schedule.steps": 250_000,
            "schedule.warmup_fraction": 0.02,
            "schedule.warmup_start_factor": 0.01,
            "schedule.power": 0.9,
        },
        notes={
            "patch.size": "its BraTS input; Synapse has 64,128,128 and ACDC 14,160,160",
            "training.optimizer": "the peak after the warm-up; the paper also names 3e-5, and no weight decay: it is "
            "the repository's",
            "schedule.steps": "1000 epochs, here of 250 steps",
            "schedule.warmup_fraction": "the paper does not say how long its warm-up is",
            "schedule.warmup_start_factor": "from 4e-6 to 4e-4",
        },
    ),
    "segformer3d-repository": Preset(
        about="what SegFormer3D's repository trains by: 1e-4, Dice alone, eight patches of 96^3",
        network_name="segformer3d",
        kinds=("segformer3d",),
        settings={
            "patch.size": [96, 96, 96],
            "network.attention_scale": "head_dim",
            "training.batch_size": 8,
            "training.optimizer": {"kind": "adamw", "learning_rate": 1e-4, "weight_decay": 0.01},
            "training.loss.dice_weight": 1.0,
            "training.loss.cross_entropy_weight": 0.0,
            "training.augmentation.rotation_probability": 0.5,
            "training.augmentation.scaling_probability": 0.0,
            "training.augmentation.noise_probability": 0.0,
            "training.augmentation.blur_probability": 0.0,
            "training.augmentation.brightness_probability": 0.0,
            "training.augmentation.contrast_probability": 0.0,
            "training.augmentation.low_resolution_probability": 0.0,
            "training.augmentation.gamma_probability": 0.0,
            "training.augmentation.gamma_inverted_probability": 0.0,
            "schedule.steps": 200_000,
            "schedule.warmup_fraction": 0.025,
            "schedule.power": 0.9,
            "schedule.final_factor": 0.06,
        },
        notes={
            "training.batch_size": "two volumes with four crops of each there; here eight of any",
            "schedule.steps": "800 epochs, here of 250 steps",
            "schedule.warmup_fraction": "20 of 800 epochs",
            "schedule.power": "a decay without restarts, in place of its cosine with restarts",
            "schedule.final_factor": "down to 6e-6",
        },
    ),
    "nnunet": Preset(
        about="nnU-Net's own way: axes as stored, SGD, no weight for the coarsest output; for every network",
        network_name="plainconvunet",
        configurations=("3d", "3d-low", "2d"),
        settings={
            "preprocessing.orientation": "stored",
            "training.optimizer": {"kind": "sgd", "learning_rate": 1e-2, "weight_decay": 3e-5, "momentum": 0.99},
            "training.foreground_oversampling": 0.33,
            "training.gradient_clip_norm": 12.0,
            "schedule.steps": 250_000,
            "schedule.warmup_fraction": 0.0,
            "schedule.power": 0.9,
            "schedule.final_factor": 0.0,
            "inference.overlap": 0.5,
        },
        notes={"schedule.steps": "1000 epochs of 250 steps"},
        skips_coarsest_output=True,
    ),
}


def preset_named(name: str) -> Preset:
    """Return a preset.

    Raises:
        PlanError: none has this name; the message suggests one.
    """
    if name not in PRESETS:
        raise PlanError(
            f"--preset {name}: no such preset.{did_you_mean(name, PRESETS)}",
            code="unknown_preset",
        )
    return PRESETS[name]
