"""Several networks at equal time: who goes on, what is kept, and that a sweep goes on where it was."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import sagittal
from sagittal.errors import DataError, PlanError, TrainingError
from sagittal.plan.networks import NETWORKS
from sagittal.testing.datasets import TINY_SETTINGS
from sagittal.training import cross_validation, run
from sagittal.training import sweep as sweeping
from sagittal.training.run_folder import HANDED_OUT
from sagittal.training.stages import Budget, RunOptions
from sagittal.training.sweep import (
    Interrupted,
    Standing,
    Sweep,
    begin,
    conclude,
    keep,
    losers,
    sweep_here,
    sweep_in_arrays,
)

pytestmark = pytest.mark.filterwarnings("ignore:.*is not writable:UserWarning")
THREE = ("mednext-s", "mednext-b", "mednext-m")


@pytest.fixture
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def _sweep(dataset: Path, out: Path, **changed: Any) -> Sweep:
    settings = {**TINY_SETTINGS, "schedule.steps": 2, "schedule.validations": 0}
    options = RunOptions(device="cpu", workers=1, say=lambda line: None)
    wanted = {"networks": THREE, "budget_s": 600.0, "folds": 2, "settings": settings, "options": options, **changed}
    return Sweep(dataset, out, **wanted)


def test_the_worse_half_is_stopped_the_rest_compared_and_the_best_one_kept(
    tiny_dataset: Path, tmp_path: Path, one_thread: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines: list[str] = []
    sweep = _sweep(tiny_dataset, tmp_path / "out", options=RunOptions(device="cpu", workers=1, say=lines.append))
    real, trained = sweeping.advance, []

    def counted(sweep: Sweep, network: str, fold: int) -> float:
        if len(trained) == 2:
            trained.append("stopped")
            raise Interrupted("terminated")
        trained.append(f"{network} {fold}")
        # Two steps teach nothing; what counts here is who goes on.
        return real(sweep, network, fold) + {"mednext-s": 0.5, "mednext-b": 0.0, "mednext-m": 0.7}[network]

    monkeypatch.setattr(sweeping, "advance", counted)
    with pytest.raises(Interrupted):
        sweep_here(sweep, begin(sweep, resume=False), lambda now: keep(sweep, now))
    with pytest.raises(TrainingError, match="Go on with it by --resume"):
        begin(sweep, resume=False)
    standing = sweep_here(sweep, begin(sweep, resume=True), lambda now: keep(sweep, now))
    assert trained == [
        *("mednext-s 0", "mednext-b 0", "stopped", "mednext-m 0"),
        *("mednext-s 1", "mednext-m 1"),
    ]
    assert standing.stopped == ("mednext-b",) and standing.finished() == ("mednext-m", "mednext-s")
    winner = conclude(sweep, standing)
    assert winner == tmp_path / "out" / "winner"
    kept = sagittal.read_bundle(winner)
    assert kept.plan.network_name == "mednext-m" and kept.weight_names == ("fold_0", "fold_1")
    compared = json.loads((tmp_path / "out" / "compared" / "comparison.json").read_text())
    assert set(compared["methods"]) == {"mednext-m", "mednext-s"} and len(compared["cases"]) == 6
    first = json.loads((tmp_path / "out" / "compared-first-folds" / "comparison.json").read_text())
    assert set(first["methods"]) == set(THREE) and len(first["cases"]) == 3
    assert (tmp_path / "out" / "compared" / "comparison.html").is_file()
    rows = [line.split() for line in lines[-4:]]
    assert [row[0] for row in rows[1:]] == ["mednext-m", "mednext-s", "mednext-b"]
    assert rows[1][-1] == "winner" and rows[3][-1] == "stopped"
    assert any(line.startswith("mednext-s | train: fold 0") for line in lines)
    assert conclude(sweep, standing) == winner  # again, over the one that is there


@pytest.mark.parametrize(
    ("scores", "after", "behind"),
    [
        ({"a": (0.1,), "b": (0.5,), "c": (0.3,), "d": (0.4,), "e": (0.2,)}, 1, ("e", "a")),
        ({"a": (0.1,), "b": (0.5,)}, 1, ()),
        ({"a": (0.1, 0.9), "b": (0.5, 0.1), "c": (0.3, 0.5), "d": (0.2,)}, 2, ("b",)),
    ],
)
def test_the_better_half_goes_on_and_never_fewer_than_two(
    scores: dict[str, tuple[float, ...]], after: int, behind: tuple[str, ...]
) -> None:
    standing = Standing(networks=tuple(scores), budget_s=1.0, folds=5, scores=scores)
    assert losers(standing, after=after) == behind


def test_who_failed_or_was_stopped_does_not_race() -> None:
    scores = {name: (score,) for name, score in zip("abcde", (0.1, 0.5, 0.3, 0.4, 0.2), strict=True)}
    standing = Standing(
        networks=tuple(scores), budget_s=1.0, folds=5, scores=scores, failed={"b": "of something"}, stopped=("c",)
    )
    assert losers(standing, after=1) == ("a",)


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"networks": ("mednext-s", "mednext-z")}, "no network is called 'mednext-z'"),
        ({"networks": ("mednext-s",)}, "two or more"),
        ({"networks": ("mednext-s", "mednext-s")}, "each once"),
        ({"budget_s": 0.0}, "a time above 0"),
        ({"folds": 1}, "2 to 5 folds"),
    ],
)
def test_what_makes_no_sweep_is_refused_before_anything_is_written(
    tmp_path: Path, changed: dict[str, Any], says: str
) -> None:
    with pytest.raises(PlanError, match=says):
        begin(_sweep(tmp_path, tmp_path / "out", **changed), resume=False)
    assert not (tmp_path / "out").exists() and "mednext-s" in NETWORKS


def test_another_sweep_and_a_damaged_file_are_not_gone_on_with(tmp_path: Path) -> None:
    sweep = _sweep(tmp_path, tmp_path / "out")
    standing = begin(sweep, resume=False).replace(failed={"mednext-s": "no memory"})
    keep(sweep, standing)
    assert begin(sweep, resume=False).failed == {}  # nothing was trained that could be lost
    keep(sweep, standing)
    sweep.run_folder("mednext-s").mkdir()
    assert begin(sweep, resume=True).failed == {}
    with pytest.raises(TrainingError, match="is another one"):
        begin(_sweep(tmp_path, tmp_path / "out", budget_s=1.0), resume=True)
    with pytest.raises(TrainingError, match=r"patch\.size=.16, 16, 16.*is another one"):
        begin(_sweep(tmp_path, tmp_path / "out", settings={"patch.size": [32, 32, 32]}), resume=True)
    with pytest.raises(TrainingError, match="mednext-s: no memory"):
        conclude(sweep, standing)
    (tmp_path / "out" / "sweep.json").write_text("{")
    with pytest.raises(DataError, match="'sagittal sweep' writes"):
        begin(sweep, resume=True)


def test_a_network_that_fails_is_told_and_the_others_go_on(
    tiny_dataset: Path, tmp_path: Path, one_thread: None
) -> None:
    sweep = _sweep(tiny_dataset, tmp_path / "out", networks=("mednext-s", "segformer3d"))
    standing = sweep_here(sweep, begin(sweep, resume=False), lambda now: keep(sweep, now))
    # The settings name a field of MedNeXt's alone.
    assert "network." in standing.failed["segformer3d"] and standing.finished() == ("mednext-s",)
    assert conclude(sweep, standing).is_dir() and not (tmp_path / "out" / "compared").exists()


def test_networks_are_scored_on_all_held_out_cases_also_without_time_left(
    tiny_dataset: Path, tmp_path: Path, one_thread: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines: list[str] = []
    options = RunOptions(device="cpu", workers=1, say=lines.append)
    sweep = _sweep(tiny_dataset, tmp_path / "out", networks=("mednext-s", "mednext-b"), options=options)
    # As if all of the time had gone into training.
    monkeypatch.setattr(cross_validation, "_deadline", lambda share_s, held_out, validation_s: time.monotonic())
    monkeypatch.setattr(Budget, "share_s", lambda self, folds: 0.01)
    monkeypatch.setattr(run, "_fit_budget", lambda ready, *others: (ready.plan, 0.0))
    score = sweeping.advance(sweep, "mednext-s", 0)
    assert 0 <= score <= 1
    assert any("on 3 of 3 held-out cases" in line for line in lines)
    assert not any("afresh" in line for line in lines)  # nobody asked to go on


def test_fewer_held_out_cases_are_no_score() -> None:
    entry = {"cases": {"a": {}}, "held_out_cases": 3, "validation": "1 held-out cases"}
    metrics = {"folds": {"0": entry}, "out_of_fold": {"mean": {"dice": {"mean": 0.5}}}}
    with pytest.raises(TrainingError, match="1 held-out cases of 3"):
        sweeping._require_scored(metrics, "mednext-s", (0,))
    sweeping._require_scored({**metrics, "folds": {"0": {**entry, "held_out_cases": 1}}}, "mednext-s", (0,))


def test_a_network_that_was_killed_before_its_first_checkpoint_is_trained_by_the_same_plan(
    tiny_dataset: Path, tmp_path: Path, one_thread: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    sweep = _sweep(tiny_dataset, tmp_path / "out")

    def killed(*given: Any, **named: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(run, "train_folds", killed)
        sweeping.advance(sweep, "mednext-s", 0)
    before = (sweep.run_folder("mednext-s") / "plan.json").read_bytes()
    made = json.loads(before)
    assert made["training"]["folds"] == 2 and made["patch"]["size"] == [16, 16, 16]
    sweeping.advance(sweep, "mednext-s", 0)
    again = json.loads((sweep.run_folder("mednext-s") / "plan.json").read_bytes())
    assert again["training"]["folds"] == 2 and again["patch"] == made["patch"] and again["network"] == made["network"]
    assert sweeping.advance(sweep, "mednext-s", 1) >= 0  # by the plan that is there now


def test_a_comparison_that_fails_costs_no_winner(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sweep = _sweep(tmp_path, tmp_path / "out")
    bundle = sweep.bundle("mednext-b")
    bundle.mkdir(parents=True)
    (bundle / "manifest.json").write_text("{}")
    scores = {"mednext-s": (0.1, 0.1), "mednext-b": (0.2, 0.2)}
    standing = Standing(networks=THREE, budget_s=1.0, folds=2, scores=scores)
    with pytest.raises(DataError, match="can't be compared"):
        conclude(sweep, standing)
    assert (tmp_path / "out" / "winner" / "manifest.json").is_file()


def test_where_folds_are_trained_side_by_side_the_first_one_tells_who_goes_on(
    tiny_dataset: Path, tmp_path: Path, one_thread: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The folds of a network are one piece of work, which a carrier gets; here they are trained in turn."""
    sweep = _sweep(tiny_dataset, tmp_path / "out", options=RunOptions(device="cpu", workers=1, at_once=2))
    real, asked = sweeping._train, list[tuple[str, str, float, bool]]()

    def seen(sweep: Sweep, network: str, fold: Any, budget_s: float, *, resume: bool) -> Any:
        asked.append((network, fold, budget_s, resume))
        return real(sweep, network, fold, budget_s, resume=resume)

    monkeypatch.setattr(sweeping, "_train", seen)
    monkeypatch.setattr(sweeping, "losers", lambda standing, *, after: ("mednext-b",))
    standing = sweep_in_arrays(sweep, begin(sweep, resume=False), lambda now: keep(sweep, now))
    first = [(name, "0", 300.0, False) for name in THREE]
    assert asked == [*first, ("mednext-s", "all", 300.0, True), ("mednext-m", "all", 300.0, True)]
    assert standing.stopped == ("mednext-b",) and set(standing.finished()) == {"mednext-s", "mednext-m"}
    for name in standing.finished():
        metrics = sagittal.read_bundle(sweep.bundle(name)).metrics
        assert standing.scores[name][-1] == metrics["out_of_fold"]["mean"]["dice"]["mean"]
        assert standing.scores[name][0] == metrics["folds"]["0"]["scores"]["mean"]["dice"]["mean"]
        assert sweeping.advance(sweep, name, 0) == standing.scores[name][0], "it tells of that fold, not of all"


def test_a_first_fold_whose_job_still_waits_is_gone_on_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It has no folder of its own yet; a new plan would not be the one that its job has."""
    sweep, asked = _sweep(tmp_path, tmp_path / "out"), list[bool]()

    def waiting(sweep: Sweep, network: str, fold: Any, budget_s: float, *, resume: bool) -> Any:
        asked.append(resume)
        raise Interrupted("terminated")

    monkeypatch.setattr(sweeping, "_train", waiting)
    with pytest.raises(Interrupted):
        sweeping.advance(sweep, "mednext-s", 0)
    sweep.run_folder("mednext-s").mkdir(parents=True)
    (sweep.run_folder("mednext-s") / HANDED_OUT).write_text("{}")
    with pytest.raises(Interrupted):
        sweeping.advance(sweep, "mednext-s", 0)
    assert asked == [False, True]
