"""A sweep on a Ray cluster: each network is a trial of Ray Tune, whose ASHA stops those that are behind.

What is kept is in the sweep's own files, as on one machine: Ray Tune's are thrown away, and a sweep that goes on hands
the scores of before to a new ASHA, also those of networks that were stopped.
"""

from __future__ import annotations

import dataclasses
import os
import tempfile
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from ray import tune
from ray.tune.schedulers import ASHAScheduler, TrialScheduler

from sagittal.cluster.folds import require_seen
from sagittal.cluster.ray_session import Needs, Session
from sagittal.errors import SagittalError
from sagittal.kernels import keep_freed_memory
from sagittal.training.sweep import KEPT_SHARE, Interrupted, Standing, Sweep, advance

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
        Interrupted: Ray Tune ended before all networks had.
    """
    session.require(needs, "a network")
    require_seen(session.nodes, (sweep.out, sweep.dataset))
    racing = [name for name in sweep.networks if name not in standing.stopped]
    sweep.options.say(f"sweep: {', '.join(racing)} on {session.place}, {needs} each")
    asha = Asha(standing)
    heard = Heard(sweep, standing, told, asha.behind)
    device = "cuda" if needs.gpus else "cpu"
    sent = dataclasses.replace(sweep, options=dataclasses.replace(sweep.options, device=device, say=_nobody))

    def trial(config: dict[str, Any]) -> None:
        _train_network(sent, config[_NETWORK], needs.cpus)

    with tempfile.TemporaryDirectory(dir=sweep.out, prefix=".tune-") as folder, _quiet():
        results = tune.Tuner(
            tune.with_resources(trial, {"cpu": needs.cpus, "gpu": needs.gpus}),
            param_space={_NETWORK: tune.grid_search(racing)},
            tune_config=tune.TuneConfig(scheduler=asha),
            run_config=tune.RunConfig(
                name="sweep",
                storage_path=str(Path(folder).resolve()),
                failure_config=tune.FailureConfig(max_failures=LOSSES),
                callbacks=[heard],
                verbose=0,
            ),
        ).fit()
    lost = (
        (result.config or {}).get(_NETWORK, "")
        for result in map(results.__getitem__, range(len(results)))
        if result.error is not None
    )
    standing = ended(heard.standing, racing, lost)
    told(standing)
    return standing


def ended(standing: Standing, racing: Iterable[str], lost: Iterable[str]) -> Standing:
    """Return the standing after Ray Tune's end, with the networks that were lost too often as failed.

    Raises:
        Interrupted: a network neither has all folds, nor failed, nor was stopped.
    """
    why = f"lost more than {LOSSES} times, with its node or its worker"
    standing = standing.replace(failed={**dict.fromkeys(lost, why), **standing.failed})
    settled = {*standing.finished(), *standing.stopped, *standing.failed}
    if not settled.issuperset(racing):
        raise Interrupted("interrupted")
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


@dataclass(frozen=True)
class _Racer:
    """A network where ASHA expects a trial, whose number is another one when a sweep goes on."""

    trial_id: str


class Asha(ASHAScheduler):
    """ASHA by networks, which knows the scores of before; who was let go on with one is not judged by it again.

    Attributes:
        behind: networks that it stopped.
    """

    def __init__(self, standing: Standing) -> None:
        super().__init__(
            time_attr=_FOLDS,
            metric=_DICE,
            mode="max",
            max_t=standing.folds,
            grace_period=1,
            reduction_factor=KEPT_SHARE,
            stop_last_trials=False,
        )
        self.behind: list[str] = []
        nobody: Any = None  # who asks makes no difference to it
        for name, scores in standing.scores.items():
            racer: Any = _Racer(name)
            super().on_trial_add(nobody, racer)
            for fold, dice in enumerate(scores, 1):
                super().on_trial_result(nobody, racer, {_FOLDS: fold, _DICE: dice})

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
        """Take a network into the race."""
        super().on_trial_add(tune_controller, _racer(trial))

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        """Return whether a network goes on after a fold."""
        if result[_FAILED]:
            return str(TrialScheduler.CONTINUE)  # it ends by itself
        verdict = str(super().on_trial_result(tune_controller, _racer(trial), result))
        if verdict == TrialScheduler.STOP:
            self.behind.append(result[_NETWORK])
        return verdict

    def on_trial_complete(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> None:
        """Do nothing: what it told last was judged."""

    def on_trial_remove(self, tune_controller: Any, trial: Any) -> None:
        """Do nothing: what it told counts for the others."""


def _racer(trial: Any) -> Any:
    return _Racer(trial.config[_NETWORK])


class Heard(tune.Callback):
    """Takes what trials tell into the sweep's standing, after ASHA has judged it.

    Args:
        sweep: what is compared.
        standing: of before.
        told: receives the standing after each fold.
        behind: networks that ASHA stopped.
    """

    def __init__(
        self, sweep: Sweep, standing: Standing, told: Callable[[Standing], None], behind: Collection[str]
    ) -> None:
        self.standing = standing
        self._sweep, self._told, self._behind = sweep, told, behind

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        """Take the score after a fold."""
        name, failed, say = result[_NETWORK], result[_FAILED], self._sweep.options.say
        fold, scores = int(result[_FOLDS]), self.standing.scores.get(name, ())
        if failed:
            say(f"{name}: failed, {failed}")
            self.standing = self.standing.replace(failed={**self.standing.failed, name: failed})
        elif fold <= len(scores):
            return  # a network that went on elsewhere, or a sweep that did, tells it again
        else:
            say(f"{name}: Dice {result[_DICE]:.4f} after {fold} of {self._sweep.folds} folds")
            self.standing = self.standing.scored(name, [*scores, result[_DICE]])
            if name in self._behind and fold < self._sweep.folds:
                say(f"stopped after {fold} of {self._sweep.folds} folds, being behind: {name}")
                self.standing = self.standing.replace(stopped=(*self.standing.stopped, name))
        self._told(self.standing)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep Ray Tune from writing logs beside results, from telling of changes to come, and from Ctrl-C.

    It would end at the first Ctrl-C as if all networks had.
    """
    os.environ["TUNE_DISABLE_SIGINT_HANDLER"] = "1"
    os.environ["TUNE_DISABLE_AUTO_CALLBACK_LOGGERS"] = "1"
    os.environ["RAY_AIR_NEW_OUTPUT"] = "0"  # which prints panels, even where it is told to be silent
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _nobody(line: str) -> None:
    """Drop a line; it is in the fold's log."""
