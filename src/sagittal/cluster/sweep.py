"""A sweep on a Ray cluster: each network is a trial of Ray Tune, whose ASHA stops those that are behind.

What is kept is in the sweep's own files, as on one machine: Ray Tune's are thrown away, and a sweep that goes on hands
finished folds' scores to a new ASHA at once.
"""

from __future__ import annotations

import dataclasses
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from ray import tune
from ray.tune.schedulers import ASHAScheduler

from sagittal.cluster.folds import require_seen
from sagittal.cluster.ray_session import Needs, Session
from sagittal.errors import SagittalError
from sagittal.kernels import keep_freed_memory
from sagittal.training.sweep import KEPT_SHARE, Standing, Sweep, advance

LOSSES = 5
"""So often a network goes on elsewhere after its node was lost."""
_FOLDS, _DICE, _NETWORK, _FAILED = "training_iteration", "dice", "network", "failed"


def sweep_on_ray(
    sweep: Sweep, standing: Standing, told: Callable[[Standing], None], *, session: Session, needs: Needs
) -> Standing:
    """Train networks side by side on a cluster; return where the sweep stands.

    Args:
        sweep: what is compared; its folders are seen by all nodes.
        standing: where it stands; what was stopped stays so.
        told: receives the standing after each fold.
        session: the cluster.
        needs: what the training of a network occupies.

    Raises:
        ResourceError: no node has that, or one does not see the folders.
    """
    session.require(needs, "a network")
    require_seen(session.nodes, (sweep.out, sweep.dataset))
    racing = [name for name in sweep.networks if name not in standing.stopped]
    sweep.options.say(f"sweep: {', '.join(racing)} on {session.place}, {needs} each")
    heard = _Heard(sweep, standing, told)
    device = "cuda" if needs.gpus else "cpu"
    sent = dataclasses.replace(sweep, options=dataclasses.replace(sweep.options, device=device, say=_nobody))

    def trial(config: dict[str, Any]) -> None:
        _train_network(sent, config[_NETWORK], needs.cpus)

    with tempfile.TemporaryDirectory(dir=sweep.out, prefix=".tune-") as folder, _quiet():
        scheduler = ASHAScheduler(
            time_attr=_FOLDS, max_t=sweep.folds, grace_period=1, reduction_factor=KEPT_SHARE, stop_last_trials=False
        )
        results = tune.Tuner(
            tune.with_resources(trial, {"cpu": needs.cpus, "gpu": needs.gpus}),
            param_space={_NETWORK: tune.grid_search(racing)},
            tune_config=tune.TuneConfig(metric=_DICE, mode="max", scheduler=scheduler),
            run_config=tune.RunConfig(
                name="sweep",
                storage_path=str(Path(folder).resolve()),
                failure_config=tune.FailureConfig(max_failures=LOSSES),
                callbacks=[heard],
                verbose=0,
            ),
        ).fit()
    standing = heard.standing
    for result in map(results.__getitem__, range(len(results))):
        name = (result.config or {}).get(_NETWORK, "")
        if result.error is not None and name not in standing.failed:
            why = f"lost more than {LOSSES} times ({type(result.error).__name__})"
            standing = standing.replace(failed={**standing.failed, name: why})
    behind = tuple(
        name for name in racing if name not in standing.failed and len(standing.scores.get(name, ())) < sweep.folds
    )
    if behind:
        sweep.options.say(f"stopped, being behind: {', '.join(behind)}")
    standing = standing.replace(stopped=(*standing.stopped, *behind))
    told(standing)
    return standing


def _train_network(sweep: Sweep, network: str, threads: int) -> None:
    """Train the folds of one network in turn, and tell Ray Tune after each; what ASHA stops ends in there."""
    torch.set_num_threads(threads)
    keep_freed_memory()
    for fold in range(sweep.folds):
        try:
            dice = advance(sweep, network, fold)
        except SagittalError as error:
            # It would fail the same way again: told as a result, so that Ray Tune does not try it again.
            tune.report({_DICE: -1.0, _NETWORK: network, _FAILED: error.message, _FOLDS: sweep.folds})
            return
        tune.report({_DICE: dice, _NETWORK: network, _FAILED: ""})


class _Heard(tune.Callback):
    """Takes what trials tell into the sweep's standing."""

    def __init__(self, sweep: Sweep, standing: Standing, told: Callable[[Standing], None]) -> None:
        self.standing = standing
        self._sweep, self._told = sweep, told

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        """Take the score after a fold."""
        name, failed = result[_NETWORK], result[_FAILED]
        if failed:
            self._sweep.options.say(f"{name}: failed, {failed}")
            self.standing = self.standing.replace(failed={**self.standing.failed, name: failed})
        else:
            fold, scores = int(result[_FOLDS]), self.standing.scores.get(name, ())
            if fold <= len(scores):
                return  # a network that went on elsewhere, or a sweep that did, tells it again
            self._sweep.options.say(f"{name}: Dice {result[_DICE]:.4f} after {fold} of {self._sweep.folds} folds")
            self.standing = self.standing.scored(name, [*scores, result[_DICE]])
        self._told(self.standing)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep Ray Tune from writing its own logs beside results, and from telling of changes to come."""
    os.environ["TUNE_DISABLE_AUTO_CALLBACK_LOGGERS"] = "1"
    os.environ["RAY_AIR_NEW_OUTPUT"] = "0"  # which prints panels, even where it is told to be silent
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _nobody(line: str) -> None:
    """Drop a line; it is in the fold's log."""
