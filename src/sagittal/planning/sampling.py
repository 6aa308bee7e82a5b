"""Which voxels a new plan draws its training patches around, and what those of rare classes weigh."""

from __future__ import annotations

from math import prod

from sagittal.plan import DatasetSpec, Fingerprint
from sagittal.plan.base import Triple, TripleMm

OVERSAMPLING = 0.33
RARE_SHARE = 0.002
"""A class that has less than this share of a patch's voxels is rare."""
RARE_POWER = 0.5


def foreground_oversampling() -> tuple[float, str]:
    """Return the share of a batch that is placed on the foreground, and why."""
    return OVERSAMPLING, "nnU-Net's, a third of each batch on the foreground"


def class_balanced(spec: DatasetSpec, preset_name: str | None = None) -> tuple[bool, str]:
    """Return whether a sample placed on the foreground draws its class before its case, and why.

    Where every case has every class both ways draw alike, so nothing but the number of classes needs to be known.

    Args:
        spec: the labels that the data set declares.
        preset_name: the protocol that is followed, if any; those that there are draw the case first.
    """
    if preset_name is not None:
        return False, f"preset {preset_name} draws the case first, then one of its classes, as nnU-Net does"
    classes = len(spec.foreground_values)
    if classes == 1:
        return False, "there is one class only"
    return True, (
        f"{classes} classes: drawn before the case, a class that few cases have comes as often as one that all have, "
        "where nnU-Net would seldom draw it"
    )


def rare_class_power(
    fingerprint: Fingerprint, spacing_mm: TripleMm, patch_size: Triple, preset_name: str | None = None
) -> tuple[float, str]:
    """Return how much the voxels of rare classes weigh in the cross-entropy, and why.

    Where a class has a few voxels of a patch, all others drive its probability to nothing before it is learned, and
    there neither Dice nor cross-entropy has a gradient left (docs/lab-log.md). A slice holds only a part of a class,
    which is taken to be as deep as it is wide.

    Args:
        fingerprint: with the volume of each class.
        spacing_mm: of the grid that patches are cut from.
        patch_size: voxels.
        preset_name: the protocol that is followed, if any; in those that there are all voxels weigh the same.
    """
    if preset_name is not None:
        return 0.0, f"preset {preset_name}: all voxels weigh the same"
    volumes = [volume for volume in fingerprint.class_volumes_ml if volume is not None]
    if not volumes:
        return 0.0, "volumes of classes were not measured"
    mm3 = 1000 * min(volumes)
    voxels = mm3 / prod(spacing_mm)
    told = f"the smallest class has {voxels:.3g} voxels (median)"
    if patch_size[0] == 1:
        voxels /= max(1.0, mm3 ** (1 / 3) / spacing_mm[0])
        told += f", about {voxels:.3g} in a slice"
    share = voxels / prod(patch_size)
    told += f", {share:.2g} of a patch"
    if share >= RARE_SHARE:
        return 0.0, f"{told}, at least {RARE_SHARE:g}: all voxels weigh the same"
    return RARE_POWER, f"{told}, less than {RARE_SHARE:g}: it would be forgotten before it is learned"
