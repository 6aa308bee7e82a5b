"""The folds of a run: side by side as in turn, one that fails, a stop, and what is told of all together."""

from __future__ import annotations

import fcntl
import os
import shutil
import signal
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch

import sagittal
from sagittal.bundle import hash_case
from sagittal.data.dataset import Dataset
from sagittal.errors import DataError, TrainingError
from sagittal.plan.plan import Plan
from sagittal.testing.datasets import TINY_SETTINGS, write_tiny_dataset
from sagittal.testing.plans import untrained_plan, untrained_spec
from sagittal.training import cross_validation, postprocessing_choice, run_folder, side_by_side
from sagittal.training.checkpoint import newest_checkpoint
from sagittal.training.cross_validation import _error_of
from sagittal.training.joining import join_folds, patients_by_case, scores_of
from sagittal.training.manifest import facts_of
from sagittal.training.run import train
from sagittal.training.side_by_side import Ending
from sagittal.training.signals import StopFlag
from sagittal.training.stages import RunOptions

pytestmark = pytest.mark.filterwarnings("ignore:.*is not writable:UserWarning")

TWO = {**TINY_SETTINGS, "schedule.steps": 2, "training.folds": 2}


@pytest.fixture
def one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def _weights(out: Path, fold: int) -> dict[str, np.ndarray]:
    return sagittal.read_bundle(out).weights(f"fold_{fold}")


def _scores(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = sagittal.read_bundle(out).metrics["out_of_fold"]
    return found


def _require_told_once(lines: list[str], error: Exception, *, fold: int, cause: str) -> None:
    (told,) = [line for line in [*lines, str(error)] if cause in line]
    assert told.startswith(f"fold {fold}: failed, ")
    (note,) = error.__notes__
    assert note.startswith(f"fold {fold}: ") and cause in note
    (row,) = [line for line in lines if line.split()[:2] == [str(fold), "failed"]]
    assert cause not in row and len(row.split()) == 3


def test_folds_side_by_side_are_those_in_turn_and_one_that_fails_is_trained_again(
    tiny_dataset: Path, tmp_path: Path, one_thread: None
) -> None:
    turn, side = tmp_path / "turn", tmp_path / "side"
    train(tiny_dataset, turn, settings=TWO, fold="all", options=RunOptions(device="cpu"))
    # A checkpoint of another plan: the process of this fold will refuse it.
    other = tmp_path / "side.run" / "fold_1"
    shutil.copytree(tmp_path / "turn.run" / "fold_1", other)
    lines: list[str] = []
    beside = RunOptions(devices=("cpu", "cpu"), resume=True, cache=tmp_path / "turn.run" / "cache", say=lines.append)
    settings = {**TWO, "training.seed": 1}
    with pytest.raises(TrainingError, match=r"1 of 2 folds failed: fold 1 \(checkpoint_mismatch\)") as caught:
        train(tiny_dataset, side, settings=settings, fold="all", options=beside)
    assert caught.value.code == "folds_failed"
    _require_told_once(lines, caught.value, fold=1, cause="belongs to another plan")
    assert any(line.startswith("fold 0 | validate: Dice") for line in lines)
    assert any(line.split()[:2] == ["1", "failed"] for line in lines)
    bundle = sagittal.read_bundle(side)
    assert bundle.weight_names == ("fold_0",)
    assert bundle.metrics["failed_folds"] == {"1": "checkpoint_mismatch"}
    assert bundle.metrics["missing_folds"] == ["1"]
    assert "missing: 1 (failed: checkpoint_mismatch)" in (side / "MODEL_CARD.md").read_text()

    shutil.rmtree(other)
    result = train(tiny_dataset, side, fold="all", options=beside)
    assert result.complete
    assert any("fold 0 is finished already" in line for line in lines)
    assert "failed_folds" not in result.metrics and result.metrics["missing_folds"] == []
    again = tmp_path / "again"
    train(tiny_dataset, again, settings=settings, fold="all", options=RunOptions(device="cpu"))
    for fold in (0, 1):
        wanted, found = _weights(again, fold), _weights(side, fold)
        assert all(np.array_equal(wanted[name], found[name]) for name in wanted)
    assert _scores(again) == _scores(side)
    assert not list((tmp_path / "side.run").glob("fold_*/bundle"))


def test_a_stop_reaches_every_process_and_each_leaves_a_checkpoint(tiny_dataset: Path, tmp_path: Path) -> None:
    begun: set[str] = set()

    def stopping(line: str) -> None:
        if "| train: fold" in line:
            begun.add(line)
            if len(begun) == 2:
                assert callable(signal.getsignal(signal.SIGTERM))
                os.kill(os.getpid(), signal.SIGTERM)

    settings = {**TWO, "schedule.steps": 100_000, "schedule.validations": 0}
    options = RunOptions(devices=("cpu", "cpu"), say=stopping)
    result = train(tiny_dataset, tmp_path / "b", settings=settings, fold="all", options=options)
    assert result.ended == "terminated" and not result.complete
    for fold in (0, 1):
        assert newest_checkpoint(tmp_path / "b.run" / f"fold_{fold}") is not None


def test_a_fold_that_fails_in_turn_does_not_stop_the_next(
    tiny_dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = cross_validation.train_fold

    def failing(job: Any, *more: Any) -> Any:
        if job.name == "0":
            raise RuntimeError("something unforeseen")
        return real(job, *more)

    lines: list[str] = []
    options = RunOptions(device="cpu", say=lines.append)
    with monkeypatch.context() as patch:
        patch.setattr(cross_validation, "train_fold", failing)
        with pytest.raises(TrainingError, match=r"1 of 2 folds failed: fold 0 \(RuntimeError\)") as caught:
            train(tiny_dataset, tmp_path / "b", settings=TWO, fold="all", options=options)
    _require_told_once(lines, caught.value, fold=0, cause="RuntimeError: something unforeseen")
    assert sagittal.read_bundle(tmp_path / "b").metrics["failed_folds"] == {"0": "RuntimeError"}
    assert "in failing" in (tmp_path / "b.run" / "fold_0" / "output.log").read_text()
    result = train(tiny_dataset, tmp_path / "b", fold="all", options=RunOptions(device="cpu", resume=True))
    assert result.complete and result.metrics["missing_folds"] == []
    together = result.metrics["out_of_fold"]
    assert together["cases"] == together["patients"] == 6
    low, high = together["classes"]["bright"]["dice"]["ci95"]
    assert low <= together["classes"]["bright"]["dice"]["mean"] <= high
    assert result.metrics["dice"]["bright"] == together["classes"]["bright"]["dice"]["mean"]
    page = (tmp_path / "b.run" / "report" / "report.html").read_text()
    assert "6 held-out cases" in page and "95 % interval" in page
    assert len((tmp_path / "b.run" / "report" / "metrics.csv").read_text().splitlines()) == 1 + 6 * 2
    card = (tmp_path / "b" / "MODEL_CARD.md").read_text()
    assert f"| bright | 1 | {together['classes']['bright']['dice']['mean']:.3f} | {low:.3f} to {high:.3f} | 6 |" in card


def test_a_stop_while_a_bundle_is_written_leaves_it_whole_and_begins_no_other_fold(
    tiny_dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = cross_validation.join_bundle

    def stopping(*arguments: Any, **options: Any) -> Any:
        # Where nobody listens, the signal would end the whole test run without a word.
        assert callable(signal.getsignal(signal.SIGTERM))
        os.kill(os.getpid(), signal.SIGTERM)
        return real(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(cross_validation, "join_bundle", stopping)
        result = train(tiny_dataset, tmp_path / "b", settings=TWO, fold="all", options=RunOptions(device="cpu"))
    assert result.ended == "terminated"
    assert sagittal.read_bundle(tmp_path / "b").weight_names == ("fold_0",)
    result = train(tiny_dataset, tmp_path / "b", fold="all", options=RunOptions(device="cpu", resume=True))
    assert result.complete and set(result.metrics["folds"]) == {"0", "1"}


def test_a_stop_while_rules_are_chosen_is_told_and_they_are_chosen_on_resume(
    tiny_dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, real_join, joins = cross_validation.choose_for_bundle, cross_validation.join_bundle, list[str]()

    def require_held() -> None:
        with (tmp_path / "b.run" / run_folder.LOCK).open() as file, pytest.raises(BlockingIOError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)

    def joining(*arguments: Any, **options: Any) -> Any:
        require_held()
        joins.append(arguments[2])
        return real_join(*arguments, **options)

    def stopping(*arguments: Any, **options: Any) -> Any:
        require_held()
        assert callable(signal.getsignal(signal.SIGTERM))
        os.kill(os.getpid(), signal.SIGTERM)
        return real(*arguments, **options)

    monkeypatch.setattr(postprocessing_choice, "MIN_CASES", 2)
    with monkeypatch.context() as patch:
        patch.setattr(cross_validation, "choose_for_bundle", stopping)
        patch.setattr(cross_validation, "join_bundle", joining)
        result = train(tiny_dataset, tmp_path / "b", settings=TINY_SETTINGS, options=RunOptions(device="cpu"))
    assert result.ended == "terminated" and joins == ["0"]
    assert "postprocessing" not in sagittal.read_bundle(tmp_path / "b").metrics
    result = train(tiny_dataset, tmp_path / "b", options=RunOptions(device="cpu", resume=True))
    assert result.complete and result.metrics["postprocessing"]["folds"] == ["0"]


def test_folds_that_a_stop_ends_before_they_listen_have_not_failed(tmp_path: Path) -> None:
    plan, spec = untrained_plan("mednext-s", untrained_spec(3)), untrained_spec(3)
    lines: list[str] = []
    run = cross_validation.Run(
        plan=plan,
        data=Dataset(tmp_path, spec, ()),
        content_sha256="",
        cache=cast("Any", None),
        folds=(),
        out=tmp_path / "b",
        folder=tmp_path / "b.run",
        devices=(),
        options=RunOptions(say=lines.append),
        budget=None,
        validation_s=None,
        source=None,
        case_weights=None,
    )
    endings = [Ending("0", None, -signal.SIGINT), Ending("1", None, -signal.SIGTERM)]
    stop, failures = StopFlag(), dict[str, Exception]()
    stop.reason = "interrupted"
    assert cross_validation.joined(run, ["0", "1"], stop, failures, endings) == "interrupted"
    assert not failures and not lines


def test_weights_are_the_same_for_any_number_of_loader_workers(tiny_dataset: Path, tmp_path: Path) -> None:
    settings = {**TINY_SETTINGS, "schedule.steps": 4, "training.deterministic": True}
    for workers in (0, 1, 3):
        options = RunOptions(device="cpu", loader_workers=workers, cache=tmp_path / "cache")
        train(tiny_dataset, tmp_path / str(workers), settings=settings, fold="none", options=options)
    wanted = sagittal.read_bundle(tmp_path / "0").weights("all")
    for workers in (1, 3):
        found = sagittal.read_bundle(tmp_path / str(workers)).weights("all")
        assert all(np.array_equal(wanted[name], found[name]) for name in wanted)


def test_case_weights_beside_the_data_are_taken_up_and_must_stay_the_same(tiny_dataset: Path, tmp_path: Path) -> None:
    table = tiny_dataset / "case_weights.csv"
    rows = [f"case_{number},{float(number == 2)}" for number in range(6)]
    table.write_text("\n".join(["case,weight", *rows]))
    settings = {**TINY_SETTINGS, "schedule.steps": 1}
    options = RunOptions(device="cpu")
    result = train(tiny_dataset, tmp_path / "b", settings=settings, fold="none", options=options)
    assert "case_weights.csv" in result.plan.reasons["training.case_weights_sha256"]
    table.write_text("\n".join(["case,weight", "case_1,3"]))
    with pytest.raises(DataError, match="others now"):
        train(tiny_dataset, tmp_path / "b", fold="none", options=RunOptions(device="cpu", resume=True))


@pytest.mark.timeout(60)
def test_a_full_disk_and_a_line_cut_short_do_not_keep_the_end_of_a_process_from_being_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("0", "1"):
        (tmp_path / f"fold_{name}").mkdir()
    (tmp_path / "fold_0" / "output.log").symlink_to("/dev/full")
    program = tmp_path / "python"
    program.write_text("""#!/bin/sh\necho '{"say": "begun"}'\necho '{"ended": "finished"}'\nprintf '{"say": "cut'\n""")
    program.chmod(0o755)
    monkeypatch.setattr(side_by_side.sys, "executable", str(program))
    lines: list[str] = []
    places = side_by_side.places_on([torch.device("cpu")] * 2)
    endings = side_by_side.train_side_by_side(
        ("0", "1"), places, lambda *of: "task", tmp_path, StopFlag(), lines.append
    )
    assert {ending.name: ending.report for ending in endings} == {name: {"ended": "finished"} for name in ("0", "1")}
    assert sorted(lines) == ["fold 0 | begun", "fold 1 | begun"]


def test_several_devices_want_several_folds(tiny_dataset: Path, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="--fold 0 is one network"):
        train(tiny_dataset, tmp_path / "b", settings=TWO, options=RunOptions(devices=("cpu", "cpu")))


def test_a_process_that_died_is_told_with_its_signal() -> None:
    assert "SIGKILL" in str(_error_of(Ending("3", None, -9))) and "memory" in str(_error_of(Ending("3", None, -9)))
    assert "exit code 7" in str(_error_of(Ending("3", None, 7)))
    known = _error_of(Ending("3", {"error": {"message": "no", "code": "why"}}, 1))
    assert isinstance(known, TrainingError) and known.code == "why"


def _entry(cases: dict[str, float | None]) -> dict[str, Any]:
    return {
        "ended": "finished",
        "steps": 1,
        "training_cases": 3,
        "validation": "held-out cases",
        "cases": {hash_case(case): {"class_1": value} for case, value in cases.items()},
        "cases_hd95_mm": {hash_case(case): {"class_1": 2.0} for case in cases},
    }


def test_folds_are_scored_together_by_patient() -> None:
    plan = untrained_plan("segformer3d", untrained_spec(2))
    others = {f"c{number}": 0.7 + 0.01 * number for number in range(9)}
    folds = {"0": _entry({"a1": 0.5, "a2": 0.5, "b": 0.9}), "1": _entry({**others, "d": None})}
    alone = scores_of(plan, folds, {})
    grouped = scores_of(plan, folds, {hash_case("a1"): "patient a", hash_case("a2"): "patient a"})
    assert (alone["cases"], alone["patients"], grouped["patients"]) == (13, 13, 12)
    dice = grouped["classes"]["class_1"]["dice"]
    assert (dice["mean"], dice["n"]) == (pytest.approx((1.9 + sum(others.values())) / 12), 12)
    assert dice["ci95"] != alone["classes"]["class_1"]["dice"]["ci95"]
    assert "over patients" in grouped["interval"] and "over cases" in alone["interval"]
    assert grouped["classes"]["class_1"]["hd95_mm"] == {"mean": 2.0, "ci95": [2.0, 2.0], "n": 13}
    metrics = join_folds(plan, folds, patients={}, failed={"3": "loss_not_finite"})
    assert metrics["missing_folds"] == ["2", "3", "4"]
    assert metrics["failed_folds"] == {"3": "loss_not_finite"}
    assert metrics["validation"].startswith("13 held-out cases")


def test_scores_say_what_may_flatter_them() -> None:
    plan = untrained_plan("segformer3d", untrained_spec(2))
    best = plan.replace(schedule=plan.schedule.replace(keep="best"))
    entry = _entry({"a": 0.5})

    def told(plan: Plan, **more: Any) -> str:
        return str(join_folds(plan, {"0": {**entry, **more}}, patients={}, failed={})["validation"])

    assert told(plan).endswith("networks that never saw it")
    assert "may have seen it" in told(plan, start_may_have_seen_held_out=True)
    assert "may flatter" in told(best) and "may flatter" in told(plan, ended="stale")


def test_patients_come_from_the_table_else_from_the_pattern(tmp_path: Path) -> None:
    folder = write_tiny_dataset(tmp_path / "tiny", cases=2)
    data = sagittal.read_dataset(folder)
    plan = untrained_plan("segformer3d", data.spec)
    one, two = hash_case("case_0"), hash_case("case_1")
    assert patients_by_case(data, plan)[one] != patients_by_case(data, plan)[two]
    by_pattern = plan.replace(training=plan.training.replace(patient_pattern=r"(case)_\d"))
    assert len(set(patients_by_case(data, by_pattern).values())) == 1
    (folder / "patients.csv").write_text("case,patient\ncase_0,x\ncase_1,x\n")
    assert len(set(patients_by_case(data, plan).values())) == 1
    (folder / "patients.csv").write_text("case,who\n")
    assert patients_by_case(data, plan) == {}


def test_what_a_fold_was_made_with_is_in_the_bundle_without_paths() -> None:
    plan = untrained_plan("segformer3d", untrained_spec(2))
    facts = facts_of(plan, "0" * 64, "1" * 64, [torch.device("cpu")], processes=1)
    assert facts["torch"] == torch.__version__ and facts["seeds"]["training"] == plan.training.seed
    assert not any(str(Path.home()) in str(value) or "/" in str(value) for value in facts.values())
