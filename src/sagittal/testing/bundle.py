"""Make an untrained bundle, to measure speed and memory with and to test software that takes bundles.

python -m sagittal.testing.bundle --network mednext-s --classes 3 --out BUNDLE
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from sagittal.bundle import write_bundle
from sagittal.errors import PlanError, SagittalError
from sagittal.networks.build import build_network
from sagittal.plan import Plan
from sagittal.plan.overrides import parse_settings
from sagittal.testing.plans import untrained_plan, untrained_spec


def write_untrained_bundle(
    out: str | os.PathLike[str],
    network_name: str,
    num_outputs: int,
    *,
    channels: int = 1,
    settings: Mapping[str, Any] | None = None,
) -> Path:
    """Write a bundle with random weights, the same each time: 1 mm, a window of 128 voxels, and return its folder.

    Args:
        out: the folder.
        network_name: a name of `sagittal networks`.
        num_outputs: network outputs, the background included.
        channels: channels of the image.
        settings: fields of the plan to change by dotted name, for example `{"patch.size": [64, 64, 64]}`.

    Raises:
        PlanError: an unknown network or field, or a number that makes no sense.
        BundleError: the folder holds something else than a bundle.
        ResourceError: the folder can't be written.
    """
    if num_outputs < 2 or channels < 1:
        raise PlanError(
            f"{num_outputs} classes and {channels} channels. Expected at least 2 classes (one is the background) and 1 "
            "channel."
        )
    plan = untrained_plan(network_name, untrained_spec(num_outputs, channels), settings=settings)
    return write_random_bundle(out, plan)


def write_random_bundle(out: str | os.PathLike[str], plan: Plan, *, folds: Sequence[str] = ("all",)) -> Path:
    """Write a bundle for `plan` with random weights, the same each time, under each name of `folds`."""
    weights = {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for fold in folds:
            network = build_network(plan.network, len(plan.dataset.channel_names), plan.dataset.num_outputs)
            weights[fold] = {name: tensor.numpy() for name, tensor in network.state_dict().items()}
    metrics = {"validation": "never trained; its outputs mean nothing", "training_cases": 0}
    return write_bundle(out, plan=plan, weights=weights, metrics=metrics)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m sagittal.testing.bundle", description=(__doc__ or "").split(",")[0]
    )
    parser.add_argument("--network", required=True, help="a name that 'sagittal networks' lists")
    parser.add_argument("--classes", required=True, type=int, help="network outputs, the background included")
    parser.add_argument("--out", required=True, type=Path, help="folder of the bundle")
    parser.add_argument("--channels", default=1, type=int, help="channels of the image (default: 1)")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="FIELD=VALUE",
        help="change the plan, for example network.kernel_size=5 or patch.size=64,64,64; may be repeated",
    )
    given = parser.parse_args(arguments)
    try:
        settings = parse_settings(given.set)
        path = write_untrained_bundle(
            given.out, given.network, given.classes, channels=given.channels, settings=settings
        )
    except SagittalError as error:
        sys.stderr.write(f"{error.message}\n")
        return 1
    sys.stdout.write(f"{path}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
