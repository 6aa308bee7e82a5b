"""The three regions that BraTS scores, found in a data set that declares regions, tissues or nothing.

Three orders of the same tissues go around: BraTS itself has 1 necrotic core, 2 oedema, 4 enhancing tumour, with 3
instead of 4 since 2023; nnU-Net's conversions and the Decathlon have 1 oedema, 2 core, 3 enhancing. Names decide, and
values only where there are none: by values alone the last kind looks like BraTS 2023 and has another tumour core.
"""

from __future__ import annotations

from sagittal.errors import DataError
from sagittal.evaluation.classes import ClassSet
from sagittal.evaluation.protocols.recognition import by_name, described, has_only_values
from sagittal.plan.dataset import Label

WHOLE, CORE, ENHANCING = "WT", "TC", "ET"

_REGIONS = {
    WHOLE: ("wholetumor", "whole"),
    CORE: ("tumorcore", "core"),
    ENHANCING: ("enhancingtumor", "enhancing", "enhancingcore"),
}
_TISSUES = {
    "core": (
        "ncr",
        "net",
        "ncrnet",
        "netc",
        "necrosis",
        "necrotic",
        "necroticcore",
        "necrotictumorcore",
        "necroticandnonenhancingtumorcore",
        "necroticandnonenhancingtumor",
        "necroticnonenhancing",
        "nonenhancing",
        "nonenhancingtumor",
        "nonenhancingtumorcore",
    ),
    "edema": (
        "ed",
        "peritumoraledema",
        "peritumoraledematousinvadedtissue",
        "snfh",
        "surroundingnonenhancingflairhyperintensity",
    ),
    "enhancing": ("et", "enhancingtumor", "gdenhancingtumor", "activetumor"),
}


def brats_regions(classes: ClassSet) -> ClassSet:
    """Return whole tumour, tumour core and enhancing tumour in the values of the data set.

    Raises:
        DataError: the classes are neither these regions nor the three tissues that they consist of.
    """
    found = by_name(classes, _REGIONS)
    tissues = by_name(classes, _TISSUES)
    if len(found) == len(_REGIONS):
        labels = tuple(found.values())
    elif len(tissues) == len(_TISSUES):
        labels = _of_tissues(tissues["core"].values, tissues["edema"].values, tissues["enhancing"].values)
    elif has_only_values(classes) and _fit(classes.foreground_values):
        # Where no reference has an enhancing tumour, a false alarm of a prediction may have either value.
        enhancing = tuple(sorted(classes.foreground_values & {3, 4})) or (3, 4)
        labels = _of_tissues((1,), (2,), enhancing)
    else:
        raise DataError(
            f"BraTS scores whole tumour, tumour core and enhancing tumour, and the classes are {described(classes)}. "
            "Expected regions named WT, TC and ET, tissues named NCR, ED and ET, or label values without names that "
            "are 1, 2 and 4, or 1, 2 and 3. Name the classes in dataset.json, or choose another protocol.",
            code="protocol_classes",
        )
    return classes.replace(labels=labels)


def _fit(values: frozenset[int]) -> bool:
    return values <= {1, 2, 3} or values <= {1, 2, 4}


def _of_tissues(core: tuple[int, ...], edema: tuple[int, ...], enhancing: tuple[int, ...]) -> tuple[Label, ...]:
    return (
        Label(name=WHOLE, values=tuple(sorted({*core, *edema, *enhancing}))),
        Label(name=CORE, values=tuple(sorted({*core, *enhancing}))),
        Label(name=ENHANCING, values=enhancing),
    )
