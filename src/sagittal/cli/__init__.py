"""The command line: one file per verb; heavy imports happen inside the verbs, so that `--help` is quick.

Exit codes: 0 done, 1 failed, 2 usage, 75 stopped and resumable (SIGTERM), 143 stopped with nothing to resume
(evaluate, compare, qc), 130 Ctrl-C.
"""

from __future__ import annotations

import io
import json
import logging
import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

from cyclopts import App, CycloptsError

from sagittal import __version__
from sagittal.cli.compare import compare
from sagittal.cli.convert import convert
from sagittal.cli.datasets import datasets
from sagittal.cli.demo import demo
from sagittal.cli.dicom import dicom
from sagittal.cli.doctor import doctor
from sagittal.cli.evaluate import evaluate
from sagittal.cli.export import export
from sagittal.cli.import_nnunet import import_nnunet
from sagittal.cli.import_weights import import_weights
from sagittal.cli.info import info
from sagittal.cli.missing import lacking_package
from sagittal.cli.models import models
from sagittal.cli.networks import networks
from sagittal.cli.offline import offline
from sagittal.cli.package import package
from sagittal.cli.plan import plan
from sagittal.cli.predict import predict
from sagittal.cli.qc import qc
from sagittal.cli.quantize import quantize
from sagittal.cli.serve import serve
from sagittal.cli.sweep import sweep
from sagittal.cli.train import train
from sagittal.cli.view import view
from sagittal.errors import ResourceError, SagittalError

USAGE_CODES = frozenset(
    {
        "bad_device",
        "bad_duration",
        "bad_input",
        "bad_setting",
        "engine",
        "options",
        "precision",
        "python",
        "step",
        "unknown_channel",
        "unknown_class",
        "unknown_extra",
        "unknown_field",
        "unknown_network",
        "unknown_preset",
        "unknown_tracker",
        "usage",
    }
)
"""Codes of errors that are about what was typed, not about the data or the machine."""
DONE, FAILED, USAGE, RESUMABLE, INTERRUPTED = 0, 1, 2, 75, 130

app = App(
    name="sagittal",
    help="Labelled 3D medical scans in, a deployable segmentation model out: MedNeXt and SegFormer3D.",
    help_epilogue="--debug, with any command, shows the traceback of an error.",
    version=__version__,
    suppress_keyboard_interrupt=False,
    result_action="return_value",
)
for verb in (
    doctor,
    plan,
    train,
    sweep,
    predict,
    serve,
    view,
    evaluate,
    compare,
    qc,
    import_weights,
    import_nnunet,
    convert,
    dicom,
    info,
    networks,
    datasets,
    demo,
    export,
    package,
    models,
    offline,
    quantize,
):
    app.command(verb)


def main(arguments: list[str] | None = None) -> None:
    """Run the command line and exit with its code."""
    # Before torch is loaded: threads that wait for each other sleep. Spinning, they steal the core that the others need
    # as soon as the machine has other work, and a training step takes 5 to 17 times as long (docs/lab-log.md).
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    for stream in (sys.stdout, sys.stderr):
        # A terminal that lacks a letter of a path shows a question mark; that is no reason to fail.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    try:
        code = run(sys.argv[1:] if arguments is None else arguments)
        sys.stdout.flush()
    except BrokenPipeError:
        # The reader, for example `head`, has enough. Python flushes once more at exit, which must not fail again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = FAILED
    sys.exit(code)


def run(arguments: list[str]) -> int:
    """Run one command and return its exit code; errors are told on stderr (with --json as JSON on stdout)."""
    debug = "--debug" in arguments
    arguments = [argument for argument in arguments if argument != "--debug"]
    try:
        with _logged(debug):
            code = app(arguments, exit_on_error=False, print_error=True)
    except CycloptsError:
        return USAGE
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    except SagittalError as error:
        return _told(error, arguments, debug)
    except ImportError as error:
        lacking = lacking_package(error, arguments[0] if arguments else "")
        if lacking is None:
            raise
        return _told(lacking, arguments, debug)
    return code if isinstance(code, int) else DONE


@contextmanager
def _logged(debug: bool) -> Iterator[None]:
    """With --debug, show what was written down of errors that only one case failed with: where they were raised."""
    if not debug:
        yield
        return
    log, handler = logging.getLogger("sagittal"), logging.StreamHandler(sys.stderr)
    level = log.level
    log.addHandler(handler)
    log.setLevel(logging.DEBUG)
    try:
        yield
    finally:
        log.setLevel(level)
        log.removeHandler(handler)


def _told(error: SagittalError, arguments: list[str], debug: bool) -> int:
    if debug:
        traceback.print_exc()
    if "--json" in arguments:
        print(json.dumps(error.as_dict()))
    else:
        print(f"error: {error.message}", file=sys.stderr)
    # The same code stands for an engine that was misspelt and for one that is not installed.
    is_usage = error.code in USAGE_CODES and not isinstance(error, ResourceError)
    return USAGE if is_usage else FAILED
