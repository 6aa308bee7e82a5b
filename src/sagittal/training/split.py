"""From what a plan says of the split to the folds, and the split of a new plan from what lies beside the data."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path

from sagittal.data.dataset import Dataset
from sagittal.data.split_files import (
    PATIENTS_NAME,
    SPLITS_NAME,
    label_sets,
    read_patients,
    read_splits,
)
from sagittal.data.splits import Fold, folds_sha256, make_folds, patients_of, split_warnings
from sagittal.errors import DataError, PlanError
from sagittal.plan.plan import Plan
from sagittal.plan.training import Training

_FIELDS = {
    f"training.{name}"
    for name in ("folds", "split_seed", "split", "patients_listed", "patient_pattern", "split_sha256")
}


@dataclass(frozen=True)
class SplitSources:
    """Where the split of a data set comes from, and who is told.

    Attributes:
        dataset: the cases.
        splits: own splits in another place than the data set's folder.
        workers: label maps read at a time.
        say: receives lines for a person.
    """

    dataset: Dataset
    splits: Path | None = None
    workers: int = 1
    say: Callable[[str], None] = lambda line: None

    @property
    def own_splits(self) -> Path | None:
        """The file of own splits, None where there is none."""
        beside = self.dataset.folder / SPLITS_NAME
        return self.splits or (beside if beside.is_file() else None)

    @property
    def patients(self) -> Path:
        """Where the table of patients would be."""
        return self.dataset.folder / PATIENTS_NAME


def settle_split(plan: Plan, sources: SplitSources, chosen: Collection[str], *, is_made: bool) -> Plan:
    """Return a new plan with its split decided, the hash of its folds and the reasons.

    A plan made here takes up own splits and patients.csv where they are and the user set nothing else; a plan that was
    given says itself how to split.

    Args:
        plan: overrides are in it already.
        sources: the data set and what lies beside it.
        chosen: dotted names that the user set.
        is_made: whether the plan was made here, not given.

    Raises:
        DataError: the files that tell the split do not fit the cases.
        PlanError: the number of folds that the user set is not that of the own splits.
    """
    if is_made:
        plan = _take_up(plan, sources, chosen)
    elif plan.training.split != "own" and sources.own_splits is not None:
        _refuse_or_tell(plan, sources)
    training = plan.training
    if not training.split_by_files:
        return plan.replace(training=training.replace(split_sha256=None))
    asked_anew = bool(_FIELDS & set(chosen)) and "training.split_sha256" not in chosen
    if training.split_sha256 is not None and not asked_anew:
        return plan
    try:
        folds = _folds(training, sources)
    except DataError as error:
        if error.code != "too_few_cases":
            raise
        sources.say(f"split: {error.message}")
        return plan
    if len(folds) != training.folds and "training.folds" in chosen:
        raise PlanError(
            f"--set training.folds={training.folds}: the own splits are {len(folds)}. Leave the setting out, or take "
            "another split (--set training.split=random).",
            code="bad_setting",
        )
    settled = training.replace(folds=len(folds), split_sha256=folds_sha256(folds))
    reasons = {"training.split_sha256": "of the folds, so that training notices where they changed"}
    if len(folds) != training.folds:
        reasons["training.folds"] = "as many as there are own splits"
    _say_warnings(folds, training, sources)
    return plan.replace(training=settled, reasons={**plan.reasons, **reasons})


def folds_of(plan: Plan, sources: SplitSources) -> tuple[Fold, ...]:
    """Return the folds of a plan for a data set.

    Raises:
        DataError: the cases can't be split so, or the split is not the one that the plan was made with.
    """
    training = plan.training
    folds = _folds(training, sources)
    if training.split_sha256 not in (None, folds_sha256(folds)):
        told = {"own": SPLITS_NAME, "stratified": f"labels or {PATIENTS_NAME}", "random": PATIENTS_NAME}
        raise DataError(
            f"{sources.dataset.folder}: these cases are split otherwise than when the plan was made (SHA-256 of the "
            f"folds {folds_sha256(folds)[:12]}, in the plan {str(training.split_sha256)[:12]}): the cases, or their "
            f"{told[training.split]}, changed. Restore them, or make a new plan.",
            code="other_split",
        )
    return folds


def same_split(one: Training, other: Training) -> bool:
    """Whether two trainings on the same cases have the same folds."""
    fields = sorted(name.removeprefix("training.") for name in _FIELDS)
    return all(getattr(one, name) == getattr(other, name) for name in fields)


def as_settled(given: Training, settled: Training, chosen: Collection[str]) -> Training:
    """Return `given` with what `settle_split` decided in `settled`, where it would decide that again.

    Args:
        given: of a plan before its split was settled, overrides included.
        settled: of the plan that a run began by.
        chosen: dotted names that the user set.
    """
    if not given.split_by_files:
        return given.replace(split_sha256=None)
    if given.split_sha256 is not None and not _FIELDS & set(chosen):
        return given
    return given.replace(folds=settled.folds, split_sha256=settled.split_sha256)


def _take_up(plan: Plan, sources: SplitSources, chosen: Collection[str]) -> Plan:
    training, reasons = plan.training, {}
    if "training.split" not in chosen and sources.own_splits is not None:
        training = training.replace(split="own")
        where = "the file given with --splits" if sources.splits else f"{SPLITS_NAME} in the data set's folder"
        reasons["training.split"] = f"own splits, from {where}"
    told = {"training.patients_listed", "training.patient_pattern"} & set(chosen)
    if training.split != "own" and not told and sources.patients.is_file():
        training = training.replace(patients_listed=True)
        reasons["training.patients_listed"] = f"{PATIENTS_NAME} in the data set's folder: no patient is on both sides"
    for reason in reasons.values():
        sources.say(f"split: {reason}")
    return plan.replace(training=training, reasons={**plan.reasons, **reasons})


def _refuse_or_tell(plan: Plan, sources: SplitSources) -> None:
    said = f"the plan says training.split={plan.training.split}"
    if sources.splits is not None:
        raise PlanError(
            f"--splits {sources.splits}: {said}, so the file would not be used. Add --set training.split=own.",
            code="bad_setting",
        )
    sources.say(f"split: {said}, so {SPLITS_NAME} in the data set's folder is not used")


def _folds(training: Training, sources: SplitSources) -> tuple[Fold, ...]:
    ids = [case.id for case in sources.dataset.cases]
    if training.split == "own":
        path = sources.own_splits
        if path is None:
            raise DataError(
                f"{sources.dataset.folder}: the plan says training.split=own, and there is no {SPLITS_NAME}. Give the "
                "file with --splits, or take another split (--set training.split=random).",
                code="missing",
            )
        return make_folds(ids, training, splits=read_splits(path))
    patients = read_patients(sources.patients) if training.patients_listed else None
    strata = label_sets(sources.dataset, workers=sources.workers) if training.split == "stratified" else None
    return make_folds(ids, training, patients=patients, strata=strata)


def _say_warnings(folds: tuple[Fold, ...], training: Training, sources: SplitSources) -> None:
    """Say what of the split a person should know: cases left out, patients on both sides, rows for no case."""
    ids = [case.id for case in sources.dataset.cases]
    listed = read_patients(sources.patients) if sources.patients.is_file() else {}
    strange = sorted(set(listed) - set(ids))
    if strange:
        sources.say(f"split: warning: {PATIENTS_NAME} names {len(strange)} cases that are not there")
    if training.split == "own":
        known = listed if listed or training.patient_pattern is None else patients_of(ids, training)
        for line in split_warnings(folds, ids, known):
            sources.say(f"split: warning: {line}")
