"""Types of options that several verbs share, and how their texts are read."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter, validators

from sagittal.errors import PlanError, did_you_mean

Settings = Annotated[
    list[str] | None,
    Parameter(
        name="--set",
        negative="",
        help="A value of the plan, FIELD=VALUE, for example patch.size=96,96,96; may be repeated.",
    ),
]

Workers = Annotated[int | None, Parameter(validator=validators.Number(gte=1))]
"""How many files are worked on at a time."""

_NUMBER = r"\d+(?:\.\d+)?"
_DURATION = re.compile(
    rf"(?P<plain>{_NUMBER})|(?:(?P<h>{_NUMBER})h)?(?:(?P<m>{_NUMBER})m(?:in)?)?(?:(?P<s>{_NUMBER})s)?"
)
_DEVICE = re.compile(r"auto|mps|(cpu|cuda)(:\d+)?")


def known_folder() -> Path:
    """Return where measurements of data sets are kept: SAGITTAL_CACHE, else sagittal in the user's cache folder."""
    given = os.environ.get("SAGITTAL_CACHE") or os.environ.get("XDG_CACHE_HOME")
    return (Path(given) if given else Path.home() / ".cache") / "sagittal" / "known"


def networks_folder() -> Path:
    """Return where networks that were compiled for this machine are kept, beside `known_folder`."""
    return known_folder().with_name("networks")


def kernels_file() -> Path:
    """Return where it is kept which GPU kernels are faster than plain PyTorch on this machine."""
    return known_folder().with_name("kernels.json")


def threads_given() -> int | None:
    """Return the number in OMP_NUM_THREADS, which clusters set; None where it says none: one per core."""
    given = os.environ.get("OMP_NUM_THREADS", "")
    return int(given) if given.isdigit() and int(given) > 0 else None


def parse_devices(text: str, option: str = "--device") -> tuple[str, ...]:
    """Return the devices in `cuda:0,cuda:1`; whether this machine has them is not asked.

    Raises:
        PlanError: a name that is no device's.
    """
    names = tuple(part.strip().lower() for part in text.split(",") if part.strip())
    for name in names or (text,):
        if not _DEVICE.fullmatch(name):
            hint = did_you_mean(name.partition(":")[0], ("auto", "cpu", "cuda", "mps"))
            raise PlanError(
                f"{option} {text}: '{name}' is not a device.{hint} A second GPU is 'cuda:1'.", code="bad_device"
            )
    return names


def require_known_names(network: str | None, preset: str | None) -> None:
    """Tell of a misspelt network or preset before a data set is looked at.

    Raises:
        PlanError: no network or preset has this name.
    """
    if network is not None:
        from sagittal.plan.networks import network_config

        network_config(network)
    if preset is not None:
        from sagittal.planning.presets import preset_named

        preset_named(preset)


def parse_duration_s(text: str, option: str = "--budget") -> float:
    """Return the seconds that `90s`, `15m`, `1h30m` or `900` mean.

    Raises:
        PlanError: another form, or no time at all.
    """
    match = _DURATION.fullmatch(text.strip().lower())
    parts = match.groupdict() if match else {}
    units = {"plain": 1.0, "h": 3600.0, "m": 60.0, "s": 1.0}
    total = sum(unit * float(parts.get(name) or 0) for name, unit in units.items())
    if total <= 0:
        raise PlanError(f"{option} {text}: not a time. Write for example 90s, 15m or 1h30m.", code="bad_duration")
    return total


def parse_input_shape(text: str) -> tuple[int, ...]:
    """Return the sizes in `1x128x128x128` (channels, D, H, W).

    Raises:
        PlanError: not four positive integers.
    """
    parts = text.lower().split("x")
    if len(parts) != 4 or not all(part.isdigit() and int(part) > 0 for part in parts):
        raise PlanError(f"--input {text}: expected channels and D, H, W, for example 1x128x128x128.", code="bad_input")
    return tuple(int(part) for part in parts)


def parse_settings_option(texts: list[str] | None) -> dict[str, Any]:
    """Return the dotted names and values of repeated `--set` options."""
    # Here, because pydantic takes a third of the time that `sagittal --help` has.
    from sagittal.plan.overrides import parse_settings

    return parse_settings(texts or [])
