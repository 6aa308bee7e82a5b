"""What a folder of nnU-Net v2 holds beside its plans: folds, checkpoints, scores, and rules of post-processing.

Checkpoints are pickles: of these only tensors, numbers and texts are read (networks/weights_file.py).
postprocessing.pkl is a pickle of functions and is not read at all; nnU-Net writes what it holds to postprocessing.json
as well.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from sagittal.errors import PlanError
from sagittal.networks.weights import official_tensors
from sagittal.networks.weights_file import read_weights_file
from sagittal.plan import DatasetSpec
from sagittal.plan.postprocessing import LargestComponent, in_words
from sagittal.training.import_nnunet_plans import Entries, read_json

Which = Literal["final", "best"]

_FOLD = re.compile(r"fold_(all|0|[1-9]\d{0,3})", flags=re.ASCII)
_PICKLE = "postprocessing.pkl"
_RULES = "postprocessing.json"
_KEEP_LARGEST = "remove_all_but_largest_component_from_segmentation"
_SAVE_AGAIN = (
    "Of an nnU-Net checkpoint four entries are needed: where you trust it, load it there and torch.save({name: "
    "checkpoint[name] for name in ('network_weights', 'init_args', 'trainer_name', 'inference_allowed_mirroring_axes')}"
    ", FILE)."
)


@dataclass(frozen=True)
class Checkpoint:
    """What prediction needs of a fold's checkpoint.

    Attributes:
        tensors: the network's weights by name, without the prefixes of wrappers.
        configuration: its name in plans.json.
        trainer: the name of the class that trained it.
        mirror_axes: axes of the network's arrays that are mirrored at test time.
    """

    tensors: Mapping[str, Tensor]
    configuration: str
    trainer: str
    mirror_axes: tuple[Literal[0, 1, 2], ...]


def require_model_folder(folder: Path) -> None:
    """Check that a folder is a trained model of nnU-Net v2.

    Raises:
        PlanError: it is something else; the message says what, and what to give or use instead.
    """
    if (folder / "plans.json").is_file() and (folder / "dataset.json").is_file():
        return
    expected = "Expected the folder of a trained model of nnU-Net v2, with dataset.json, plans.json and fold_0"
    if not folder.is_dir():
        what = "is a file" if folder.exists() else "does not exist"
        raise PlanError(f"{folder}: {what}. {expected}.", code="nnunet_folder")
    if (folder / "plans.pkl").is_file():
        raise PlanError(
            f"{folder}: a model of nnU-Net v1, whose plans.pkl is a pickle and is not read. {expected}. Bring the "
            "weights of a MedNeXt in by 'sagittal import-weights "
            "fold_0/model_final_checkpoint.model --network mednext-...'.",
            code="nnunet_folder",
        )
    models = sorted(found.parent.name for found in folder.glob("*/plans.json"))
    if models:
        raise PlanError(
            f"{folder}: no model, but it holds {', '.join(models[:5])}. {expected}; give one of these.",
            code="nnunet_folder",
        )
    missing = ", ".join(name for name in ("dataset.json", "plans.json") if not (folder / name).is_file())
    raise PlanError(
        f"{folder}: lacks {missing}. {expected}. Copy what is missing from the folder in nnUNet_results.",
        code="nnunet_folder",
    )


def checkpoint_files(folder: Path, which: Which | None, folds: Sequence[str] | None) -> dict[str, Path]:
    """Return the checkpoint of each fold by its name in a bundle, `fold_0`, ... or `all`, by nnU-Net's rule.

    Left to itself, that is every numbered fold that has the checkpoint, else fold_all.

    Args:
        folder: the model's.
        which: `final` or `best`; None takes the final ones, or the best where no fold is finished.
        folds: their names, `0`, `all`; None for the rule above.

    Raises:
        PlanError: a fold or its checkpoint is missing.
    """
    there = {match[1]: path for path in sorted(folder.glob("fold_*")) if (match := _FOLD.fullmatch(path.name))}
    wanted = list(there) if folds is None else list(dict.fromkeys(folds))
    unknown = [fold for fold in wanted if fold not in there]
    if unknown or not there:
        listed = ", ".join(sorted(there)) or "none"
        raise PlanError(
            f"{folder}: no fold {', '.join(unknown) or '0 to 4 or all'}; there are: {listed}. Expected fold_N with a "
            "checkpoint in it. Name folds that are there.",
            code="nnunet_folder",
        )
    for kind in ("final", "best") if which is None else (which,):
        found = {fold: path for fold in wanted if (path := there[fold] / f"checkpoint_{kind}.pth").is_file()}
        complete = folds is None or len(found) == len(wanted)
        if found and complete:
            numbered = {fold: path for fold, path in found.items() if fold != "all" or folds is not None}
            chosen = numbered or found
            return {"all" if fold == "all" else f"fold_{fold}": path for fold, path in chosen.items()}
    name = "checkpoint_final.pth or checkpoint_best.pth" if which is None else f"checkpoint_{which}.pth"
    raise PlanError(
        f"{folder}: no {name} in {', '.join(f'fold_{fold}' for fold in wanted)}. Train the folds to the end, name "
        "those that are finished, or choose the other kind of checkpoint.",
        code="nnunet_folder",
    )


def read_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint of nnU-Net v2; no code in it is run.

    Raises:
        PlanError: it can't be read safely, or lacks what prediction needs.
    """
    try:
        content = read_weights_file(path)
    except PlanError as error:
        if error.code != "unsafe_weights":
            raise
        raise PlanError(f"{error.message} {_SAVE_AGAIN}", code=error.code) from None
    entries = Entries(content, str(path))
    tensors, _ = official_tensors(entries.part("network_weights").values)
    axes = content.get("inference_allowed_mirroring_axes")
    axes = () if axes is None else axes
    if not isinstance(axes, tuple | list) or any(type(axis) is not int or axis not in (0, 1, 2) for axis in axes):
        raise PlanError(
            f"{path}: inference_allowed_mirroring_axes is {axes}, expected axes of 0, 1, 2. Get the checkpoint from "
            "its maker again.",
            code="nnunet_plans",
        )
    return Checkpoint(
        tensors=tensors,
        configuration=entries.part("init_args").get("configuration", str),
        trainer=entries.get("trainer_name", str),
        mirror_axes=tuple(sorted(set(axes))),
    )


def held_out_dice(files: Sequence[Path], spec: DatasetSpec) -> dict[str, float | None] | None:
    """Return each label's mean Dice over the cases that nnU-Net held out, None without its scores for every fold.

    Args:
        files: the checkpoints; the scores are in validation/summary.json beside each.
        spec: the labels.
    """
    sums = {label.name: [0.0, 0] for label in spec.labels}
    for file in files:
        summary = file.parent / "validation" / "summary.json"
        if not summary.is_file():
            return None
        cases = read_json(summary).values.get("metric_per_case")
        for case in cases if isinstance(cases, list) else []:
            for label in spec.labels:
                dice = _dice(case, label.values)
                if dice is not None:
                    sums[label.name][0] += dice
                    sums[label.name][1] += 1
    return {name: total / count if count else None for name, (total, count) in sums.items()}


def component_rules(
    folder: Path, folds: Sequence[str], spec: DatasetSpec, say: Callable[[str], None]
) -> tuple[LargestComponent, ...]:
    """Return nnU-Net's rules of post-processing: of some labels together, only the largest component stays.

    Args:
        folder: the model's; postprocessing.json lies in it, or beside the cross-validation of these folds.
        folds: names of the weights in the bundle.
        spec: the labels.
        say: told what was found and what was not read.

    Raises:
        PlanError: a rule that Sagittal does not know, by its name.
    """
    numbers = [fold.removeprefix("fold_") for fold in folds]
    home = folder / f"crossval_results_folds_{'_'.join(numbers)}"
    for place in (folder, home):
        if (place / _RULES).is_file():
            rules = _rules(read_json(place / _RULES), spec)
            said = "; ".join(in_words(rule) for rule in rules) or "none chosen"
            say(f"post-processing, from {_RULES}: {said}")
            if spec.has_regions and any(rule.labels for rule in rules):
                say("  what is taken from a region becomes the region around it; nnU-Net makes background of it")
            return rules
    pickles = [place for place in (folder, home) if (place / _PICKLE).is_file()]
    if pickles:
        say(
            f"post-processing: none, for {_PICKLE} is a pickle of functions, which is never read, and there is no "
            f"{_RULES} beside it; copy that from nnU-Net's crossval_results folder into the model's folder"
        )
    others = sorted(path.parent.name for path in folder.glob(f"crossval_results_folds_*/{_RULES}"))
    if others and not pickles:
        say(f"post-processing: none; the rules in {', '.join(others)} were chosen for other folds than these")
    return ()


def _rules(content: Entries, spec: DatasetSpec) -> tuple[LargestComponent, ...]:
    names, options = content.get("postprocessing_fns", list), content.get("postprocessing_kwargs", list)
    rules = []
    for name, option in zip(names, options, strict=False):
        if name != _KEEP_LARGEST:
            raise content.refuse(f"a rule of post-processing is {name}", _KEEP_LARGEST)
        given = option if isinstance(option, dict) else {}
        unknown = given.keys() - {"labels_or_regions", "background_label"}
        if unknown or given.get("background_label", 0) != 0:
            raise content.refuse(f"{name} has the options {given}", "labels_or_regions alone")
        # A list of labels, of regions, or one of either: in each case the union of all values is one mask.
        values = set(_flat(given.get("labels_or_regions")))
        within = [label for label in spec.labels if set(label.values) <= values]
        if not values or values != {value for label in within for value in label.values}:
            known = ", ".join(f"{label.name} {list(label.values)}" for label in spec.labels)
            raise content.refuse(f"{name} names the labels {sorted(values)}", f"some of {known}")
        whole = values == spec.foreground_values
        rules.append(LargestComponent(labels=() if whole else tuple(label.name for label in within)))
    if len(names) != len(options):
        raise content.refuse(f"{len(names)} postprocessing_fns have {len(options)} postprocessing_kwargs", "as many")
    return tuple(rules)


def _flat(values: Any) -> list[int]:
    if isinstance(values, list):
        return [value for one in values for value in _flat(one)]
    return [values] if type(values) is int else []


def _dice(case: Any, values: tuple[int, ...]) -> float | None:
    """Return a case's Dice of a label, under any of the keys that nnU-Net gives it; None where it is not defined."""
    metrics = case.get("metrics") if isinstance(case, dict) else None
    if not isinstance(metrics, dict):
        return None
    for key, scores in metrics.items():
        same = tuple(sorted(int(number) for number in re.findall(r"\d+", key))) == values
        dice = scores.get("Dice") if same and isinstance(scores, dict) else None
        if isinstance(dice, int | float) and math.isfinite(dice):
            return float(dice)
    return None
