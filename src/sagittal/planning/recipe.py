"""How each network is trained by default: its paper's optimiser and schedule, nnU-Net's augmentation."""

from __future__ import annotations

from typing import Literal, assert_never

from sagittal.plan import DatasetSpec
from sagittal.plan.augmentation import Augmentation
from sagittal.plan.base import Triple
from sagittal.plan.loss import Loss
from sagittal.plan.networks import (
    MedNeXtConfig,
    NetworkConfig,
    NNFormerConfig,
    PlainConvUNetConfig,
    ResEncUNetConfig,
    SegFormer3DConfig,
    SwinUNETRConfig,
    TransBTSConfig,
    UNETRConfig,
    UXNetConfig,
)
from sagittal.plan.optimizers import SGD, AdamW, Optimizer
from sagittal.plan.overrides import deep_supervision_weights
from sagittal.plan.plan import Configuration
from sagittal.plan.schedule import Schedule
from sagittal.planning.grid import COVERAGE, SAVING
from sagittal.planning.sides import Mirroring, mirroring

EPOCHS = 1000
STEPS_PER_EPOCH = 250
_ANISOTROPIC_PATCH = 3
_LONG_SLICE = 1.5


def optimizer(network: NetworkConfig, *, precision: object = "fp32") -> tuple[Optimizer, dict[str, str]]:
    """Return the optimiser and the reasons of its fields, by their names.

    Args:
        network: whose recipe it is.
        precision: what training runs in, as asked for.
    """
    match network:
        case MedNeXtConfig():
            eps, why_eps = 1e-8, "AdamW's own; MedNeXt's 1e-4 guards fp16 against NaN"
            if precision == "fp16":
                eps, why_eps = 1e-4, "MedNeXt's recipe, which guards fp16 against NaN"
            return AdamW(learning_rate=1e-3, weight_decay=3e-5, eps=eps), {
                "learning_rate": "MedNeXt's recipe",
                "weight_decay": "MedNeXt's recipe",
                "eps": why_eps,
            }
        case SegFormer3DConfig():
            return AdamW(learning_rate=4e-4, weight_decay=0.01), {
                "learning_rate": "SegFormer3D's paper: the peak after the warm-up",
                "weight_decay": "SegFormer3D's repository",
                "eps": "AdamW's own",
            }
        case NNFormerConfig():
            return SGD(learning_rate=1e-2, weight_decay=3e-5, momentum=0.99), {
                "learning_rate": "nnFormer's paper, which trains as nnU-Net does",
                "weight_decay": "nnFormer's paper and nnU-Net's",
                "momentum": "nnFormer's paper and nnU-Net's, with Nesterov's step",
            }
        case TransBTSConfig():
            return AdamW(learning_rate=4e-4, weight_decay=1e-5), {
                "learning_rate": "TransBTS's paper",
                "weight_decay": "TransBTS's paper; AdamW, which decays apart from the gradient, stands for its Adam",
                "eps": "AdamW's own",
            }
        case PlainConvUNetConfig() | ResEncUNetConfig():
            return SGD(learning_rate=1e-2, weight_decay=3e-5, momentum=0.99), {
                "learning_rate": "nnU-Net's",
                "weight_decay": "nnU-Net's",
                "momentum": "nnU-Net's, with Nesterov's step",
            }
        case UNETRConfig() | SwinUNETRConfig():
            return AdamW(learning_rate=1e-4, weight_decay=1e-5), {
                "learning_rate": "UNETR's paper, and MONAI's research repository for both networks",
                "weight_decay": "MONAI's research repository",
                "eps": "AdamW's own",
            }
        case UXNetConfig():
            return AdamW(learning_rate=1e-4, weight_decay=0.01), {
                "learning_rate": "3D UX-Net's paper",
                "weight_decay": "AdamW's own; the paper names none",
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
        case NNFormerConfig() | TransBTSConfig():
            paper = "nnFormer's paper" if isinstance(network, NNFormerConfig) else "TransBTS's paper"
            return Schedule(steps=steps, power=0.9), {
                "steps": f"nnU-Net's, {length}, as for the networks it is compared with",
                "power": f"{paper}, polynomial decay (1 - t)^0.9",
                "warmup_fraction": "none, as nnU-Net",
            }
        case PlainConvUNetConfig() | ResEncUNetConfig():
            return Schedule(steps=steps, power=0.9), {
                "steps": f"nnU-Net's, {length}",
                "power": "nnU-Net's, polynomial decay (1 - t)^0.9",
                "warmup_fraction": "nnU-Net has none",
            }
        case UNETRConfig() | SwinUNETRConfig():
            return Schedule(steps=steps, warmup_fraction=0.01, power=0.9), {
                "steps": f"nnU-Net's, {length}, as for the networks it is compared with",
                "power": "nnU-Net's polynomial decay, in the place of MONAI's research repository's cosine",
                "warmup_fraction": "MONAI's research repository, 50 of 5000 epochs",
            }
        case UXNetConfig():
            return Schedule(steps=steps, power=0.9), {
                "steps": f"nnU-Net's, {length}, as for the networks it is compared with",
                "power": "nnU-Net's polynomial decay; the paper describes none",
                "warmup_fraction": "none; the paper describes none",
            }
        case _:
            assert_never(network)


def loss(
    network: NetworkConfig, configuration: Configuration = "3d", coverage: float = 1.0
) -> tuple[Loss, dict[str, str]]:
    """Return the loss, Dice + cross-entropy in equal parts for any network, and the reasons of its fields.

    Args:
        network: its outputs are weighted.
        configuration: the plan's.
        coverage: share of the median case's voxels that a patch has.
    """
    outputs = network.scales
    batch_dice, why_batch_dice = _batch_dice(configuration, coverage)
    halves = (
        "halved from each output to the next coarser one and scaled to sum to 1, MedNeXt's recipe"
        if outputs > 1
        else "the network has one output in training"
    )
    if outputs > 1 and isinstance(network, PlainConvUNetConfig | ResEncUNetConfig):
        halves = (
            "halved from each output to the next coarser one and scaled to sum to 1, as nnU-Net's, but for the "
            "coarsest, which nnU-Net gives no weight: here every head learns"
        )
    return Loss(batch_dice=batch_dice, deep_supervision_weights=deep_supervision_weights(outputs)), {
        "batch_dice": why_batch_dice,
        "dice_smooth": "nnU-Net's",
        "dice_weight": "Dice and cross-entropy in equal parts, as MedNeXt, SegFormer3D and nnU-Net train",
        "cross_entropy_weight": "Dice and cross-entropy in equal parts, as MedNeXt, SegFormer3D and nnU-Net train",
        "deep_supervision_weights": halves,
    }


def _batch_dice(configuration: Configuration, coverage: float) -> tuple[bool, str]:
    """Return whether Dice is taken over the batch as a whole, and why (nnU-Net's rule)."""
    if configuration == "2d":
        return True, "nnU-Net's for 2d: a slice lacks most structures, so Dice is taken over the batch as a whole"
    if configuration == "3d-low":
        return False, "nnU-Net's for the coarser of two configurations: Dice is taken of each sample"
    if coverage < COVERAGE / SAVING:
        return True, (
            f"nnU-Net's where there is a coarser configuration: a patch covers {coverage:.1%} of the median case, so "
            "it often lacks a structure, and Dice is taken over the batch as a whole"
        )
    return (
        False,
        f"nnU-Net's: a patch covers {min(coverage, 1):.0%} of the median case, so Dice is taken of each sample",
    )


def augmentation(
    spec: DatasetSpec,
    patch_size: Triple,
    orientation: Literal["RAS", "stored"] = "RAS",
    transpose: Triple = (0, 1, 2),
    *,
    sees_slices: bool = False,
) -> tuple[Augmentation, dict[str, str]]:
    """Return nnU-Net's augmentation, fitted to the labels' sides and the patch's shape, and the reasons."""
    mirrored = mirroring(spec, orientation, transpose)
    axes, why_axes = mirrored.axes, mirrored.why
    degrees, why_degrees = rotation_degrees(patch_size, sees_slices=sees_slices)
    if sees_slices:
        axes, why_axes = tuple(axis for axis in axes if axis > 0), f"{why_axes}; of those, the axes of a slice"
    swapped = tuple(pair for pair in mirrored.swapped_labels if pair[0] in axes)
    return Augmentation(mirror_axes=axes, rotation_degrees=degrees, swapped_labels=swapped), {
        "mirror_axes": why_axes,
        "rotation_degrees": why_degrees,
        "elastic_probability": "off, as nnU-Net's",
        "elastic_sigma": "where elastic deformation is turned on: bends the size of organs, ours",
        "elastic_magnitude": "where elastic deformation is turned on: far less than nnU-Net's, ours",
        "swapped_labels": mirrored.why_swapped if swapped else Mirroring((), "").why_swapped,
    }


def rotation_degrees(patch_size: Triple, *, sees_slices: bool = False) -> tuple[float, str]:
    """Return the largest angle of rotation about an axis, and why."""
    if sees_slices:
        return _slice_rotation_degrees(patch_size)
    ratio = max(patch_size) / min(patch_size)
    if ratio > _ANISOTROPIC_PATCH:
        return 180.0, (
            f"the patch is {ratio:.3g} > {_ANISOTROPIC_PATCH} times longer than thick, so it is turned in the plane "
            "only, there by any angle (nnU-Net)"
        )
    return 30.0, f"nnU-Net's default; the patch is at most {_ANISOTROPIC_PATCH} times longer than thick ({ratio:.3g})"


def _slice_rotation_degrees(patch_size: Triple) -> tuple[float, str]:
    """Return the largest angle by which a slice is turned in its plane, and why."""
    ratio = max(patch_size[1:]) / min(patch_size[1:])
    if ratio > _LONG_SLICE:
        return 15.0, f"nnU-Net's for a slice that is {ratio:.3g} > {_LONG_SLICE:g} times longer than wide"
    return 180.0, f"nnU-Net's for slices: any angle in the plane; at most {_LONG_SLICE:g} times longer than wide"
