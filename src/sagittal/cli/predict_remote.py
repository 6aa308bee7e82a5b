"""`sagittal predict http://HOST:PORT scan.nii.gz`: a service computes, this machine sends and saves."""

from __future__ import annotations

import json as json_module
import os
import sys
import time
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cyclopts import Parameter

from sagittal.cli.progress import EVERY_S

if TYPE_CHECKING:
    from sagittal.cli.predict_options import HowToPredict, Writing
    from sagittal.client import Client
    from sagittal.data.dataset import Case
    from sagittal.inference.run_report import CasePrediction

KEY_VARIABLE = "SAGITTAL_API_KEY"
ENDING = ".nii.gz"
_AHEAD = 3
"""Scans that wait at the service beside the one that is computed, so that it is never idle."""
_GONE = frozenset({"connection", "certificate"})
"""Codes of errors after which the service is not to be talked to."""
_HASTE_S = 5.0
"""For the service to hear that what it was sent is not wanted any more."""


@Parameter(name="*")
@dataclass(frozen=True)
class Service:
    """Where a service is asked, `sagittal predict http://HOST:PORT[/BASE] scan.nii.gz --out labels`.

    Attributes:
        model: name of the service's model; needed where it has several
        key_file: file with the API key; else the variable SAGITTAL_API_KEY
    """

    model: str | None = None
    key_file: Path | None = None

    def require_unasked(self, bundle: str) -> None:
        """Refuse these options where a bundle on this machine predicts."""
        from sagittal.errors import PlanError

        for name, value in (("--model", self.model), ("--key-file", self.key_file)):
            if value is not None:
                raise PlanError(f"{name} is for services, and {bundle} is none. Leave it out.", code="options")

    def require_defaults(self, computing: Mapping[str, str], memory_gib: float | None) -> None:
        """Refuse options that say how this machine computes, where a service does."""
        from sagittal.errors import PlanError

        given = {**computing, "--memory-gib": "auto" if memory_gib is None else f"{memory_gib:g}"}
        for name, value in given.items():
            if value not in ("auto", "fp32"):
                raise PlanError(f"{name} {value}: the service was told when it started. Leave it out.", code="options")

    def key(self) -> str | None:
        """Return the API key, None where there is none.

        Raises:
            DataError: the file can't be read or is empty.
        """
        from sagittal.errors import DataError

        if self.key_file is None:
            return os.environ.get(KEY_VARIABLE) or None
        try:
            lines = self.key_file.read_text(encoding="utf-8").split()
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"{self.key_file}: can't be read ({error}). Expected a file with the API key.") from None
        if len(lines) != 1:
            raise DataError(f"{self.key_file}: holds {len(lines)} words. Expected one, the API key.")
        return lines[0]


def is_service(name: str) -> bool:
    """Whether what should be a bundle is the address of a service."""
    return name.lower().startswith(("http://", "https://"))


def predict_remote(
    url: str,
    inputs: Sequence[Path],
    out: Path,
    service: Service,
    how: HowToPredict,
    write: Writing,
    *,
    overwrite: bool,
    json: bool,
) -> int:
    """Have a service predict scans, save its label maps and return the exit code.

    Raises:
        SagittalError: an option that a service does not have, no such model, no service, nothing to predict.
    """
    from sagittal.client import Client
    from sagittal.errors import DataError
    from sagittal.inference.inputs import find_cases
    from sagittal.inference.outputs import paths_of, protect

    _refuse_local_options(how, write)
    options, kinds = _options(how, write)
    client = Client(url, service.key())
    model = _model(client.models(), service.model)
    found = find_cases(how.inputs(inputs), model["channels"], out=out)
    protect(found.good, out, ENDING)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"{out}: can't be made ({error.strerror}). Choose another folder for the outputs.") from None
    results = [_failed(bad.id, bad.error.message, bad.error.code, 0.0) for bad in found.bad]
    for result in results:
        _tell(result, json)
    wanted: list[Case] = []
    for case in found.good:
        if paths_of(out, case.id, ENDING).labels.exists() and not overwrite:
            print(f"{case.id}: finished before, left as it is", file=sys.stderr)
        else:
            wanted.append(case)
    hasty = Client(url, service.key(), timeout_s=_HASTE_S, patience_s=_HASTE_S)
    asked = _Asked(client, hasty, str(model["name"]), options, kinds, write.preview, out)
    results += asked.all(wanted, lambda result: _tell(result, json))
    failures = [result for result in results if result.status == "failed"]
    if json:
        counts = {"cases": len(results), "failed": len(failures), "skipped": len(found.good) - len(wanted)}
        print(json_module.dumps({"summary": counts}))
    if failures:
        print(f"error: {len(failures)} of {len(results)} cases failed:", file=sys.stderr)
        for failure in failures:
            print(f"  {failure}", file=sys.stderr)
    return 1 if failures else 0


def _tell(result: CasePrediction, json: bool) -> None:
    print(result.model_dump_json() if json else result, flush=True)


@dataclass(frozen=True)
class _Asked:
    """What each scan is asked for, and where its results go."""

    client: Client
    hasty: Client
    """Cancels."""
    model: str
    options: Mapping[str, Any]
    kinds: Sequence[str]
    preview: bool
    out: Path

    def all(self, cases: Sequence[Case], tell: Any) -> list[CasePrediction]:
        """Predict the cases, a few of them sent ahead; what is at the service is cancelled if this ends early.

        Where the service is lost nothing is: each of the jobs would be waited for once more.
        """
        from sagittal.errors import SagittalError

        results: list[CasePrediction] = []
        waiting = deque(cases)
        at_service: deque[tuple[Case, str, float]] = deque()
        try:
            while waiting or at_service:
                while waiting and len(at_service) <= _AHEAD:
                    case, began = waiting.popleft(), time.monotonic()
                    try:
                        at_service.append((case, self._sent(case), began))
                    except SagittalError as error:
                        if error.code in _GONE or error.code == "api_key":
                            raise
                        results.append(_failed(case.id, error.message, error.code, time.monotonic() - began))
                        tell(results[-1])
                if at_service:
                    results.append(self._saved(*at_service[0]))
                    at_service.popleft()
                    tell(results[-1])
        except BaseException as error:
            if not (isinstance(error, SagittalError) and error.code in _GONE):
                with suppress(SagittalError):
                    for _, job, _ in at_service:
                        self.hasty.cancel(job)
            raise
        return results

    def _sent(self, case: Case) -> str:
        from sagittal.volumes.dicom_files import split_series

        split = [split_series(image) for image in case.images]
        named = [uid for _, uid in split if uid is not None]
        studies = list(dict.fromkeys(path for path, _ in split))
        images = studies if named else [path for path, _ in split]
        options = {**self.options, **({"series_uid": ",".join(named)} if named else {})}
        return self.client.submit(*images, model=self.model, **options)

    def _saved(self, case: Case, job: str, began: float) -> CasePrediction:
        from sagittal.errors import SagittalError
        from sagittal.inference.outputs import paths_of
        from sagittal.inference.run_report import CasePrediction, Flag

        try:
            done = self.client.wait(job, on_progress=_Lines(case.id))
            paths = paths_of(self.out, case.id, ENDING)
            wanted = {"png": paths.preview} if self.preview else {}
            wanted |= {kind: paths.dicom[kind] for kind in self.kinds}
            for result in done["results"]:
                target = wanted.get(result["format"])
                if target is not None:
                    target.parent.mkdir(parents=True, exist_ok=True)
                    self.client.download(job, result["name"], target)
            paths.labels.parent.mkdir(parents=True, exist_ok=True)
            # Last: where it is there, the case is finished.
            self.client.download(job, "labels.nii.gz", paths.labels)
        except SagittalError as error:
            if error.code in _GONE or error.code == "api_key":
                raise
            return _failed(case.id, error.message, error.code, time.monotonic() - began)
        return CasePrediction(
            case=case.id,
            status="done",
            seconds=time.monotonic() - began,
            output=paths.labels.relative_to(self.out).as_posix(),
            volumes_ml=done["volumes_ml"],
            flags=tuple(Flag(code="service", message=str(flag)) for flag in done["flags"]),
        )


class _Lines:
    """Says now and then how far a job is."""

    def __init__(self, case: str) -> None:
        self._case, self._said_at = case, time.monotonic()

    def __call__(self, job: Mapping[str, Any]) -> None:
        if time.monotonic() - self._said_at < EVERY_S:
            return
        self._said_at = time.monotonic()
        place = job.get("queue_position")
        where = f"place {place} in the queue" if place else f"{job.get('stage')}, {job.get('progress', 0):.0%}"
        print(f"{self._case}: {where}", file=sys.stderr, flush=True)


def _failed(case: str, message: str, code: str, seconds: float) -> CasePrediction:
    from sagittal.inference.run_report import CasePrediction

    return CasePrediction(case=case, status="failed", seconds=seconds, message=message, code=code)


def _refuse_local_options(how: HowToPredict, write: Writing) -> None:
    from sagittal.errors import PlanError

    given = {
        "--missing": how.missing is not None,
        "--with": bool(how.others),
        "--kernels": how.kernels != "auto",
        "--probabilities": write.probabilities,
        "--entropy": write.entropy,
        "--quality": write.quality,
    }
    for name, is_given in given.items():
        if is_given:
            raise PlanError(
                f"{name}: a service does not offer it. Leave it out, or predict with the bundle on this machine.",
                code="options",
            )


def _options(how: HowToPredict, write: Writing) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Return the options of the job, and the kinds of DICOM objects that were asked for."""
    from sagittal.inference.dicom_outputs import parse_kinds

    kinds = parse_kinds(write.dicom)
    subset = [part.strip() for part in (write.subset or "").split(",") if part.strip()]
    options: dict[str, Any] = {"mirror": how.mirror, "fast": how.fast, "postprocessing": how.postprocessing}
    options |= {"formats": list(kinds)}
    if how.step is not None:
        options["step"] = how.step
    if subset:
        options["subset"] = subset
    return options, kinds


def _model(models: Sequence[Mapping[str, Any]], name: str | None) -> Mapping[str, Any]:
    from sagittal.errors import PlanError, did_you_mean

    if name is None and len(models) == 1:
        return models[0]
    for model in models:
        if model["name"] == name:
            return model
    names = [str(model["name"]) for model in models]
    if name is None:
        raise PlanError(
            f"the service has {len(names)} models: {', '.join(names)}. Choose with --model.", code="options"
        )
    raise PlanError(f"--model {name}: the service has none of this name.{did_you_mean(name, names)}", code="options")
