"""The files of one case -> its score, or why it has none."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

import numpy as np
from jaxtyping import Integer

from sagittal.errors import DataError, ResourceError, SagittalError
from sagittal.evaluation import CaseScore, ClassSet, Failure, evaluate_case
from sagittal.evaluation.calibration import calibrate
from sagittal.evaluation.classes import present_values
from sagittal.evaluation.free_response import free_response
from sagittal.evaluation.settings import EvaluationSettings
from sagittal.evaluation.stored_probabilities import read_probabilities
from sagittal.plan.base import Frozen
from sagittal.volumes import read_labels
from sagittal.volumes.volume import require_same_grid


class Job(Frozen):
    """What the score of one case is made of; it goes to a process as JSON."""

    case: str
    reference: Path
    prediction: Path
    probabilities: Path | None
    patient: str | None
    classes: ClassSet
    settings: EvaluationSettings
    strict: bool
    """Whether a value of the reference that no class names is an error."""


class Outcome(Frozen):
    """The score of a case, or why there is none."""

    score: CaseScore | None = None
    failure: Failure | None = None
    undeclared: tuple[str, ...] = ()
    """Remarks on values that no class names."""


class Answer(Frozen):
    """What a process says of a job: its outcome, what it lacks to do it, or the traceback of a bug."""

    outcome: Outcome | None = None
    lack: Failure | None = None
    bug: str | None = None


def score_files(job: Job) -> Outcome:
    """Read the files of a case and score it; what is wrong with them is its outcome.

    Raises:
        ResourceError: it does not fit into memory, or a metric needs a package that is not installed.
    """
    classes = job.classes
    try:
        reference, grid = read_labels(job.reference)
        prediction, other = read_labels(job.prediction)
        require_same_grid(grid, other, "reference and prediction")
        reference, prediction = classes.in_own_values(reference), classes.in_own_values(prediction)
        unknown = [value for value in present_values(reference) if value not in classes.declared_values]
        if unknown and job.strict:
            raise DataError(
                f"the reference has the values {unknown}, which dataset.json lacks. "
                f"Expected {sorted(classes.declared_values)}. Correct {job.reference.name} or dataset.json.",
                code="unknown_label",
            )
        score = evaluate_case(
            reference, prediction, grid.spacing_mm, classes, case=job.case, patient=job.patient, settings=job.settings
        )
        if job.probabilities is not None:
            score = _with_probabilities(score, reference, job.probabilities, job)
    except ResourceError:
        raise
    except SagittalError as error:
        message = error.message.removeprefix(f"{job.case}: ")  # Whoever shows it names the case.
        return Outcome(failure=Failure(case=job.case, code=error.code, message=message))
    in_prediction = [value for value in present_values(prediction) if value not in classes.declared_values]
    sides = (("reference", unknown), ("prediction", in_prediction))
    told = tuple(f"{job.case}: the {side} has the values {values}" for side, values in sides if values)
    return Outcome(score=score, undeclared=told)


def _with_probabilities(score: CaseScore, reference: Integer[np.ndarray, "D H W"], path: Path, job: Job) -> CaseScore:
    """Add the calibration and, where lesions are counted, the free-response curve of every class."""
    found, classes, rule = read_probabilities(path), job.classes, job.settings.lesions
    score = score.replace(calibration=calibrate(reference, found, score.spacing_mm, classes))
    if rule is None:
        return score
    scored = dict(score.classes)
    ignored = None if classes.ignore_value is None else reference == classes.ignore_value
    foreground = islice(found, len(found) - len(classes.labels), None)
    for label, probability in zip(classes.labels, foreground, strict=True):
        mask = np.isin(reference, label.values)
        shown = probability if ignored is None else np.where(ignored, probability.dtype.type(0), probability)
        curve = free_response(mask, shown, score.spacing_mm, rule)
        scored[label.name] = scored[label.name].replace(free_response=curve)
    return score.replace(classes=scored)
