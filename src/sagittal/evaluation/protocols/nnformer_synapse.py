"""Synapse as nnFormer's inference_synapse.py scores it: Dice and medpy's HD95 of eight of thirteen organs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from sagittal.errors import DataError
from sagittal.evaluation.classes import ClassSet
from sagittal.evaluation.metrics import METRICS, SURFACE_VOXEL
from sagittal.evaluation.pair import MaskPair, Metric
from sagittal.evaluation.protocols.averaging import classes_of_all_cases
from sagittal.evaluation.protocols.medpy import dice_or_one, hd95_vox
from sagittal.evaluation.protocols.protocol import Protocol, always
from sagittal.evaluation.protocols.recognition import by_name, described, has_only_values
from sagittal.plan.dataset import Label

ORGANS: Mapping[str, int] = {
    "spleen": 1,
    "right kidney": 2,
    "left kidney": 3,
    "gallbladder": 4,
    "liver": 6,
    "stomach": 7,
    "aorta": 8,
    "pancreas": 11,
}
"""The organs that are scored, with their values in the label maps of Synapse (BTCV, 1 to 13)."""

_ALIASES = {
    "spleen": ("spl",),
    "right kidney": ("kidneyright", "rkidney", "rk", "kidneyr"),
    "left kidney": ("kidneyleft", "lkidney", "lk", "kidneyl"),
    "gallbladder": ("gall", "gb"),
    "liver": (),
    "stomach": ("sto",),
    "aorta": (),
    "pancreas": ("pan",),
}
_LAST_VALUE = 13
_TRANSUNET = frozenset(range(1, 9))
"""TransUNet numbers the same eight organs in another order."""
_SOURCE = "nnFormer, nnformer/inference_synapse.py (2022), with medpy's hd95."


def _hd95(pair: MaskPair) -> float:
    value = hd95_vox(pair)
    return 0.0 if value is None else value


_METRICS: Mapping[str, Metric] = {
    "dice": replace(
        METRICS["dice"],
        compute=dice_or_one,
        empty_reference="0.",
        empty_prediction="0.",
        both_empty="1, and in the mean.",
        source=_SOURCE,
    ),
    "hd95_vox": replace(
        METRICS["hd95_mm"],
        unit="voxels",
        compute=_hd95,
        definition="From every surface voxel of one mask the distance to the nearest surface voxel of the other; both "
        "directions pooled, and of all together the 95th percentile (linear interpolation). Distances are in voxels, "
        f"though tables call them millimetres. {SURFACE_VOXEL}",
        empty_reference="0: a false alarm has the best value there is.",
        empty_prediction="0: a miss has the best value there is.",
        both_empty="0.",
        source=_SOURCE,
    ),
}


def _organs(classes: ClassSet) -> ClassSet:
    found = by_name(classes, _ALIASES)
    values = classes.foreground_values
    if len(found) == len(ORGANS):
        labels = tuple(found.values())
    elif has_only_values(classes) and max(values) <= _LAST_VALUE and values != _TRANSUNET:
        labels = tuple(Label(name=name, values=(value,)) for name, value in ORGANS.items())
    else:
        lacking = ", ".join(name for name in ORGANS if name not in found)
        raise DataError(
            f"nnFormer scores eight organs of Synapse, and the classes are {described(classes)}: not told among them "
            f"are {lacking}. Expected the names {', '.join(ORGANS)}, or label values without names in the numbering of "
            f"BTCV, 1 to 13 (exactly 1 to 8 is TransUNet's, in another order). Name the classes in dataset.json.",
            code="protocol_classes",
        )
    return classes.replace(labels=labels)


NNFORMER_SYNAPSE = Protocol(
    name="nnformer-synapse",
    title="nnFormer, Synapse",
    columns=always(_METRICS),
    headline=("dice", "hd95_vox"),
    averaging=classes_of_all_cases,
    mean_rule="Each organ over all cases; the overall mean over the eight organs.",
    peculiar=(
        "A missed organ has an HD95 of 0, the best value there is; a false alarm too.",
        "An organ that both lack scores a Dice of 1.",
        "Distances are in voxels: spacing is not used, though slices of Synapse are 3 to 5 mm apart and voxels 0.6 to "
        "1 mm wide.",
        "Oesophagus, inferior vena cava, portal and splenic veins and adrenal glands are not scored.",
        "TransUNet's calculate_metric_percase, copied by many, is another one: it scores a false alarm with a Dice of "
        "1, and an organ that both lack with 0.",
    ),
    source=_SOURCE,
    choose=_organs,
)
