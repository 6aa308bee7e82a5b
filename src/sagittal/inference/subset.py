"""`--subset liver,spleen`: of a model's classes, only some are written; all others become background."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Integer

from sagittal.errors import PlanError, did_you_mean
from sagittal.plan.dataset import DatasetSpec


def chosen_spec(spec: DatasetSpec, names: Sequence[str]) -> DatasetSpec:
    """Return the declaration of the classes or regions called `names` alone, in the model's order; all for none.

    `LIVER` finds `liver`.

    Raises:
        PlanError: a name that the model does not have.
    """
    if not names:
        return spec
    wanted = {_named(name, [label.name for label in spec.labels]) for name in names}
    kept = [place for place, label in enumerate(spec.labels) if label.name in wanted]
    order = spec.regions_class_order
    values = {value for place in kept for value in spec.labels[place].values}
    return spec.replace(
        labels=tuple(spec.labels[place] for place in kept),
        regions_class_order=None if order is None else tuple(order[place] for place in kept),
        label_map=tuple(pair for pair in spec.label_map if pair[0] in values),
        codes=tuple(pair for pair in spec.codes if pair[0] in wanted),
    )


def _named(name: str, known: Sequence[str]) -> str:
    """Return the class that a user means; upper and lower case count only where two classes differ in nothing else."""
    alike = [each for each in known if each.casefold() == name.casefold()]
    if name in alike or len(alike) == 1:
        return name if name in alike else alike[0]
    hint = f" It has {' and '.join(alike)}: write one of them." if alike else f"{did_you_mean(name, known)} Correct it."
    raise PlanError(f"--subset {name}: the model has no such class.{hint}", code="unknown_class")


def keep_only(labels: Integer[np.ndarray, "D H W"], chosen: DatasetSpec, whole: DatasetSpec) -> None:
    """Set the voxels to 0, in place, that belong to none of the chosen classes.

    Of overlapping regions, a voxel stays that lies in any chosen one; it keeps its value.

    Args:
        labels: a label map of the model, with the original values of `label_map`.
        chosen: what `chosen_spec` returned.
        whole: the model's declaration.
    """
    if chosen == whole:
        return
    originals = dict(whole.label_map)
    values = chosen.foreground_values | set(chosen.regions_class_order or ())
    kept = [0, *(originals.get(value, value) for value in values)]
    for plane in labels:
        # Plane by plane: a mask of the whole volume would take its memory once more.
        plane[~np.isin(plane, kept)] = 0
