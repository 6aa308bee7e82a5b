"""`sagittal info`: what is this file or folder?"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter


def info(path: Path, /, *, json: Annotated[bool, Parameter(negative="")] = False) -> int:
    """Say what an image, a DICOM study, a data set, a plan, a bundle or the folder of a run (OUT.run) is and holds.

    Of a DICOM study (folder, zip archive or DICOMDIR) every series is listed; STUDY#UID shows one of them.

    Args:
        path: a file or folder
        json: print the series of a DICOM study as JSON
    """
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from sagittal.bundle import is_package
    from sagittal.cli.series_table import print_series
    from sagittal.errors import DataError, PlanError
    from sagittal.training.run_folder import is_run_folder
    from sagittal.volumes.dicom_catalogue import list_series
    from sagittal.volumes.dicom_files import split_series, with_series
    from sagittal.volumes.io import is_dicom, is_scan

    study, series_uid = split_series(path)
    if not study.exists():
        raise DataError(
            f"{path}: does not exist. Give an image, a data set, a plan, a bundle or OUT.run.", code="missing"
        )
    if json and not (is_scan(study) and is_dicom(study)):
        raise PlanError(f"{path}: --json is for DICOM studies. Leave it out.", code="usage")
    more: list[str] = []
    if path.name == "dataset.json":
        path = path.parent
    if is_package(path) or (path.is_dir() and (path / "manifest.json").exists()):
        kind, facts = "bundle", _bundle_facts(path)
    elif path.is_dir() and (path / "dataset.json").exists():
        kind, facts = "data set", _dataset_facts(path)
    elif path.is_dir() and is_run_folder(path):
        kind, (facts, more) = "run", _run_facts(path)
    elif series_uid is None and is_scan(path) and is_dicom(path):
        found = list_series(path)
        print_series(path, found, json)
        usable = [series.series_uid for series in found if series.usable]
        if json or len(usable) != 1:
            return 0
        kind, facts = "image", _image_facts(with_series(path, usable[0]))
    elif path.is_dir() and not is_scan(path):
        known = "a bundle (manifest.json), a data set (dataset.json), a run (run.json) nor a DICOM series"
        raise DataError(f"{path}: neither {known}. Check the path.", code="unknown_kind")
    elif path.suffix == ".json":
        kind, facts = "plan", _plan_facts(path)
    else:
        kind, facts = "image", _image_facts(path)
    table = Table(title=escape(str(path)), show_header=False)
    table.add_column("", overflow="fold")
    table.add_column(kind, overflow="fold")
    for name, value in facts.items():
        table.add_row(escape(name), escape(value))
    Console().print(kind)
    Console().print(table)
    for line in more:  # outside of the table, which would break a command into pieces
        print(line)
    return 0


def _image_facts(path: Path) -> dict[str, str]:
    from sagittal.volumes import read_volume
    from sagittal.volumes.geometry import axis_codes

    volume = read_volume(path)
    return {
        "channels": str(volume.array.shape[0]),
        "shape (D, H, W)": " x ".join(map(str, volume.array.shape[1:])),
        "spacing (D, H, W)": " x ".join(f"{value:.4g}" for value in volume.spacing_mm) + " mm",
        "axes D, H, W run towards": axis_codes(volume.affine),
        "values": f"{volume.array.min():.6g} to {volume.array.max():.6g}, mean {volume.array.mean():.6g}",
        "affine (d, h, w, 1) to RAS mm": "\n".join(" ".join(f"{x:10.4f}" for x in row) for row in volume.affine),
    }


def _dataset_facts(path: Path) -> dict[str, str]:
    from sagittal.data.dataset import read_dataset

    dataset = read_dataset(path)
    spec = dataset.spec
    return {
        "name": spec.name,
        "cases": str(len(dataset.cases)),
        "channels": ", ".join(spec.channel_names),
        "labels": "\n".join(f"{label.name}: {', '.join(map(str, label.values))}" for label in spec.labels),
        "kind": "regions" if spec.has_regions else "classes",
        "ignore value": str(spec.ignore_value),
        "files": spec.file_ending,
    }


def _plan_facts(path: Path) -> dict[str, str]:
    from sagittal.plan import Plan

    return _facts_of_plan(Plan.read(path))


def _bundle_facts(path: Path) -> dict[str, str]:
    from sagittal.bundle import read_bundle

    bundle = read_bundle(path)
    dice = bundle.metrics.get("mean_dice")
    return {
        "weights": ", ".join(bundle.weight_names),
        "mean Dice": "not validated" if dice is None else f"{dice:.4f} ({bundle.metrics.get('validation')})",
        "every byte": "verified against manifest.json",
        **_facts_of_plan(bundle.plan),
    }


def _run_facts(path: Path) -> tuple[dict[str, str], list[str]]:
    """Return the facts of a run, and the line that tells how to go on with it where it is not over."""
    from sagittal.training.run_folder import read_run

    run = read_run(path)
    whole = path.resolve()  # of ".", too
    bundle = whole.with_name(whole.name.removesuffix(".run"))
    facts = {"state": run.state}
    for fold in run.folds:
        dice = "no validation on the way" if fold.dice is None else f"Dice {fold.dice:.4f} at step {fold.dice_step}"
        facts[f"fold {fold.name}"] = f"step {fold.step} of {fold.end}; {dice}; {path / f'fold_{fold.name}'}"
    facts["bundle"] = str(bundle) if (bundle / "manifest.json").is_file() else "not written yet"
    command = run.command or "the same call of sagittal.train, with RunOptions(resume=True)"
    facts |= {} if run.plan is None else _facts_of_plan(run.plan)
    return facts, [f"go on with: {command}"] if run.resumable else []


def _facts_of_plan(plan: object) -> dict[str, str]:
    from sagittal.plan import Plan

    assert isinstance(plan, Plan)
    return {
        "network": f"{plan.network_name} {json.dumps(plan.network.model_dump(mode='json', exclude_defaults=True))}",
        "data set": f"{plan.dataset.name}: {', '.join(plan.dataset.channel_names)}",
        "labels": ", ".join(label.name for label in plan.dataset.labels),
        "spacing (D, H, W)": " x ".join(f"{value:.4g}" for value in plan.preprocessing.spacing_mm) + " mm",
        "patch (D, H, W)": " x ".join(map(str, plan.patch.size)),
        "batch": str(plan.training.batch_size),
        "steps": f"{plan.schedule.steps} ({plan.reasons.get('schedule.steps', 'no reason recorded')})",
        "optimiser": f"{plan.training.optimizer.kind}, learning rate {plan.training.optimizer.learning_rate:g}",
    }
