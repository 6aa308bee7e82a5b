"""`--config 3d,3d-low`: two models of the same cases and folds, each with a run of its own, become one bundle."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sagittal.bundle import Bundle, read_bundle, write_bundle
from sagittal.bundle.manifest import LOW, weights_path
from sagittal.data.dataset import read_dataset
from sagittal.training.choice import PlanChoice
from sagittal.training.fast_cost import by_case, cost_of_fast
from sagittal.training.run import TrainResult, train
from sagittal.training.stages import RunOptions, find_plan

FIRST_SHARE = 0.6
"""Of the budget, for the model that sees the full resolution."""


def train_both(
    dataset: Path, out: Path, *, budget_s: float | None = None, options: RunOptions | None = None, **wishes: Any
) -> TrainResult:
    """Train a model of the full resolution, then one of a coarser spacing, and join them into one bundle.

    The second one's own bundle and run lie beside the first's, as `OUT.low` and `OUT.low.run`. Stopped in either, the
    same command goes on with `resume`.

    Args:
        dataset, out, options: as for `train`.
        budget_s: seconds for both together.
        wishes: the others of `train`, but `configuration`.

    Raises:
        SagittalError: as for `train`; also, before anything is trained, where no coarser spacing is to be had.
    """
    began, options = time.monotonic(), options or RunOptions()
    out = out.resolve() if out.name in ("", "..") else out
    beside = out.with_name(f"{out.name}.low")
    _require_coarser(dataset, beside, options, wishes)
    first_s = None if budget_s is None else FIRST_SHARE * budget_s
    first = train(dataset, out, budget_s=first_s, options=options, configuration="3d", **wishes)
    if not first.complete:
        return first
    left_s = None if budget_s is None else budget_s - (time.monotonic() - began)
    options.say("train: the second model, at a coarser spacing")
    second = train(dataset, beside, budget_s=left_s, options=options, configuration="3d-low", **wishes)
    if not options.world.main:
        return dataclasses.replace(first, ended=second.ended)
    return dataclasses.replace(first, metrics=attach_low(out, beside), ended=second.ended)


def attach_low(out: Path, beside: Path) -> Mapping[str, Any]:
    """Write the bundle `beside` into the bundle `out` as its second model, with its cost; return the metrics."""
    main, low = read_bundle(out), read_bundle(beside)
    plain, fast = (by_case(bundle.metrics.get("folds", {}), "cases") for bundle in (main, low))
    cost = cost_of_fast(main.plan, plain, fast, "low")
    metrics = {name: value for name, value in main.metrics.items() if name != "fast"}
    if cost is not None:
        metrics["fast"] = cost
    if main.low_plan != low.plan or not _same_weights(main, low) or metrics != main.metrics:
        weights = {name: main.weights(name) for name in main.weight_names}
        write_bundle(out, plan=main.plan, weights=weights, metrics=metrics, low=low)
    return metrics


def _same_weights(main: Bundle, low: Bundle) -> bool:
    files = {path.removeprefix(LOW): entry for path, entry in main.manifest.files.items() if path.startswith(LOW)}
    paths = [weights_path(name) for name in low.weight_names]
    return main.manifest.low_weight_names == low.weight_names and all(
        files[path] == low.manifest.files[path] for path in paths
    )


def _require_coarser(dataset: Path, beside: Path, options: RunOptions, wishes: Mapping[str, Any]) -> None:
    """Plan the second model before the first is trained, so that what can't be planned is known at once."""
    if options.world.size > 1 or (beside.with_name(f"{beside.name}.run") / "plan.json").exists():
        return
    choice = PlanChoice(
        network=wishes.get("network"),
        settings=wishes.get("settings") or {},
        configuration="3d-low",
        preset=wishes.get("preset"),
    )
    find_plan(read_dataset(dataset), None, choice, dataclasses.replace(options, say=lambda line: None))
