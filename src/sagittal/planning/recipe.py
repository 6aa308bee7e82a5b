"""How each network is trained by default: its paper's optimiser and schedule, nnU-Net's augmentation."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Literal, assert_never

from sagittal.plan import DatasetSpec
from sagittal.plan.base import Triple
from sagittal.plan.networks import MedNeXtConfig, NetworkConfig, SegFormer3DConfig
from sagittal.plan.overrides import deep_supervision_weights
from sagittal.plan.plan import AdamW, Augmentation, Loss, Schedule

EPOCHS = 1000
STEPS_PER_EPOCH = 250
_ANISOTROPIC_PATCH = 3
_OPPOSITES: dict[Literal[0, 1, 2], dict[str, str]] = {
    0: {"superior": "inferior", "upper": "lower", "cranial": "caudal", "top": "bottom"},
    1: {"anterior": "posterior", "ventral": "dorsal", "front": "back"},
    2: {"left": "right", "l": "r", "lt": "rt", "lh": "rh", "sin": "dex", "sinistra": "dextra"},
}
_ALONG = {0: "up and down", 1: "front to back", 2: "left to right"}

Axes = tuple[Literal[0, 1, 2], ...]


def optimizer(network: NetworkConfig) -> tuple[AdamW, dict[str, str]]:
    """Return the optimiser and the reasons of its fields, by their names."""
    match network:
        case MedNeXtConfig():
            return AdamW(learning_rate=1e-3, weight_decay=3e-5), {
                "learning_rate": "MedNeXt's recipe",
                "weight_decay": "MedNeXt's recipe",
                "eps": "AdamW's own 1e-8, because training runs in fp32; MedNeXt's 1e-4 guards fp16 against NaN",
            }
        case SegFormer3DConfig():
            return AdamW(learning_rate=4e-4, weight_decay=0.01), {
                "learning_rate": "SegFormer3D's paper: the peak after the warm-up",
                "weight_decay": "SegFormer3D's repository",
                "eps": "AdamW's own",
            }
        case _:
            assert_never(network)


def schedule(network: NetworkConfig) -> tuple[Schedule, dict[str, str]]:
    """Return the schedule and the reasons of its fields, by their names."""
    steps = EPOCHS * STEPS_PER_EPOCH
    length = f"{EPOCHS} epochs of {STEPS_PER_EPOCH} steps"
    match network:
        case MedNeXtConfig():
            return Schedule(steps=steps, power=0.9), {
                "steps": f"MedNeXt's recipe, {length}",
                "power": "MedNeXt's recipe, polynomial decay (1 - t)^0.9",
                "warmup_fraction": "MedNeXt's recipe has none",
            }
        case SegFormer3DConfig():
            return Schedule(
                steps=steps,
                warmup_fraction=0.02,
                warmup_start_factor=0.01,
                power=0.9,
            ), {
                "steps": f"SegFormer3D's paper, {EPOCHS} epochs, here of {STEPS_PER_EPOCH} steps (nnU-Net's)",
                "power": "SegFormer3D's paper, polynomial decay",
                "warmup_fraction": "2 % of the steps; the paper warms up but does not say for how long",
                "warmup_start_factor": "SegFormer3D's paper, from 4e-6 to 4e-4",
            }
        case _:
            assert_never(network)


def loss(network: NetworkConfig) -> tuple[Loss, dict[str, str]]:
    """Return the loss, Dice + cross-entropy in equal parts for either network, and the reasons of its fields."""
    outputs = network.scales
    halves = (
        "halved from each output to the next coarser one and scaled to sum to 1, MedNeXt's recipe"
        if outputs > 1
        else "the network has one output in training"
    )
    return Loss(deep_supervision_weights=deep_supervision_weights(outputs)), {
        "dice_weight": "Dice and cross-entropy in equal parts, as MedNeXt, SegFormer3D and nnU-Net train",
        "cross_entropy_weight": "Dice and cross-entropy in equal parts, as MedNeXt, SegFormer3D and nnU-Net train",
        "deep_supervision_weights": halves,
    }


def augmentation(spec: DatasetSpec, patch_size: Triple) -> tuple[Augmentation, dict[str, str]]:
    """Return nnU-Net's augmentation, fitted to the labels' sides and the patch's shape, and the reasons."""
    axes, why_axes = mirror_axes(spec)
    degrees, why_degrees = rotation_degrees(patch_size)
    return Augmentation(mirror_axes=axes, rotation_degrees=degrees), {
        "mirror_axes": why_axes,
        "rotation_degrees": why_degrees,
    }


def mirror_axes(spec: DatasetSpec) -> tuple[Axes, str]:
    """Return the axes (of D, H, W in RAS order) that are mirrored, and why.

    An axis is left out where two labels differ only by a direction along it: mirrored, one would look like the other.
    """
    pairs = {axis: pair for axis in _OPPOSITES if (pair := opposite_pair([label.name for label in spec.labels], axis))}
    axes = tuple(axis for axis in _OPPOSITES if axis not in pairs)
    if not pairs:
        return axes, "nnU-Net's default, all axes; no two labels differ by a direction only"
    told = "; ".join(f"not {_ALONG[axis]}, because of '{one}' and '{other}'" for axis, (one, other) in pairs.items())
    return axes, f"{told}: mirrored, one would look like the other"


def opposite_pair(names: Sequence[str], axis: Literal[0, 1, 2]) -> tuple[str, str] | None:
    """Return the first two names that differ only by a direction along an axis: for W, kidney_left and kidney_right.

    Args:
        names: of labels.
        axis: 0, 1 or 2 for D, H or W in RAS order.
    """
    opposites = _OPPOSITES[axis]
    by_words = {tuple(sorted(_words(name))): name for name in names}
    for name in names:
        words = _words(name)
        for position, word in enumerate(words):
            if word in opposites:
                other = sorted([*words[:position], opposites[word], *words[position + 1 :]])
                if tuple(other) in by_words:
                    return name, by_words[tuple(other)]
    return None


def rotation_degrees(patch_size: Triple) -> tuple[float, str]:
    """Return the largest angle of rotation about an axis, and why."""
    ratio = max(patch_size) / min(patch_size)
    if ratio > _ANISOTROPIC_PATCH:
        return 180.0, (
            f"the patch is {ratio:.3g} > {_ANISOTROPIC_PATCH} times longer than thick, so it is turned in the plane "
            "only, there by any angle (nnU-Net)"
        )
    return 30.0, f"nnU-Net's default; the patch is at most {_ANISOTROPIC_PATCH} times longer than thick ({ratio:.3g})"


def _words(name: str) -> list[str]:
    """Split snake_case, CamelCase and spaced names into lower-case words."""
    return [word.lower() for word in re.findall(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])|\d+", name)]
