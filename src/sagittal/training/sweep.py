"""Several networks on the same folds at equal time: cross-validated, losers stopped early, the winner's bundle kept.

    OUT/NETWORK, OUT/NETWORK.run   bundle and run of each network, as `sagittal train --fold K` leaves them
    OUT/compared                   the comparison of those that finished all folds
    OUT/compared-first-folds       where some were stopped: of all, on the folds that each of them finished
    OUT/winner                     the bundle of the best of those that finished
    OUT/sweep.json                 what was asked for, who was stopped and who failed; a sweep goes on by it

A network's folds are trained one after the other, each with the same share of the time. All networks hold out the same
cases in a fold, and all of them are scored even where that takes longer than was kept for it, so scores after as many
folds can be compared.
"""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, cast

from pydantic import Field, ValidationError

from sagittal.data.dataset import read_dataset
from sagittal.errors import DataError, PlanError, SagittalError, TrainingError, did_you_mean
from sagittal.evaluation import Evaluation
from sagittal.evaluation.comparison import compare_evaluations
from sagittal.evaluation.joining import join_evaluations
from sagittal.plan.base import Frozen, write_atomically
from sagittal.plan.networks import NETWORKS
from sagittal.plan.overrides import require_known_fields
from sagittal.report.comparison import write_comparison
from sagittal.training.finish import REPORT
from sagittal.training.joining import bundle_at, scores_of
from sagittal.training.run import FOLDS, FoldName, TrainResult, train
from sagittal.training.run_folder import HANDED_OUT
from sagittal.training.stages import RunOptions

SWEEP_JSON, WINNER, COMPARED, COMPARED_FIRST = "sweep.json", "winner", "compared", "compared-first-folds"
KEPT_SHARE = 2
"""After one fold, after two and after four, one network of so many goes on."""
RUNGS = (1, 2, 4)
_STOPPED = ("interrupted", "terminated")


@dataclass(frozen=True)
class Sweep:
    """What is compared.

    Attributes:
        dataset: folder in nnU-Net's layout.
        out: folder for everything that comes of it.
        networks: names.
        budget_s: time that each network has, over all folds.
        folds: how many folds each is trained on.
        settings: of every plan, by dotted name.
        options: how folds are trained.
    """

    dataset: Path
    out: Path
    networks: tuple[str, ...]
    budget_s: float
    folds: int = len(FOLDS)
    settings: Mapping[str, Any] = field(default_factory=dict)
    options: RunOptions = field(default_factory=RunOptions)

    def bundle(self, network: str) -> Path:
        """Return where a network's bundle is."""
        return self.out / network

    def run_folder(self, network: str) -> Path:
        """Return where a network's run is."""
        return self.out / f"{network}.run"


class Standing(Frozen):
    """What became of the networks so far; sweep.json."""

    networks: tuple[str, ...]
    budget_s: float
    folds: int
    settings: dict[str, Any] = Field(default_factory=dict)
    scores: dict[str, tuple[float, ...]] = Field(default_factory=dict)
    """By network: the mean Dice over the cases held out so far, after each of its folds."""
    stopped: tuple[str, ...] = ()
    """Those that were behind the others."""
    failed: dict[str, str] = Field(default_factory=dict)
    """Those that can't be trained, and why."""

    def finished(self) -> tuple[str, ...]:
        """Return the networks with all folds, the best first."""
        whole = [name for name, scores in self.scores.items() if len(scores) >= self.folds]
        return tuple(sorted(whole, key=lambda name: -self.scores[name][-1]))

    def scored(self, network: str, scores: Sequence[float]) -> Standing:
        """Return the standing with a network's scores."""
        return self.replace(scores={**self.scores, network: tuple(scores)})


class Interrupted(Exception):  # noqa: N818 - no error: the user or the scheduler asked for an end
    """A sweep was asked to end; it goes on with `resume`."""

    def __init__(self, ended: str) -> None:
        super().__init__(ended)
        self.ended = ended


def begin(sweep: Sweep, *, resume: bool) -> Standing:
    """Check what was asked for and return where the sweep stands.

    Raises:
        PlanError: an unknown network, fewer than two, or too short a time.
        TrainingError: `out` holds another sweep, or this one and `resume` was not given.
    """
    for name in sweep.networks:
        if name not in NETWORKS:
            raise PlanError(f"--networks: no network is called '{name}'.{did_you_mean(name, NETWORKS)}")
    if len(set(sweep.networks)) < 2 or len(set(sweep.networks)) < len(sweep.networks):
        raise PlanError(
            f"--networks {','.join(sweep.networks)}: expected two or more, each once; one is trained by "
            "'sagittal train'.",
            code="options",
        )
    if sweep.budget_s <= 0 or not 1 < sweep.folds <= len(FOLDS):
        raise PlanError(
            f"a sweep over {sweep.folds} folds in {sweep.budget_s:g} s: expected 2 to {len(FOLDS)} folds and a time "
            "above 0.",
            code="options",
        )
    require_known_fields(sweep.settings)
    path = sweep.out / SWEEP_JSON
    settings = json.loads(json.dumps(dict(sweep.settings)))  # as they are read again
    asked = Standing(networks=sweep.networks, budget_s=sweep.budget_s, folds=sweep.folds, settings=settings)
    if not path.exists():
        keep(sweep, asked)
        return asked
    stored = _read(path)
    if not stored.scores and not any(sweep.run_folder(name).exists() for name in stored.networks):
        keep(sweep, asked)  # nothing was trained, as where no cluster could be reached
        return asked
    if stored.replace(scores={}, stopped=(), failed={}) != asked:
        chosen = "".join(f", {name}={value}" for name, value in stored.settings.items())
        raise TrainingError(
            f"{path}: holds a sweep over {', '.join(stored.networks)} with {stored.budget_s:g} s each on "
            f"{stored.folds} folds{chosen}, which is another one. Choose another --out.",
            code="would_overwrite",
        )
    if not resume:
        raise TrainingError(
            f"{sweep.out}: holds this sweep, which would be lost. Go on with it by --resume, or choose another --out.",
            code="would_overwrite",
        )
    return stored.replace(failed={})


def keep(sweep: Sweep, standing: Standing) -> None:
    """Write down where the sweep stands."""
    write_atomically(sweep.out / SWEEP_JSON, standing.to_json().encode())


def advance(sweep: Sweep, network: str, fold: int) -> float:
    """Train one fold of a network, unless it is finished; return its mean Dice over the cases held out up to it.

    Raises:
        Interrupted: the user or the scheduler asked for an end.
        TrainingError: not all held-out cases could be scored; else as `train`.
    """
    folder = sweep.run_folder(network)
    begun = (folder / HANDED_OUT).exists() or (folder / f"fold_{fold}").exists()
    result = _train(sweep, network, cast(FoldName, str(fold)), sweep.budget_s / sweep.folds, resume=begun)
    _require_scored(result.metrics, network, (fold,))
    return _score_up_to(result, fold)


def advance_to_the_end(sweep: Sweep, network: str) -> list[float]:
    """Train the folds of a network that are not finished, several at a time; return its scores after each fold.

    Raises:
        Interrupted, TrainingError: as `advance`.
    """
    bundle, folder = bundle_at(sweep.bundle(network)), sweep.run_folder(network)
    left = sweep.folds - (0 if bundle is None else len(bundle.weight_names))
    rounds = max(1, math.ceil(left / sweep.options.at_once))
    begun = (folder / HANDED_OUT).exists() or any(folder.glob("fold_*"))
    result = _train(sweep, network, "all", rounds * sweep.budget_s / sweep.folds, resume=begun)
    _require_scored(result.metrics, network, range(sweep.folds))
    return [_score_up_to(result, fold) for fold in range(sweep.folds)]


def _score_up_to(result: TrainResult, fold: int) -> float:
    """Return the mean Dice over the cases that a fold and those before it hold out, whichever others are finished."""
    held = {name: entry for name, entry in result.metrics["folds"].items() if int(name) <= fold}
    return float(scores_of(result.plan, held, {})["mean"]["dice"]["mean"])


def _train(sweep: Sweep, network: str, fold: FoldName, budget_s: float, *, resume: bool) -> TrainResult:
    say = sweep.options.say
    options = dataclasses.replace(
        sweep.options,
        resume=resume,
        validate_all=True,  # networks are compared on the same cases
        cache=sweep.options.cache or sweep.out / "cache",
        live=False,
        say=lambda line: say(f"{network} | {line}"),
    )
    result = train(
        sweep.dataset,
        sweep.bundle(network),
        network=network,
        settings={**sweep.settings, "training.folds": sweep.folds},
        fold=fold,
        budget_s=budget_s,
        options=options,
    )
    if result.ended in _STOPPED:
        raise Interrupted(result.ended)
    return result


def _require_scored(metrics: Mapping[str, Any], network: str, folds: Iterable[int]) -> None:
    """Make sure that all cases that folds held out were scored, as other networks are on the same ones."""
    for fold in folds:
        entry = metrics.get("folds", {}).get(str(fold))
        dice = metrics.get("out_of_fold", {}).get("mean", {}).get("dice", {}).get("mean")
        if entry is None or len(entry["cases"]) < entry["held_out_cases"] or dice is None:
            why = "it is not in the bundle"
            if entry is not None:
                why = f"{entry['validation']} of {entry['held_out_cases']}"
            raise TrainingError(
                f"{network}, fold {fold}: can't be compared with the others ({why}). Give the sweep more --budget and "
                "another --out.",
                code="not_validated",
            )


def sweep_here(sweep: Sweep, standing: Standing, told: Callable[[Standing], None]) -> Standing:
    """Train on this machine, fold after fold of every network, and stop the worse half now and then.

    Args:
        sweep: what is compared.
        standing: where it stands.
        told: receives the standing after each fold.

    Raises:
        Interrupted: the user or the scheduler asked for an end.
    """
    for fold in range(sweep.folds):
        standing = _round(sweep, standing, told, partial(_one_more, sweep, standing, fold), until=fold + 1)
    return standing


def _one_more(sweep: Sweep, standing: Standing, fold: int, network: str) -> list[float]:
    return [*standing.scores.get(network, ()), advance(sweep, network, fold)]


def sweep_in_arrays(sweep: Sweep, standing: Standing, told: Callable[[Standing], None]) -> Standing:
    """Train where folds are trained side by side, one network after the other: by the carrier of `sweep.options`.

    The first fold of more than two networks comes before the others, so that the worse half is stopped after it.

    Args:
        sweep, standing, told: as for `sweep_here`.

    Raises:
        Interrupted: the user or the scheduler asked for an end.
    """
    if len(sweep.networks) > 2:
        standing = _round(sweep, standing, told, lambda network: [advance(sweep, network, 0)], until=1)
    return _round(sweep, standing, told, lambda network: advance_to_the_end(sweep, network), until=sweep.folds)


def _round(
    sweep: Sweep,
    standing: Standing,
    told: Callable[[Standing], None],
    trained: Callable[[str], list[float]],
    *,
    until: int,
) -> Standing:
    """Train each network that races until it has so many folds, and stop the worse half of them."""
    for network in sweep.networks:
        done = len(standing.scores.get(network, ())) >= until
        if done or network in standing.stopped or network in standing.failed:
            continue
        try:
            standing = standing.scored(network, trained(network))
        except SagittalError as error:
            sweep.options.say(f"{network}: failed, {error.message}")
            standing = standing.replace(failed={**standing.failed, network: error.message})
        told(standing)
    if until in RUNGS and until < sweep.folds:
        behind = losers(standing, after=until)
        if behind:
            sweep.options.say(f"stopped after {until} of {sweep.folds} folds, being behind: {', '.join(behind)}")
            standing = standing.replace(stopped=(*standing.stopped, *behind))
            told(standing)
    return standing


def losers(standing: Standing, *, after: int) -> tuple[str, ...]:
    """Return the networks that do not go on after so many folds: the worse half, but two always go on.

    Two are needed for a comparison.
    """
    racing = [
        name
        for name in standing.networks
        if name not in standing.stopped and name not in standing.failed and len(standing.scores.get(name, ())) >= after
    ]
    ranked = sorted(racing, key=lambda name: -standing.scores[name][after - 1])
    return tuple(ranked[max(2, -(-len(ranked) // KEPT_SHARE)) :])


def conclude(sweep: Sweep, standing: Standing) -> Path:
    """Compare the networks, keep the winner's bundle and return its folder.

    Raises:
        TrainingError: no network finished all folds.
    """
    finished = standing.finished()
    if not finished:
        told = "; ".join(f"{name}: {why}" for name, why in standing.failed.items()) or "every one was stopped"
        raise TrainingError(f"no network finished its {sweep.folds} folds ({told}).", code="no_winner")
    winner = sweep.out / WINNER
    _replace_folder(sweep.bundle(finished[0]), winner)
    _compare(sweep, finished, range(sweep.folds), COMPARED)
    scored = [name for name in sweep.networks if standing.scores.get(name)]
    if set(scored) != set(finished):
        common = min(len(standing.scores[name]) for name in scored)
        _compare(sweep, scored, range(common), COMPARED_FIRST)
    for line in table(sweep, standing):
        sweep.options.say(line)
    return winner


def table(sweep: Sweep, standing: Standing) -> list[str]:
    """Return a line for each network, the best first."""
    rows = [("network", "folds", "Dice", "")]
    best = standing.finished()[:1]
    for name in sorted(sweep.networks, key=lambda name: (-len(standing.scores.get(name, ())), _last(standing, name))):
        scores = standing.scores.get(name, ())
        how = "failed" if name in standing.failed else "stopped" if name in standing.stopped else ""
        rows.append((name, str(len(scores)), f"{scores[-1]:.4f}" if scores else "", "winner" if name in best else how))
    width = max(len(row[0]) for row in rows)
    return [f"{name:<{width}}  {folds:>5}  {dice:>6}  {how}".rstrip() for name, folds, dice, how in rows]


def _last(standing: Standing, name: str) -> float:
    scores = standing.scores.get(name, ())
    return -scores[-1] if scores else 0.0


def _compare(sweep: Sweep, networks: Sequence[str], folds: range, name: str) -> None:
    if len(networks) < 2:
        return
    evaluations = {network: _evaluation(sweep, network, folds) for network in networks}
    references = read_dataset(sweep.dataset).folder / "labelsTr"
    page = write_comparison(sweep.out / name, compare_evaluations(evaluations), references=references.name)
    sweep.options.say(f"report: {page}")


def _evaluation(sweep: Sweep, network: str, folds: range) -> Evaluation:
    parts = {}
    for fold in folds:
        path = (sweep.run_folder(network) / f"fold_{fold}" / REPORT).with_name("metrics.json")
        try:
            parts[f"fold {fold}"] = Evaluation.from_json(path.read_bytes(), source=str(path))
        except OSError as error:
            raise DataError(f"{path}: can't be read ({error.strerror}), so networks can't be compared.") from None
    return next(iter(parts.values())) if len(parts) == 1 else join_evaluations(parts)


def _replace_folder(source: Path, target: Path) -> None:
    """Copy a folder to a place where there may be an older one, which is replaced as a whole."""
    part, old = target.with_name(f".{target.name}.part"), target.with_name(f".{target.name}.old")
    shutil.rmtree(part, ignore_errors=True)
    shutil.copytree(source, part)
    if target.exists():
        shutil.rmtree(old, ignore_errors=True)
        target.replace(old)
    part.replace(target)
    shutil.rmtree(old, ignore_errors=True)


def _read(path: Path) -> Standing:
    try:
        return Standing.model_validate_json(path.read_bytes())
    except (OSError, ValidationError) as error:
        raise DataError(
            f"{path}: can't be read ({type(error).__name__}). Expected what 'sagittal sweep' writes. Choose another "
            "--out, or remove it: finished folds are kept."
        ) from None
