"""What `evaluate` and `compare` take alike: whose definitions, which metrics, tolerances, labels and patients."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from sagittal.errors import DataError, PlanError

if TYPE_CHECKING:
    from sagittal.evaluation import ClassSet, EvaluationSettings

Tolerances = Annotated[
    list[str] | None,
    Parameter(
        negative="",
        help="Distance in mm up to which a surface counts as right (NSD), 2 by default; several with commas or "
        "repeated; liver=3 for a class of its own.",
    ),
]
Metrics = Annotated[
    list[str] | None,
    Parameter(
        negative="",
        help="Metrics to compute, with commas or repeated, by the names in docs/metrics.md; 'all' for every one.",
    ),
]
Cases = Annotated[
    list[str] | None,
    Parameter(
        negative="",
        help="Names of the cases to score, with commas or repeated, or a text file with one per line; by default all "
        "references.",
    ),
]
LesionRules = Annotated[
    list[str] | None,
    Parameter(
        negative="",
        help="A value of the rule by which lesions are matched, for example minimum_iou=0.1 or minimum_ml=0.05; may be "
        "repeated.",
    ),
]


def evaluation_settings(
    protocol: str,
    tolerances: Sequence[str] | None,
    *,
    metrics: Sequence[str] | None = None,
    lesion_rules: Sequence[str] | None = None,
    lesions: bool = False,
) -> EvaluationSettings:
    """Return the settings that these options mean.

    Raises:
        PlanError: an unknown protocol or metric, or a value that makes no sense; its code is `usage`.
    """
    from pydantic import ValidationError

    from sagittal.evaluation import EvaluationSettings, metrics_of
    from sagittal.evaluation.settings import ALL_METRICS
    from sagittal.plan.base import describe_validation_error

    given: dict[str, Any] = {"protocol": protocol, **_tolerances(_words(tolerances))}
    names = _words(metrics)
    if metrics and not names:
        raise PlanError("--metrics: no name is given. Expected names as in docs/metrics.md, or 'all'.", code="usage")
    if names:
        given["metrics"] = tuple(ALL_METRICS) if names == ["all"] else tuple(names)
    if lesions or lesion_rules:
        given["lesions"] = _lesion_rule(_words(lesion_rules))
    try:
        settings = EvaluationSettings(**given)
    except ValidationError as error:
        told = [item["msg"].removeprefix("Value error, ") for item in error.errors() if not item["loc"]]
        raise PlanError("; ".join(told) or describe_validation_error(error, "options"), code="usage") from None
    try:
        metrics_of(settings)
    except DataError as error:
        raise PlanError(f"--{error.message}", code="usage") from None
    _refuse_unused(given)
    return settings


def _refuse_unused(given: Mapping[str, Any]) -> None:
    """Refuse options that the protocol would not look at: who gives them believes that they count."""
    from sagittal.evaluation.protocols import PROTOCOLS
    from sagittal.evaluation.settings import SAGITTAL

    protocol = given["protocol"]
    if protocol == SAGITTAL:
        return
    taken = PROTOCOLS[protocol].tolerances
    shared, own = "tolerances_mm" in given, "class_tolerances_mm" in given
    if "metrics" in given:
        raise PlanError(
            f"--metrics: --protocol {protocol} has metrics of its own. Leave one of the two options out.", code="usage"
        )
    if (shared or own) and taken == "none":
        raise PlanError(f"--tolerance-mm: --protocol {protocol} has no tolerances. Leave the option out.", code="usage")
    if taken == "by_class" and len(given.get("tolerances_mm", ())) > 1:
        raise PlanError(
            f"--tolerance-mm: --protocol {protocol} has one tolerance for each class, and several are given for all. "
            "Give one number, or CLASS=NUMBER for classes of their own.",
            code="usage",
        )
    if own and taken == "shared":
        raise PlanError(
            f"--tolerance-mm: --protocol {protocol} has one tolerance for all classes. Give it without a class.",
            code="usage",
        )


def declared_classes(path: Path | None) -> ClassSet | None:
    """Return the labels that a dataset.json declares; None for None.

    Raises:
        DataError: it can't be read or has no labels.
    """
    from sagittal.evaluation import ClassSet
    from sagittal.report.layout import read_declaration

    if path is None:
        return None
    declared = read_declaration(path)
    return ClassSet.of_mapping(declared.labels, source=str(path), label_map=declared.label_map)


def listed_patients(path: Path | None) -> Mapping[str, str] | None:
    """Return the patient of each case from a table with the columns case and patient; None for None.

    Raises:
        DataError: it can't be read, lacks a column, or has no row.
    """
    from sagittal.data.split_files import read_patients

    if path is None:
        return None
    patients = read_patients(path)
    if not patients:
        raise DataError(f"{path}: no rows. Expected one for each case.", code="bad_patients")
    return patients


def named_cases(texts: Sequence[str] | None) -> tuple[str, ...] | None:
    """Return the names in the option --cases, those in a file where one is given; None for None.

    Raises:
        PlanError: there is no name; its code is `usage`.
        DataError: a file can't be read.
    """
    if texts is None:
        return None
    if len(texts) == 1 and Path(texts[0]).is_file():
        try:
            lines = Path(texts[0]).read_text(encoding="utf-8-sig").splitlines()
        except (OSError, ValueError) as error:
            raise DataError(f"--cases {texts[0]}: can't be read ({error}). Expected a name per line.") from None
        names = tuple(line.strip() for line in lines if line.strip())
    else:
        names = tuple(_words(texts))
    if not names:
        raise PlanError("--cases: no name is given. Expected names of references, CASE for CASE.nii.gz.", code="usage")
    return tuple(dict.fromkeys(names))


def _words(texts: Sequence[str] | None) -> list[str]:
    return [word.strip() for text in texts or () for word in text.split(",") if word.strip()]


def _tolerances(words: Sequence[str]) -> dict[str, Any]:
    shared = [_number(word, "--tolerance-mm") for word in words if "=" not in word]
    named = [word.rpartition("=") for word in words if "=" in word]
    own = [(_class_name(name, value), _number(value, "--tolerance-mm")) for name, _, value in named]
    found: dict[str, Any] = {"tolerances_mm": tuple(shared)} if shared else {}
    return {**found, "class_tolerances_mm": tuple(own)} if own else found


def _class_name(name: str, value: str) -> str:
    if not name.strip():
        raise PlanError(f"--tolerance-mm ={value}: expected a class before the sign, as in liver=3.", code="usage")
    return name.strip()


def _number(text: str, option: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise PlanError(f"{option} {text}: expected a number, for example 2 or liver=3.", code="usage") from None


def _lesion_rule(words: Sequence[str]) -> Any:
    from pydantic import ValidationError

    from sagittal.evaluation.lesions import LesionRule
    from sagittal.plan.base import describe_validation_error
    from sagittal.plan.overrides import parse_settings

    try:
        return LesionRule(**parse_settings(list(words), option="--lesion-rule", example="minimum_iou=0.1"))
    except ValidationError as error:
        raise PlanError(describe_validation_error(error, "--lesion-rule"), code="usage") from None
