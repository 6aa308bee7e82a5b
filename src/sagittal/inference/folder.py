"""Predict thousands of cases with one command: what is finished is left alone, and a bad case does not stop the others.

A case counts as finished where prediction.json says so, its files are as they were written, its scan is the one that
was read, and bundle and choices are the same. So the same command, given again, goes on after anything that ended it.
"""

from __future__ import annotations

import platform
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from sagittal.bundle import Bundle
from sagittal.data.dataset import Case
from sagittal.errors import PlanError, ResourceError
from sagittal.inference.inputs import FoundCases, Inputs, find_cases
from sagittal.inference.missing import channels_given
from sagittal.inference.outputs import (
    DECLARATION,
    declaration,
    is_as_written,
    is_same_input,
    protect,
    tidy,
)
from sagittal.inference.pipeline import CasePipeline, CasePredictor, Job
from sagittal.inference.run_report import CasePrediction, Choices, FolderResult, RunLog, known_cases
from sagittal.inference.subset import chosen_spec
from sagittal.inference.uncertainty import threshold_of
from sagittal.plan.base import write_atomically
from sagittal.plan.plan import Plan

Tell = Callable[[CasePrediction], None]
Compute = Callable[[Sequence[Case], Tell], None]
_PACKAGES = ("sagittal", "numpy", "torch", "openvino")


@dataclass(frozen=True)
class Model:
    """What a folder run says of its model: all but the networks themselves.

    Attributes:
        plan: what it was trained with.
        name: of its bundle.
        sha256: hash of the bundle's manifest; without one no case counts as finished.
        engine: what computes, with its precision: `openvino fp32`.
        devices: where.
        threshold: agreement below which a case is flagged, and where it comes from.
    """

    plan: Plan
    name: str
    sha256: str | None
    engine: str
    devices: tuple[str, ...]
    threshold: tuple[float, str]


def model_of(
    bundle: Bundle | None, plan: Plan, engine: str, devices: Sequence[str], others: Sequence[Bundle] = ()
) -> Model:
    """Return what a run's report says of the model of `bundle`, None where it comes from none.

    `others` are the bundles that it is averaged with; `Choices.averaged_with` has their hashes.
    """
    bundles = [*(() if bundle is None else (bundle,)), *others]
    return Model(
        plan=plan,
        name=" + ".join(each.path.resolve().name for each in bundles),
        sha256=None if bundle is None else bundle.manifest.manifest_sha256,
        engine=engine,
        devices=tuple(devices),
        threshold=threshold_of({} if bundle is None else bundle.metrics),
    )


def predict_folder(
    predictor: CasePredictor,
    inputs: Inputs,
    out: str | Path,
    *,
    choices: Choices | None = None,
    memory_gib: float | None = None,
    overwrite: bool = False,
    model: Model | None = None,
    on_case: Tell | None = None,
) -> FolderResult:
    """Write a label map for every case to OUT/CASE.nii.gz, and beside them `dataset.json` and `prediction.json`.

    Args:
        predictor: the model.
        inputs: scans, folders of them or lists; see `inference.inputs.find_cases`.
        out: folder for the outputs; it is made.
        choices: what is written and how it is computed; by default label maps, mirrored as the plan says.
        memory_gib: see `Predictor.predict`; scans that wait and results that are being written count too.
        overwrite: whether finished cases are computed again.
        model: what the report says of the model; without it no case counts as finished.
        on_case: called after each case, one call at a time.

    Returns:
        What became of each case, failed ones included; the same is in `prediction.json`.

    Raises:
        DataError: the inputs make no case, or an output would overwrite something that is no prediction.
        PlanError: `memory_gib` is not a positive number, or the subset names a class that the model does not have.
        ResourceError: the folder can't be written or the disk is full; what was finished stays.
    """
    wanted = choices or Choices()
    known = model or model_of(None, predictor.plan, "", ())
    device = known.devices[0] if known.devices else None
    job = Job(Path(out), wanted, known.sha256, device, memory_gib, known.threshold)

    def compute(cases: Sequence[Case], tell: Tell) -> None:
        CasePipeline(predictor, job, tell).run(cases)

    return run_folder(known, job, inputs, compute, overwrite=overwrite, on_case=on_case)


def run_folder(
    model: Model,
    job: Job,
    inputs: Inputs,
    compute: Compute,
    *,
    overwrite: bool = False,
    on_case: Tell | None = None,
) -> FolderResult:
    """Find the cases, leave the finished ones alone, have the others computed, and keep the report.

    Args:
        model, job: what predicts, and what is made of each case.
        inputs: see `inference.inputs.find_cases`.
        compute: predicts cases and tells what became of each, in any order and from any thread.
        overwrite, on_case: as for `predict_folder`, which tells the errors too.
    """
    folder, spec = job.folder, model.plan.dataset
    if job.memory_gib is not None and not 0 < job.memory_gib < float("inf"):
        raise PlanError(f"--memory-gib {job.memory_gib:g}: expected a number above 0, for example 8.", code="options")
    chosen = chosen_spec(spec, job.choices.subset)
    numbers = channels_given(model.plan, job.choices.missing)
    names = [spec.channel_names[number] for number in numbers]
    found = find_cases(inputs, names, out=folder, numbers=numbers)
    protect(found.good, folder, spec.file_ending)
    earlier = {} if overwrite else _still_true(known_cases(folder), folder)
    finished = {case.id for case in found.good if _is_finished(earlier.get(case.id), case, job)}
    with RunLog(folder, _head(model, job), earlier.values()) as log:
        write_atomically(folder / DECLARATION, declaration(chosen))
        tidy(found.good, folder, spec.file_ending)
        lock = threading.Lock()

        def tell(case: CasePrediction) -> None:
            with lock:
                log.add(case)
                if on_case is not None:
                    on_case(case)

        _tell_known(found, earlier, finished, tell)
        try:
            compute([case for case in found.good if case.id not in finished], tell)
        except ResourceError as error:
            done = sum(case.status == "done" for case in log.result.cases)
            total = len(found.good) + len(found.bad)
            raise ResourceError(
                f"{error.message} {done} of {total} cases are finished; the same command goes on with the rest.",
                code=error.code,
            ) from None
    return log.result


def _tell_known(found: FoundCases, earlier: dict[str, CasePrediction], finished: set[str], tell: Tell) -> None:
    for case in sorted(finished):
        tell(earlier[case].replace(finished_before=True))
    for bad in found.bad:
        message, code = bad.error.message, bad.error.code
        tell(CasePrediction(case=bad.id, status="failed", seconds=0.0, message=message, code=code))


def _still_true(known: dict[str, CasePrediction], folder: Path) -> dict[str, CasePrediction]:
    """Return the cases that were done and whose label map is still there."""
    return {
        name: case.replace(finished_before=False)
        for name, case in known.items()
        if case.status == "done" and case.output is not None and (folder / case.output).is_file()
    }


def _is_finished(known: CasePrediction | None, case: Case, job: Job) -> bool:
    if known is None or known.input is None or known.choices is None or job.bundle_sha256 is None:
        return False
    if known.bundle_sha256 != job.bundle_sha256 or not known.choices.covers(job.choices):
        return False
    return all(is_as_written(job.folder, stamp) for stamp in known.files) and is_same_input(case, known.input)


def _head(model: Model, job: Job) -> FolderResult:
    return FolderResult(
        started=datetime.now(UTC).isoformat(timespec="seconds"),
        seconds=0.0,
        bundle=model.name,
        bundle_sha256=model.sha256,
        network=model.plan.network_name,
        engine=model.engine,
        devices=model.devices,
        versions={"python": platform.python_version(), **_versions()},
        choices=job.choices,
        cases=(),
    )


def _versions() -> dict[str, str]:
    found = {}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:  # an engine that is not installed, or a source tree that never was
            continue
    return found
