"""MODEL_CARD.md: what a person should know before using a bundle, written from its plan and its metrics."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sagittal.plan import Plan
from sagittal.plan.postprocessing import in_words

_LICENCE = "Licence of the data"


def model_card(plan: Plan, metrics: Mapping[str, Any], *, parameters: int, data_license: str | None = None) -> str:
    """Return the card as Markdown.

    Args:
        plan: the bundle's plan.
        metrics: the bundle's metrics; of these the card shows, where present, `dice` (label name -> number or None),
            `mean_dice`, `validation` (a sentence: on which cases, seen or unseen), `training_cases` (a number),
            `out_of_fold` (scores with intervals over the held-out cases of all folds, see `training.joining`),
            `missing_folds`, `failed_folds`, `postprocessing` (see `training.postprocessing_choice`), and of a fold's
            entry `made_with`.
        parameters: number of trainable values of one network.
        data_license: licence of the data set, None where unknown.
    """
    dataset = plan.dataset
    sections = [
        f"# {_line(dataset.name)}, {_line(plan.network_name)}",
        "**For research use. Not a medical device.** Nobody has shown that these outputs are safe to treat people by.",
        "## Data\n\n"
        + _bullets(
            {
                "Data set": dataset.name,
                "Training cases": _number(metrics.get("training_cases")),
                "Channels": ", ".join(dataset.channel_names),
                "Spacing seen by the network (D, H, W)": " x ".join(
                    f"{value:.4g}" for value in plan.preprocessing.spacing_mm
                )
                + " mm",
                _LICENCE: data_license or "unknown",
            }
        ),
        "## Classes and Dice\n\n" + _dice_table(plan, metrics),
        *_fast(metrics),
        *_postprocessing(plan, metrics),
        "## Network\n\n"
        + _bullets(
            {
                "Network": f"{plan.network_name} ({plan.network.kind})",
                "Parameters": f"{parameters:,}",
                "Window (D, H, W)": " x ".join(str(size) for size in plan.patch.size) + " voxels",
                **_training(plan, metrics),
            }
        ),
        "## Use\n\n```\nsagittal predict BUNDLE SCAN --out FOLDER\n```",
    ]
    return "\n\n".join(sections) + "\n"


def data_license_in(card: str) -> str | None:
    """Return the licence of the data that a card names, which stands nowhere else in a bundle; None where unknown."""
    start = f"- {_LICENCE}: "
    found = next((line.removeprefix(start).strip() for line in card.splitlines() if line.startswith(start)), "unknown")
    return None if found == "unknown" else found


def _training(plan: Plan, metrics: Mapping[str, Any]) -> dict[str, str]:
    if "imported" in metrics:
        return {"Training": "elsewhere; the weights were imported"}
    steps = {"Planned training steps": f"{plan.schedule.steps:,} of batch {plan.training.batch_size}"}
    folds = metrics.get("folds")
    made = [entry["made_with"] for entry in folds.values() if "made_with" in entry] if folds else []
    told = [
        f"sagittal {one['sagittal']}, torch {one['torch']}, Python {one['python']}, {', '.join(one['device_names'])}"
        for one in made
    ]
    return {**steps, **({"Trained with": "; ".join(dict.fromkeys(told))} if told else {})}


def _dice_table(plan: Plan, metrics: Mapping[str, Any]) -> str:
    dice = metrics.get("dice")
    dice = dice if isinstance(dice, Mapping) else {}
    written = plan.dataset.regions_class_order or tuple(label.values[0] for label in plan.dataset.labels)
    originals = dict(plan.dataset.label_map)
    together = metrics.get("out_of_fold")
    intervals = _intervals(together) if isinstance(together, Mapping) and together.get("cases") else None
    more = ("", "") if intervals is None else (" 95 % interval | cases |", "---|---|")
    rows = [f"| class | value in the label map | Dice |{more[0]}", f"|---|---|---|{more[1]}"]
    for label, value in zip(plan.dataset.labels, written, strict=True):
        row = f"| {_line(label.name)} | {originals.get(value, value)} | {_score(dice.get(label.name))} |"
        rows.append(row + ("" if intervals is None else intervals[label.name]))
    rows.append(f"| mean | | {_score(metrics.get('mean_dice'))} |" + ("" if intervals is None else intervals[""]))
    how = metrics.get("validation")
    how = _line(str(how)) if how else "These weights have not been validated."
    told = [f"How it was measured: {how}", *_folds(plan, metrics)]
    if intervals is not None and together is not None:
        told.append(f"Interval: where the mean would lie for other cases of the same kind; {together['interval']}.")
    return "\n".join(rows) + "\n\n" + "\n\n".join(told)


def _intervals(together: Mapping[str, Any]) -> dict[str, str]:
    """Return two more cells for the row of each class, and for that of the mean under an empty name."""
    values = {**{name: scores["dice"] for name, scores in together["classes"].items()}, "": together["mean"]["dice"]}
    cells = {}
    for name, value in values.items():
        bounds = value["ci95"]
        cells[name] = (
            f" {'too few cases' if bounds is None else f'{bounds[0]:.3f} to {bounds[1]:.3f}'} | {value['n']} |"
        )
    return cells


def _folds(plan: Plan, metrics: Mapping[str, Any]) -> list[str]:
    """Return a sentence on the folds that a bundle lacks, where it has more than one or one failed."""
    missing, failed = metrics.get("missing_folds"), metrics.get("failed_folds", {})
    if not missing or (len(metrics["folds"]) == 1 and not failed):
        return []
    told = [f"{fold} (failed: {failed[fold]})" if fold in failed else fold for fold in missing]
    return [f"Folds {', '.join(metrics['folds'])} of {plan.training.folds} are here; missing: {', '.join(told)}."]


def _fast(metrics: Mapping[str, Any]) -> list[str]:
    """Return the section on `--fast` where its cost was measured."""
    told = metrics.get("fast")
    if not isinstance(told, Mapping) or told.get("mean_cost") is None:
        return []
    how = {"low": "the second model of this bundle, at a coarser spacing", "step": "fewer windows"}[told["how"]]
    rows = [
        f"| {_line(name)} | {_score(dice)} | {_change(told['cost'][name])} |" for name, dice in told["dice"].items()
    ]
    table = "\n".join(["| class | Dice | change |", "|---|---|---|", *rows])
    total = f"| mean | {_score(told['mean_dice'])} | {_change(told['mean_cost'])} |"
    where = f"On {told['cases']} held-out cases, compared with {_line(told['against'])}."
    return [f"## Fast prediction\n\n`sagittal predict --fast` takes {how}.\n\n{table}\n{total}\n\n{where}"]


def _change(cost: Any) -> str:
    return f"{-cost:+.4f}" if isinstance(cost, int | float) else "not measured"


def _postprocessing(plan: Plan, metrics: Mapping[str, Any]) -> list[str]:
    """Return the section on what is done to label maps after the network, where there is something to tell."""
    told = metrics.get("postprocessing")
    title = "## Post-processing\n\n"
    if not isinstance(told, Mapping):
        rules = [f"- {_line(in_words(rule))}" for rule in plan.postprocessing]
        why = _line(plan.reasons.get("postprocessing", "set by hand in the plan"))
        return [title + "\n".join([*rules, "", f"Why: {why}."])] if rules else []
    if told.get("why") is not None:
        return [f"{title}None: {_line(str(told['why']))}."]
    rows = ["| rule | Dice gained |", "|---|---|"]
    for item in told["chosen"]:
        gains = ", ".join(f"{_line(name)} {gain:+.4f}" for name, gain in item["gain"].items())
        rows.append(f"| {_line(item['words'])} | {gains or 'with the next rule'} |")
    how = (
        f"Measured on the {told['cases']} held-out cases that chose the rules, so it flatters. The table of classes is "
        "without them; `sagittal predict --no-postprocessing` leaves them out."
    )
    return [title + "\n".join(rows) + f"\n\n{how}"]


def _bullets(items: Mapping[str, str]) -> str:
    return "\n".join(f"- {name}: {_line(value)}" for name, value in items.items())


def _score(value: Any) -> str:
    return f"{value:.3f}" if isinstance(value, int | float) else "not measured"


def _number(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else "unknown"


def _line(text: str) -> str:
    # Names come from a data set's file: a newline or a bar would break out of the table.
    return " ".join(text.split()).replace("|", "\\|")
