"""Which voxels a new plan draws its training patches around."""

from __future__ import annotations

from sagittal.plan import DatasetSpec

OVERSAMPLING = 0.33


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
