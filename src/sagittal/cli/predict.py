"""`sagittal predict`: scans become label maps."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from cyclopts import Parameter

from sagittal.cli.options import kernels_file, networks_folder, parse_devices, threads_given
from sagittal.cli.predict_cluster import OnCluster
from sagittal.cli.predict_options import HowToPredict, Precision, Writing
from sagittal.cli.predict_remote import Service, is_service, predict_remote
from sagittal.cli.progress import ProgressLines
from sagittal.cli.stopping import STOPPED, command_to_tell, sigterm_raises

if TYPE_CHECKING:
    from sagittal.bundle import Bundle
    from sagittal.data.dataset import Case
    from sagittal.inference.engines.engine import KernelMode
    from sagittal.inference.folder import Tell
    from sagittal.inference.pipeline import Job
    from sagittal.inference.processes import Loading
    from sagittal.inference.run_report import CasePrediction, Choices, FolderResult

RESEARCH_USE = "for research use; not a medical device"


def predict(
    bundle: str,
    input: Annotated[
        list[Path],
        Parameter(
            help="a scan (file, or folder or zip of a DICOM series), its channels in order, a folder of scans at any "
            "depth, or a list (.csv, .tsv, .txt) with a case per line"
        ),
    ],
    /,
    *,
    out: Path,
    device: str = "auto",
    engine: Literal["auto", "torch", "openvino"] = "auto",
    precision: Precision = "fp32",
    memory_gib: float | None = None,
    overwrite: Annotated[bool, Parameter(negative="")] = False,
    json: Annotated[bool, Parameter(negative="")] = False,
    how: HowToPredict = HowToPredict(),  # noqa: B008 - frozen
    write: Writing = Writing(),  # noqa: B008 - frozen
    service: Service = Service(),  # noqa: B008 - frozen
    cluster: OnCluster = OnCluster(),  # noqa: B008 - frozen
) -> int:
    """Segment scans; each label map has the grid of its scan and is written whole or not at all.

    Finished cases are left alone when the same command is given again.

    Args:
        bundle: folder that `sagittal train` or an import wrote, or a package of it; or http://HOST:PORT, where
            `sagittal serve` runs
        out: folder for the label maps
        device: auto, cpu, cuda, cuda:1 or mps; several with commas share the cases, or one scan
        engine: what computes; auto takes OpenVINO on a CPU where it is installed and knows the network
        precision: of the products; bf16 (a GPU or OpenVINO), fp16 (a GPU) and int8 (OpenVINO) cost accuracy
        memory_gib: memory to stay within, of each worker with --on; refused before it starts where that can't be done
        overwrite: compute finished cases again
        json: print an object per case and line, and one at the end
        how: see HowToPredict
        write: see Writing
        service: see Service
        cluster: see OnCluster
    """
    if is_service(bundle):
        cluster.require_unasked(bundle)
        service.require_defaults({"--device": device, "--engine": engine, "--precision": precision}, memory_gib)
        print(RESEARCH_USE, file=sys.stderr)
        with _stoppable():
            return predict_remote(bundle, input, out, service, how, write, overwrite=overwrite, json=json)
    service.require_unasked(bundle)
    asked = parse_devices(device)
    place = cluster.place(asked)
    from sagittal.bundle import read_bundle
    from sagittal.inference.dicom_outputs import require_writable_kinds
    from sagittal.inference.engines.choice import kernels_switched, require_sensible, torch_hint
    from sagittal.inference.ensemble import engines_named, require_distinct
    from sagittal.inference.fast import fast_settings_of
    from sagittal.inference.folder import model_of, run_folder
    from sagittal.inference.pipeline import Job
    from sagittal.inference.subset import chosen_spec

    require_sensible(engine, precision, asked if place is None else ())
    print(RESEARCH_USE, file=sys.stderr)
    paths = (Path(bundle), *how.others)
    bundles = [read_bundle(path) for path in paths]
    require_distinct([(str(path), each) for path, each in zip(paths, bundles, strict=True)])
    fast = fast_settings_of(bundles) if how.fast else ()
    read, *others = [each.bundle for each in fast] or bundles
    choices = write.choices(how, precision, _say_aside, fast)
    averaged_with = sorted(other.manifest.manifest_sha256 for other in others)
    choices = choices.replace(averaged_with=tuple(averaged_with))
    chosen = chosen_spec(read.plan.dataset, choices.subset)
    require_writable_kinds(choices.dicom, chosen)
    subset = tuple(label.name for label in chosen.labels)
    choices = choices.replace(subset=subset if choices.subset else ())
    _require_comparable(choices, [read, *others])
    with _stoppable(), cluster.joined(place, asked, out, _say_aside) as (devices, where):
        computes = engines_named([read, *others], devices, engine, precision)
        if (hint := torch_hint([read, *others], engine, precision, computes)) is not None:
            _say_aside(hint)
        kernels = _switch(how.kernels, computes)
        model = model_of(read, read.plan, computes, devices, others)
        job = Job(out, choices, model.sha256, ",".join(devices), memory_gib, model.threshold)

        def compute(cases: Sequence[Case], tell: Tell) -> None:
            lines = ProgressLines(len(cases), _say_aside)

            def told(case: CasePrediction) -> None:
                lines.case()
                tell(case)

            if where is not None:
                cluster.predict(where, devices[0], _loading(paths, engine, kernels), job, cases, tell)
            elif len(devices) > 1 and len(cases) > 1:
                _on_several(devices, [read, *others], engine, job, cases, told, lines, kernels)
            elif cases:
                # Where there is one case, several devices share its windows.
                _on_one(",".join(devices), [read, *others], engine, job, cases, told, lines)

        with kernels_switched(kernels if where is None else None, kernels_file()):
            result = run_folder(model, job, how.inputs(input), compute, overwrite=overwrite, on_case=_teller(json))
    return _told(result, out, json)


def _loading(paths: Sequence[Path], engine: str, kernels: KernelMode | None) -> Loading:
    """Return how nodes load the model: with no caches, whose folders are this machine's."""
    from sagittal.inference.processes import Loading

    return Loading(paths[0], engine, others=tuple(paths[1:]), kernels=kernels)


def _switch(asked: KernelMode, computes: str) -> KernelMode | None:
    """Return the position of the kernels' switch, None where PyTorch computes nothing."""
    from sagittal.errors import PlanError

    if "torch" in computes:
        return asked
    if asked != "auto":
        raise PlanError(
            f"--kernels {asked}: these kernels are PyTorch's, and {computes} computes. Leave it out, or ask for "
            "--engine torch.",
            code="usage",
        )
    return None


def _require_comparable(choices: Choices, bundles: Sequence[Bundle]) -> None:
    from sagittal.errors import PlanError

    first, *others = bundles
    is_mirrored = choices.mirror and first.plan.inference.mirror_axes
    if choices.quality and not (is_mirrored or others or len(first.weight_names) > 1):
        raise PlanError(
            "--quality compares mirrored copies or folds: this model has one fold, and nothing is mirrored (the model "
            "is not, or --no-mirror or --fast was given). Leave out --quality, or what keeps from mirroring.",
            code="options",
        )


def _on_one(
    device: str,
    bundles: Sequence[Bundle],
    engine: str,
    job: Job,
    cases: Sequence[Case],
    tell: Tell,
    lines: ProgressLines,
) -> None:
    from dataclasses import replace

    from sagittal.inference.ensemble import computed_by, engines_of, predictor_of
    from sagittal.inference.pipeline import CasePipeline

    folder, threads = networks_folder(), threads_given()
    predictor = predictor_of(
        bundles, job.choices, device, engine, cache_folder=folder, scratch=job.folder, threads=threads
    )
    for name, precision, where in engines_of(predictor):
        _say_aside(f"{name} {precision} on {where}")
    CasePipeline(predictor, replace(job, device=computed_by(predictor)), tell, lines.window).run(cases)


def _on_several(
    devices: Sequence[str],
    bundles: Sequence[Bundle],
    engine: str,
    job: Job,
    cases: Sequence[Case],
    tell: Tell,
    lines: ProgressLines,
    kernels: KernelMode | None,
) -> None:
    from sagittal.inference.processes import Loading, places_on, predict_on

    first, *others = (bundle.path for bundle in bundles)
    loading = Loading(first, engine, networks_folder(), tuple(others), kernels, kernels_file())
    predict_on(places_on(devices, threads_given()), loading, job, cases, tell, lines.window)


def _teller(json: bool) -> Callable[[CasePrediction], None]:
    if json:
        return lambda case: print(case.model_dump_json(), flush=True)
    return lambda case: print(case, flush=True)


def _told(result: FolderResult, out: Path, json: bool) -> int:
    """Say how a run ended and return the exit code."""
    failures, flagged = result.failures, result.flagged
    if json:
        import json as json_module

        counts = {"cases": len(result.cases), "failed": len(failures), "flagged": len(flagged)}
        print(json_module.dumps({"summary": {**counts, "report": str(out / "prediction.json")}}))
    if flagged and len(result.cases) > 1:
        names = ", ".join(case.case for case in flagged[:20]) + (", ..." if len(flagged) > 20 else "")
        print(f"look at {len(flagged)} of {len(result.cases)} cases: {names}", file=sys.stderr)
    if failures:
        print(f"error: {len(failures)} of {len(result.cases)} cases failed:", file=sys.stderr)
        for failure in failures:
            print(f"  {failure}", file=sys.stderr)
    return 1 if failures else 0


def _say_aside(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


@contextmanager
def _stoppable() -> Iterator[None]:
    """Let SIGTERM unwind the run, as Ctrl-C does, and say how to go on."""
    try:
        with sigterm_raises(lambda: SystemExit(STOPPED)):
            yield
    except (KeyboardInterrupt, SystemExit):
        _say_aside(f"stopped; finished cases are kept; go on with: {command_to_tell()}")
        raise
