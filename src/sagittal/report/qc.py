"""A folder of predictions without references -> what looks wrong: qc.json, qc.csv and a page, the worst first.

Label maps are read one after the other and only numbers are kept, so thousands of cases take the memory of a few. Those
that are shown are read once more.
"""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any, Literal

from sagittal.bundle import Bundle
from sagittal.errors import DataError, SagittalError
from sagittal.evaluation import ClassSet, Failure
from sagittal.evaluation.classes import present_values
from sagittal.plan.base import Frozen, require_writable, write_atomically
from sagittal.plan.volume_range import VolumeRange
from sagittal.report.layout import DECLARATION, find_declaration
from sagittal.report.qc_case import CaseMeasure, measure_case
from sagittal.report.qc_page import PageParts, write_page
from sagittal.report.qc_pictures import Shown, draw_case
from sagittal.report.qc_rules import LEAST_CASES, QCFlag, RunFlag, flags_of, scores_of, suspicion_of, usual_of
from sagittal.volumes import read_labels
from sagittal.volumes.io import known_suffix

QC_JSON, QC_CSV, QC_HTML = "qc.json", "qc.csv", "qc.html"
RUN_REPORT = "prediction.json"
ENTROPY_FOLDER = "entropy"
MAX_WORKERS = 4
"""Each holds a label map and the numbered pieces of a class: with a large CT a gigabyte."""
MAX_PICTURED = 60
"""Cases that are shown, the most suspicious: some 5 MB of page."""
MAX_PICTURE_BYTES = 24_000_000


class CaseCheck(Frozen):
    """One case as it was found."""

    case: str
    suspicion: float
    flags: tuple[QCFlag, ...]
    measure: CaseMeasure
    scores: dict[str, float]
    """Robust z-score of the volume by label, of those that can be compared."""
    agreement: float | None = None
    """The prediction run's own estimate of its quality (`predict --quality`)."""

    @property
    def unusual_labels(self) -> frozenset[str]:
        """Labels whose volume is flagged, alone or beside that of the other side."""
        if any(flag.code == "nothing_found" for flag in self.flags):
            return frozenset(self.measure.labels)
        about_volume = ("absent", "sides", "volume_large", "volume_small")
        return frozenset(flag.label for flag in self.flags if flag.label and flag.code in about_volume)


class QualityCheck(Frozen):
    """Everything that was found in a folder of predictions."""

    schema_version: Literal[1] = 1
    compared_with: str
    """In words."""
    classes: ClassSet
    usual: dict[str, VolumeRange]
    """What volumes were compared with, by label."""
    cases: tuple[CaseCheck, ...]
    """The most suspicious first."""
    failures: tuple[Failure, ...] = ()
    """Cases that could not be checked."""
    warnings: tuple[str, ...] = ()

    @property
    def flagged(self) -> tuple[CaseCheck, ...]:
        """Cases with at least one flag, the most suspicious first."""
        return tuple(case for case in self.cases if case.flags)

    def to_csv(self) -> str:
        """Return one row per case and label; what is not known is an empty cell."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        head = ("place", "case", "suspicion", "class", "volume_ml", "usual_low_ml", "usual_high_ml", "robust_z")
        writer.writerow([*head, "pieces", "edges", "agreement", "entropy", "flags"])
        for place, case in enumerate(self.cases, start=1):
            for name, label in case.measure.labels.items():
                quantiles = self.usual[name].quantiles_ml
                low, high = ("", "") if quantiles is None else (repr(quantiles[1]), repr(quantiles[3]))
                codes = " ".join(flag.code for flag in case.flags if flag.label in (None, name))
                numbers = (case.agreement, case.measure.entropy)
                writer.writerow(
                    [place, case.case, case.suspicion, name, repr(label.volume_ml), low, high]
                    + [case.scores.get(name, ""), label.pieces, " ".join(label.edges)]
                    + ["" if number is None else number for number in numbers]
                    + [codes]
                )
        return text.getvalue()


@dataclass(frozen=True)
class _Told:
    """What prediction.json says of a case."""

    agreement: float | None = None
    flags: tuple[RunFlag, ...] = ()


@dataclass(frozen=True)
class _Folder:
    """The label maps of a folder, and what its prediction.json says."""

    files: Mapping[str, Path]
    told: Mapping[str, _Told] = field(default_factory=dict)
    failures: tuple[Failure, ...] = ()
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Meaning:
    """What the values mean, what training's volumes were, and what pictures need to know."""

    classes: ClassSet
    is_ct: bool
    training: Mapping[str, VolumeRange]
    compared_with: str
    warnings: tuple[str, ...] = ()


def check_predictions(
    predictions: str | os.PathLike[str],
    out: str | os.PathLike[str] | None = None,
    *,
    bundle: Bundle | None = None,
    images: str | os.PathLike[str] | None = None,
    workers: int | None = None,
    told: Callable[[int, int], None] | None = None,
) -> QualityCheck:
    """Look for predictions that are probably wrong, without references; with `out`, write qc.json, qc.csv and qc.html.

    Volumes are compared with those of the bundle's training cases, and without a bundle with the folder's own. A case
    whose file can't be read is put into `failures`; the others go on.

    Args:
        predictions: folder of label maps, as `sagittal predict` or any other tool writes it, or one file.
        out: folder for the three files; nothing is written without it.
        bundle: the model that predicted them.
        images: folder of the scans (CASE_0000.nii.gz), for the pictures.
        workers: label maps read at the same time; by itself the cores, at most 4.
        told: called after every case with how many are done and how many there are, from any thread.

    Raises:
        DataError: there are no label maps, or the bundle knows none of their classes.
        ResourceError: the results can't be written.
    """
    predictions = Path(predictions)
    scans = None if images is None else Path(images)
    if scans is not None and not scans.is_dir():
        raise DataError(f"{scans}: not a folder. Expected the folder of the scans, with files like CASE_0000.nii.gz.")
    folder = _folder(predictions)
    meaning = _meaning(predictions, folder.files, bundle)
    if out is not None:
        require_writable(Path(out))
    done = count(1)

    def measured_and_told(item: tuple[str, Path]) -> tuple[str, CaseMeasure | Failure]:
        found = _measured(*item, meaning.classes)
        if told is not None:
            told(next(done), len(folder.files))
        return found

    with ThreadPoolExecutor(workers or min(MAX_WORKERS, os.cpu_count() or 1)) as pool:
        outcomes = list(pool.map(measured_and_told, folder.files.items()))
    measured = {case: found for case, found in outcomes if isinstance(found, CaseMeasure)}
    failures = [found for _, found in outcomes if isinstance(found, Failure)]
    usual = usual_of(list(measured.values()), meaning.training)
    cases = []
    for case, measure in measured.items():
        of_run = folder.told.get(case, _Told())
        scores = scores_of(measure, usual)
        flags = flags_of(measure, scores, usual, of_run.flags)
        suspicion = suspicion_of(flags, scores)
        cases.append(CaseCheck(case=case, suspicion=suspicion, flags=flags, measure=measure, scores=scores,
                               agreement=of_run.agreement))  # fmt: skip
    result = QualityCheck(
        compared_with=meaning.compared_with,
        classes=meaning.classes,
        usual=dict(usual.volumes),
        cases=tuple(sorted(cases, key=lambda check: (-check.suspicion, check.case))),
        failures=tuple(sorted((*failures, *folder.failures), key=lambda failure: failure.case)),
        warnings=(*folder.warnings, *meaning.warnings, *_few(measured, meaning, usual.from_training)),
    )
    if out is not None:
        _write(Path(out), result, predictions, folder.files, scans, is_ct=meaning.is_ct)
    return result


def _write(
    out: Path, result: QualityCheck, predictions: Path, files: Mapping[str, Path], scans: Path | None, *, is_ct: bool
) -> None:
    views: dict[str, Shown] = {}
    taken = 0
    for check in result.cases[:MAX_PICTURED]:
        if taken > MAX_PICTURE_BYTES:
            break
        focus = next((flag.label for flag in check.flags if flag.label), None)
        views[check.case] = draw_case(check.case, files[check.case], result.classes, scans, focus=focus, is_ct=is_ct)
        taken += views[check.case].size_bytes
    # Names only: a full path tells a reader of the page who ran it, and where.
    facts = {"Predictions": predictions.resolve().name, "Compared with": result.compared_with}
    if scans is not None:
        facts["Scans"] = scans.resolve().name
    # The largest file first: where the disk is too full for it, an earlier result stays as it was.
    write_page(out / QC_HTML, PageParts.of(result, views, facts))
    write_atomically(out / QC_CSV, result.to_csv().encode())
    write_atomically(out / QC_JSON, result.to_json().encode())


def _measured(case: str, path: Path, classes: ClassSet) -> tuple[str, CaseMeasure | Failure]:
    try:
        return case, measure_case(path, classes, _entropy_map(case, path))
    except SagittalError as error:
        # Names only: a full path tells a reader of the page who ran it, and where.
        message = error.message.replace(f"{path.parent}{os.sep}", "")
        return case, Failure(case=case, code=error.code, message=message)
    except MemoryError:
        told = f"{path.name}: too large for the memory that is left. Give fewer --workers, or a machine with more."
        return case, Failure(case=case, code="memory", message=told)


def _entropy_map(case: str, path: Path) -> Path | None:
    """Return where `predict --entropy` put the map of a case: beside the label maps, in a folder of the same form."""
    suffix = path.name[len(Path(case).name) :]
    found = path.parents[len(Path(case).parts) - 1] / ENTROPY_FOLDER / f"{case}{suffix}"
    return found if found.is_file() else None


def _folder(predictions: Path) -> _Folder:
    if predictions.is_file():
        return _Folder({_case_of(predictions): predictions})
    if not predictions.is_dir():
        raise DataError(f"{predictions}: no such file or folder. Expected label maps.", code="unreadable")
    files: dict[str, Path] = {}
    for path in sorted(predictions.iterdir()):
        if path.is_file() and not path.name.startswith(".") and known_suffix(path) is not None:
            case = _case_of(path)
            if case in files:
                raise DataError(
                    f"{predictions}: {files[case].name} and {path.name} are both case '{case}'. Remove one of them."
                )
            files[case] = path
    told, failures, warnings = _run_report(predictions, files)
    if not files and not failures:
        raise DataError(
            f"{predictions}: no label maps. Expected files like CASE.nii.gz. Check the folder.", code="no_predictions"
        )
    return _Folder(dict(sorted(files.items())), told, tuple(failures), tuple(warnings))


def _run_report(folder: Path, files: dict[str, Path]) -> tuple[dict[str, _Told], list[Failure], list[str]]:
    """Read what prediction.json says of each case; add its label maps in folders of their own to `files`.

    The report is another program's file to this room: what is not as expected is left out, with a warning.
    """
    path = folder / RUN_REPORT
    if not path.is_file():
        return {}, [], []
    try:
        content = json.loads(path.read_bytes())
        cases = content["cases"]
        status = content.get("status", "finished")
        entries = [(str(entry["case"]), entry) for entry in cases]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return {}, [], [f"{RUN_REPORT} can't be used; the run's own flags and estimates are missing here."]
    told, failures = {}, []
    warnings = [] if status == "finished" else [f"{RUN_REPORT}: the prediction run is not finished ({status})."]
    for case, entry in entries:
        output = entry.get("output")
        if entry.get("status") == "failed":
            if case not in files:
                message = f"It was not predicted: {entry.get('message')}"
                failures.append(Failure(case=case, code="not_predicted", message=message))
            continue
        told[case] = _told(entry)
        if case not in files and isinstance(output, str):
            place = folder / output
            if place.resolve().is_relative_to(folder.resolve()) and place.is_file():
                files[case] = place
            else:
                message = f"{output} is named in {RUN_REPORT} and is not there. Predict it again."
                failures.append(Failure(case=case, code="missing", message=message))
    return told, failures, warnings


def _told(entry: Mapping[str, Any]) -> _Told:
    quality, flags = entry.get("quality"), entry.get("flags")
    agreement = quality.get("agreement") if isinstance(quality, dict) else None
    found = [flag for flag in flags if isinstance(flag, dict)] if isinstance(flags, list) else []
    return _Told(
        float(agreement) if isinstance(agreement, int | float) else None,
        tuple(RunFlag(code=str(flag.get("code")), message=str(flag.get("message"))) for flag in found),
    )


def _meaning(predictions: Path, files: Mapping[str, Path], bundle: Bundle | None) -> _Meaning:
    declaration = find_declaration(predictions, predictions)
    spec = None if bundle is None else bundle.plan.dataset
    channel = declaration.first_channel if declaration else spec.channel_names[0] if spec else None
    warnings: list[str] = []
    if declaration is not None:
        classes = ClassSet.of_mapping(declaration.labels, source=str(declaration.path), label_map=declaration.label_map)
    elif spec is not None:
        classes = ClassSet.of_spec(spec)
    else:
        classes = _found_classes(files)
        warnings.append(f"No {DECLARATION}: the classes are the values in the label maps ({', '.join(classes.names)}).")
    training: dict[str, VolumeRange] = {}
    compared_with = "the cases of this folder"
    if bundle is not None and spec is not None:
        theirs = {label.name for label in spec.labels}
        if not theirs & set(classes.names):
            raise DataError(
                f"{predictions}: its classes ({', '.join(classes.names)}) and those of the bundle "
                f"({', '.join(sorted(theirs))}) have no name in common. Give the bundle that predicted them.",
                code="other_classes",
            )
        volumes = bundle.plan.label_volumes
        training = {label.name: one for label, one in zip(spec.labels, volumes, strict=False)}
        if training:
            compared_with = f"{next(iter(training.values())).cases} training cases of {spec.name}"
        else:
            warnings.append(
                "The bundle does not say how large its classes were in training (an earlier version made it, or it was "
                "imported), so volumes are compared within this folder."
            )
    return _Meaning(classes, (channel or "").upper() == "CT", training, compared_with, tuple(warnings))


def _found_classes(files: Mapping[str, Path]) -> ClassSet:
    values: set[int] = set()
    for path in files.values():
        try:
            values.update(present_values(read_labels(path)[0]))
        except DataError:
            continue  # It fails again, and is told, when the case is measured.
    if not values - {0}:
        raise DataError(
            f"No label map holds a label other than 0, and no {DECLARATION} names any: there is nothing to check. "
            "Give the bundle that predicted them.",
            code="no_classes",
        )
    return ClassSet.of_values(sorted(values))


def _few(measured: Mapping[str, CaseMeasure], meaning: _Meaning, known: frozenset[str]) -> list[str]:
    if len(measured) >= LEAST_CASES:
        return []
    lost = "pieces and uncertainty" if known else "volumes, absent classes, pieces and uncertainty"
    return [f"Fewer than {LEAST_CASES} cases: {lost} can't be compared with the others in this folder."]


def _case_of(path: Path) -> str:
    suffix = known_suffix(path)
    return path.name[: -len(suffix)] if suffix else path.stem
