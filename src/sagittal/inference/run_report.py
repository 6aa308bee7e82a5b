"""prediction.json: what became of every case of a folder run, so that the next run knows what is finished.

Writing the whole report after each of thousands of cases would take a time that grows with their square. So each case
is one line of `prediction.jsonl`, written as soon as it is known; the report is written at the start, now and then, and
at the end, when the lines are taken away. A run that was killed leaves both, and `known_cases` reads both.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import ClassVar, Literal

from pydantic import Field

from sagittal.errors import PlanError, ResourceError
from sagittal.inference.engines.engine import Precision
from sagittal.plan.base import Frozen, cannot_write

REPORT = "prediction.json"
JOURNAL = "prediction.jsonl"
_AT_MOST_EVERY_S = 30.0
_SHARE_OF_TIME = 0.01
"""Of a run, for writing its report before it is at its end."""


class Flag(Frozen):
    """Something that a person should look at; nothing was refused because of it."""

    code: str
    message: str


class Quality(Frozen):
    """How much the predictions that were averaged agree, an estimate of how good the result is."""

    agreement: float | None
    """Mean over the classes that were found of the pairwise Dice of mirrored copies or folds; None: nothing found."""
    classes: dict[str, float]
    """The same per class; classes that no copy found are left out."""
    threshold: float
    """Below it the case is flagged."""
    threshold_from: str
    """Where it comes from."""


class FileStamp(Frozen):
    """A file as it was written."""

    path: str
    """In the output folder, with forward slashes."""
    size_bytes: int
    sha256: str | None = None
    """None for probabilities that an earlier version wrote."""


class InputStamp(Frozen):
    """The files of a case as they were read."""

    sha256: str
    """Over their contents, in channel order."""
    state: str
    """Hash over their paths, sizes and times of change: where it is the same, the contents need not be read."""


class Choices(Frozen):
    """What was asked for; a case that was predicted by other choices is not finished."""

    precision: Precision = "fp32"
    mirror: bool = True
    step: float | None = None
    """Distance of neighbouring windows as a share of the window; None: the plan's."""
    fast: bool = False
    subset: tuple[str, ...] = ()
    """Names of the only classes that are written, in the model's order; none: all."""
    averaged_with: tuple[str, ...] = ()
    """Hashes of the manifests of the further bundles whose probabilities are averaged, in ascending order."""
    missing: tuple[str, ...] = ()
    """Names of the channels that the scans lack."""
    postprocessing: bool = True
    """Whether the plan's rules are applied."""
    preview: bool = False
    probabilities: bool = False
    entropy: bool = False
    quality: bool = False
    dicom: tuple[str, ...] = ()
    """Kinds of DICOM objects that are written for DICOM series, see `dicom_outputs.KINDS`."""

    later_fields: ClassVar[tuple[str, ...]] = ("averaged_with", "dicom")
    _EXTRAS: ClassVar[tuple[str, ...]] = ("preview", "probabilities", "entropy", "quality")

    def covers(self, wanted: Choices) -> bool:
        """Whether what these choices gave holds all that is wanted; more does no harm."""
        extras = {name: getattr(wanted, name) for name in self._EXTRAS}
        return (
            all(getattr(self, name) or not asked for name, asked in extras.items())
            and set(wanted.dicom) <= set(self.dicom)
            and self.replace(**extras, dicom=wanted.dicom) == wanted
        )


class CasePrediction(Frozen):
    """What became of one case."""

    case: str
    status: Literal["done", "failed"]
    seconds: float
    """From the first byte read to the last one written."""
    output: str | None = None
    """The label map's path in the folder, None where the case failed."""
    volumes_ml: dict[str, float] = Field(default_factory=dict)
    """Volume of each class or region that was asked for."""
    message: str | None = None
    """Why the case failed."""
    code: str | None = None
    """The same for machines."""
    phases_s: dict[str, float] = Field(default_factory=dict)
    """Seconds by phase, see `timings.Timings`; phases overlap, within a case and of different cases."""
    flags: tuple[Flag, ...] = ()
    quality: Quality | None = None
    device: str | None = None
    input: InputStamp | None = None
    files: tuple[FileStamp, ...] = ()
    """Everything that was written for the case, the label map first."""
    choices: Choices | None = None
    bundle_sha256: str | None = None
    """Hash of the manifest of the bundle that predicted it."""
    finished_before: bool = False
    """Whether an earlier run had finished it, so that this one left it alone."""

    def __str__(self) -> str:
        """Return one line for a person."""
        if self.status == "failed":
            return f"{self.case}: failed, {self.message}"
        if self.finished_before:
            return f"{self.case}: finished before, left as it is"
        volumes = ", ".join(f"{name} {volume:.4g} mL" for name, volume in self.volumes_ml.items())
        agreement = "" if self.quality is None or self.quality.agreement is None else self.quality.agreement
        told = f", agreement {agreement:.3f}" if agreement != "" else ""
        looks = "".join(f"\n  look at {self.case}: {flag.message}" for flag in self.flags)
        return f"{self.case}: done in {self.seconds:.1f} s, {volumes}{told}{looks}"


class FolderResult(Frozen):
    """The run report, `prediction.json`."""

    schema_version: Literal[2] = 2
    status: Literal["running", "finished", "ended early"] = "finished"
    started: str
    """Date and time, UTC, ISO 8601."""
    seconds: float
    bundle: str
    """Name of its folder."""
    bundle_sha256: str | None
    """Hash of its manifest, None where the model was not read from a bundle."""
    network: str
    engine: str
    """What computed, with its precision: `openvino fp32`."""
    devices: tuple[str, ...]
    versions: dict[str, str]
    choices: Choices
    notes: tuple[str, ...] = ("For research use. Not a medical device.",)
    cases: tuple[CasePrediction, ...]

    @property
    def failures(self) -> tuple[CasePrediction, ...]:
        """The cases that failed."""
        return tuple(case for case in self.cases if case.status == "failed")

    @property
    def flagged(self) -> tuple[CasePrediction, ...]:
        """The cases that a person should look at."""
        return tuple(case for case in self.cases if case.flags)


class RunLog:
    """Keeps a run's report: a line per case at once, the whole now and then. Use it in a `with` statement.

    Args:
        folder: the output folder.
        head: the report without its cases.
        earlier: cases of earlier runs; they stay in the report until this run says something newer of them.

    Raises:
        ResourceError: the folder can't be written.
    """

    def __init__(self, folder: Path, head: FolderResult, earlier: Iterable[CasePrediction] = ()) -> None:
        self._folder, self._head = folder, head
        self._cases = {case.case: case for case in earlier}
        self._own: dict[str, CasePrediction] = {}
        self._began = time.monotonic()
        self._written_at, self._write_s = self._began, 0.0

    def __enter__(self) -> RunLog:
        """Write the report as it stands at the start, with what the lines of a killed run say."""
        self._write("running")
        (self._folder / JOURNAL).unlink(missing_ok=True)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Write the report and take the lines away; after an error they stay where the report can't be written."""
        try:
            self._write("finished" if kind is None else "ended early")
            (self._folder / JOURNAL).unlink(missing_ok=True)
        except (ResourceError, OSError):
            if kind is None:
                raise

    def add(self, case: CasePrediction) -> None:
        """Note what became of a case."""
        self._own[case.case] = self._cases[case.case] = case
        if not case.finished_before:
            _append(self._folder / JOURNAL, case.model_dump_json() + "\n")
        now = time.monotonic()
        if now - self._written_at > max(_AT_MOST_EVERY_S, self._write_s / _SHARE_OF_TIME):
            self._write("running")

    @property
    def result(self) -> FolderResult:
        """The cases of this run, by id."""
        return self._report("finished", self._own)

    def _write(self, status: str) -> None:
        began = time.monotonic()
        self._report(status, self._cases).write(self._folder / REPORT)
        self._written_at = time.monotonic()
        self._write_s = self._written_at - began

    def _report(self, status: str, cases: Mapping[str, CasePrediction]) -> FolderResult:
        ordered = tuple(cases[name] for name in sorted(cases))
        seconds = round(time.monotonic() - self._began, 3)
        return self._head.replace(status=status, seconds=seconds, cases=ordered)


def known_cases(folder: Path) -> dict[str, CasePrediction]:
    """Return what earlier runs said of each case; nothing where there is no report, or one that can't be used.

    The last line of a journal may be cut off where a run was killed; it is left out.
    """
    found: dict[str, CasePrediction] = {}
    with suppress(PlanError):  # no report, one of another version, or a damaged one: its cases are computed again
        found = {case.case: case for case in FolderResult.read(folder / REPORT).cases}
    try:
        lines = (folder / JOURNAL).read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return found
    for line in lines:
        try:
            case = CasePrediction.from_json(line)
        except PlanError:
            continue
        found[case.case] = case
    return found


def _append(path: Path, line: str) -> None:
    try:
        with path.open("a", encoding="utf-8") as file:
            file.write(line)
    except OSError as error:
        raise cannot_write(path, error, code="disk") from None
