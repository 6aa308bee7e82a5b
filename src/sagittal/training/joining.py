"""Several folds become one bundle: their weights beside each other, and what is known of them all together."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from sagittal.bundle import Bundle, hash_case, is_package, read_bundle, write_bundle
from sagittal.bundle.manifest import MANIFEST
from sagittal.data.dataset import Dataset
from sagittal.data.split_files import PATIENTS_NAME, read_patients
from sagittal.data.splits import patients_of
from sagittal.errors import BundleError, DataError
from sagittal.evaluation.bootstrap import CONFIDENCE, RESAMPLES, SEED, Interval, bootstrap_means
from sagittal.plan.plan import Plan
from sagittal.training.fast_cost import fast_of_folds
from sagittal.training.fold import COMPLETE
from sagittal.training.postprocessing_choice import unchosen

CASE_SCORES = {"dice": "cases", "hd95_mm": "cases_hd95_mm"}
"""Metric to the name under which a fold's entry has its values by hash of the case and label."""

Entry = Mapping[str, Any]
"""What a bundle's metrics tell of one fold."""


def bundle_at(out: Path) -> Bundle | None:
    """Return the bundle at `out`, None where there is nothing or an empty folder.

    Raises:
        BundleError: there is something else, or a damaged bundle.
    """
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return None
    if not is_package(out) and not (out / MANIFEST).is_file():
        raise BundleError(
            f"{out}: is there already and is no bundle (it holds no {MANIFEST}), and what is in it would be lost. "
            "Expected a new path, an empty folder, or a bundle to add to. Choose another --out.",
            code="would_overwrite",
        )
    return read_bundle(out)


def weights_name(fold: str) -> str:
    """Return what a bundle calls the weights of a fold."""
    return "all" if fold == "none" else f"fold_{fold}"


def finished_before(out: Path, plan: Plan, name: str) -> Mapping[str, Any] | None:
    """Return the bundle's metrics where it holds this fold, trained and validated to its end by the same plan."""
    bundle = bundle_at(out)
    if bundle is None or unchosen(bundle.plan) != plan:
        return None
    entry = bundle.metrics.get("folds", {}).get(name)
    return bundle.metrics if entry is not None and is_finished(entry) else None


def is_finished(entry: Entry) -> bool:
    """Whether a fold was trained and validated to its end."""
    return entry["ended"] in COMPLETE and not entry.get("validation_stopped", False)


def join_bundle(
    out: Path,
    plan: Plan,
    name: str,
    entry: Entry,
    weights: Mapping[str, np.ndarray],
    *,
    patients: Mapping[str, str],
    failed: Mapping[str, str],
) -> dict[str, Any]:
    """Write a fold into the bundle beside the finished folds that are there, and return the bundle's metrics.

    Finished folds predict together; one that was stopped is in the bundle only as long as none is finished.

    Args:
        out: the bundle.
        plan: the plan that the fold was trained by; folds of another one are not kept.
        name, entry, weights: the fold, and what is known of it.
        patients: see `join_folds`.
        failed: folds of this run that failed, and what kind of error each ended by.
    """
    arrays, folds = _finished(out, plan)
    if folds and entry["ended"] not in COMPLETE:
        return join_folds(plan, folds, patients=patients, failed=failed)
    arrays[weights_name(name)] = weights
    folds[name] = entry
    metrics = join_folds(plan, folds, patients=patients, failed=failed)
    former = bundle_at(out)
    write_bundle(out, plan=plan, weights=arrays, metrics=metrics, low=None if former is None else former.low)
    return metrics


def note_failures(
    out: Path, plan: Plan, failed: Mapping[str, str], *, patients: Mapping[str, str]
) -> Mapping[str, Any]:
    """Write into a bundle which folds failed, where there is one; return its metrics."""
    bundle = bundle_at(out)
    if bundle is None or unchosen(bundle.plan) != plan:
        return {}
    if bundle.metrics.get("failed_folds", {}) == failed:
        return bundle.metrics
    metrics = join_folds(plan, bundle.metrics["folds"], patients=patients, failed=failed)
    rewrite(bundle, plan, metrics)
    return metrics


def rewrite(bundle: Bundle, plan: Plan, metrics: Mapping[str, Any]) -> None:
    """Write a bundle again with the same weights and another plan or other metrics."""
    arrays = {name: bundle.weights(name) for name in bundle.weight_names}
    write_bundle(bundle.path, plan=plan, weights=arrays, metrics=metrics, low=bundle.low)


def join_folds(
    plan: Plan, folds: Mapping[str, Entry], *, patients: Mapping[str, str], failed: Mapping[str, str]
) -> dict[str, Any]:
    """Return the bundle's metrics from those of its folds: scores over all held-out cases, with intervals.

    Args:
        plan: names the labels and the folds.
        folds: entries by name.
        patients: patient by hash of the case; a case that is not in it is a patient of its own.
        failed: folds that failed, and what kind of error each ended by.
    """
    together = scores_of(plan, folds, patients)
    reasons = sorted({str(entry["validation"]) for entry in folds.values()})
    cases = together["cases"]
    metrics: dict[str, Any] = {
        "dice": {name: scores["dice"]["mean"] for name, scores in together["classes"].items()},
        "mean_dice": together["mean"]["dice"]["mean"],
        "validation": f"{cases} held-out cases, each predicted by networks that {unseen(plan, folds)}"
        if cases
        else "; ".join(reasons),
        "training_cases": max(int(entry["training_cases"]) for entry in folds.values()),
    }
    if "none" not in folds:
        missing = [str(fold) for fold in range(plan.training.folds) if str(fold) not in folds]
        metrics["missing_folds"] = missing
        metrics["out_of_fold"] = {"folds": sorted(folds), **together}
    fast = fast_of_folds(plan, folds)
    if fast is not None:
        metrics["fast"] = fast
    if failed:
        metrics["failed_folds"] = dict(sorted(failed.items()))
    metrics["folds"] = {name: dict(folds[name]) for name in sorted(folds)}
    return metrics


def scores_of(plan: Plan, folds: Mapping[str, Entry], patients: Mapping[str, str]) -> dict[str, Any]:
    """Return every metric's mean per class and over classes, over the held-out cases of folds, with intervals.

    A case that own splits hold out in several folds counts once per fold, and as one patient.
    """
    names = [label.name for label in plan.dataset.labels]
    held = [(name, case) for name in sorted(folds) for case in folds[name]["cases"]]
    owners = [patients.get(case, f"case {case}") for _, case in held]
    classes: dict[str, dict[str, Any]] = {name: {} for name in names}
    over_classes = {}
    for metric, key in CASE_SCORES.items():
        rows = [folds[name].get(key, {}).get(case, {}) for name, case in held]
        table = np.array([[np.nan if row.get(label) is None else row[label] for label in names] for row in rows])
        found = bootstrap_means(table.reshape(len(rows), len(names)).astype(np.float64), owners)
        for name, interval in zip(names, found.columns, strict=True):
            classes[name][metric] = _tree(interval)
        over_classes[metric] = _tree(found.overall)
    drawn = "cases" if len(set(owners)) == len(held) else "patients"
    return {
        "cases": len(held),
        "patients": len(set(owners)),
        "interval": f"{CONFIDENCE:.0%} BCa bootstrap over {drawn}, {RESAMPLES} resamples, seed {SEED}",
        "classes": classes,
        "mean": over_classes,
    }


def patients_by_case(data: Dataset, plan: Plan) -> dict[str, str]:
    """Return the patient of each case by the case's hash, where the plan or a table beside the data tells it."""
    ids = [case.id for case in data.cases]
    path = data.folder / PATIENTS_NAME
    try:
        listed = read_patients(path) if path.is_file() else None
        known = listed if listed is not None else patients_of(ids, plan.training)
    except DataError:
        # Who goes by the table when cases are split has been told; here every case is left a patient of its own.
        return {}
    return {hash_case(case): f"patient {known[case]}" for case in ids if case in known}


def _tree(interval: Interval) -> dict[str, Any]:
    bounds = None if interval.low is None else [interval.low, interval.high]
    return {"mean": interval.mean, "ci95": bounds, "n": interval.n}


def unseen(plan: Plan, folds: Mapping[str, Entry]) -> str:
    """Return what folds' networks have to do with the cases that they are scored on, to follow "networks that"."""
    told = "never saw it"
    if any(entry.get("start_may_have_seen_held_out", False) for entry in folds.values()):
        told = "were not trained on it here; the weights that they started from may have seen it"
    if plan.schedule.keep == "best" or any(entry["ended"] == "stale" for entry in folds.values()):
        told += "; which of their weights were kept was chosen by validations on such cases, so scores may flatter"
    return told


def _finished(out: Path, plan: Plan) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return weights and metrics of the folds that the bundle holds, trained to their end by the same plan."""
    bundle = bundle_at(out)
    if bundle is None or unchosen(bundle.plan) != plan:
        return {}, {}
    folds = {name: entry for name, entry in bundle.metrics.get("folds", {}).items() if entry["ended"] in COMPLETE}
    weights = {weights_name(name): bundle.weights(weights_name(name)) for name in folds}
    return weights, folds
