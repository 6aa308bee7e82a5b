"""The best validation's weights become the result where the plan says so, or where training stopped early."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import sagittal
from sagittal.data.cache import Cache
from sagittal.plan.plan import Plan
from sagittal.testing.datasets import TINY_SETTINGS as TINY
from sagittal.training import fold as fold_module
from sagittal.training import validation as validation_module
from sagittal.training.log import read_log
from sagittal.training.run import train
from sagittal.training.stages import RunOptions
from sagittal.training.validation import Score

SETTINGS = {**TINY, "schedule.steps": 8, "schedule.validations": 4}


class _Validations:
    """Stands in for validations: gives the scores it was told, and keeps the weights that each one saw."""

    def __init__(self, scores: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
        self.seen: list[dict[str, torch.Tensor]] = []
        self._scores: Iterator[float] = iter(scores)
        monkeypatch.setattr(fold_module, "validate_on_cache", self)

    def __call__(self, network: torch.nn.Module, *arguments: Any, **options: Any) -> Score:
        self.seen.append({name: value.clone() for name, value in network.state_dict().items()})
        score = next(self._scores)
        return Score(dice={"bright": score, "dark": score}, mean_dice=score)


def _run(data: Path, out: Path, settings: dict[str, Any], lines: list[str]) -> sagittal.TrainResult:
    return train(data, out, settings={**SETTINGS, **settings}, options=RunOptions(device="cpu", say=lines.append))


def _is(out: Path, weights: dict[str, torch.Tensor]) -> bool:
    written = sagittal.read_bundle(out).weights("fold_0")
    return all(np.array_equal(written[name], value.numpy()) for name, value in weights.items())


@pytest.mark.parametrize(("scores", "wanted"), [([0.2, 0.6, 0.4, 0.5], 1), ([0.2, 0.3, 0.1, 0.5], 3)])
def test_the_best_weights_are_kept_and_the_last_ones_compete(
    tiny_dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scores: list[float], wanted: int
) -> None:
    validations, lines = _Validations(scores, monkeypatch), []
    result = _run(tiny_dataset, tmp_path / "b", {"schedule.keep": "best", "training.ema_decay": 0.5}, lines)
    assert result.ended == "finished"
    assert len(validations.seen) == 4, "three on the schedule, and one of the last weights"
    assert _is(tmp_path / "b", validations.seen[wanted])
    assert any("weights of step 4, the best validation, Dice 0.600" in line for line in lines) == (wanted == 1)


def test_an_early_stop_ends_with_the_best_weights(
    tiny_dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    validations, lines = _Validations([0.5, 0.4, 0.3, 0.2], monkeypatch), []
    result = _run(tiny_dataset, tmp_path / "b", {"schedule.early_stop_validations": 2}, lines)
    assert result.ended == "stale"
    assert result.metrics["folds"]["0"]["steps"] == 6
    assert len(validations.seen) == 3
    assert _is(tmp_path / "b", validations.seen[0])


def test_best_weights_that_are_lost_are_told_and_the_last_ones_taken(
    tiny_dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    validations, lines = _Validations([0.5, 0.4, 0.3, 0.2], monkeypatch), []
    monkeypatch.setattr(fold_module, "save_best", lambda *arguments, **options: None)
    _run(tiny_dataset, tmp_path / "b", {"schedule.keep": "best"}, lines)
    assert any("step 2, the best validation, are missing or damaged" in line for line in lines)
    assert _is(tmp_path / "b", validations.seen[3])


def test_a_stop_in_a_validation_is_obeyed_at_once_and_the_validation_made_on_resume(
    tiny_dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, predicted = validation_module._predict, list[int]()

    def stopping(network: torch.nn.Module, cache: Cache, case: int, plan: Plan) -> torch.Tensor:
        predicted.append(case)
        assert callable(signal.getsignal(signal.SIGTERM))
        os.kill(os.getpid(), signal.SIGTERM)
        return real(network, cache, case, plan)

    with monkeypatch.context() as patch:
        patch.setattr(validation_module, "_predict", stopping)
        result = _run(tiny_dataset, tmp_path / "b", {"schedule.keep": "best"}, [])
    assert result.ended == "terminated"
    assert len(predicted) == 1, "of two held-out cases"
    assert result.metrics["folds"]["0"]["steps"] == 2
    options = RunOptions(device="cpu", resume=True)
    assert train(tiny_dataset, tmp_path / "b", options=options).complete
    assert _run(tiny_dataset, tmp_path / "whole", {"schedule.keep": "best"}, []).complete
    stopped, whole = ([*_validations(tmp_path / out)] for out in ("b", "whole"))
    assert stopped[0] == whole[0] and stopped[0][0] == 2
    assert [step for step, _ in stopped] == sorted({step for step, _ in stopped})
    weights = sagittal.read_bundle(tmp_path / "whole").weights("fold_0")
    assert _is(tmp_path / "b", {name: torch.from_numpy(value) for name, value in weights.items()})


def _validations(out: Path) -> Iterator[tuple[int, Any]]:
    for record in read_log(out.with_name(f"{out.name}.run") / "fold_0" / "log.jsonl"):
        if record["kind"] == "validation":
            yield record["step"], record["by_case"]
