"""What is done to a label map after the network: plain rules, applied in the order of the plan.

`inference.postprocessing` applies them; `training.postprocessing_choice` chooses them on held-out cases.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from sagittal.plan.base import Frozen
from sagittal.plan.dataset import DatasetSpec
from sagittal.plan.quantities import Positive


class LargestComponent(Frozen):
    """Keep the largest connected component of a set of labels, and of equally large ones all.

    nnU-Net's rule. Voxels are connected where they touch by a face, an edge or a corner.
    """

    kind: Literal["largest_component"] = "largest_component"
    labels: tuple[str, ...] = ()
    """Classes or regions whose union has one largest component; none for all of the foreground together."""


class MinimumVolume(Frozen):
    """Remove the connected components of a class or region that are smaller than a volume."""

    kind: Literal["minimum_volume"] = "minimum_volume"
    label: str
    volume_ml: Positive
    """A component of exactly this volume stays."""


class FillHoles(Frozen):
    """Give a class or region the background that it encloses; of a region, also what its parents alone cover.

    Enclosed is what no path over faces of voxels connects with the border of the scan. What belongs to other labels
    inside a hole stays theirs.
    """

    kind: Literal["fill_holes"] = "fill_holes"
    label: str


Rule = Annotated[LargestComponent | MinimumVolume | FillHoles, Field(discriminator="kind")]


def labels_named(rule: Rule) -> tuple[str, ...]:
    """Return the labels that a rule names; none for one on all of the foreground together."""
    return rule.labels if rule.kind == "largest_component" else (rule.label,)


def in_words(rule: Rule) -> str:
    """Return a rule in words, for people."""
    match rule:
        case LargestComponent():
            return f"keep only the largest component of {' and '.join(rule.labels) or 'all foreground together'}"
        case MinimumVolume():
            return f"remove components of {rule.label} below {rule.volume_ml:.3g} mL"
        case FillHoles():
            return f"fill holes of {rule.label}"


def unknown_label(rules: tuple[Rule, ...], spec: DatasetSpec) -> str | None:
    """Return the first label that a rule names and the data set lacks, None where all are known."""
    known = {label.name for label in spec.labels}
    return next((name for rule in rules for name in labels_named(rule) if name not in known), None)
