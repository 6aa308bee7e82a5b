"""What an evaluation found, in words and few numbers: the part of a report that is read in a minute."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from sagittal.evaluation import CaseScore, Evaluation, Metric, MetricSummary
from sagittal.report.main_columns import badness, distance_metric, headline_metric, in_words

MAX_LOOK = 5
"""Cases that the summary names for a person to look at."""


@dataclass(frozen=True)
class Look:
    """A case that deserves a look, and why."""

    case: str
    why: str


@dataclass(frozen=True)
class Told:
    """One thing that the summary tells: what it is about, and the sentence."""

    about: str
    text: str


@dataclass(frozen=True)
class Glance:
    """One class in a row.

    Attributes:
        name: of the class.
        present: cases whose reference has it.
        found: those of them whose prediction has it too.
        false_alarms: cases in which only the prediction has it.
        headline: the headline metric over all cases.
        distance: median of the distance metric; None where there is no such metric, or no value.
        volume_error_ml: median of the absolute difference of the volumes, over cases in which either mask has it.
        volume_error_percent: median of the same in percent of the reference.
    """

    name: str
    present: int
    found: int
    false_alarms: int
    headline: MetricSummary
    distance: float | None
    volume_error_ml: float | None
    volume_error_percent: float | None


def glance(evaluation: Evaluation) -> tuple[Glance, ...]:
    """Return a row per class: found, overlap, typical distance and typical volume error."""
    key, distance = headline_metric(evaluation.metrics), distance_metric(evaluation.metrics)
    rows = []
    for name in evaluation.classes.names:
        scores = [case.classes[name] for case in evaluation.cases]
        present = [score for score in scores if score.reference_ml]
        summary = evaluation.summary.classes[name]
        errors = [abs(score.prediction_ml - score.reference_ml) for score in scores if score.outcome != "absent"]
        shares = [100 * abs(score.prediction_ml - score.reference_ml) / score.reference_ml for score in present]
        rows.append(
            Glance(
                name=name,
                present=len(present),
                found=len(present) - summary.missed,
                false_alarms=summary.false_alarms,
                headline=summary.metrics[key],
                distance=None if distance is None else summary.metrics[distance].median,
                volume_error_ml=statistics.median(errors) if errors else None,
                volume_error_percent=statistics.median(shares) if shares else None,
            )
        )
    return tuple(rows)


def ranked_cases(evaluation: Evaluation) -> tuple[CaseScore, ...]:
    """Return cases from the worst to the best by the mean of the headline metric over their classes.

    Cases in which it is defined for no class are left out.
    """
    key = headline_metric(evaluation.metrics)
    metric = evaluation.metrics[key]
    means = [(case_mean(case, key), case) for case in evaluation.cases]
    defined = [(badness(mean, metric), case) for mean, case in means if mean is not None]
    return tuple(case for _, case in sorted(defined, key=lambda item: (-item[0], item[1].case)))


def case_mean(case: CaseScore, key: str) -> float | None:
    """Return the mean of a metric over the classes of a case in which it is defined."""
    values = [value for score in case.classes.values() if (value := score.metrics.get(key)) is not None]
    return statistics.fmean(values) if values else None


def cases_to_look_at(evaluation: Evaluation) -> tuple[Look, ...]:
    """Return at most five cases for a person to look at: what was missed or falsely found, then the worst scores.

    At least two places are left for cases in which nothing was missed: a method that misses much also errs elsewhere.
    """
    key = headline_metric(evaluation.metrics)
    metric = evaluation.metrics[key]
    ranked = ranked_cases(evaluation)
    empty = [(case, words) for case in ranked if (words := _empty_words(case))]
    room = MAX_LOOK if len(ranked) - len(empty) < 2 else MAX_LOOK - 2
    empty.sort(key=lambda item: "missed" not in item[1])
    found = {case.case: f"{words}; {_score_words(case, key, metric)}" for case, words in empty[:room]}
    for case in ranked:
        if len(found) >= MAX_LOOK:
            break
        if case not in [item for item, _ in empty]:
            name, value = _weakest(case, key, metric)
            where = f", of {name} {in_words(value, metric)}" if len(case.classes) > 1 else ""
            found[case.case] = f"{_score_words(case, key, metric)}{where}"
    return tuple(Look(case, why) for case, why in found.items())


def _empty_words(case: CaseScore) -> str:
    missed = [name for name, score in case.classes.items() if score.outcome == "missed"]
    alarms = [name for name, score in case.classes.items() if score.outcome == "false_alarm"]
    told = [f"{_some(missed)} missed entirely"] if missed else []
    told += [f"{_some(alarms)} found where there is none"] if alarms else []
    return ", ".join(told)


def _score_words(case: CaseScore, key: str, metric: Metric) -> str:
    mean = "mean " if len(case.classes) > 1 else ""
    return f"{mean}{metric.title} {in_words(case_mean(case, key), metric)}"


def _weakest(case: CaseScore, key: str, metric: Metric) -> tuple[str, float]:
    scores = [(name, value) for name, score in case.classes.items() if (value := score.metrics[key]) is not None]
    return max(scores, key=lambda item: badness(item[1], metric))


def plain_words(
    evaluation: Evaluation, *, floor: float | None = None, floor_note: str = "a method that never looks at the image"
) -> tuple[Told, ...]:
    """Tell the result in a few sentences for a reader who reads nothing else.

    Args:
        evaluation: what was measured.
        floor: mean Dice of a method that never looks at the image.
        floor_note: what that is.
    """
    return tuple(_tell(evaluation, floor, floor_note))


def _tell(evaluation: Evaluation, floor: float | None, floor_note: str) -> Iterator[Told]:
    summary, classes = evaluation.summary, evaluation.classes.names
    patients = {case.patient for case in evaluation.cases if case.patient is not None}
    of_patients = f" of {count(len(patients), 'patient')}" if 0 < len(patients) < summary.cases else ""
    failed = f" {count(summary.failed, 'case')} could not be scored." if summary.failed else ""
    about = f"{count(summary.cases, 'case')}{of_patients} in {count(len(classes), 'class', 'classes')}.{failed}"
    yield Told("Scored", about)
    if not evaluation.cases:
        return
    yield Told("Found", _found(evaluation))
    yield from _overlap(evaluation, floor, floor_note)
    yield from _distance(evaluation)
    yield from _volume(evaluation)


def _found(evaluation: Evaluation) -> str:
    present = sum(bool(score.reference_ml) for case in evaluation.cases for score in case.classes.values())
    missed = sum(scores.missed for scores in evaluation.summary.classes.values())
    alarms = sum(scores.false_alarms for scores in evaluation.summary.classes.values())
    if not present and not alarms:
        return "No class is present in any reference or prediction, so there is nothing to compare."
    told = f"{present - missed} of {count(present, 'structure')} in the references"
    told += "; none was missed entirely" if not missed else f"; {missed} missed entirely"
    return told + (", and no false alarm." if not alarms else f", and {count(alarms, 'false alarm')}.")


def _overlap(evaluation: Evaluation, floor: float | None, floor_note: str) -> Iterator[Told]:
    key = headline_metric(evaluation.metrics)
    metric, mean = evaluation.metrics[key], evaluation.summary.mean[key]
    if mean is None:
        return
    low, high = evaluation.summary.low.get(key), evaluation.summary.high.get(key)
    told = f"The mean {metric.title} is {in_words(mean, metric)}"
    if low is not None and high is not None:
        told += (
            f"; over other cases of the same kind it would lie between {low:.{metric.digits}f} and "
            f"{in_words(high, metric)} (95 % interval)"
        )
    told += "."
    if floor is not None and key == "dice":
        side = "above" if mean >= floor else "below"
        told += f" That is {abs(mean - floor):.3f} {side} the floor of {floor:.3f} ({floor_note})."
    classes = evaluation.summary.classes
    means = [(value, name) for name in classes if (value := classes[name].metrics[key].mean) is not None]
    weakest, strongest = (choose(means, key=lambda item: badness(item[0], metric)) for choose in (max, min))
    if abs(strongest[0] - weakest[0]) >= 0.5 * 10.0**-metric.digits:
        told += (
            f" Strongest class: {strongest[1]} ({strongest[0]:.{metric.digits}f}); "
            f"weakest: {weakest[1]} ({weakest[0]:.{metric.digits}f})."
        )
    yield Told("Overlap" if metric.group == "overlap" else metric.title, told)


def _distance(evaluation: Evaluation) -> Iterator[Told]:
    key = distance_metric(evaluation.metrics)
    if key is None:
        return
    metric = evaluation.metrics[key]
    values = [
        (value, case.case, name)
        for case in evaluation.cases
        for name, score in case.classes.items()
        if score.outcome == "present" and (value := score.metrics.get(key)) is not None
    ]
    if not values:
        return
    typical = statistics.median(value for value, _, _ in values)
    largest, case, name = max(values)
    meaning = {
        "hd95_mm": "95 % of the outline lies within {} of its counterpart",
        "assd_mm": "the outlines are {} apart",
    }
    told = meaning.get(key, f"the {metric.title} is {{}}").format(in_words(typical, metric))
    where = f" ({name})" if len(evaluation.classes.names) > 1 else ""
    yield Told(
        "Outline",
        f"In the typical structure {told} ({metric.title}, median of the {len(values)} found). "
        f"The largest is {in_words(largest, metric)}, in {case}{where}.",
    )


def _volume(evaluation: Evaluation) -> Iterator[Told]:
    rows = [(row.volume_error_ml, row) for row in glance(evaluation) if row.volume_error_ml is not None and row.present]
    if not rows:
        return
    (least, small), (most, large) = min(rows, key=lambda row: row[0]), max(rows, key=lambda row: row[0])
    if small.name == large.name:
        told = f"The typical error is {millilitres(most)} mL{_percent(large)}."
    else:
        told = (
            f"The typical error is between {millilitres(least)} mL{_percent(small, small.name)} and "
            f"{millilitres(most)} mL{_percent(large, large.name)}."
        )
    reference = sum(score.reference_ml for case in evaluation.cases for score in case.classes.values())
    prediction = sum(score.prediction_ml for case in evaluation.cases for score in case.classes.values())
    share = 100 * (prediction - reference) / reference
    if abs(share) < 0.5:
        told += " Over all cases together volumes are neither too large nor too small."
    else:
        told += f" Over all cases together volumes are {abs(share):.0f} % too {'large' if share > 0 else 'small'}."
    yield Told("Volume", told)


def _percent(row: Glance, name: str = "") -> str:
    share = "" if row.volume_error_percent is None else f"{row.volume_error_percent:.1f} %"
    inside = ", ".join(part for part in (name, share) if part)
    return f" ({inside})" if inside else ""


def _some(names: list[str]) -> str:
    return ", ".join(names) if len(names) <= 3 else f"{', '.join(names[:3])} and {len(names) - 3} more"


def count(number: int, one: str, many: str | None = None) -> str:
    """Return a number with its noun."""
    return f"{number} {one if number == 1 else many or one + 's'}"


def millilitres(value: float) -> str:
    """Return a volume with the digits that tell something."""
    if abs(value) >= 100:
        return f"{value:.0f}"
    # What rounds to 0.1 is no small value: 0.1000 beside 0.13 would look more exact than it is.
    return f"{value:.4f}" if 0 < abs(value) < 0.09995 else f"{value:.2f}"


def summary_facts(evaluation: Evaluation) -> Mapping[str, object]:
    """Return the protocol and the settings of an evaluation, as a section of the facts."""
    settings = evaluation.settings
    facts: dict[str, object] = {"Protocol": settings.protocol, "Metrics": ", ".join(evaluation.metrics)}
    if any(key.startswith("nsd") for key in evaluation.metrics) and settings.protocol == "sagittal":
        facts["Tolerances (mm)"] = ", ".join(f"{value:g}" for value in settings.tolerances_mm)
    if settings.class_tolerances_mm:
        facts["Tolerances of classes (mm)"] = ", ".join(f"{name} {mm:g}" for name, mm in settings.class_tolerances_mm)
    if settings.lesions is not None:
        rule = settings.lesions.model_dump().items()
        facts["Lesions"] = ", ".join(f"{key.replace('_', ' ')} {value}".replace("_", " ") for key, value in rule)
    if evaluation.classes.ignore_value is not None:
        facts["Ignored value"] = evaluation.classes.ignore_value
    return facts
