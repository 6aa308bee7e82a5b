"""The Medical Segmentation Decathlon: Dice and NSD of surface elements, with a tolerance for each of its ten tasks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from sagittal.errors import DataError
from sagittal.evaluation.classes import ClassSet
from sagittal.evaluation.metrics import METRICS, UNDEFINED
from sagittal.evaluation.nsd import nsd_metric, nsd_own_metric
from sagittal.evaluation.pair import Metric
from sagittal.evaluation.protocols.averaging import defined_classes_of_defined_cases
from sagittal.evaluation.protocols.protocol import Protocol
from sagittal.evaluation.protocols.recognition import described, plain
from sagittal.evaluation.settings import EvaluationSettings

TASKS: Mapping[str, tuple[tuple[str, ...], float]] = {
    "Task01_BrainTumour": (("edema", "non-enhancing tumor", "enhancing tumour"), 5.0),
    "Task02_Heart": (("left atrium",), 4.0),
    "Task03_Liver": (("liver", "cancer"), 7.0),
    "Task04_Hippocampus": (("Anterior", "Posterior"), 1.0),
    "Task05_Prostate": (("PZ", "TZ"), 4.0),
    "Task06_Lung": (("cancer",), 2.0),
    "Task07_Pancreas": (("pancreas", "cancer"), 5.0),
    "Task08_HepaticVessel": (("Vessel", "Tumour"), 3.0),
    "Task09_Spleen": (("spleen",), 3.0),
    "Task10_Colon": (("colon cancer primaries",), 4.0),
}
"""Names of a task's classes in its dataset.json, and the tolerance in mm that its annotators chose for all of them.

Source: M. Antonelli et al., The Medical Segmentation Decathlon, Nature Communications 13, 4128 (2022). Second-hand: a
toolkit that cites the paper (aj-das-research/SegEvalKit) has the same ten, no code of the organisers has any.
"""

_SOURCE = "M. Antonelli et al., Nature Communications 13 (2022), with DeepMind's surface-distance."


def task_of(classes: ClassSet) -> str | None:
    """Return the task whose classes these are, by their names; None where they are no task's."""
    given = {plain(name) for name in classes.names}
    return next((task for task, (names, _) in TASKS.items() if given == {plain(name) for name in names}), None)


def _settle(settings: EvaluationSettings, classes: ClassSet) -> EvaluationSettings:
    # Whoever writes out what is our default means it: the Decathlon's own tolerance stands where none was given.
    if settings.class_tolerances_mm or "tolerances_mm" in settings.model_fields_set:
        return settings
    task = task_of(classes)
    if task is None:
        tasks = "; ".join(f"{task}: {', '.join(names)}" for task, (names, _) in TASKS.items())
        raise DataError(
            f"The Decathlon has a tolerance for each of its tasks, and the classes {described(classes)} are those of "
            f"none. Expected the names of one task ({tasks}). Name the classes so in dataset.json, or give "
            "tolerances (--tolerance-mm).",
            code="protocol_tolerance",
        )
    tolerance_mm = TASKS[task][1]
    return settings.replace(class_tolerances_mm=tuple((name, tolerance_mm) for name in classes.names))


def _columns(settings: EvaluationSettings) -> Mapping[str, Metric]:
    otherwise_mm = settings.tolerances_mm[0]
    own = dict(settings.class_tolerances_mm)
    nsd = nsd_own_metric(own, otherwise_mm, surfel=True) if own else nsd_metric(otherwise_mm, surfel=True)
    return {
        "dice": replace(METRICS["dice"], both_empty=UNDEFINED, source=_SOURCE),
        "nsd": replace(nsd, source=_SOURCE),
    }


MSD = Protocol(
    name="msd",
    title="Medical Segmentation Decathlon",
    columns=_columns,
    tolerances="by_class",
    headline=("dice", "nsd"),
    averaging=defined_classes_of_defined_cases,
    mean_rule="Each class over the cases in which it is defined; the overall mean over the classes that are.",
    peculiar=(
        "The NSD weights surface elements by their area, as DeepMind's surface-distance does: MONAI's is another one.",
        "One tolerance for all classes of a task, from 1 mm (hippocampus) to 7 mm (liver), second-hand: no code of the "
        "organisers has them. The task is told by the names of the classes. Tolerances in the settings go first.",
        "A class that reference and prediction both lack is NaN. The challenge ranked teams by tests on cases, and "
        "never averaged classes or tasks: the overall mean is ours.",
    ),
    source=_SOURCE,
    settle=_settle,
)
