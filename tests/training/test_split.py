"""The split of a plan: taken up from what lies beside the data, kept by its hash, and refused where it changed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

import sagittal
from sagittal.data.dataset import read_dataset
from sagittal.data.split_files import read_splits
from sagittal.data.splits import Fold, folds_sha256
from sagittal.errors import DataError, PlanError
from sagittal.plan.overrides import override
from sagittal.plan.plan import Plan
from sagittal.testing.datasets import TINY_SETTINGS as TINY
from sagittal.testing.plans import untrained_plan
from sagittal.training.run import train
from sagittal.training.split import SplitSources, as_settled, folds_of, same_split, settle_split
from sagittal.training.stages import RunOptions

IDS = tuple(f"case_{number}" for number in range(6))
OWN = [{"train": ["case_0", "case_1", "case_2"], "val": ["case_3", "case_4"]}]


def own_splits(path: Path, entries: object = OWN) -> Path:
    path.write_text(json.dumps(entries))
    return path


def patients(folder: Path, of: dict[str, str]) -> None:
    rows = "".join(f"{case},{patient}\n" for case, patient in of.items())
    (folder / "patients.csv").write_text("case,patient\n" + rows)


def settled(
    folder: Path, *, splits: Path | None = None, is_made: bool = True, **settings: object
) -> tuple[Plan, list[str]]:
    """The plan of a tiny data set after its split was settled, and what was said."""
    data, said = read_dataset(folder), list[str]()
    names = {f"training.{name}": value for name, value in settings.items()}
    plan = override(untrained_plan("mednext-s", data.spec), names, origin="--set")
    sources = SplitSources(data, splits, say=said.append)
    return settle_split(plan, sources, set(names), is_made=is_made), said


def test_without_anything_beside_the_data_the_plan_stays_as_it_is(tiny_dataset: Path) -> None:
    plan, said = settled(tiny_dataset)
    assert plan == untrained_plan("mednext-s", read_dataset(tiny_dataset).spec)
    assert said == []
    assert len(folds_of(plan, SplitSources(read_dataset(tiny_dataset)))) == 5


def test_own_splits_beside_the_data_are_taken_up_with_hash_and_reason(tiny_dataset: Path) -> None:
    path = own_splits(tiny_dataset / "splits_final.json")
    plan, said = settled(tiny_dataset)
    training = plan.training
    assert (training.split, training.folds) == ("own", 1)
    assert training.split_sha256 == folds_sha256(read_splits(path))
    assert plan.reasons["training.split"] == "own splits, from splits_final.json in the data set's folder"
    assert "training.folds" in plan.reasons and "training.split_sha256" in plan.reasons
    assert "case_0" not in plan.to_json()
    assert said[0] == "split: own splits, from splits_final.json in the data set's folder"
    assert "split: warning: fold 0 leaves out 1 of 6 cases: case_5" in said
    found = folds_of(plan, SplitSources(read_dataset(tiny_dataset)))
    assert found == (Fold(("case_0", "case_1", "case_2"), ("case_3", "case_4")),)


def test_a_file_that_is_named_goes_before_the_one_beside_the_data(tiny_dataset: Path, tmp_path: Path) -> None:
    own_splits(tiny_dataset / "splits_final.json")
    other = own_splits(tmp_path / "mine.json", [{"train": ["case_5"], "val": ["case_0"]}] * 2)
    plan, _ = settled(tiny_dataset, splits=other)
    assert plan.training.folds == 2
    assert plan.reasons["training.split"] == "own splits, from the file given with --splits"
    assert str(tmp_path) not in plan.to_json()


def test_patients_csv_is_taken_up_unless_the_user_says_otherwise(tiny_dataset: Path) -> None:
    patients(tiny_dataset, {case: f"P{number // 2}" for number, case in enumerate(IDS)} | {"gone": "P9"})
    plan, said = settled(tiny_dataset, folds=3)
    assert plan.training.patients_listed and plan.training.split_sha256 is not None
    for fold in folds_of(plan, SplitSources(read_dataset(tiny_dataset))):
        assert len(fold.validation) == 2 and int(fold.validation[0][-1]) // 2 == int(fold.validation[1][-1]) // 2
    assert any("patients.csv names 1 cases that are not there" in line for line in said)
    for settings in ({"patients_listed": False}, {"patient_pattern": "(.*)"}):
        plain, _ = settled(tiny_dataset, **settings)
        assert not plain.training.patients_listed and plain.training.split_sha256 is None


def test_own_splits_with_a_patient_on_both_sides_are_told(tiny_dataset: Path) -> None:
    own_splits(tiny_dataset / "splits_final.json")
    patients(tiny_dataset, {**{case: case for case in IDS}, "case_0": "P", "case_3": "P"})
    plan, said = settled(tiny_dataset)
    assert not plan.training.patients_listed
    assert any("same patients (P)" in line for line in said)


def test_stratified_folds_depend_on_the_labels_and_notice_their_change(tiny_dataset: Path) -> None:
    plan, _ = settled(tiny_dataset, split="stratified", folds=2)
    sources = SplitSources(read_dataset(tiny_dataset), workers=2)
    assert [len(fold.validation) for fold in folds_of(plan, sources)] == [3, 3]
    empty = Path(tiny_dataset / "labelsTr" / "case_0.nii.gz")
    volume = sagittal.read_volume(empty)
    for case in IDS[:3]:
        volume.with_array(0 * volume.array.astype("uint8")).write(empty.with_name(f"{case}.nii.gz"))
    with pytest.raises(DataError, match=r"split otherwise than when the plan was made.*their labels") as caught:
        folds_of(plan, sources)
    assert caught.value.code == "other_split"


def test_a_given_plan_says_itself_how_to_split(tiny_dataset: Path) -> None:
    path = own_splits(tiny_dataset / "splits_final.json")
    plan, said = settled(tiny_dataset, is_made=False)
    assert plan.training.split == "random"
    assert said == [
        "split: the plan says training.split=random, so splits_final.json in the data set's folder is not used"
    ]
    with pytest.raises(PlanError, match=r"--splits .*Add --set training.split=own"):
        settled(tiny_dataset, splits=path, is_made=False)
    taken, _ = settled(tiny_dataset, is_made=False, split="own")
    assert taken.training.folds == 1 and taken.training.split_sha256 is not None
    pinned, _ = settled(tiny_dataset, is_made=False, split="own", split_sha256="0" * 64)
    assert pinned.training.split_sha256 == "0" * 64
    sources = SplitSources(read_dataset(tiny_dataset))
    assert settle_split(pinned, sources, (), is_made=False) == pinned
    anew = settle_split(pinned, sources, {"training.split"}, is_made=False)
    assert anew.training.split_sha256 == taken.training.split_sha256
    plain = override(taken, {"training.split": "random", "training.folds": 5}, origin="--set")
    assert settle_split(plain, sources, {"training.split"}, is_made=False).training.split_sha256 is None


def test_what_cannot_be_settled_is_refused(tiny_dataset: Path) -> None:
    with pytest.raises(DataError, match=r"training.split=own, and there is no splits_final.json"):
        settled(tiny_dataset, split="own")
    own_splits(tiny_dataset / "splits_final.json")
    with pytest.raises(PlanError, match=r"--set training.folds=3: the own splits are 1"):
        settled(tiny_dataset, folds=3)
    own_splits(tiny_dataset / "splits_final.json", [{"train": ["case_9"], "val": ["case_0"]}])
    with pytest.raises(DataError, match="case_9 not in the data set"):
        settled(tiny_dataset)


def test_too_few_patients_for_folds_still_make_a_plan_to_train_on_all(tiny_dataset: Path) -> None:
    patients(tiny_dataset, dict.fromkeys(IDS, "P"))
    plan, said = settled(tiny_dataset)
    assert plan.training.split_sha256 is None
    assert any("6 cases of 1 patients can't be split into 5 folds" in line for line in said)
    with pytest.raises(DataError, match="can't be split"):
        folds_of(plan, SplitSources(read_dataset(tiny_dataset)))


def test_trainings_with_the_same_split_are_recognised(tiny_dataset: Path) -> None:
    plain = untrained_plan("mednext-s", read_dataset(tiny_dataset).spec).training
    own_splits(tiny_dataset / "splits_final.json")
    own = settled(tiny_dataset)[0].training
    assert same_split(own, own.replace(seed=7, batch_size=1))
    assert not same_split(own, plain)
    before = plain.replace(split="own")
    assert as_settled(before, own, ()) == own
    assert as_settled(plain.replace(split_sha256="0" * 64), own, ()) == plain
    pinned = own.replace(split_sha256="0" * 64)
    assert as_settled(pinned, own, ()) == pinned
    assert as_settled(pinned, own, {"training.split"}) == own


@pytest.mark.filterwarnings("ignore:.*is not writable:UserWarning")
def test_a_run_trains_by_own_splits_goes_on_without_the_file_and_notices_another(
    tiny_dataset: Path, tmp_path: Path
) -> None:
    own = own_splits(tmp_path / "own.json", [*OWN, {"train": ["case_3", "case_4"], "val": ["case_0"]}])
    options = RunOptions(device="cpu", splits=own)
    settings = {**TINY, "schedule.steps": 1}
    train(tiny_dataset, tmp_path / "b", settings=settings, options=options)
    folds = sagittal.read_bundle(tmp_path / "b").metrics["folds"]
    assert (folds["0"]["training_cases"], folds["0"]["held_out_cases"]) == (3, 2)
    assert read_splits(tmp_path / "b.run" / "splits_final.json") == read_splits(own)
    own.unlink()
    train(tiny_dataset, tmp_path / "b", fold="1", options=RunOptions(device="cpu"))
    assert sagittal.read_bundle(tmp_path / "b").weight_names == ("fold_0", "fold_1")
    shutil.rmtree(tmp_path / "b.run")
    with pytest.raises(DataError, match="split otherwise"):
        other = RunOptions(device="cpu", splits=own_splits(own), resume=True)
        train(tiny_dataset, tmp_path / "b", fold="0", options=other)
